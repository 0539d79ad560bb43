"""F7: tagged solutions as ids and labels, in the very tokens the runtime would read them in.

    prompt       32*51-143.\\n        encoded as a prompt, BOS included           labels -100
    completion   <think>\\n32*51=<bigmodel>1632</bigmodel>\\n...  + EOS           labels = ids

A completion is encoded by itself: at the seam the model must write what it will see there. What stands inside the tags
is trained on too: a model that is never shown that a span goes on learns to close it at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from splitdecode.annotate import spans
from splitdecode.errors import RequestError
from splitdecode.families import stream, tagged
from splitdecode.jsonl import read_objects
from splitdecode.models.chat import ChatTemplate
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.questions import THINK, asked_by, opening, question_prompt
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG

IGNORED = -100
_TAG = re.compile(f"{re.escape(OPEN_TAG)}|{re.escape(CLOSE_TAG)}")


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt, as the model will be given it, and the solution it should write: tags balanced, not nested.

    bare: the prompt is a question alone, and asked() makes of it what the model will be given
    """

    prompt: str
    tagged: str
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """Ids, labels (IGNORED in the prompt) and whether a token holds a byte of a control tag; equally long lists."""

    input_ids: list[int]
    labels: list[int]
    in_tag: list[bool]


def read_traces(file: Path, flag: str = "--data") -> list[Trace]:
    """Traces from JSON lines with "question" or "prompt", and "tagged". Raises RequestError naming the flag, file and
    line."""
    traces = [_trace(place, row) for place, row in read_objects(file, flag)]
    if not traces:
        raise RequestError(f"{flag}: {file}: found no traces, expected one JSON object a line")
    return traces


def family_traces(names: Sequence[str], number: int, seed: int) -> list[Trace]:
    """`number` training problems of each family, with tags around what is hard. Raises RequestError."""
    if number < 1:
        raise RequestError(f"--n: found {number}, expected at least 1")
    found = [problem for name in names for problem in islice(stream(seed, name, "train"), number)]
    return [Trace(problem.prompt, tagged(problem)) for problem in found]


def asked(traces: Sequence[Trace], directory: Path) -> list[Trace]:
    """The traces as they are trained on: bare questions as the runtime puts them to the small model, in the chat
    template of the checkpoint in `directory`, with the hint; others as they stand.

    Where the template has opened the answer (`<think>\\n`), a solution that begins with it goes on behind it: what the
    prompt holds already is taken off. Raises CheckpointError or RequestError for a template that cannot be used.
    """
    template = ChatTemplate.from_directory(directory) if any(trace.bare for trace in traces) else None

    def put(trace: Trace) -> Trace:
        if not trace.bare:
            return trace
        prompt = question_prompt(trace.prompt, template, hint=True)
        return Trace(prompt, _behind(opening(prompt), trace.tagged))

    return [put(trace) for trace in traces]


def _behind(opened: str, tagged: str) -> str:
    """A tagged solution without the `opened` it begins with; of tags within that nothing is left."""
    text, found = spans.parse(tagged) if opened else ("", [])
    if not text.startswith(THINK):
        return tagged
    cut = len(opened) if text.startswith(opened) else len(THINK)
    return spans.tag(text[cut:], [(max(0, start - cut), stop - cut) for start, stop in found if max(start, cut) < stop])


def check_tags(text: str, where: str) -> None:
    """Raises RequestError unless every opening tag is closed before the next one opens, and nothing else is closed."""
    expected, other = OPEN_TAG, CLOSE_TAG
    for found in _TAG.finditer(text):
        if found[0] != expected:
            raise RequestError(f"{where}: tagged: found {found[0]} at character {found.start()}, expected {expected}")
        expected, other = other, expected
    if expected == CLOSE_TAG:
        raise RequestError(f"{where}: tagged: found an {OPEN_TAG} that nothing closes")


def encode(trace: Trace, tokenizer: Tokenizer, eos_id: int, apart: Callable[[], bool] = lambda: False) -> Example:
    """A trace in the tokens of a checkpoint, EOS behind it. Raises RequestError for what it cannot spell.

    apart: asked for each tag, whether it is encoded by itself, as a forced hand-off puts it: `=`, `<` for `=<`.
    """
    prompt, completion = tokenizer.encode(trace.prompt), []
    for piece in _pieces(trace.tagged, apart):
        completion += tokenizer.encode_inserted(piece)
    if not prompt:
        raise RequestError("prompt: found no tokens, expected at least one")
    in_tag = [False] * len(prompt) + tag_tokens(trace.tagged, [tokenizer.token_bytes[i] for i in completion]) + [False]
    return Example([*prompt, *completion, eos_id], [IGNORED] * len(prompt) + [*completion, eos_id], in_tag)


def _pieces(text: str, apart: Callable[[], bool]) -> Iterator[str]:
    """The text, cut before and behind each tag that stands apart."""
    edges = [0, *(edge for found in _TAG.finditer(text) if apart() for edge in found.span()), len(text)]
    yield from (text[start:stop] for start, stop in pairwise(edges))


def tag_tokens(text: str, tokens: Sequence[bytes]) -> list[bool]:
    """Which of the tokens, whose bytes together are the text, hold a byte of a control tag; `.</` does."""
    inside = bytearray(len(text.encode()))
    for found in re.finditer(_TAG.pattern.encode(), text.encode()):
        inside[found.start() : found.end()] = b"\x01" * (found.end() - found.start())
    marks, at = [], 0
    for token in tokens:
        marks.append(any(inside[at : at + len(token)]))
        at += len(token)
    return marks


def _trace(where: str, row: Mapping[str, Any]) -> Trace:
    name = asked_by(row, where)
    if not all(isinstance(row.get(field), str) for field in (name, "tagged")):
        raise RequestError(f"{where}: found {', '.join(map(repr, row))}, expected an object with the texts "
                           f"{name!r} and 'tagged'")  # fmt: skip
    check_tags(row["tagged"], where)
    if not row[name] or not row["tagged"]:
        raise RequestError(f"{where}: found an empty text, expected a {name!r} and a 'tagged' solution")
    return Trace(row[name], row["tagged"], name == "question")
