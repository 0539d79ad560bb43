"""Planted spans, quoted as models quote: the whole way from a server's answers to what was planted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from oracles.chat_server import ChatServer, completion, trace_in

from splitdecode.annotate import report, run
from splitdecode.annotate.client import Server
from splitdecode.annotate.endpoint import EndpointAnnotator
from splitdecode.annotate.records import Tagged, read_tagged
from splitdecode.annotate.spans import Span, normalise
from splitdecode.annotate.traces import Trace

TALK = (
    "so then the sum of both sides equals a prime number because every factor divides it and we can check whether this "
    "holds for small cases wait maybe the bound is not tight hence consider parity modulo four which gives exactly two "
    "solutions \\frac{a}{b} \\le x^2 + 3y = 17 therefore induction works"
)


def planted(rng: random.Random, name: str) -> tuple[Trace, list[Span]]:
    """A trace of sentences and four of them, not neighbours, as spans."""
    sentences = [" ".join(rng.choices(TALK.split(), k=rng.randint(8, 25))).capitalize() + "." for _ in range(30)]
    hard = sorted(rng.sample(range(0, 30, 2), 4))
    text, spans = "", []
    for number, sentence in enumerate(sentences):
        if number in hard:
            spans.append((len(text), len(text) + len(sentence)))
        text += sentence + rng.choice([" ", "\n", "\n\n"])
    return Trace(name, "Why?", text), spans


def misquoted(rng: random.Random, quote: str) -> str:
    """What a model makes of a passage it was asked to copy: other spaces, a word changed, its end cut off or grown."""
    words = quote.split()
    match rng.randrange(5):
        case 0:
            return "  ".join(words)
        case 1:
            words[rng.randrange(len(words))] = "indeed"
        case 2:
            words = words[:-1]
        case 3:
            words.append("Right.")
        case 4:
            return quote.replace("\\", "\\\\").lower()
    return " ".join(words)


@pytest.mark.parametrize(("errors", "least"), [(0.0, 1.0), (0.5, 0.97), (1.0, 0.95)])
def test_what_was_planted_is_found(errors: float, least: float, tmp_path: Path) -> None:
    rng = random.Random(1)
    made = [planted(rng, f"t{n}") for n in range(40)]
    answers = {}
    for trace, spans in made:
        quotes = [trace.text[start:stop] for start, stop in spans]
        said = [misquoted(rng, quote) if rng.random() < errors else quote for quote in quotes]
        said.insert(rng.randrange(5), "By Lagrange, the order of a subgroup is a divisor of the order of its group.")
        answers[trace.text] = f"Here you are:\n```json\n{json.dumps({'snippets': said})}\n```"

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return 200, {}, completion(answers[trace_in(body)])

    out = tmp_path / "out.jsonl"
    with ChatServer(answer) as server:
        summary = run.annotate([trace for trace, _ in made], EndpointAnnotator(Server(server.url, "m")), out)
    assert (summary.annotated, summary.failed) == (40, [])
    truth = {t.id: Tagged(t.id, t.text, normalise(t.text, spans), {}) for t, spans in made}
    found = report.agreement(read_tagged(out), truth)
    assert found["f1"] >= least
    assert found["spans_met"] == 1.0  # the invented snippet stands nowhere
    assert found["their_spans_met"] >= 0.98
