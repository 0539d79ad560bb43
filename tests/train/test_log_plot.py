"""Plots of GRPO logs: what is read, in which panels, how it is smoothed, what is said of logs that are none."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path

import pytest
from oracles.tiny_sft import save_checkpoint

from splitdecode import cli
from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.train import log_plot
from splitdecode.train.traces import family_traces

PNG = b"\x89PNG"


def log(run: Path, steps: int, **more: float) -> Path:
    run.mkdir(parents=True)
    lines = [
        {"step": n, "reward/accuracy": 0.5, "reward": math.sin(n), "offload_fraction": 0.1, "spans": 2.0,
         "tokens": 90.0, "ms": 3.0, **more}
        for n in range(1, steps + 1)
    ]  # fmt: skip
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return run


def test_several_runs_become_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [log(tmp_path / "one/out", 20), log(tmp_path / "two/out", 1, **{"reward/latency": -0.4})]
    file = tmp_path / "new/log.png"
    assert cli.main(["train", "plot", *map(str, runs), "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"saved to {file}\n"
    assert file.read_bytes().startswith(PNG)
    assert log_plot._labels(runs) == ["one/out", "two/out"]
    steps = [step for run in runs for step in log_plot.read_log(run)]
    assert log_plot.panels(steps) == [
        "reward", "reward/accuracy", "reward/latency", "offload_fraction", "spans", "tokens", "ms"
    ]  # fmt: skip


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = log(tmp_path / "run", 3)
    with (run / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "rew')
    assert [step["step"] for step in log_plot.read_log(run)] == [1, 2, 3]


def test_a_smooth_line_keeps_what_is_straight() -> None:
    assert log_plot.smoothed([3.0]) == [3.0]
    assert log_plot.smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    slope = [float(n) for n in range(80)]
    assert log_plot.smoothed(slope)[10:-10] == pytest.approx(slope[10:-10])
    wave = [(-1.0) ** n for n in range(80)]
    assert max(map(abs, log_plot.smoothed(wave)[10:-10])) < 0.2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "run: found no log.jsonl to read, expected the output of `splitdecode train grpo`"),
        ("", "log.jsonl: found no steps"),
        ('{"step": 1}\nnothing\n', "log.jsonl:2: found 'nothing', expected an object of numbers"),
        ('{"step": 1, "ms": "long"}\n', "log.jsonl:1: found"),
        ("[1]\n", "log.jsonl:1: found '\\[1\\]'"),
        ('{"reward": 1}\n', "log.jsonl:1: found no 'step'"),
    ],
)
def test_wrong_logs_are_named(text: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run/log.jsonl").write_text(text, "utf-8")
    with pytest.raises(RequestError, match=said):
        log_plot.plot([tmp_path / "run"], tmp_path / "log.png")


def test_wrong_outputs_are_named(tmp_path: Path) -> None:
    run = log(tmp_path / "run", 2)
    for name, said in (("log.txt", "--output: found .*log.txt, expected a file such as log.png"),
                       ("run/log.jsonl/log.png", "--output: .* cannot be written")):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            log_plot.plot([run], tmp_path / name)
    with pytest.raises(RequestError, match=r"runs: found .* twice"):
        log_plot.plot([run, run], tmp_path / "log.png")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"a plot of a run's log needs matplotlib: pip install"):
        log_plot.plot([log(tmp_path / "run", 2)], tmp_path / "log.png")


@pytest.mark.parametrize("there", [True, False], ids=["with matplotlib", "without"])
def test_a_run_of_grpo_draws_its_log(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    pair = save_checkpoint(tmp_path / "pair", [trace.tagged for trace in family_traces(["one-product"], 4, 0)])
    if not there:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--families", "one-product", "--n", "2", "--preset", "toy", "--steps", "1", "--prompts", "1"]
    flags += ["--generations", "2", "--max-tokens", "8", "--latency", "coverage"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of names that TRL still uses
        assert cli.main(["train", "grpo", "--small", str(pair), "--large", str(pair), "--output", str(tmp_path / "out"),
                         *flags]) == 0  # fmt: skip
    assert (tmp_path / "out/log.png").exists() == there
