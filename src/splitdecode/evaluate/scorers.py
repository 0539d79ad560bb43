"""F7: what counts as right. A scorer takes an answer's text and the right answer, both as text.

    integer   the last \\boxed{} holds exactly that integer
    math      the last \\boxed{} holds the same mathematical object (math-verify)
    aime      both of them: math-verify reads the box as that number, and it is written as that integer

Only what is in the last box counts. Without a box, with an empty one or one that never closes, an answer is wrong:
given a whole text, math-verify would fall back to its last number.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

from splitdecode.errors import MissingExtraError, RequestError

Scorer = Callable[[str, str], bool]

_BOX = "\\boxed{"


def last_box(text: str) -> str | None:
    """What stands in the last \\boxed{}, inner braces matched; None without one, or where it is empty or unclosed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start, depth, at = start + len(_BOX), 1, start + len(_BOX)
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start:at].strip() or None
        at += 1
    return None


def score_integer(text: str, gold: str) -> bool:
    """Whether the last box is the integer `gold`; leading zeros do not matter."""
    box = last_box(text)
    return box is not None and _integer(box) is not None and _integer(box) == _integer(gold)


def score_math(text: str, gold: str) -> bool:
    """Whether math-verify takes the last box for `gold` (LaTeX or a number). Raises MissingExtraError without it."""
    box = last_box(text)
    return box is not None and _same(box, gold)


def score_aime(text: str, gold: str) -> bool:
    """Whether math-verify takes the last box for `gold`, and it is an integer equal to it."""
    return score_integer(text, gold) and score_math(text, gold)


SCORERS: dict[str, Scorer] = {"integer": score_integer, "math": score_math, "aime": score_aime}


def scorer(name: str) -> Scorer:
    """The scorer of that name. Raises RequestError for an unknown one, MissingExtraError without its package."""
    if name not in SCORERS:
        raise RequestError(f"scorer: found {name!r}, expected one of {', '.join(SCORERS)}")
    if name != "integer":
        _math_verify()
    return SCORERS[name]


def _integer(text: str) -> str | None:
    """An integer written in digits, with or without commas between thousands and dollar signs around it: its digits,
    behind "-" where it is below 0, without leading zeros. They may be too many for int()."""
    plain = text.strip().strip("$").replace("{,}", ",").strip()
    if not re.fullmatch(r"-?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)", plain):
        return None
    digits = plain.replace(",", "").lstrip("-").lstrip("0")
    return "-" * plain.startswith("-") + digits if digits else "0"


def _same(box: str, gold: str) -> bool:
    parse, verify = _math_verify()
    limit = 5 if threading.current_thread() is threading.main_thread() else None  # it times itself by a signal
    wanted, found = (parse(f"\\boxed{{{said}}}", parsing_timeout=limit) for said in (gold, box))
    return bool(verify(wanted, found, timeout_seconds=limit))


def _math_verify() -> tuple[Callable[..., object], Callable[..., object]]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise MissingExtraError("math-verify", "eval", "scoring mathematics") from error
    return parse, verify
