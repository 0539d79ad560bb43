"""Rewards against values computed by hand, and the properties a trainer relies on."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitdecode.errors import RequestError
from splitdecode.split.outputs import ModelMetrics, ModelSpan, RequestMetrics
from splitdecode.split.roles import Pair
from splitdecode.train import rewards
from splitdecode.train.cost import Answer, CostModel
from splitdecode.train.rewards import Latency, combine

OPEN, CLOSE = "<bigmodel>", "</bigmodel>"


def whole(think: str, answer: str = "\\boxed{7}") -> str:
    return f"<think>\n{think}\n</think>\n<answer>\n{answer}\n</answer>"


@pytest.mark.parametrize(
    ("text", "format_score", "tag_count"),
    [
        ("", 1, 0),
        ("x", 1, 0),
        (whole("x"), 2, 2),  # the scaffold whole, no tags: 0.5 + 0.5 + 0.25 + 0.25 + 0.5
        (whole("x\ny"), 2, 2),
        (whole("x", "7"), 2, 1.5),  # no box
        (whole("x") + "\n", 1, 2),  # something behind the scaffold
        ("\n" + whole("x"), 1, 2),
        (whole("x").replace("<answer>", "<reply>"), 1, 1.75),
        (whole("x\n</think>\n"), 2, 1.5),  # the end of the thinking twice
        ("<think>\n<think>\n", 1, 0),
        ("\\boxed{1}\\boxed{2}", 1, 0.5),  # at least one
        # 31 characters, 10 inside: r = 10/31 < 0.4, cov = 25/31; floor(0.5 / 2) = 0
        (OPEN + "0123456789" + CLOSE, 1, 2 * 25 / 31),
        (OPEN + CLOSE, 1, 0),
        (OPEN, 0, -2),
        (CLOSE, 1, -2),  # a stray closing is nested, but unbalanced
        (CLOSE + OPEN, 0, 0),  # balanced in number, not nested
        (OPEN + OPEN + CLOSE, 0, -2 + 2 * 25 / 31),  # inside stands an opening tag, 10 of 31 characters
        (OPEN + CLOSE + CLOSE, 1, -2),
        # openings at 0 and 10, one pair from 0 on: inside stands the second opening tag, 10 of 42 characters
        (OPEN + OPEN + CLOSE + CLOSE, 0, 2 * (10 / 42) / 0.4),
        (4 * (OPEN + CLOSE), 1, 1),  # c = 2
        (8 * (OPEN + CLOSE), 1, 2),  # c = 4
        (9 * (OPEN + CLOSE), 1, 1),  # c = 3.5
        (12 * (OPEN + CLOSE), 1, 1),  # c = 2
        (17 * (OPEN + CLOSE), 1, -1),  # c = -0.5, floor(-0.25) = -1
        (20 * (OPEN + CLOSE), 1, -1),  # c = -2
        (21 * (OPEN + CLOSE), 1, -2),  # c = -2.5, floor(-1.25) = -2
        # 105 characters, 84 inside: r = 0.8, cov = 1 - 2 * 0.4 / 0.6 = -1/3
        (OPEN + 84 * "a" + CLOSE, 1, -2 / 3),
        # 35 characters, 14 inside: r = 0.4 exactly
        (OPEN + 14 * "\n" + CLOSE, 1, 2),
        # the scaffold with a span: 70 characters, 3 inside
        (whole(f"{OPEN}abc{CLOSE}"), 2, 2 + 2 * (3 / 70) / 0.4),
    ],
)
def test_the_golden_table(text: str, format_score: float, tag_count: float) -> None:
    assert rewards.format_score(text) == format_score
    assert rewards.tag_count(text) == pytest.approx(tag_count, abs=1e-12)


@pytest.mark.parametrize(
    ("share", "worth"),
    [(-1, 0), (0, 0), (0.1, 0.25), (0.2, 0.5), (0.4, 1), (0.55, 0.5), (0.7, 0), (0.85, -0.5), (1, -1)],
)
def test_coverage(share: float, worth: float) -> None:
    assert rewards.coverage_score(share) == pytest.approx(worth, abs=1e-12)


@pytest.mark.parametrize(("n", "credit"), [(0, 0), (1, 0.5), (7, 3.5), (8, 4), (9, 3.5), (16, 0), (17, -0.5), (24, -4)])
def test_credit_for_spans(n: int, credit: float) -> None:
    assert rewards.span_credit(n) == credit


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("\\boxed{7}", "7", 1),
        ("7", "7", 0),
        ("\\boxed{}7", "7", 0),
        ("\\boxed{8}", "7", 0),
        ("\\boxed{7}\\boxed{8}", "7", 0),
    ],
)
@pytest.mark.parametrize("scoring", ["integer", "math"])
def test_accuracy_wants_a_box(text: str, gold: str, right: int, scoring: str) -> None:
    found = combine({"accuracy": 2}, scoring=scoring)(Answer(text, gold))
    assert found.terms == {"accuracy": right}
    assert found.total == 2 * right


@given(st.lists(st.sampled_from([OPEN, CLOSE, "a", "\n", "\\boxed{1}", "<think>\n"])).map("".join))
def test_any_text_has_a_worth(text: str) -> None:
    assert rewards.format_score(text) in (0, 1, 2)
    assert 0 <= rewards.inside_share(text) < 1
    assert -1 <= rewards.coverage(text) <= 1
    assert math.isfinite(rewards.tag_count(text))


def spans(*authors: tuple[str, int]) -> list[ModelSpan]:
    ends = list(accumulate(count for _, count in authors))
    return [ModelSpan(name, end - count, end) for (name, count), end in zip(authors, ends, strict=True)]


# small 30 + 40 written, 10 read in 3 steps: 73 steps, 80 positions; large 10 written, 30 caught up with. One opening.
SPANS = spans(("small", 30), ("large", 10), ("small", 40))
TIMES = RequestMetrics(models=Pair(ModelMetrics(tokens=70, ms=120.0), ModelMetrics(tokens=10, ms=60.0)))
COST = CostModel(step_ms=Pair(1.0, 4.0), token_ms=Pair(0.1, 0.5), handoff_ms=Pair(7.0, 5.0))
MODELLED = (73 * 1 + 80 * 0.1 + 7) + (10 * 4 + 40 * 0.5 + 5)  # 88 + 65


def test_latency_by_hand() -> None:
    answer = Answer(OPEN + "0123456789" + CLOSE, metrics=TIMES, spans=SPANS)
    assert COST.ms(answer) == pytest.approx(MODELLED)
    assert COST.large_only_ms(80) == pytest.approx(360)
    assert rewards.latency(answer, Latency.MODELLED, COST) == pytest.approx(-153 / 360)
    assert rewards.latency(answer, Latency.MEASURED, COST) == pytest.approx(-180 / 360)
    assert rewards.latency(answer, Latency.MEASURED, scale=90) == pytest.approx(-2)
    assert rewards.latency(answer, Latency.MODELLED, COST, 76.5) == pytest.approx(-2)
    assert rewards.latency(answer, Latency.COVERAGE) == pytest.approx(25 / 31)
    assert rewards.latency(Answer("", spans=[]), Latency.MODELLED, COST) == 0


def test_terms_are_kept_apart() -> None:
    text = whole(f"{OPEN}abc{CLOSE}")
    found = combine({"accuracy": 1, "format": 0.5, "tag_count": 0, "latency": 2}, cost=COST)(
        Answer(text, "7", None, SPANS)
    )
    assert found.terms == {
        "accuracy": 1,
        "format": 2,
        "tag_count": pytest.approx(2 + 2 * (3 / 70) / 0.4),
        "latency": pytest.approx(-153 / 360),
    }
    assert found.total == pytest.approx(1 + 1 - 2 * 153 / 360)


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        ({}, {}, "weights: found {}, expected one above 0"),
        ({"format": 0}, {}, "expected one above 0"),
        ({"speed": 1}, {}, "weights: found 'speed', expected terms out of accuracy, format, tag_count, latency"),
        ({"latency": -1}, {}, "weights: latency: found -1, expected a finite number from 0"),
        ({"format": math.nan}, {}, "weights: format: found nan"),
        ({"format": True}, {}, "weights: format: found True"),
        ({"format": "1"}, {}, "weights: format: found '1'"),
        ({"latency": 1}, {"kind": "guessed"}, "latency: found 'guessed', expected one of measured, modelled, coverage"),
        ({"accuracy": 1}, {"scoring": "taste"}, "scorer: found 'taste'"),
    ],
)
def test_wrong_weights_are_refused(weights: dict[str, float], options: dict[str, str], said: str) -> None:
    with pytest.raises(RequestError) as raised:
        combine(weights, **options)  # type: ignore[arg-type]
    assert said in str(raised.value)


def test_what_a_term_needs_is_named() -> None:
    for weights, options, answer, said in (
        ({"accuracy": 1}, {}, Answer("x"), "accuracy: found no gold answer"),
        ({"latency": 1}, {"cost": COST}, Answer("x"), "latency: found no spans of the answer"),
        ({"latency": 1}, {}, Answer("x", spans=SPANS), "latency: found no cost model, expected one for 'modelled'"),
        ({"latency": 1}, {"kind": "measured"}, Answer("x", metrics=TIMES), "or a scale in ms"),
        ({"latency": 1}, {"kind": "measured", "scale": 0}, Answer("x", metrics=TIMES), "scale: found 0 ms"),
        ({"latency": 1}, {"kind": "measured", "scale": 9}, Answer("x"), "latency: found no metrics of the answer"),
    ):
        with pytest.raises(RequestError, match=said):
            combine(weights, **options)(answer)  # type: ignore[arg-type]
