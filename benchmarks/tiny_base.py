"""The base models of the embedded pair, from nothing: they learn products by drill and the families by solved problems.

    large        0.8 million parameters: knows the products
    small-base   98 thousand: writes every step, knows the products only in part

Solved problems of one family in one wording are equally long, and so are drills: a forward has no padding. Each step is
a few such forwards and one step of Muon (hidden matrices) and AdamW (the rest), on problems never seen before, of the
training parts only; the loss is on solutions. One thread and a seed decide everything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitdecode.families import FAMILIES, hard_ranges, stream
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.train.muon import MuonAdam
from splitdecode.train.scratch import Shape

MIX = {"two-products": 0.35, "two-products-reworded": 0.15, "one-product": 0.2, "three-products": 0.3}
OTHERS = {"two-products": 0.15, "two-products-reworded": 0.05, "one-product": 0.4, "three-products": 0.4}
FACTS = [(a, b) for a in range(21, 80) for b in range(21, 80) if 1000 <= a * b <= 4999]
DRILL = "Products.\n"
DRILL_LINES = 20
REPORTS = 20  # of a training
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Phase:
    """So many steps, each of `drills` lists of products and `groups` x `rows` solved problems, a group of one family.

    matrix_rate, rate: peaks, of Muon and AdamW; both begin and end low, unless the phase ends before its schedule, of
    `schedule` steps, does (0: of as many as it has). mix: the share of each family.
    """

    steps: int
    drills: int
    groups: int
    rows: int
    matrix_rate: float = 0.02
    rate: float = 3e-3
    schedule: int = 0
    mix: Mapping[str, float] = field(default_factory=lambda: MIX)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one base model is taught: the phases in turn, from weights drawn by the seed."""

    shape: Shape
    seed: int
    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)


RECIPES = {
    "large": Recipe(
        Shape(128, 4, 4, 2, 384),
        1,
        (
            Phase(2600, 11, 2, 3),
            Phase(600, 2, 4, 4),
            Phase(600, 4, 4, 4, 0.01, 1.5e-3),
            Phase(400, 4, 4, 6, 0.01, 1.5e-3, mix=OTHERS),
        ),
    ),
    "small-base": Recipe(Shape(64, 2, 4, 2, 128), 2, (Phase(4900, 3, 3, 6, schedule=7000),)),
}


def texts() -> Iterator[str]:
    """For the tokenizer. Tags come in pieces, merged with what stands at either edge: `=<`, `big`, `model`, `>\\n`."""
    for name in FAMILIES:
        for problem in islice(stream(1, name, "train"), 300):
            yield from (problem.prompt, problem.trace)
    yield from ("Products", "=<", "</", ">\n", "big", "model") * 3000


def drill(rng: random.Random) -> tuple[str, str]:
    """Prompt and solution: a list of products."""
    return DRILL, "\n".join(f"{a}*{b}={a * b}" for a, b in rng.sample(FACTS, DRILL_LINES))


class Lessons:
    """Rows of equal length, ids and labels [B, T]: of families and of drills."""

    def __init__(self, tokenizer: Tokenizer, seed: int, part: str) -> None:
        self._tokenizer, self._rng, self._part = tokenizer, random.Random(seed), part
        self._problems = {name: stream(seed + 1, name, part) for name in FAMILIES}

    def drawn(self, rows: int, mix: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Solved problems of one family, drawn by its share in the mix, in one wording."""
        return self.family(rows, self._rng.choices(list(mix), list(mix.values()))[0])

    def family(self, rows: int, name: str) -> tuple[Tensor, Tensor]:
        """Solved problems of one family in one wording."""
        wordings = len(FAMILIES[name].wordings)
        drawn = list(islice(self._problems[name], rows * wordings))
        return self._rows((p.prompt, p.trace) for p in drawn[self._rng.randrange(wordings) :: wordings])

    def drills(self, rows: int) -> tuple[Tensor, Tensor]:
        """Lists of products, of which only the values are labels: the factors are drawn by lot."""
        ids, labels = self._rows(drill(self._rng) for _ in range(rows))
        hard = torch.tensor([hard_tokens(self._tokenizer, row) for row in ids.tolist()])
        return ids, labels.masked_fill(~hard, _IGNORED)

    def _rows(self, pairs: Any) -> tuple[Tensor, Tensor]:
        ids, labels = [], []
        for prompt, solution in pairs:
            first = self._tokenizer.encode(prompt)
            rest = [*self._tokenizer.encode_inserted(solution), self._tokenizer.eos_id or 0]
            ids.append(first + rest)
            labels.append([_IGNORED] * len(first) + rest)
        return torch.tensor(ids), torch.tensor(labels)


def teach(
    model: Any,
    batches: Callable[[], Sequence[tuple[Tensor, Tensor]]],
    steps: int,
    *,
    matrix_rate: float,
    rate: float,
    schedule: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Trains in place: each step on what `batches` gives, ids and labels [B, T]; the loss is the mean of a label.

    Clipped at norm 1; 3 % of the schedule's steps (0: of `steps`) warm up, then a cosine goes down to 2 %.
    """
    optimizer = MuonAdam(model, matrix_rate=matrix_rate, rate=rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in range(steps):
        done = (step + 1) / (schedule or steps)
        scale = min(done / 0.03, 1.0) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = scale * peak
        parts, total = batches(), 0.0
        count = sum(int((labels[:, 1:] != _IGNORED).sum()) for _, labels in parts)
        for ids, labels in parts:
            logits = model(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED, reduction="sum"
            )
            (loss / count).backward()
            total += float(loss.detach()) / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None
        if on_step is not None:
            on_step(step + 1, total)


@torch.no_grad()
def mastery(model: Any, tokenizer: Tokenizer, rows: int = 64) -> dict[str, float]:
    """Share of held-out problems, a family in one wording, that a model solves, greedy; of their easy tokens; hard.

    An argmax that is right after every right prefix is the greedy answer.
    """
    model.eval()
    lessons, found = Lessons(tokenizer, 99, "held-out"), {}
    for name in FAMILIES:
        ids, labels = lessons.family(rows, name)
        right = (model(input_ids=ids[:, :-1]).logits.argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == _IGNORED)
        hard = torch.tensor([hard_tokens(tokenizer, row) for row in ids.tolist()])[:, 1:]
        found[name] = float(right.all(1).float().mean())
        found[f"{name}, easy"] = float((right | hard).all(1).float().mean())
        found[f"{name}, hard"] = float((right | ~hard).all(1).float().mean())
    model.train()
    return found


def hard_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
    """Which ids of a solved problem are digits of a product, in a line that is nothing else."""
    text = tokenizer.decode(ids)
    marks, at = [], 0
    ranges = hard_ranges(text)
    for index in ids:
        marks.append(any(start <= at < stop for start, stop in ranges))
        at += len(tokenizer.token_bytes[index])
    return marks


def base(start: Path, recipe: Recipe, report: Callable[[dict[str, float]], None]) -> Any:
    """The taught model, float32, of a checkpoint with nothing learned. report: step, loss and mastery, now and then."""
    from transformers import Qwen2ForCausalLM

    tokenizer = Tokenizer.from_directory(start)
    model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32)
    lessons = Lessons(tokenizer, 1000 * recipe.seed, "train")
    before = 0
    for phase in recipe.phases:

        def batches(phase: Phase = phase) -> list[tuple[Tensor, Tensor]]:
            return [lessons.drills(phase.drills), *(lessons.drawn(phase.rows, phase.mix) for _ in range(phase.groups))]

        def on_step(step: int, loss: float, before: int = before) -> None:
            if (before + step) % max(1, recipe.steps // REPORTS) == 0:
                report({"step": before + step, "loss": loss, **mastery(model, tokenizer)})

        rates = {"matrix_rate": phase.matrix_rate, "rate": phase.rate, "schedule": phase.schedule}
        teach(model, batches, phase.steps, **rates, on_step=on_step)
        before += phase.steps
    return model
