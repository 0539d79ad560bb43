"""Hand-offs against labels: figures worked out by hand, and a twin that works with sets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitdecode import RequestError
from splitdecode.evaluate.decisions import Decisions, compare

Spans = list[tuple[int, int]]


def test_by_hand() -> None:
    """Ten characters; labelled 2..5 and 8..9, handed over 3..7: 2 of both, 2 extra, 2 missed, 4 of neither.

    precision = recall = F1 = 2/4; IoU = 2/6; agreement 6/10, by chance (4*4 + 6*6)/100 = 0.52; kappa = 0.08/0.48 = 1/6.
    """
    found = compare([(3, 7)], [(2, 5), (8, 9)], 10)
    assert found == Decisions(both=2, extra=2, missed=2, neither=4, labelled=2, hit=1, handed=1, stray=0)
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)
    assert found.iou == pytest.approx(1 / 3)
    assert found.kappa == pytest.approx(1 / 6)
    assert found.hit_rate == 0.5


def test_half_of_a_span_is_a_hit() -> None:
    assert [compare([(0, n)], [(0, 4)], 9).hit for n in (1, 2, 3)] == [0, 1, 1]


def test_a_span_beside_all_labels_is_stray() -> None:
    found = compare([(0, 2), (5, 7)], [(2, 6)], 9)
    assert (found.handed, found.stray) == (2, 1)


def test_perfect_none_and_all() -> None:
    spans = [(1, 3), (4, 6)]
    perfect = compare(spans, spans, 8)
    assert {perfect.precision, perfect.recall, perfect.f1, perfect.iou, perfect.kappa, perfect.hit_rate} == {1.0}
    none = compare([], spans, 8)
    assert (none.precision, none.recall, none.f1, none.iou, none.kappa) == (None, 0, 0, 0, 0)
    everything = compare([(0, 8)], spans, 8)
    assert (everything.precision, everything.recall, everything.kappa) == (0.5, 1, 0)
    empty = compare([], [], 0)
    assert set(empty.figures().values()) == {0, None}
    assert compare([], [], 5).kappa is None  # no chance to disagree


def test_ranges_beyond_the_text_are_cut() -> None:
    assert compare([(2, 9)], [(3, 20), (25, 30)], 5) == compare([(2, 5)], [(3, 5)], 5)


@pytest.mark.parametrize("spans", [[(2, 2)], [(3, 1)], [(0, 4), (3, 5)], [(-1, 2)], [(5, 6), (0, 1)]])
def test_ranges_out_of_order_are_refused(spans: Spans) -> None:
    with pytest.raises(RequestError, match="ranges: found"):
        compare(spans, [], 9)
    with pytest.raises(RequestError, match="ranges: found"):
        compare([], spans, 9)


def spans_in(length: int) -> st.SearchStrategy[Spans]:
    edges = st.lists(st.integers(0, length), unique=True, max_size=8).map(sorted)
    return edges.map(lambda e: list(zip(e[::2], e[1::2], strict=False)))


@given(spans_in(30), spans_in(30), st.integers(0, 30))
def test_a_twin_with_sets(handed: Spans, labelled: Spans, length: int) -> None:
    found = compare(handed, labelled, length)
    large, hard = (
        {i for start, stop in spans for i in range(start, stop) if i < length} for spans in (handed, labelled)
    )
    assert (found.both, found.extra, found.missed) == (len(large & hard), len(large - hard), len(hard - large))
    assert found.neither == length - len(large | hard)
    assert found.iou == (len(large & hard) / len(large | hard) if large | hard else None)
    if found.precision and found.recall:
        assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))
    swapped = compare(labelled, handed, length)
    assert (swapped.precision, swapped.recall, swapped.f1) == (found.recall, found.precision, found.f1)
    assert swapped.kappa == found.kappa
    if found.kappa is not None:
        assert -1 <= found.kappa <= 1 + 1e-12
        agreement = (found.both + found.neither) / length
        chance = len(large) * len(hard) / length**2 + (1 - len(large) / length) * (1 - len(hard) / length)
        assert math.isclose(found.kappa, (agreement - chance) / (1 - chance), abs_tol=1e-9)


@given(spans_in(12), spans_in(12), spans_in(12), spans_in(12))
def test_counts_of_two_texts_add_up(a: Spans, b: Spans, c: Spans, d: Spans) -> None:
    """As if the second text stood behind the first, a gap between them so that no spans touch."""
    total = compare(a, b, 13)
    total.add(compare(c, d, 13))
    later = [[(start + 13, stop + 13) for start, stop in spans] for spans in (c, d)]
    assert total == compare([*a, *later[0]], [*b, *later[1]], 26)
