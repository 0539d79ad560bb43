"""memory.py at small sizes, and what sweeps share: what they report is what happened, and predictions follow from
geometry."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import catchup
import memory
import pytest
import sweep

from splitdecode.models import geometry

QUICK = ("--num-iters", "1", "--num-iters-warmup", "0", "--max-tokens", "24")


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.usefixtures("steady")
def test_memory_of_every_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = (
        "--requests",
        "6",
        "--sequences",
        "8,2",
        "--output-json",
        str(file),
        "--plot",
        str(picture),
    )
    assert memory.main([*QUICK, *flags]) == 0
    found = last(capsys)
    assert found == json.loads(file.read_text("utf-8"))
    assert picture.read_bytes()[:4] == b"\x89PNG"
    runs = {(run["policy"], run["sequences"]): run for run in found["runs"]}
    assert len(runs) == 1 + 2 * len(memory.POLICIES)
    plenty = runs["plenty", 12.0]
    assert (plenty["idle_evictions"], plenty["preemptions"], plenty["shelf_bytes"]) == (0, 0, 0)
    assert plenty["tokens"] == 6 * 24
    for (policy, sequences), run in runs.items():
        assert run["stuck"] or run["tokens"] == plenty["tokens"]
        assert (run["shelf_bytes"] > 0) == (policy in ("swap", "fp8"))
        assert run["cache_bytes"] <= 1.2 * sequences * found["sequence_bytes"]
    # "Full length" is prompt, answer and room for tags: 74 positions. These answers come to 26 and their tags, which is
    # 6 x (3 small pages + 2 large ones) = 467 KB at their ends, and all begin together: too much for two times 184 KB.
    assert runs["drop", 2.0]["idle_evictions"] + runs["drop", 2.0]["preemptions"] > 0
    assert runs["drop", 2.0]["run_again"] > runs["drop", 8.0]["run_again"] == 0
    for policy in ("recompute", "drop"):
        assert runs[policy, 8.0]["tokens_that_differ"] == 0.0


def test_predictions_follow_from_geometry() -> None:
    rows = memory.predict("1.5b", "32b", "h200")["rows"]
    assert [row["context"] for row in rows] == [1024, 4096, 16384, 32768]
    for row in rows:
        assert row["cache_bytes"] == row["context"] * geometry.kv_bytes(geometry.preset("32b"))
        assert row["fp8_bytes"] == pytest.approx(row["cache_bytes"] * (128 + 4) / 256)
        assert row["swap_ms"] == pytest.approx(row["cache_bytes"] / 55e6)
        assert row["fp8_ms"] < row["swap_ms"] < row["recompute_ms"]
    per_position = [row["recompute_ms"] / row["context"] for row in rows]
    assert per_position[-1] > 1.2 * per_position[1], "attention over a long context makes each position dearer"


def test_a_run_without_progress_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    aborted: list[str] = []
    engine = SimpleNamespace(running={1: "a"}, waiting=["b"], abort=aborted.append)
    watch = SimpleNamespace(ticks=0, tracks={}, engine=engine, look=lambda: None)
    monkeypatch.setattr(sweep._Guard, "patience", 3)
    guard = sweep._Guard(watch, [])  # type: ignore[arg-type]
    for tick in range(1, 5):
        assert not guard.stuck
        watch.ticks = tick
        watch.tracks = {0: SimpleNamespace(growth=[(0.0, 1)])}
        guard.look()
    assert not guard.stuck, "it grew at the first tick"
    watch.ticks = 5
    guard.look()
    assert guard.stuck
    assert aborted == ["a", "b"]


@pytest.mark.parametrize(
    ("module", "flags", "wanted"),
    [
        (memory, ("--policies", "hope"), "--policies: found 'hope', expected some of recompute,drop,swap,fp8"),
        (memory, ("--sequences", "0.5"), "--sequences: found '0.5', expected numbers from 1 up"),
        (memory, ("--predict", "1.5b,32b,abacus"), "--predict: found '1.5b,32b,abacus'"),
        (catchup, ("--modes", "eager"), "--modes: found 'eager', expected lazy and some of eager,adaptive"),
        (catchup, ("--chunks", "0"), "--chunks: found '0', expected whole numbers"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    module: Any, flags: tuple[str, ...], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main(flags) == 2
    said = capsys.readouterr()
    assert wanted in said.err
    assert len(said.err.splitlines()) == 1


def test_share_that_differs() -> None:
    assert sweep.share_that_differs([[1, 2, 3], [4]], [[1, 2, 3], [4]]) == 0.0
    assert sweep.share_that_differs([[1, 9], [4]], [[1, 2, 3], [4]]) == 0.5
