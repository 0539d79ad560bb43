"""Snippets and their places: verbatim ones exactly, damaged ones at the right words, invented ones nowhere."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz import fuzz

from splitdecode.annotate.align import anchored, locate, locate_all
from splitdecode.annotate.snippets import messages, parse_snippets
from splitdecode.errors import MissingExtraError

TEXT = (
    "First I restate the question. We need the number of lattice points inside the circle of radius 5.\n\n"
    "The key idea is to use Gauss's counting: for every x, count y with x^2 + y^2 \\le 25, so \\frac{1}{2} of them are "
    "positive. For x = 3 we get y^2 \\le 16, hence y runs from -4 to 4: nine values.\n\n"
    "Summing up: 11 + 2*(9 + 9 + 9 + 7 + 1) = 81. Wait, for x = 3 I should double-check the boundary.\n\n"
    "Therefore the answer is 81. Good, that agrees with the known sequence 1, 5, 13, 29, 49, 81."
)
PASSAGE = "For x = 3 we get y^2 \\le 16, hence y runs from -4 to 4: nine values."


def test_verbatim() -> None:
    match = locate(TEXT, f"  {PASSAGE}\n")
    assert match is not None
    assert (TEXT[match.start : match.stop], match.ratio, match.exact) == (PASSAGE, 1.0, True)


def test_a_repeated_passage_goes_where_nothing_is_yet() -> None:
    text = "alpha beta gamma. " * 3
    assert [(m.start, m.stop) for m in locate_all(text, ["alpha beta gamma."] * 4)] == [(0, 17), (18, 35), (36, 53)]


@pytest.mark.parametrize(
    "damaged",
    [
        PASSAGE.replace("\\le", "<="),
        PASSAGE.replace(" ", "  "),
        PASSAGE.replace("hence y runs", "so y goes"),
        "for x=3, we get y^2 \\le 16; hence y runs from -4 to 4: nine values",
        PASSAGE[:20] + PASSAGE[26:],
    ],
)
def test_damaged(damaged: str) -> None:
    match = locate(TEXT, damaged)
    assert match is not None
    assert not match.exact
    assert 0.5 <= match.ratio < 1
    found = TEXT[match.start : match.stop]
    start = TEXT.index(PASSAGE)
    assert abs(match.start - start) <= 4, found
    assert abs(match.stop - start - len(PASSAGE)) <= 4, found


def test_random_damage_finds_the_place() -> None:
    rng = random.Random(3)
    words = ["so", "hence", "x", "y", "sum", "prime", "divides", "modulo", "three", "bound", "case", "even", "odd"]
    for _ in range(40):
        text = " ".join(rng.choice(words) + str(rng.randint(0, 99)) for _ in range(300))
        start = rng.randint(0, len(text) - 200)
        said = list(text[start : start + rng.randint(60, 150)])
        stop = start + len(said)
        for _ in range(len(said) // 15):
            said[rng.randrange(len(said))] = rng.choice("qz#")
        match = locate(text, "".join(said))
        assert match is not None
        assert abs(match.start - start) <= 8
        assert abs(match.stop - stop) <= 8


@pytest.mark.parametrize(
    "invented",
    [
        "We apply the Cauchy-Schwarz inequality to both vectors and then use induction on the dimension.",
        "It follows from Fermat's little theorem that the order of the element divides p minus one.",
        "the answer",
        "x",
        "",
    ],
)
def test_invented_snippets_stand_nowhere(invented: str) -> None:
    match = locate(TEXT, invented)
    assert match is None or match.exact  # "the answer" is a passage


PROSE = (
    "Let me think about this again. The total number of students is the sum of those who play football and those who "
    "play tennis, minus those who play both. So the number who play at least one of the games is forty, and the rest "
    "of them play neither. That means the answer should be the difference between the two, but I am not sure whether "
    "the teacher is counted among the students or not."
)


@pytest.mark.parametrize(
    "invented",
    [
        "The area of the triangle is then the half of the base times the height, and so the other side is the root.",
        "So the probability that at least one of the two dice shows a six is one minus that of neither of them.",
        "By induction on the number of vertices the graph has a perfect matching, and hence the claim.",
    ],
)
def test_a_likely_window_needs_verbatim_runs(invented: str) -> None:
    """By ratio alone these would be accepted: 0.5 is what any two English sentences share."""
    assert fuzz.partial_ratio(invented, PROSE) > 50
    assert locate(PROSE, invented) is None


def test_anchored_by_hand() -> None:
    assert anchored("a b c d", "xxab cdxx") == 1.0
    assert anchored("abcdefgh12345678", "abcdefgh--------") == 0.5
    assert anchored("abcdefgh12345678", "abcdefg-1234567-") == 0.0
    assert anchored("", "x") == 0.0


@given(st.text("ab c.\n\u00e9", max_size=60), st.text("ab c.\n\u00e9", max_size=40), st.floats(0, 1))
def test_a_match_is_a_range_of_the_text(text: str, snippet: str, minimum: float) -> None:
    match = locate(text, snippet, minimum=minimum)
    if snippet.strip() in text and len(snippet.strip()) >= 8:
        assert match is not None
        assert text[match.start : match.stop] == snippet.strip()
    if match is not None:
        assert 0 <= match.start < match.stop <= len(text)
        assert match.exact == (text[match.start : match.stop] == snippet.strip())
        assert minimum - 1e-3 <= match.ratio <= 1


def test_lost_backslashes() -> None:
    (snippet,) = parse_snippets('{"snippets": ["so \\frac{1}{2} of them are positive"]}')
    assert "\f" in snippet
    match = locate(TEXT, snippet)
    assert match is not None
    assert match.exact


def test_fuzzy_matching_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    assert locate(TEXT, PASSAGE) is not None
    with pytest.raises(MissingExtraError, match=r"needs rapidfuzz: pip install 'splitdecode\[annotate\]'"):
        locate(TEXT, PASSAGE.replace("hence", "so"))


ANSWERS = {
    "plain": '{"snippets": ["a b", "c"]}',
    "fence": 'Sure!\n```json\n{"snippets": ["a b", "c"]}\n```\nHope [this] helps {you}.',
    "thinking": '<think>maybe {"snippets": ["x"]}</think>\n{"snippets": ["a b", "c"]}',
    "list": '["a b", "c"]',
    "objects": '{"snippets": [{"text": "a b"}, {"text": "c", "why": "hard"}]}',
    "other name": '{"passages": ["a b", "c"], "count": 2}',
    "cut short": '{"snippets": ["a b", "c", "and th',
    "lists before it": 'Of the set [1, 2] and {3}: {"snippets": ["a b", "c", ""]}',
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_are_read(case: str) -> None:
    assert parse_snippets(ANSWERS[case]) == ["a b", "c"]


def test_odd_answers() -> None:
    assert parse_snippets('{"snippets": ["\\(x \\le 3\\) and\nmore \\u00e9 \\underline{x}"]}') == [
        "\\(x \\le 3\\) and\nmore é \\underline{x}"
    ]
    for nothing in (
        "",
        "I cannot do that.",
        "{}",
        '{"snippets": []}',
        "[1, 2]",
        '{"snippets": "all"}',
        "{" * 5000,
        "[" * 5000,
    ):
        assert parse_snippets(nothing) == []


def test_what_is_asked() -> None:
    system, user = messages("What is {x}?", "Trace {y} \\frac", share=0.2, least=4)
    assert (system["role"], user["role"]) == ("system", "user")
    assert all(part in user["content"] for part in ("20 %", "at least 4", "What is {x}?", "Trace {y} \\frac"))
