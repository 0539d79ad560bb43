"""catchup.py at small sizes: by forced traces, by own tags, and by drawn ones, which adaptive sees coming."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import catchup
import drawn
import pytest
import sweep
from traces import make_trace

from splitdecode.errors import RequestError

QUICK = ("--num-iters", "1", "--num-iters-warmup", "0", "--requests", "2", "--rooms", "0")
RANDOM = ("--small", "random-1m", "--large", "random-1m", "--max-tokens", "48", "--traces", "math")
pytestmark = pytest.mark.usefixtures("steady")


def runs_of(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[tuple[str, int], dict[str, Any]]:
    """By setting and requests at a time."""
    assert catchup.main([*QUICK, *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert all(run["tokens_that_differ"] == 0.0 for run in found)
    return {(run["setting"], run["concurrency"]): run for run in found}


def test_forced_traces(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--traces", "minimal", "--concurrency", "1,2", "--chunks", "2,1000", "--max-tokens", "32")
    runs = runs_of(capsys, *flags)
    names = ["lazy", "eager, chunk 2, room 0", "eager, chunk 1000, room 0", "adaptive, room 0"]
    assert list(runs) == [(name, size) for size in (1, 2) for name in names]
    assert all(run["seam_stall_ms"]["count"] > 0 for run in runs.values())
    lazy, small, large, adaptive = (runs[name, 1] for name in names)
    assert lazy["ahead"] == 0
    assert small["ahead"] > large["ahead"] == 0, "a chunk that never gathers changes nothing"
    assert adaptive["large_steps"] >= lazy["large_steps"], "a tag may be likely where the trace has none"


def test_the_embedded_pairs_own_tags(capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_of(capsys, "--traces", "own", "--chunks", "8", "--concurrency", "1,2")
    assert len(runs) == 2 * len(catchup.MODES)
    for (setting, size), run in runs.items():
        assert run["hand_offs"] == "own"
        assert run["seam_stall_ms"]["count"] == 4, "two for each problem"
        steps = run["large_steps"] - runs["lazy", size]["large_steps"]
        if setting == "lazy":
            assert run["ahead"] == steps == 0
        elif setting == "eager, chunk 8, room 0":
            assert min(run["ahead"], steps) > 0, "its answers end long after the last hand-off"


def test_drawn_tags_are_those_of_the_trace_and_seen_coming(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*RANDOM, "--concurrency", "1", "--modes", "lazy,adaptive")
    told, forced = runs_of(capsys, *flags, "--drawn"), runs_of(capsys, *flags)
    lazy, adaptive = told["lazy", 1], told["adaptive, room 0", 1]
    seams = sum(len(make_trace("math", 0, index).spans) for index in range(2))
    assert lazy["hand_offs"] == "drawn"
    assert lazy["seam_stall_ms"]["count"] == seams
    assert adaptive["ahead"] == 0
    assert seams - 2 <= adaptive["large_steps"] - lazy["large_steps"] <= seams, "one for each gap of two tokens or more"
    assert forced["lazy", 1]["hand_offs"] == "forced"
    assert forced["lazy", 1]["large_steps"] == forced["adaptive, room 0", 1]["large_steps"]


def test_a_false_alarm_costs_a_step_and_changes_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*RANDOM, "--drawn", "--concurrency", "1", "--modes", "lazy,adaptive")
    quiet, alarmed = runs_of(capsys, *flags), runs_of(capsys, *flags, "--alarm-every", "8")
    assert quiet["lazy", 1]["large_steps"] == alarmed["lazy", 1]["large_steps"]
    extra = alarmed["adaptive, room 0", 1]["large_steps"] - quiet["adaptive, room 0", 1]["large_steps"]
    assert 0 < extra <= 2 * 48 // 8


def test_answers_by_drawn_tags_follow_the_trace() -> None:
    args = catchup.arguments().parse_args([*QUICK, *RANDOM, "--drawn"])
    load = sweep.Load("math", 2, 2, drawn=True)
    made = sweep.Sweep(args, [load])
    decoder = made.decoder(2)
    plain = decoder.engine.runners.small.model
    ran = made._serve(decoder, load)
    assert decoder.engine.runners.small.model is plain
    for choice, trace in zip(ran.watch.tracks, made.traces[load], strict=True):
        assert choice.output is not None
        assert [(s.start, s.end) for s in choice.output.spans if s.model == "large"] == list(trace.spans)
        assert choice.output.raw_text.count("<bigmodel>") == len(trace.spans)


def test_captured_steps_cannot_be_edited() -> None:
    decoder: Any = SimpleNamespace(engine=SimpleNamespace(runners=[object()]))
    with pytest.raises(RequestError, match="expected a CPU"):
        drawn.Scribe(decoder, {})


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--traces", "rumours"), "--traces: found 'rumours', expected some of math,aime,minimal,stress,own"),
        (("--traces", "own", "--small", "random-1m", "--large", "random-1m"), "'own' needs the embedded pair"),
        (("--drawn",), "--drawn: needs random weights"),
    ],
)
def test_loads_that_cannot_be_had(flags: tuple[str, ...], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert catchup.main(flags) == 2
    assert wanted in capsys.readouterr().err
