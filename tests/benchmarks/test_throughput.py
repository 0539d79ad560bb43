"""throughput.py and what it is made of: arrivals, the drivers, the figures, and one JSON document at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import throughput
from arrivals import closed_loop, open_loop, poisson
from serving import Track, Watch, gaps_of, percentiles

from splitdecode.config import SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import problems
from splitdecode.split.engine import Choice
from splitdecode.split.outputs import ModelSpan, RequestMetrics
from splitdecode.split.policies import ControlTags, HandoffPolicy, LargeOnly, SmallOnly
from splitdecode.split.prompts import prompt_ids


class Clockwork:
    """Stands in for an engine: a step takes a second and serves everybody; a request takes `steps` of them."""

    def __init__(self, steps: int = 3) -> None:
        self.time, self.steps = 0.0, steps
        self.added: list[tuple[float, Any]] = []
        self.left: dict[int, int] = {}
        self.most = 0

    def add(self, choice: Any) -> None:
        self.added.append((self.time, choice))
        self.left[id(choice)] = self.steps
        self.most = max(self.most, len(self.left))

    def tick(self) -> None:
        assert self.left, "nobody ticks an idle engine"
        self.time += 1.0
        self.left = {key: left - 1 for key, left in self.left.items() if left > 1}

    @property
    def unfinished(self) -> int:
        return len(self.left)

    @property
    def clock(self) -> Callable[[], float]:
        return lambda: self.time

    def jump(self, until: float) -> None:
        assert until > self.time
        self.time = until


def requests(count: int) -> list[Any]:
    return [SimpleNamespace(metrics=SimpleNamespace(arrival_time=0.0)) for _ in range(count)]


def choices(decoder: SplitDecoder, count: int, policy: HandoffPolicy) -> list[Choice]:
    prompts = [prompt_ids(decoder.tokens, task.prompt, None, decoder.vocab_limits) for task in problems(count, 3)]
    params = SamplingParams(temperature=0.0, max_tokens=60)
    return [Choice(prompt, params, policy, 0, 0, RequestMetrics()) for prompt in prompts]


# ---- arrivals


def test_poisson_arrivals_are_a_function_of_the_seed() -> None:
    times = poisson(4000, 8.0, 1)
    assert times == poisson(4000, 8.0, 1) == sorted(times)
    assert times[:100] == poisson(100, 8.0, 1)
    assert times != poisson(4000, 8.0, 2)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert mean(gaps) == pytest.approx(1 / 8, rel=0.06)
    assert mean(gap > 1 / 8 for gap in gaps) == pytest.approx(math.exp(-1), abs=0.03)
    assert poisson(100, 16.0, 1) == pytest.approx([t / 2 for t in times[:100]])
    assert poisson(3, math.inf, 1) == [0.0] * 3
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(RequestError, match="--request-rate: found"):
            poisson(1, rate, 0)


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_a_closed_loop_never_exceeds_the_concurrency(concurrency: int) -> None:
    engine, looks = Clockwork(), []
    closed_loop(engine, requests(10), concurrency, lambda: looks.append(engine.time))
    assert len(engine.added) == 10
    assert engine.most == min(concurrency, 10)
    assert engine.time == 3 * math.ceil(10 / concurrency)
    assert looks == [float(t) for t in range(1, len(looks) + 1)]


def test_an_open_loop_adds_what_has_arrived_and_sleeps_when_idle() -> None:
    engine, asked = Clockwork(), requests(4)
    slept: list[float] = []

    def sleep_until(until: float) -> None:
        slept.append(until)
        engine.jump(until)

    open_loop(engine, asked, [0.0, 1.5, 2.5, 10.25], sleep_until)
    assert [time for time, _ in engine.added] == [0.0, 2.0, 3.0, 10.25]
    assert [choice.metrics.arrival_time for choice in asked] == [0.0, 1.5, 2.5, 10.25]
    assert slept == [10.25]
    assert engine.time == 13.25


# ---- figures


def test_percentiles_are_nearest_ranks_in_ms() -> None:
    found = percentiles(number / 1000 for number in reversed(range(1, 101)))
    assert found == pytest.approx({"count": 100, "mean": 50.5, "p50": 51.0, "p90": 91.0, "p99": 100.0})
    assert percentiles([0.002]) == pytest.approx({"count": 1, "mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0})
    assert percentiles([]) == {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None}


def test_gaps_belong_to_the_author_that_was_waited_for() -> None:
    spans = [ModelSpan("small", 0, 2), ModelSpan("large", 2, 5), ModelSpan("small", 5, 6)]
    choice: Any = SimpleNamespace(output=SimpleNamespace(spans=spans))
    track = Track(growth=[(1.0, 1), (2.0, 2), (5.0, 4), (5.5, 5), (6.5, 6)])
    assert gaps_of(choice, track) == [("small", 1.0), ("large", 3.0), ("large", 0.5), ("small", 1.0)]


@pytest.fixture(scope="module")
def decoder() -> SplitDecoder:
    return SplitDecoder.demo(max_num_seqs=4)


@pytest.mark.parametrize("policy", [ControlTags(), SmallOnly(), LargeOnly()])
def test_a_watch_counts_what_the_engine_counts(decoder: SplitDecoder, policy: HandoffPolicy) -> None:
    engine, asked = decoder.engine, choices(decoder, 6, policy)
    for runner in engine.runners:
        runner.cache.pool.clear_cache()
    with Watch(engine) as watch:
        closed_loop(engine, asked, 3, watch.look)
    assert engine.tracer is None
    work, found = watch.work(), watch.latencies()
    metrics = [choice.metrics for choice in asked]
    assert work["requests"] == 6
    assert work["most_at_once"] == 3
    assert work["tokens"] == sum(m.tokens for m in metrics)
    for role, load in enumerate(watch.loads):
        assert load.rows == sum(m.models[role].forwards for m in metrics)
        one = work["occupancy"]["large" if role else "small"]
        assert (one["rows_per_forward"] or 0) <= 3
        assert 0 <= one["share_of_steps"] <= 1
    grown = [track.growth[-1][1] for track in watch.tracks.values()]
    assert grown == [len(choice.output.token_ids) for choice in asked if choice.output is not None]
    assert found["ttft_ms"]["count"] == found["request_ms"]["count"] == 6
    by_author = found["itl_ms"]["small"]["count"] + found["itl_ms"]["large"]["count"]
    assert by_author == found["itl_ms"]["all"]["count"] == sum(len(t.growth) - 1 for t in watch.tracks.values())
    if isinstance(policy, ControlTags):
        assert 0 < found["seam_stall_ms"]["count"] <= work["handoffs"]
    else:
        assert found["seam_stall_ms"]["count"] == 0


# ---- the command


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert throughput.main([*flags, "--num-iters", "1", "--num-iters-warmup", "0"]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_the_embedded_pair_against_transformers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    file, picture, trace = (tmp_path / name for name in ("out.json", "out.png", "trace.json"))
    flags = ("--concurrency", "1,3", "--num-prompts", "3", "--max-tokens", "12", "--compare", "transformers")
    files = ("--output-json", str(file), "--plot", str(picture), "--chrome-trace", str(trace))
    found = run(capsys, *flags, *files)
    assert found == json.loads(file.read_text())
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert {event["ph"] for event in json.loads(trace.read_text())["traceEvents"]} >= {"X", "b", "e", "C", "M"}
    assert [(one["mode"], one["concurrency"]) for one in found["runs"]] == [
        (mode, size) for size in (1, 3) for mode in ("small", "large", "split")
    ]
    for one in found["runs"]:
        assert one["requests"] == 3
        assert one["most_at_once"] == one["concurrency"]
        assert one["tokens_per_second"]["cpu"] > 0 < one["tokens_per_second"]["wall"]
        assert 0 < one["roofline_share"] < 1
        assert one["prefix_cache"]["pages_asked"] >= one["prefix_cache"]["pages_found"] >= 0
        if one["mode"] != "split":
            assert one["tokens"] == 36
            assert one["offload_fraction"] == (one["mode"] == "large")
    (peers,) = found["peers"].values()
    assert [(one["mode"], one["concurrency"]) for one in peers] == [
        (mode, size) for size in (1, 3) for mode in ("small", "large")
    ]
    assert all(one["same_answers"] == 3 for one in peers), "both write the same text"
    ratios = found["times_faster_than"]
    assert set(ratios["peer"]) == {f"{mode}, {n} at a time" for mode in ("small", "large") for n in (1, 3)}
    assert ratios["one_at_a_time"]["split, 1 at a time"] == 1.0
    assert len(ratios["one_at_a_time"]) == 6


def test_poisson_arrivals_over_forced_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    pair = ("--small", "random-1m", "--large", "random-1m", "--trace", "stress", "--max-tokens", "24")
    found = run(capsys, *pair, "--request-rate", "200", "--num-prompts", "5", "--modes", "split", "--lanes", "2")
    (one,) = found["runs"]
    assert one["load"] == "200 per second"
    assert one["tokens"] == 5 * 24
    assert one["handoffs"] >= 5
    assert one["seam_stall_ms"]["count"] > 0
    assert found["times_faster_than"] == {"one_at_a_time": {}, "peer": {}}
    assert found["settings"]["max_num_seqs"] == 64


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--concurrency", "0"), "--concurrency: found 0, expected at least 1"),
        (("--concurrency", "4,x"), "expected numbers, separated by commas"),
        (("--request-rate", "-1"), "--request-rate: found -1"),
        (("--request-rate", "2", "--compare", "transformers"), "a static batch has no arrivals"),
        (("--small", "1.6b"), "expected a checkpoint directory or one of demo, random-1m"),
        (("--modes", "tiny"), "--modes: found 'tiny'"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    flags: tuple[str, ...], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main(flags) == 2
    said = capsys.readouterr()
    assert wanted in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
