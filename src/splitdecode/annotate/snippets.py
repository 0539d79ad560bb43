"""F7: what an annotating model is asked, and the snippets in whatever it answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

SYSTEM = (
    "You read reasoning traces and mark the steps at which a weak model would most likely go wrong: the decisive "
    "ideas, the error-prone calculations, the turns of the argument. You quote; you never rephrase, shorten or correct."
)
ASK = """Below are a problem and a reasoning trace that solves it.

Pick the hardest parts of the trace: together about {percent:.0f} % of its characters, as at least {least} separate
snippets. Each snippet is a contiguous passage of one to a few sentences or lines, copied character for character from
the trace, LaTeX and punctuation included. Do not pick routine restatements, greetings or plain bookkeeping.

Answer with one JSON object and nothing else. Order the snippets as they stand in the trace; write a backslash as \\\\:
{{"snippets": ["...", "...", "..."]}}

<problem>
{prompt}
</problem>

<trace>
{trace}
</trace>"""
_BAD_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|(\\)')
_BEGIN = re.compile(r"[{\[]")
_NEXT = re.compile(r'[\s,]*(?=")')
_DECODER = json.JSONDecoder(strict=False)  # a raw line break inside a string is forgiven


def messages(prompt: str, trace: str, *, share: float, least: int) -> list[dict[str, str]]:
    """A chat that asks for the hardest `share` (0 to 1) of a trace as at least `least` verbatim snippets."""
    asked = ASK.format(percent=100 * share, least=least, prompt=prompt.strip(), trace=trace)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def parse_snippets(answer: str) -> list[str]:
    """The snippets of an answer, [] when it has none.

    Thinking before the answer, prose, code fences, a bare list, single backslashes of LaTeX, raw line breaks and an
    answer that was cut short are all forgiven; of the last the whole snippets are taken.
    """
    body = answer.rpartition("</think>")[2]
    for text in dict.fromkeys((body, _with_doubled_backslashes(body))):
        for value in _values(text):
            found = _snippets_of(value)
            if found:
                return found
    return _cut_short(_with_doubled_backslashes(body))


def _with_doubled_backslashes(text: str) -> str:
    return _BAD_ESCAPE.sub(lambda found: "\\\\" if found[1] else found[0], text)


def _values(text: str) -> Iterator[Any]:
    """Every JSON object or list that begins somewhere in the text, outermost first."""
    at = 0
    while found := _BEGIN.search(text, at):
        try:
            value, at = _DECODER.raw_decode(text, found.start())
            yield value
        except (ValueError, RecursionError):
            at = found.end()


def _snippets_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        lists = [value["snippets"]] if "snippets" in value else [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else None
    if not isinstance(value, list):
        return []
    texts = [next((v for v in item.values() if isinstance(v, str)), None) if isinstance(item, dict) else item
             for item in value]  # fmt: skip
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _cut_short(text: str) -> list[str]:
    """The strings of a list whose end is missing."""
    found: list[str] = []
    opened = re.search(r'"snippets"\s*:\s*\[', text)
    at = opened.end() if opened else len(text)
    while begins := _NEXT.match(text, at):
        try:
            snippet, at = _DECODER.raw_decode(text, begins.end())
        except ValueError:
            break
        found.append(snippet)
    return [snippet for snippet in found if snippet.strip()]
