"""Traces are deterministic, well-formed, and have the statistics of the traffic they stand for."""

from __future__ import annotations

from statistics import mean, median, quantiles

import pytest
import traces

COUNT = 400


@pytest.fixture(scope="module")
def traffic() -> dict[str, list[traces.Trace]]:
    return {name: traces.workload(name, COUNT, seed=5) for name in traces.NAMES}


@pytest.mark.parametrize("name", traces.NAMES)
def test_equal_seeds_give_equal_traces(name: str) -> None:
    assert traces.workload(name, 5, seed=3) == traces.workload(name, 5, seed=3)
    assert traces.workload(name, 5, seed=3) != traces.workload(name, 5, seed=4)
    one = traces.make_trace(name)
    assert one.prompt_ids(50) == one.prompt_ids(50)
    assert len(one.prompt_ids(50)) == one.prompt_tokens


@pytest.mark.parametrize("name", traces.NAMES)
@pytest.mark.parametrize("tokens", [None, 2800, 300, 64, 7, 1])
def test_spans_are_ordered_and_inside(traffic: dict[str, list[traces.Trace]], name: str, tokens: int | None) -> None:
    for trace in traffic[name]:
        small = trace if tokens is None else trace.scaled(tokens)
        assert small.total_tokens == min(tokens or trace.total_tokens, trace.total_tokens)
        edge = 0
        for start, stop in small.spans:
            assert edge < start < stop <= small.total_tokens, "the small model writes before every segment"
            edge = stop
        assert sum(count for _, count in small.pieces()) == small.total_tokens
        assert sum(count for large, count in small.pieces() if large) == sum(small.lengths)
        assert small.policy().spans == list(small.spans)


def test_scaling_keeps_the_share(traffic: dict[str, list[traces.Trace]]) -> None:
    whole = mean(trace.offload for trace in traffic["math"])
    assert mean(trace.scaled(400).offload for trace in traffic["math"]) == pytest.approx(whole, rel=0.05)


def test_segments_have_the_reported_lengths(traffic: dict[str, list[traces.Trace]]) -> None:
    lengths = [length for trace in traffic["math"] for length in trace.lengths]
    assert 84 < median(lengths) < 96
    assert 146 < quantiles(lengths, n=10)[8] < 166
    assert 88 < mean(lengths) < 101
    assert max(lengths) <= 268


def test_math(traffic: dict[str, list[traces.Trace]]) -> None:
    assert {trace.total_tokens for trace in traffic["math"]} == {2800}
    assert {trace.prompt_tokens for trace in traffic["math"]} == {200}
    assert 4.3 < mean(len(trace.spans) for trace in traffic["math"]) < 4.7


def test_aime(traffic: dict[str, list[traces.Trace]]) -> None:
    aime = traffic["aime"]
    shares = sorted(100 * trace.offload for trace in aime)
    assert 12_000 < mean(trace.total_tokens for trace in aime) < 14_000
    assert max(trace.total_tokens for trace in aime) == 16_384
    assert 0.63 < mean(trace.total_tokens == 16_384 for trace in aime) < 0.75
    assert 5.0 < mean(shares) < 7.0
    assert 3.9 < median(shares) < 5.2
    assert 0.6 < quantiles(shares, n=10)[0] < 1.5
    assert 10 < quantiles(shares, n=10)[8] < 15
    assert 0.01 < mean(share == 0 for share in shares) < 0.05
    assert 6.5 < mean(len(trace.spans) for trace in aime) < 10


def test_minimal(traffic: dict[str, list[traces.Trace]]) -> None:
    shares = [100 * trace.offload for trace in traffic["minimal"]]
    assert 0.19 < mean(share == 0 for share in shares) < 0.29
    assert 2.0 < mean(shares) < 3.1
    assert 1.0 < median(shares) < 1.5


def test_stress(traffic: dict[str, list[traces.Trace]]) -> None:
    for trace in traffic["stress"]:
        assert 0.29 < trace.offload < 0.58
        assert max(trace.lengths) >= 576
        assert trace.spans[-1][1] == trace.total_tokens, "the last tag is never closed"
        assert trace.split_tags


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of math, aime"):
        traces.make_trace("maths")
