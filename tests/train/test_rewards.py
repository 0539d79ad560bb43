"""Rewards against values computed by hand, and the properties a trainer relies on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitdecode import SamplingParams, SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import problems, tagged
from splitdecode.split.outputs import ModelMetrics, RequestMetrics
from splitdecode.split.roles import Pair, Role
from splitdecode.train import rewards
from splitdecode.train.rewards import Answer, CostModel, Latency, combine

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


def metrics(small: ModelMetrics, large: ModelMetrics) -> RequestMetrics:
    return RequestMetrics(models=Pair(small, large))


ONE = metrics(
    ModelMetrics(tokens=90, forwards=100, ms=120.0, prompt_tokens=30, read_tokens=20, writes=70),
    ModelMetrics(tokens=10, forwards=12, ms=60.0, prompt_tokens=30, catch_up_tokens=50, writes=8),
)
COST = CostModel(forward_ms=Pair(1.0, 4.0), token_ms=Pair(0.1, 0.5))


def test_latency_by_hand() -> None:
    # small 100 * 1 + 90 * 0.1 = 109, large 12 * 4 + 58 * 0.5 = 77; large-only 100 * 4.5 = 450
    assert COST.ms(ONE) == pytest.approx(186)
    assert COST.large_only_ms(100) == pytest.approx(450)
    answer = Answer(OPEN + "0123456789" + CLOSE, metrics=ONE)
    assert rewards.latency(answer, Latency.MODELLED, COST) == pytest.approx(-186 / 450)
    assert rewards.latency(answer, Latency.MEASURED, COST) == pytest.approx(-180 / 450)
    assert rewards.latency(answer, Latency.MEASURED, scale=90) == pytest.approx(-2)
    assert rewards.latency(answer, Latency.MODELLED, COST, 93) == pytest.approx(-2)
    assert rewards.latency(answer, Latency.COVERAGE) == pytest.approx(25 / 31)


def planted(rng: np.random.Generator, noise: float) -> RequestMetrics:
    works = []
    for role in Role:
        forwards, read, writes = (int(rng.integers(1, 200)) for _ in range(3))
        ms = COST.forward_ms[role] * forwards + COST.token_ms[role] * (30 + read + writes)
        ms *= 1 + noise * rng.standard_normal()
        works.append(ModelMetrics(forwards=forwards, ms=ms, prompt_tokens=30, read_tokens=read, writes=writes))
    return metrics(*works)


def test_a_planted_cost_is_found() -> None:
    rng = np.random.default_rng(0)
    exact = CostModel.calibrate([planted(rng, 0.0) for _ in range(20)])
    noisy = CostModel.calibrate([planted(rng, 0.05) for _ in range(400)])
    for role in Role:
        assert exact.forward_ms[role] == pytest.approx(COST.forward_ms[role])
        assert exact.token_ms[role] == pytest.approx(COST.token_ms[role])
        assert noisy.forward_ms[role] == pytest.approx(COST.forward_ms[role], rel=0.05)


def test_jitter_is_no_advantage() -> None:
    """Answers with equal counters are worth the same, whatever the clock said."""
    rng = np.random.default_rng(1)
    group = []
    for _ in range(8):
        small, large = (ModelMetrics(tokens=10, forwards=10, ms=20 + rng.random(), writes=10) for _ in range(2))
        group.append(Answer("x", metrics=metrics(small, large)))
    cost = CostModel.calibrate([answer.metrics for answer in group if answer.metrics is not None])
    assert len({rewards.latency(answer, Latency.MODELLED, cost) for answer in group}) == 1
    assert len({rewards.latency(answer, Latency.MEASURED, cost) for answer in group}) == 8


@given(st.integers(0, 10**6))
def test_least_squares_meet_the_optimality_conditions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((6, 3)), rng.standard_normal(6)
    x = rewards.nonnegative_least_squares(a, b)
    gradient = a.T @ (a @ x - b)
    assert (x >= 0).all()
    assert (gradient >= -1e-8).all()
    assert np.abs(gradient[x > 0]).max(initial=0) < 1e-8


def test_columns_that_say_the_same_are_used_once() -> None:
    a = np.array([[1.0, 1.0], [2.0, 2.0]])
    assert rewards.nonnegative_least_squares(a, np.array([3.0, 6.0])) == pytest.approx(np.array([3.0, 0.0]))


def test_terms_are_kept_apart() -> None:
    text = whole(f"{OPEN}abc{CLOSE}")
    found = combine({"accuracy": 1, "format": 0.5, "tag_count": 0, "latency": 2}, cost=COST)(Answer(text, "7", ONE))
    assert found.terms == {
        "accuracy": 1,
        "format": 2,
        "tag_count": pytest.approx(2 + 2 * (3 / 70) / 0.4),
        "latency": pytest.approx(-186 / 450),
    }
    assert found.total == pytest.approx(1 + 1 - 2 * 186 / 450)


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
        ({"latency": 1}, {"cost": COST}, Answer("x"), "latency: found no metrics"),
        ({"latency": 1}, {}, Answer("x", metrics=ONE), "latency: found no cost model, expected one for 'modelled'"),
        ({"latency": 1}, {"kind": "measured"}, Answer("x", metrics=ONE), "or a scale in ms"),
        ({"latency": 1}, {"kind": "measured", "scale": 0}, Answer("x", metrics=ONE), "scale: found 0 ms"),
    ):
        with pytest.raises(RequestError, match=said):
            combine(weights, **options)(answer)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="CostModel: found no answers"):
        CostModel.calibrate([])
    with pytest.raises(RequestError, match="CostModel: found nan ms"):
        CostModel.calibrate([metrics(ModelMetrics(forwards=1, ms=math.nan), ModelMetrics())])


def test_real_answers() -> None:
    """Measured on the embedded pair: the split costs less than large-only would by its own cost model's counters."""
    tasks = problems(6, 3)
    with SplitDecoder.demo() as decoder:
        outputs = [decoder.generate(task.prompt, SamplingParams(temperature=0, max_tokens=400))[0] for task in tasks]
    cost = CostModel.calibrate([output.metrics for output in outputs])
    reward = combine({"accuracy": 1, "latency": 1}, scoring="integer", cost=cost)
    for task, output in zip(tasks, outputs, strict=True):
        found = reward(Answer(output.outputs[0].raw_text, str(task.answer), output.metrics))
        assert found.terms["accuracy"] == 1
        assert found.terms["latency"] < 0
        assert cost.ms(output.metrics) == pytest.approx(rewards.measured_ms(output.metrics), rel=0.8)
    assert rewards.nested(tagged(tasks[0]))
