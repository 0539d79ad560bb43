"""What counts as right: the cases a scorer was seen to get wrong elsewhere, and that only the last box counts."""

from __future__ import annotations

import builtins
import threading
from typing import Any

import pytest

from splitdecode import MissingExtraError, RequestError
from splitdecode.evaluate.scorers import SCORERS, last_box, score_aime, score_integer, score_math, scorer

CASES = [  # text, gold, integer, math, aime
    ("\\boxed{204}", "1204", False, False, False),  # not the end of a number
    ("\\boxed{1204}", "204", False, False, False),
    ("\\boxed{049}", "49", True, True, True),
    ("\\boxed{49}", "049", True, True, True),
    ("\\boxed{} so it is 116", "116", False, False, False),  # math-verify alone says yes
    ("so it is 116", "116", False, False, False),
    ("\\boxed{116", "116", False, False, False),
    ("first \\boxed{1}, no: \\boxed{2}", "2", True, True, True),  # math-verify alone says no
    ("first \\boxed{2}, no: \\boxed{1}", "2", False, False, False),
    ("\\boxed{1/2}", "0.5", False, True, False),
    ("\\boxed{\\frac{1}{2}}", "\\frac12", False, True, False),
    ("\\boxed{ 1,234 }", "1234", True, True, True),
    ("\\boxed{12,34}", "1234", False, False, False),
    ("\\boxed{-7}", "-7", True, True, True),
    ("\\boxed{49.0}", "49", False, True, False),  # AIME answers are integers
    ("\\boxed{x=49}", "49", False, True, False),
    ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", False, True, False),
    ("\\boxed{(3, \\frac{\\pi}{2})}", "\\left( 3, \\frac{\\pi}{2} \\right)", False, True, False),
]


@pytest.mark.parametrize(("text", "gold", "integer", "math", "aime"), CASES)
def test_cases(text: str, gold: str, integer: bool, math: bool, aime: bool) -> None:
    pytest.importorskip("math_verify")
    assert (score_integer(text, gold), score_math(text, gold), score_aime(text, gold)) == (integer, math, aime)


ONES = "1" * 5000  # more digits than int() takes


@pytest.mark.parametrize(
    ("box", "gold", "right"),
    [(ONES, "5", False), (ONES, ONES, True), (f"-000{ONES}", f"-{ONES}", True), (f"-{ONES}", ONES, False),
     ("-0", "000", True), ("1,000", "1000", True), ("5", ONES, False), ("-", "0", False)],
)  # fmt: skip
def test_integers_of_any_length(box: str, gold: str, right: bool) -> None:
    assert score_integer(f"\\boxed{{{box}}}", gold) is right


def test_a_long_box_ends_no_evaluation() -> None:
    pytest.importorskip("math_verify")
    assert score_aime(f"\\boxed{{{ONES}}}", "5") is score_math(f"\\boxed{{{ONES}}}", "5") is False


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{a{b{c}}d} e}", "a{b{c}}d"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{ }", None),
        ("\\boxed{a{b}", None),
        ("\\boxed{1} \\boxed{2", None),
        ("\\boxed{a\\", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


def test_a_thread_scores_as_well() -> None:
    """math-verify times itself by a signal, which only the main thread may set."""
    pytest.importorskip("math_verify")
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(score_math("\\boxed{1/2}", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]


def test_names() -> None:
    assert scorer("integer") is SCORERS["integer"]
    with pytest.raises(RequestError, match="scorer: found 'exact', expected one of integer, math, aime"):
        scorer("exact")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert scorer("integer")("\\boxed{5}", "5")
    with pytest.raises(MissingExtraError, match=r"scoring mathematics needs math-verify: pip install .*\[eval\]"):
        scorer("aime")
