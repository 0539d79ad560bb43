"""F7: what an annotator is, what it finds, and the line of JSON that becomes of it.

    {"id", "prompt", "tagged", "spans": [[start, stop], ...], "share", "digest", "by": {...}, "details": {...}}

A trace of a bare question has "question" in place of "prompt". spans are characters of the untagged text, strip(tagged)
is that text. `by` says which annotator and settings made it; `digest` is of prompt and text, so that a changed trace
under an old id is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from splitdecode.annotate.spans import Span, covered, parse, tag
from splitdecode.annotate.traces import Trace
from splitdecode.errors import RequestError
from splitdecode.jsonl import read_object, whole_lines


@dataclass(frozen=True, slots=True)
class Annotation:
    """A trace and its hard spans (normalised). details: whatever the annotator can say of them; cost: dollars."""

    trace: Trace
    spans: list[Span]
    details: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A trace that could not be annotated. left_out: it never can be, by this annotator, and nothing is wrong with
    anything else; otherwise another run tries it again."""

    trace: Trace
    reason: str
    cost: float = 0.0
    left_out: bool = False


class Annotator(Protocol):
    """Finds the hard spans of traces."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides its answers, as JSON can hold it; `annotator` is its name."""

    def annotate(self, traces: Iterable[Trace]) -> Iterator[Annotation | Failure]:
        """One result per trace, in any order. Takes a trace only when it is about to work on it."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """A line of an annotated file, read back."""

    id: str
    text: str
    spans: list[Span]
    row: Mapping[str, Any]


def as_line(found: Annotation, settings: Mapping[str, Any]) -> bytes:
    """One line of JSON, newline included. Raises AssertionError if the tagged text did not give the trace back."""
    trace = found.trace
    tagged = tag(trace.text, found.spans)
    assert parse(tagged) == (trace.text, found.spans), f"trace {trace.id!r}: tags changed the text"
    row = {
        "id": trace.id,
        "question" if trace.bare else "prompt": trace.prompt,
        "tagged": tagged,
        "spans": found.spans,
        "share": round(covered(found.spans) / len(trace.text), 6),
        "digest": trace.digest,
        "by": dict(settings),
        "details": dict(found.details),
    }
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def read_row(line: bytes, place: str) -> dict[str, Any]:
    """The object of one line. Raises RequestError naming the place."""
    row = read_object(line, place)
    if not (isinstance(row.get("id"), str) and isinstance(row.get("tagged"), str)):
        raise RequestError(f"{place}: expected an annotated trace, an object with 'id' and 'tagged'")
    return row


def read_tagged(path: Path) -> Iterator[Tagged]:
    """The annotated traces of a file; a torn last line, as a killed writer leaves, is not one.

    Raises RequestError naming the line when tags do not pair up, spans are not where the tags are, or an id returns.
    """
    if not path.is_file():
        raise RequestError(f"{path}: found no such file, expected one written by `splitdecode annotate`")
    seen: set[str] = set()
    for line, place in whole_lines(path):
        row = read_row(line, place)
        try:
            text, spans = parse(row["tagged"])
        except RequestError as error:
            raise RequestError(f"{place}: {error}") from None
        if "spans" in row and [list(span) for span in spans] != row["spans"]:
            raise RequestError(f"{place}: found spans {row['spans']}, expected {spans}, where the tags are")
        if not text:
            raise RequestError(f"{place}: found an empty trace, expected text")
        if row["id"] in seen:
            raise RequestError(f"{place}: found id {row['id']!r} again, expected each id once")
        seen.add(row["id"])
        yield Tagged(row["id"], text, spans, row)
