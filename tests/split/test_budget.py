"""Offload budgets: every cap, reason and forced close, on scripted models: what is written is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.clocks import steady
from oracles.openings import IDS, IN, OPEN, OUT, ids, pair, run, three_openings

from splitdecode import ForcedSpans, LargeOnly, SamplingParams, SmallOnly, SplitDecoder


def long_span(length: int = 24, **engine: Any) -> SplitDecoder:
    """Opens at once; the large model writes `T` for ever, the small one never closes and ends `length` tokens on."""
    decoder, models = pair(**engine)
    models.small.draws(3, {OPEN: 9.0, IDS["b"]: 1.0}).says(4, [*ids(*"a" * length), 0])
    models.large.says(3, ids(*"T" * 60))
    return decoder


@pytest.mark.parametrize("most", [0, 1, 2, 3, 9, None])
def test_at_most_so_many_openings_are_accepted(most: int | None) -> None:
    output = run(three_openings(), max_offloads=most)
    granted = 3 if most is None else min(3, most)
    assert output.outputs[0].raw_text == IN * granted + OUT * (3 - granted)
    assert output.metrics.handoffs == granted
    assert output.metrics.rejected_openings == 3 - granted
    assert output.metrics.budget_rejections == ({"offloads": 3 - granted} if granted < 3 else {})
    assert output.metrics.large.tokens == granted
    assert (output.metrics.large.forwards == 0) == (granted == 0)


def test_an_opening_is_rejected_when_no_tokens_are_left() -> None:
    output = run(three_openings(), max_large_tokens=2)
    assert output.outputs[0].raw_text == IN * 2 + OUT
    assert output.metrics.budget_rejections == {"tokens": 1}
    assert run(three_openings(), max_large_tokens=3).outputs[0].raw_text == IN * 3
    both = run(three_openings(), max_large_tokens=0, max_offloads=0)
    assert both.metrics.budget_rejections == {"offloads": 3}  # one reason each, in the order of the documents


@pytest.mark.parametrize("interval", [1, 2, 4, 8])
@pytest.mark.parametrize("cap", [1, 3, 5, 7])
def test_a_span_is_closed_by_force_when_the_tokens_are_used_up(cap: int, interval: int) -> None:
    decoder = long_span(read_interval=interval)
    output = run(decoder, max_large_tokens=cap)
    answer = output.outputs[0]
    assert answer.raw_text.startswith("<bigmodel>" + "T" * cap + "</bigmodel>a")
    assert (answer.finish_reason, output.metrics.large.tokens, output.metrics.handoffs) == ("stop", cap, 1)


def test_the_tokens_of_all_spans_count() -> None:
    decoder, models = pair(max_span=3)
    for at in (0, 6):  # opening, three large tokens, the forced close, `c`
        models.small.draws(3 + at, {OPEN: 9.0, IDS["b"]: 1.0}).says(3 + at + 1, ids(*"aaaac"))
    models.small.says(3 + 12, ids("<|eos|>"))
    models.large.says(3, ids(*"T" * 30))
    assert run(decoder, max_large_tokens=5).outputs[0].raw_text == (
        "<bigmodel>TTT</bigmodel>c<bigmodel>TT</bigmodel>ac"  # `a` where the third token was read before
    )


def test_max_span_still_holds_within_a_budget() -> None:
    decoder = long_span(max_span=2)
    assert run(decoder, max_large_tokens=9).outputs[0].raw_text.startswith("<bigmodel>TT</bigmodel>a")


def test_of_an_engines_and_a_requests_budget_the_stricter_one_holds() -> None:
    assert run(three_openings(max_offloads=1)).metrics.handoffs == 1
    assert run(three_openings(max_offloads=1), max_offloads=2).metrics.handoffs == 1
    assert run(three_openings(max_offloads=2), max_offloads=1).metrics.handoffs == 1
    assert run(three_openings(max_large_tokens=2), max_offloads=3).metrics.large.tokens == 2
    assert run(three_openings(deadline_ms=0.0), deadline_ms=1e9).metrics.budget_rejections == {"deadline": 3}
    decoder = three_openings(max_offload_fraction=0.25)
    run(decoder, max_offload_fraction=0.5)
    run(decoder, max_offload_fraction=0.125)
    assert sorted(decoder.engine.budgets.accounts) == [0.125, 0.25]


def test_budgets_are_per_choice_and_metrics_their_sum() -> None:
    output = run(three_openings(), n=3, max_offloads=1)
    assert [answer.raw_text for answer in output.outputs] == [IN + OUT * 2] * 3
    assert output.metrics.budget_rejections == {"offloads": 6}


# ---- policies by position


def by_position() -> SplitDecoder:
    decoder, models = pair(read_interval=2)
    models.small.says(3, ids(*"abcabcabcabcabcabcab"))
    models.large.says(3, ids(*"T" * 30))
    return steady(decoder)


@pytest.mark.parametrize("along", [False, True])
def test_positions_beyond_a_budget_belong_to_the_small_model(along: bool) -> None:
    decoder, policy = by_position(), ForcedSpans([(0, 2), (4, 7), (9, 10)], reads_along=along)
    assert run(decoder, policy, max_tokens=11).outputs[0].text == "TTcaTTTbcTb"
    assert run(decoder, policy, max_tokens=11, max_offloads=1).outputs[0].text == "TTcabcabcab"
    assert run(decoder, policy, max_tokens=11, max_large_tokens=2).outputs[0].text == "TTcabcabcab"
    output = run(decoder, policy, max_tokens=11, max_large_tokens=4)
    assert output.outputs[0].text == "TTcaTTabcab"
    assert (output.metrics.budget_rejections, output.metrics.rejected_openings) == ({"tokens": 1}, 0)
    assert run(decoder, policy, max_tokens=11, max_offloads=0).metrics.large.forwards == 0


def test_the_small_model_goes_on_where_large_only_may_not() -> None:
    decoder = by_position()
    assert run(decoder, LargeOnly(), max_tokens=9).outputs[0].text == "T" * 9
    assert run(decoder, LargeOnly(), max_tokens=9, max_large_tokens=4).outputs[0].text == "TTTTbcabc"
    output = run(decoder, LargeOnly(), max_tokens=9, max_offloads=0)
    assert (output.outputs[0].text, output.metrics.large.forwards) == ("abcabcabc", 0)
    assert run(decoder, SmallOnly(), max_tokens=9, max_offloads=0).metrics.budget_rejections == {}


def test_a_share_of_large_only_answers_is_kept() -> None:
    decoder = by_position()
    params = SamplingParams(temperature=0.0, max_tokens=20, max_offload_fraction=0.25, seed=1)
    outputs = decoder.generate(
        [{"prompt_token_ids": ids("a", "b", "c")}] * 100,
        [replace(params, seed=seed) for seed in range(100)],
        handoff=LargeOnly(),
    )
    assert np.mean([output.metrics.offload_fraction for output in outputs]) == pytest.approx(0.25, abs=0.03)


# ---- deadlines


class Clock:
    """Stands still, but for what a large step takes."""

    def __init__(self, decoder: SplitDecoder, ms: float) -> None:
        model: Any = decoder.models.large
        self.now, forward = 100.0, model.forward
        decoder.engine.clock = self

        def takes_time(batch: Any, kv: Any, rows: Any) -> Any:
            self.now += ms / 1e3
            return forward(batch, kv, rows)

        model.forward = takes_time

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("ms", "blocks"), [(35.0, 1), (75.0, 2), (115.0, 3), (1.0, 1), (1e6, 6)])
def test_a_span_is_closed_at_the_block_border_behind_the_deadline(ms: float, blocks: int) -> None:
    decoder = long_span(read_interval=4, max_span=24)
    Clock(decoder, 10.0)
    output = run(decoder, deadline_ms=ms)
    answer = output.outputs[0]
    assert answer.raw_text.startswith("<bigmodel>" + "TTTT" * blocks + "</bigmodel>" + ("a" if blocks < 6 else ""))
    assert answer.finish_reason == "stop"  # the small model finished it


def test_without_reading_along_the_deadline_is_kept_too() -> None:
    decoder, models = pair(read_interval=4)
    models.small.says(3, ids(*"abcabcabcabcabcabcab"))
    models.large.says(3, ids(*"T" * 30))
    Clock(decoder, 10.0)
    output = run(decoder, LargeOnly(), max_tokens=12, deadline_ms=45.0)
    assert output.outputs[0].text == "TTTTTTTTcabc"
    assert run(decoder, LargeOnly(), max_tokens=12, deadline_ms=1e6).outputs[0].text == "T" * 12


def test_an_opening_is_rejected_when_its_span_would_end_too_late() -> None:
    """A span of this script takes two large steps (it writes one token ahead) at 10 ms: the mean is known after one."""
    decoder = three_openings(read_interval=2)
    Clock(decoder, 10.0)
    for ms, granted in ((61.0, 3), (59.0, 2), (41.0, 2), (39.0, 1), (0.0, 0)):
        decoder.engine.budgets.seconds.value, decoder.engine.budgets.seconds.count = 0.0, 0
        output = run(decoder, deadline_ms=ms)
        assert output.outputs[0].raw_text == IN * granted + OUT * (3 - granted), ms
        assert output.metrics.budget_rejections.get("deadline", 0) == 3 - granted
