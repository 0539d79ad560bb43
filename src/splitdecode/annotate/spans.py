"""F7: spans of a text, and the text with control tags around them.

    text     Let x be 3. So 3*17=51 and then ...        spans  half-open ranges of characters
    tagged   Let x be 3. So <bigmodel>3*17=51</bigmodel> and then ...

strip(tag(text, spans)) == text for every text that holds no tag: a tag begins with "<" and has no second one, so none
can arise across the edge of an inserted one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from splitdecode.errors import RequestError
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG

Span = tuple[int, int]
MERGE = 10  # characters: spans closer than this are one
_TAG = re.compile(f"{re.escape(OPEN_TAG)}|{re.escape(CLOSE_TAG)}")
_JOINERS = "\u200c\u200d\ufe0e\ufe0f"


def normalise(
    text: str, spans: Iterable[Span], *, merge: int = MERGE, min_length: int = 1, cap: float | None = None
) -> list[Span]:
    """Ordered, disjoint spans without white space at their edges, none ending inside a combined character.

    merge: spans with fewer than `merge` characters between them become one; min_length: shorter ones are then dropped,
    in characters; cap: the largest share of the text's characters; `spans` are taken in the order given while they fit.
    """
    clean = [span for span in (_trimmed(text, *span) for span in spans) if span]
    if cap is not None:
        clean = _within(clean, cap * len(text), merge)
    return [span for span in merged(clean, merge) if span[1] - span[0] >= min_length]


def merged(spans: Iterable[Span], gap: int = MERGE) -> list[Span]:
    """Sorted spans; those that overlap, or have fewer than `gap` characters between them, as one."""
    out: list[Span] = []
    for start, stop in sorted(spans):
        if out and (start < out[-1][1] or start - out[-1][1] < gap):
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def covered(spans: Iterable[Span]) -> int:
    """Characters in disjoint spans."""
    return sum(stop - start for start, stop in spans)


def tag(text: str, spans: Sequence[Span]) -> str:
    """The text with a pair of tags around each span.

    Raises RequestError unless spans are ordered, disjoint, not empty and within the text, and the text holds no tag.
    """
    found = _TAG.search(text)
    if found:
        raise RequestError(f"text: found {found[0]} at character {found.start()}, expected a text without tags")
    out, edge = [], 0
    for start, stop in spans:
        if not edge <= start < stop <= len(text):
            raise RequestError(f"spans: found ({start}, {stop}) after character {edge} of {len(text)}, expected "
                               "ordered, disjoint, half-open spans (start, stop) with start < stop")  # fmt: skip
        out += [text[edge:start], OPEN_TAG, text[start:stop], CLOSE_TAG]
        edge = stop
    return "".join([*out, text[edge:]])


def parse(tagged: str) -> tuple[str, list[Span]]:
    """The text without tags and the spans they stood around. Raises RequestError where tags do not pair up."""
    out: list[str] = []
    spans: list[Span] = []
    edge, length, opened = 0, 0, -1
    for found in _TAG.finditer(tagged):
        out.append(tagged[edge : found.start()])
        length += found.start() - edge
        edge = found.end()
        if (found[0] == OPEN_TAG) != (opened < 0):
            raise RequestError(f"tagged text: found {found[0]} at character {found.start()}, expected the other tag")
        if found[0] == OPEN_TAG:
            opened = length
        else:
            spans.append((opened, length))
            opened = -1
    if opened >= 0:
        raise RequestError(f"tagged text: found its end after {OPEN_TAG}, expected {CLOSE_TAG}")
    return "".join([*out, tagged[edge:]]), spans


def strip(tagged: str) -> str:
    """The text without its tags. Raises RequestError where they do not pair up."""
    return parse(tagged)[0]


def _trimmed(text: str, start: int, stop: int) -> Span | None:
    start, stop = max(0, start), min(len(text), stop)
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    if start >= stop:
        return None
    while _inside(text, start):
        start -= 1
    while _inside(text, stop):
        stop += 1
    return start, stop


def _inside(text: str, at: int) -> bool:
    """Whether a cut before character `at` would part what is read as one character."""
    if not 0 < at < len(text):
        return False
    return bool(unicodedata.combining(text[at])) or text[at] in _JOINERS or text[at - 1] == "\u200d"


def _within(spans: Sequence[Span], most: float, merge: int) -> list[Span]:
    kept: list[Span] = []
    for span in spans:
        trial = merged([*kept, span], merge)
        if covered(trial) <= most:
            kept = trial
    return kept
