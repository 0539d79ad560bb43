"""F7: where in a trace a quoted snippet stands: verbatim, or nearly.

    verbatim    text.find
    nearly      rapidfuzz proposes the window most like the snippet (ratio >= 0.5); below 0.95 both ends move to the
                word boundaries that make it most alike; it is accepted only where verbatim runs of the snippet
                confirm it

The result is always a range of the trace's own text, never the snippet's. The confirmation matters: by chance alone a
window of English is 0.5 alike to any English sentence, so an invented snippet would find a place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from splitdecode.annotate.spans import Span
from splitdecode.errors import MissingExtraError

MIN_RATIO = 0.5
REFINE_BELOW = 0.95
MIN_CHARACTERS = 8  # what is shorter stands in too many places to mean one
RUN = 8  # characters of a verbatim run, white space aside; half a snippet where that is less
ANCHORED = 0.25  # of the snippet must stand in the window in such runs
_BOUNDARY = re.compile(r"(?<=\S)(?=\s)|(?<=\s)(?=\S)")
_SPACE = re.compile(r"\s+")
# "\frac" in an answer whose writer forgot to double the backslash reads as a form feed and "rac".
_LOST_BACKSLASHES = re.compile("([\b\f\t\r])(?=[A-Za-z])")
_LETTERS = {"\b": "\\b", "\f": "\\f", "\t": "\\t", "\r": "\\r"}


@dataclass(frozen=True, slots=True)
class Match:
    """text[start:stop] is where a snippet stands.

    ratio     Indel similarity of the two, 0 to 1       exact    the snippet stood there verbatim
    anchored  share of the snippet, white space aside, that stands there in verbatim runs
    """

    start: int
    stop: int
    ratio: float
    exact: bool
    anchored: float


def locate(
    text: str, snippet: str, taken: Sequence[Span] = (), *, minimum: float = MIN_RATIO, refine: float = REFINE_BELOW
) -> Match | None:
    """Where `snippet` stands in `text`; None when nowhere. Of several verbatim places the first that meets no range in
    `taken`, else the first. Raises MissingExtraError without rapidfuzz."""
    wanted = snippet.strip()
    for said in dict.fromkeys((wanted, _LOST_BACKSLASHES.sub(lambda found: _LETTERS[found[1]], wanted))):
        if len(said) < MIN_CHARACTERS:
            return None
        at = _verbatim(text, said, taken)
        if at is not None:
            return Match(at, at + len(said), 1.0, True, 1.0)
    return _nearly(text, said, minimum, refine)


def locate_all(
    text: str, snippets: Iterable[str], *, minimum: float = MIN_RATIO, refine: float = REFINE_BELOW
) -> list[Match]:
    """The matches of those snippets that have one, in the snippets' order; equal ranges once."""
    found: list[Match] = []
    for snippet in snippets:
        match = locate(text, snippet, [(m.start, m.stop) for m in found], minimum=minimum, refine=refine)
        if match and (match.start, match.stop) not in [(m.start, m.stop) for m in found]:
            found.append(match)
    return found


def _verbatim(text: str, said: str, taken: Sequence[Span]) -> int | None:
    first = at = text.find(said)
    while at >= 0:
        if not any(start < at + len(said) and at < stop for start, stop in taken):
            return at
        at = text.find(said, at + 1)
    return first if first >= 0 else None


def _nearly(text: str, said: str, minimum: float, refine: float) -> Match | None:
    try:
        from rapidfuzz import fuzz
    except ImportError as error:
        raise MissingExtraError("rapidfuzz", "annotate", "finding a snippet that is not verbatim") from error
    window = fuzz.partial_ratio_alignment(said, text, score_cutoff=100 * minimum)
    if window is None:
        return None
    start, stop = window.dest_start, window.dest_end
    ratio = fuzz.ratio(said, text[start:stop]) / 100
    if ratio < refine:
        start, stop = _refined(text, said, start, stop)
        ratio = fuzz.ratio(said, text[start:stop]) / 100
    share = anchored(said, text[start:stop])
    if ratio < minimum or share < ANCHORED:
        return None
    return Match(start, stop, round(ratio, 4), False, round(share, 4))


def _refined(text: str, said: str, start: int, stop: int) -> Span:
    """The bounds, among nearby word boundaries and the ones given, that make the window most like the snippet."""
    from rapidfuzz import fuzz

    pad = max(16, len(said) // 4)
    starts, stops = [start, *_boundaries(text, start, pad)], [stop, *_boundaries(text, stop, pad)]
    for _ in range(2):  # each end is best for the other's new place
        start = max((s for s in starts if s < stop), key=lambda s: fuzz.ratio(said, text[s:stop]), default=start)
        stop = max((s for s in stops if s > start), key=lambda s: fuzz.ratio(said, text[start:s]), default=stop)
    return start, stop


def _boundaries(text: str, near: int, pad: int) -> list[int]:
    low, high = max(0, near - pad), min(len(text), near + pad)
    edges = [edge for edge in (0, len(text)) if low <= edge <= high]
    return edges + [found.start() for found in _BOUNDARY.finditer(text, low, high)]


def anchored(said: str, window: str) -> float:
    """The share of `said`, white space aside, that stands in `window` in the same order and in verbatim runs."""
    a, b = _SPACE.sub("", said), _SPACE.sub("", window)
    run = max(1, min(RUN, len(a) // 2))
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks if block.size >= run) / max(1, len(a))
