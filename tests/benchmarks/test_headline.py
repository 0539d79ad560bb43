"""headline.py on the CPU, with eager steps and with the tapes of a GPU's: the document, its floors, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import headline
import latency
import pairs
import pytest
from oracles.tapes import tape_runner
from traces import Trace, make_trace

from splitdecode.models.geometry import kv_bytes, weight_bytes
from splitdecode.split.roles import Pair, Role

GBPS, CONTEXT = 10.0, 48
PAIR = ("--small", "random-1m", "--large", "random-5m")
BRIEF = ("--headline", "--context", str(CONTEXT), "--segment", "2", "--max-tokens", "8", "--catch-ups", "5,70")
ONCE = ("--num-iters", "2", "--num-iters-warmup", "1", "--offload", "10,25")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bandwidth that is known, and short traces."""
    monkeypatch.setattr(headline, "bandwidths", lambda device: {"read": GBPS})
    monkeypatch.setattr(headline, "read_bandwidth", lambda size, device: GBPS)
    monkeypatch.setattr(headline, "make_trace", lambda name, seed, index: Trace(name, 9, 12, ((3, 6), (8, 9)), seed))


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert latency.main([*PAIR, *BRIEF, *ONCE, "--device", "cpu", *flags]) == 0
    said = capsys.readouterr().out.splitlines()
    assert any("over large" in line for line in said)
    return dict(json.loads(said[-1]))


def check_document(found: dict[str, Any]) -> None:
    sizes = [
        weight_bytes(config, 4) + CONTEXT * kv_bytes(config, 4)
        for config in map(pairs.random_config, ("random-1m", "random-5m"))
    ]
    assert found["what"] == "headline"
    assert found["pair"] == {"small": "random-1m", "large": "random-5m"}
    shares = {"small": 0.0, "large": 1.0, "split 10 %": 0.1, "split 25 %": 0.25, "split math": 4 / 12}
    assert list(found["runs"]) == [*shares, "split aime"]
    for name, share in shares.items():
        one, ms = found["runs"][name], found["runs"][name]["ms_per_token"]
        assert ms["count"] == 2
        assert 0 < ms["low"] <= ms["median"] <= ms["high"]
        floor = ((1 - share) * sizes[0] + share * sizes[1]) / GBPS / 1e6
        assert one["floor_ms_per_token"] == pytest.approx(floor)
        assert one["roofline_share"] == pytest.approx(floor / ms["median"], rel=1e-2)
        assert one["offload_fraction"] == pytest.approx(share)
        assert one["prompt_tokens"] == CONTEXT - one["tokens"] // 2
        assert (one["seam_stall_ms"] is None) == (share in (0.0, 1.0))
        assert one["joules_per_token"] is None
    assert [one["tokens"] for one in found["runs"].values()] == [8, 8, 40, 16, 12, 12]
    assert found["runs"]["split math"]["handoffs"] == 2
    assert list(found["catch_up_ms"]) == ["5", "70"]
    assert all(ms > 0 for ms in found["catch_up_ms"].values())


def test_eager_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    found = run(capsys, "--output-json", str(file))
    assert found == json.loads(file.read_text())
    check_document(found)
    assert found["launches_per_step"] == {"small": None, "large": None}


@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype", "float64"),
        pytest.param(("--steps-per-graph", "3"), marks=pytest.mark.slow),
        pytest.param(("--enforce-eager",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tapes(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("splitdecode.decoder.make_runner", tape_runner)
    if "float64" in flags:  # floors are of half the bytes
        monkeypatch.setattr(headline.Headline, "_step_floor", lambda self, source: floor_of(source))
    found = run(capsys, *flags)
    check_document(found)
    layers = [pairs.random_config(name).num_layers for name in ("random-1m", "random-5m")]
    assert list(found["launches_per_step"].values()) == [5 * n + 3 for n in layers], "embed, layers, head, advance"
    assert found["settings"]["steps_per_graph"] == (3 if "3" in flags else 1)


def floor_of(source: pairs.Source) -> float:
    return (weight_bytes(source.config, 4) + CONTEXT * kv_bytes(source.config, 4)) / GBPS / 1e6


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--offload", "five"), "--offload: found 'five'"),
        (("--offload", "5,100"), "--offload: found '5,100'"),
        (("--offload", "nan"), "--offload: found 'nan'"),
        (("--catch-ups", "64,many"), "--catch-ups: found '64,many'"),
        (("--catch-ups", "0"), "--catch-ups: found '0'"),
        (("--max-tokens", "1"), "--max-tokens: found 1"),
        (("--context", "40000"), "its context is 32768"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    flags: tuple[str, ...], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main([*PAIR, *BRIEF, *flags]) == 2
    said = capsys.readouterr()
    assert wanted in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""


def test_the_pair_of_the_suite_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its defaults, on a device of 140 GB: everything up to the loading of the models."""
    asked: list[Pair[pairs.Source]] = []
    monkeypatch.setattr(pairs, "free_memory", lambda device: 140 << 30)
    monkeypatch.setattr(headline, "build", lambda sources, length, **more: asked.append(sources))
    args = latency.arguments().parse_args(["--small", "1.5b", "--large", "32b", "--device", "cpu"])
    args.page_size = 64
    made = headline.Headline(args)
    assert asked[0][Role.LARGE].name == "32b"
    assert [run.name for run in made.runs][2:5] == ["split 1.35 %", "split 5 %", "split 20 %"]
    assert made.length < 32768


@pytest.mark.parametrize("seed", range(4))
def test_a_trace_hands_over(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "make_trace", make_trace)
    for name in ("math", "aime"):
        assert headline._handing_over(name, seed).spans
