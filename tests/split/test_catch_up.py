"""Catching up ahead of need, on scripted models: what the large one runs, and when, is told by its forwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles.scripted import Stage, ids

from splitdecode import SamplingParams, SplitDecoder
from splitdecode.families import problems
from splitdecode.runtime.runner import LIKELY, foretold, rows_foretold

OPEN = ("<", "big", "model", ">")
TEXT = "abcTbcabcT"


def stage(**engine: Any) -> Stage:
    """Ten tokens, a hand-off, three tokens by the large model and the end."""
    it = Stage(read_interval=8, handoff_patience=0.0, **engine).small(0, *TEXT, *OPEN, "T", "T", "T", "T")
    return it.large(len(TEXT), "b", "c", "<|eos|>")


def alarmed(it: Stage, at: int, probability: float) -> Stage:
    """The small model gives an opening so much at a place where it writes on."""
    (word,), (first,) = ids(TEXT[at]), ids("<")
    it.models.small.draws(3 + at, {word: 0.0, first: math.log(probability / (1 - probability))})
    return it


def forwards(it: Stage) -> list[int]:
    """Tokens of each forward of the large model up to its first own one."""
    assert it.run().outputs[0].text == TEXT + "bc"
    found = it.models.large.forwards
    assert found[-2:] == [1, 1], "its own three tokens: the first with what it owed"
    return found[:-2]


def test_lazy_runs_all_of_it_when_it_gets_the_pen() -> None:
    assert forwards(stage()) == [3 + len(TEXT)]


def test_eager_runs_chunks() -> None:
    assert forwards(stage(catch_up="eager", catch_up_chunk=4)) == [4, 4, 4, 1]


def test_adaptive_runs_it_while_the_tag_is_being_written() -> None:
    """All but the last token, behind which a draw will be wanted."""
    assert forwards(stage(catch_up="adaptive")) == [2 + len(TEXT), 1]


@pytest.mark.parametrize("probability", [0.06, 0.4])
def test_a_tag_that_is_likely_and_does_not_come_costs_one_step(probability: float) -> None:
    prompt_and_five = 3 + 5 - 1
    found = forwards(alarmed(stage(catch_up="adaptive"), 4, probability))
    assert found == [prompt_and_five, 2 + len(TEXT) - prompt_and_five, 1]


def test_a_tag_that_is_unlikely_costs_none() -> None:
    assert forwards(alarmed(stage(catch_up="adaptive"), 4, 0.04)) == [2 + len(TEXT), 1]


@pytest.mark.parametrize("watched", [[3], [0, 7, 19], list(range(20))])
def test_rows_foretold_are_those_of_the_sums(watched: list[int]) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = 4 * torch.randn(4000, 20, generator=generator)
    logits[::5, watched[0]] += 3.0
    logits[::7, 11] = -torch.inf
    logits[::501] = torch.nan
    mass = logits.softmax(1)[:, watched].sum(1)
    clear = (mass - LIKELY).abs() > 1e-6
    found = torch.zeros(4000, dtype=torch.bool)
    found[rows_foretold(logits, torch.tensor(watched))] = True
    assert torch.equal(found[clear], mass[clear] >= LIKELY)
    assert torch.equal(found, foretold(logits, torch.tensor(watched)))
    assert found.any()
    assert rows_foretold(logits[:0], torch.tensor(watched)) == []


@pytest.mark.parametrize("catch_up", ["eager", "adaptive", "lazy"])
def test_a_large_prompt_beyond_the_context_is_not_run(catch_up: str) -> None:
    """It is refused where the large model is asked for, and nothing of it is read before."""
    options: dict[str, Any] = {"catch_up": catch_up, "catch_up_chunk": 1, "weight_bound_tokens": 160}
    task = problems(1, 3)[0]
    with SplitDecoder.demo(**options) as decoder:
        (output,) = decoder.generate(task.prompt, SamplingParams(temperature=0.0), large_prompt=task.prompt * 60)
    assert output.metrics.rejected_openings > 0
    assert output.metrics.large.forwards == 0
