"""Spans and tags: whatever the spans, the tagged text gives the text back, with as many closing as opening tags."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitdecode.annotate.spans import covered, merged, normalise, parse, strip, tag
from splitdecode.errors import RequestError
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG

PIECES = [
    "<",
    ">",
    "/",
    "bigmodel",
    "<bigmode",
    "</bigmodel",
    "<big",
    " ",
    "\n",
    "a",
    "é",
    "e\u0301",
    "\U0001f600",
    "𝔸",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join).filter(
    lambda text: OPEN_TAG not in text and CLOSE_TAG not in text
)  # fmt: skip
SPANS = st.lists(st.tuples(st.integers(-3, 90), st.integers(-3, 90)), max_size=8)


@given(TEXTS, SPANS, st.integers(0, 12), st.integers(1, 9), st.none() | st.floats(0.01, 1))
def test_tagged_text_gives_the_text_back(
    text: str, spans: list[tuple[int, int]], merge: int, min_length: int, cap: float | None
) -> None:
    found = normalise(text, spans, merge=merge, min_length=min_length, cap=cap)
    assert all(0 <= start < stop <= len(text) and stop - start >= min_length for start, stop in found)
    assert all(b[0] - a[1] >= merge for a, b in pairwise(found))
    assert cap is None or covered(found) <= cap * len(text)
    tagged = tag(text, found)
    assert tagged.count(OPEN_TAG) == tagged.count(CLOSE_TAG) == len(found)
    assert strip(tagged) == text
    assert parse(tagged) == (text, found)
    assert normalise(text, found, merge=merge, min_length=min_length, cap=cap) == found


@given(TEXTS, SPANS)
def test_what_was_inside_stays_inside(text: str, spans: list[tuple[int, int]]) -> None:
    wanted = {i for start, stop in spans for i in range(max(0, start), min(stop, len(text))) if not text[i].isspace()}
    found = normalise(text, spans)
    assert wanted <= {i for start, stop in found for i in range(start, stop)}


def test_normalise_by_hand() -> None:
    text = "  one two three four five six  "
    assert normalise(text, [(0, 6)]) == [(2, 5)]
    assert normalise(text, [(6, 9), (2, 5)], merge=1) == [(2, 5), (6, 9)]
    assert normalise(text, [(6, 9), (2, 5)], merge=2) == [(2, 9)]
    assert normalise(text, [(2, 5), (16, 20)]) == [(2, 5), (16, 20)]
    assert normalise(text, [(2, 5), (14, 20)]) == [(2, 20)]
    assert normalise(text, [(5, 6), (3, 3), (9, 4), (40, 50), (-9, 1)]) == []
    assert normalise("e\u0301e", [(0, 1)]) == [(0, 2)]  # a letter and its accent
    assert normalise("e\u0301e", [(1, 2)]) == [(0, 2)]
    assert normalise("\U0001f468\u200d\U0001f469x", [(0, 1)]) == [(0, 3)]  # one emoji of three characters
    assert merged([(0, 3), (3, 5)], 0) == [(0, 3), (3, 5)]
    assert merged([(0, 3), (2, 5)], 0) == [(0, 5)]


def test_the_cap_takes_spans_in_their_order() -> None:
    text = "abcdefghij" * 10
    assert normalise(text, [(50, 60), (0, 10), (80, 85)], cap=0.15) == [(50, 60), (80, 85)]
    assert normalise(text, [(0, 20)], cap=0.15) == []


@pytest.mark.parametrize("spans", [[(3, 3)], [(4, 2)], [(0, 3), (2, 5)], [(2, 3), (0, 1)], [(0, 9)], [(-1, 2)]])
def test_tag_refuses_other_spans(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(RequestError, match="spans: found"):
        tag("abcdefgh", spans)


def test_a_tag_never_enters_a_tag() -> None:
    for text in (f"a{OPEN_TAG}b", f"a{CLOSE_TAG}b"):
        with pytest.raises(RequestError, match="at character 1, expected a text without tags"):
            tag(text, [(0, 1)])


@pytest.mark.parametrize(
    "tagged",
    [OPEN_TAG, CLOSE_TAG, f"{OPEN_TAG}{OPEN_TAG}{CLOSE_TAG}{CLOSE_TAG}", f"{OPEN_TAG}a{CLOSE_TAG}{CLOSE_TAG}"],
)
def test_unpaired_tags_are_refused(tagged: str) -> None:
    with pytest.raises(RequestError, match="tagged text: found"):
        parse(tagged)
