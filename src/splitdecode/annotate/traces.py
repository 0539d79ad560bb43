"""F7: traces to annotate: JSON lines, a directory saved by `datasets`, or a synthetic family. One is held at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from splitdecode import families
from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.jsonl import read_objects
from splitdecode.split.questions import asked_by
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt and a reasoning trace without tags; `id` is unique in its source.

    bare: the prompt is a question alone, as split/questions.py puts it to a model
    """

    id: str
    prompt: str
    text: str
    bare: bool = False

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the content, whatever the id."""
        return _digest(self.prompt, self.text, self.bare)


@dataclass(frozen=True, slots=True)
class Fields:
    """Names under which a source keeps what a Trace needs."""

    id: str = "id"
    prompt: str = "prompt"
    trace: str = "trace"
    question: str = "question"


def read_traces(source: str | Path, fields: Fields | None = None, *, split: str | None = None) -> Iterator[Trace]:
    """Traces of a JSONL file, or of a directory written by datasets' save_to_disk().

    A row is {"id"?, "question" or "prompt", "trace"}, other names by `fields`; without an id it is named by a hash of
    its content. A list of texts as trace gives one Trace each, named id#0, id#1, ... split: which one of a directory
    with several.
    Raises RequestError naming the row for anything missing, empty, already tagged, not UTF-8 or named twice;
    MissingExtraError for a directory without `datasets`.
    """
    path, names = Path(source), fields or Fields()
    rows = _saved_rows(path, split) if path.is_dir() else _json_rows(path)
    seen: dict[str, str] = {}
    for place, row in rows:
        for trace in _traces_of(row, names, place):
            if trace.id in seen:
                raise RequestError(f"{place}: found id {trace.id!r} of {seen[trace.id]} again, expected each id once")
            seen[trace.id] = place
            yield trace


def family_traces(family: str, number: int, seed: int) -> Iterator[Trace]:
    """Worked solutions of the training problems of a synthetic family. Raises RequestError for an unknown family."""
    for index, problem in enumerate(families.problems(number, seed, family, part="train")):
        yield Trace(f"{family}-{seed}-{index}", problem.prompt, problem.trace)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise RequestError(f"{path}: found no such file, expected JSON lines or a directory saved by datasets")
    yield from read_objects(path)


def _saved_rows(path: Path, split: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "annotate", f"reading the directory {path}") from error
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise RequestError(f"{path}: found no saved data set, expected one of datasets' save_to_disk()") from None
    if isinstance(found, datasets.DatasetDict):
        names = list(found)
        chosen = split or (names[0] if len(names) == 1 else None)
        if chosen not in found:
            raise RequestError(f"split: found {split!r}, expected one of {', '.join(names)} of {path}")
        found = found[chosen]
    for number, row in enumerate(found):
        yield f"{path.name} row {number}", row


def _traces_of(row: Mapping[str, Any], names: Fields, place: str) -> Iterator[Trace]:
    asked = asked_by(row, place, prompt=names.prompt, question=names.question)
    prompt, texts, name = row[asked], row.get(names.trace), row.get(names.id)
    bare = asked != names.prompt or names.question == names.prompt == "prompt"  # the latter: --question-field prompt
    several = isinstance(texts, list)
    for index, text in enumerate(texts if isinstance(texts, list) else [texts]):
        for field, value in ((asked, prompt), (names.trace, text)):
            if not isinstance(value, str) or not value.strip():
                known = "" if field in row else f"; it has {', '.join(map(str, row)) or 'nothing'}"
                raise RequestError(f"{place}: found {value!r} as {field!r}, expected a text{known}")
            _check_utf8(value, field, place)
        if not (name is None or isinstance(name, (str, int))):
            raise RequestError(f"{place}: found {name!r} as {names.id!r}, expected a text or a number")
        own = _digest(prompt, text, bare) if name is None else f"{name}#{index}" if several else str(name)
        _check_utf8(own, names.id, place)
        for tag in (OPEN_TAG, CLOSE_TAG):
            if tag in text:
                raise RequestError(f"{place}: trace {own!r} holds {tag} already, expected a trace without tags")
        yield Trace(own, str(prompt), text, bare)


def _check_utf8(value: str, field: str, place: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{place}: found half a surrogate pair in {field!r}, expected UTF-8 text") from None


def _digest(prompt: Any, text: Any, bare: bool) -> str:
    return sha256(json.dumps([prompt, text, *([bare] if bare else [])]).encode()).hexdigest()[:16]
