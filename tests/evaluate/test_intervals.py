"""Intervals against values worked out by hand, scipy, and what must hold of any interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from splitdecode import RequestError
from splitdecode.evaluate.intervals import Z, accuracy, paired, wilson


def test_wilson_by_hand() -> None:
    """n = 10, p = 1/2: z^2 = 3.8415; centre 1/2; half width 1.96 sqrt(0.025 + 0.0096) / 1.38415 = 0.2634."""
    found = wilson(5, 10)
    assert (found.value, found.method) == (0.5, "wilson")
    assert (found.low, found.high) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    none = wilson(0, 10)  # the upper bound is z^2 / (n + z^2)
    assert (none.low, none.high) == (0.0, pytest.approx(Z * Z / (10 + Z * Z)))
    every = wilson(400, 400)
    assert (every.low, every.high) == (pytest.approx(400 / (400 + Z * Z)), 1.0)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts: tuple[int, int]) -> None:
    right, count = counts
    found = wilson(right, count)
    oracle = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1
    mirror = wilson(count - right, count)
    assert (1 - mirror.high, 1 - mirror.low) == pytest.approx((found.low, found.high), abs=1e-12)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses(right: int, count: int) -> None:
    with pytest.raises(RequestError, match=f"found {right} right of {count}, expected 0 to n of n >= 1"):
        wilson(right, count)


def test_one_answer_each_is_wilsons() -> None:
    assert accuracy([[True], [False], [True], [True]]) == wilson(3, 4)


def test_answers_to_one_problem_are_not_independent() -> None:
    """Sixteen equal answers to each of 30 problems tell as much as one: the interval must not shrink by four."""
    scores = [[index < 12] * 16 for index in range(30)]
    found = accuracy(scores)
    assert (found.value, found.method) == (0.4, "cluster bootstrap")
    alone = wilson(12, 30)
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.1)
    pooled = wilson(12 * 16, 30 * 16)
    assert found.high - found.low > 3 * (pooled.high - pooled.low)


@pytest.mark.parametrize("right", [False, True])
def test_all_or_none_right_is_wilsons(right: bool) -> None:
    """Sixteen equal answers to each of 30 problems: a bootstrap would have no width."""
    assert accuracy([[right] * 16] * 30) == wilson(30 * right, 30)


def test_equal_problems_have_a_width() -> None:
    """One of two answers right, three times: the share of other problems is at most z^2 / (3 + z^2) = 0.5615."""
    found = accuracy([[True, False]] * 3)
    assert (found.value, found.method) == (0.5, "all equal")
    assert (found.low, found.high) == pytest.approx((0.5 * 0.4385, 0.5 + 0.5 * 0.5615), abs=1e-4)


@pytest.mark.parametrize(("first", "second", "sign"), [(True, True, 0), (True, False, 1), (False, True, -1)])
def test_equal_differences_have_a_width(first: bool, second: bool, sign: int) -> None:
    others = Z * Z / (40 + Z * Z)
    found = paired([[first]] * 40, [[second]] * 40)
    assert (found.value, found.method) == (sign, "all equal")
    wanted = {0: (-others, others), 1: (1 - 2 * others, 1), -1: (-1, 2 * others - 1)}[sign]
    assert (found.low, found.high) == pytest.approx(wanted)


def test_paired_by_hand() -> None:
    """Four problems, second policy right on two more of them and never worse: differences 0, 0, 1, 1."""
    first = [[True], [False], [True], [True]]
    second = [[True], [False], [False], [False]]
    found = paired(first, second)
    assert (found.value, found.method) == (0.5, "paired bootstrap")
    assert (found.low, found.high) == (0.0, 1.0)  # P(no 1 in four draws) = 1/16 > 2.5 %
    swapped = paired(second, first)
    assert (swapped.value, swapped.low, swapped.high) == (-0.5, -1.0, 0.0)


def test_paired_width_is_the_standard_error() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random(800) < 0.6, rng.random(800) < 0.5
    differences = first.astype(float) - second
    found = paired([[bool(x)] for x in first], [[bool(x)] for x in second])
    wanted = 2 * Z * differences.std() / math.sqrt(800)
    assert found.high - found.low == pytest.approx(wanted, rel=0.05)


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    """One differs from the other on a single problem of 200: the interval is far narrower than either one's own."""
    first = [[index % 2 == 0] for index in range(200)]
    second = [[True], *first[1:]]
    second[1] = [True]
    found = paired(second, first)
    assert found.value == pytest.approx(1 / 200)
    assert found.high - found.low < 0.25 * (accuracy(first).high - accuracy(first).low)


@given(
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=40),
    st.integers(0, 5),
)
@settings(max_examples=30, deadline=None)
def test_what_must_hold(scores: list[list[bool]], seed: int) -> None:
    found = accuracy(scores, seed)
    assert found.value == pytest.approx(np.mean(scores))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert accuracy(scores, seed) == found
    assert found.low < found.high
    same = paired(scores, scores, seed)
    assert same.value == 0
    assert same.low == -same.high < 0
    none = [[False] * 3] * len(scores)
    against = paired(scores, none, seed)
    assert against.value == pytest.approx(found.value)
    assert -1 <= against.low < against.high <= 1
    if found.method == "cluster bootstrap":
        assert (against.low, against.high) == pytest.approx((found.low, found.high))


def test_unequal_questions_are_refused() -> None:
    with pytest.raises(RequestError, match=r"accuracy: found \[1, 2\] answers per problem"):
        accuracy([[True], [True, False]])
    for scores in ([], [[]]):
        with pytest.raises(RequestError, match="accuracy: found"):
            accuracy(scores)
    with pytest.raises(RequestError, match="paired: found 1 and 2 problems"):
        paired([[True]], [[True], [False]])
    with pytest.raises(RequestError, match="paired: found 0 and 0 problems"):
        paired([], [])


def test_two_numbers_of_answers_can_be_paired() -> None:
    assert paired([[True, False]], [[True]]).value == -0.5
