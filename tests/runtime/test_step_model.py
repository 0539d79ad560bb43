"""The step program over Triton kernels against the CPU path: logits and caches of small models of every family.

In Triton's interpreter here, compiled on a GPU by `pytest -m gpu`. Tokens are given (teacher forcing); what is compared
are the logits of every row, and the cache a further step reads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.tapes import by_rows
from oracles.tiny import random_hf
from torch import Tensor

from splitdecode.models import Transformer, load_model
from splitdecode.models.step import StepInputs, StepModel, StepShape
from splitdecode.ops import PagedBatch, StepOps, step_ops

PAGE = 4


def launchers(device: torch.device) -> StepOps:
    """Triton's half, also where the device is the interpreter's."""
    return step_ops(device, launchers=True)


def batch_of(tokens: list[int], start: int, pages: list[int]) -> PagedBatch:
    """One row of pending tokens from position `start` on."""
    count, end = len(tokens), start + len(tokens)
    slots = [pages[p // PAGE] * PAGE + p % PAGE for p in range(start, end)]
    ints = [tokens, list(range(start, end)), slots, [0, count], [end], [0, len(pages)], pages]
    return PagedBatch(*(torch.tensor(part, dtype=torch.int32) for part in ints), PAGE)


class Stage:
    """A StepModel with one slot, fed by hand."""

    def __init__(self, model: Transformer, ops: StepOps, pages: list[int]) -> None:
        c, device = model.config, model.device
        self.ops, self.pages = ops, pages
        kv = torch.full((c.num_layers, max(pages) + 2, PAGE, 2, c.num_kv_heads, c.head_dim), float("nan"))
        table = torch.tensor([pages], dtype=torch.int32, device=device)
        last = torch.zeros(1, dtype=torch.int32, device=device)
        self.model = StepModel(model, kv.to(device=device, dtype=model.dtype), table, last, 128)

    def logits(self, tokens: list[int], start: int, shape: StepShape) -> Tensor:
        """Logits [T, V] of the tokens, which may be fewer than the shape's."""
        base = torch.zeros(sum(StepInputs.sizes(shape)), dtype=torch.int32)
        inputs, count = StepInputs.of(base, shape), len(tokens)
        inputs.positions[:] = -1
        inputs.tokens[:count] = torch.tensor(tokens)
        inputs.positions[:count] = torch.arange(start, start + count)
        for i, first in enumerate(range(0, count, shape.queries)):
            inputs.tiles[i] = torch.tensor([first, min(shape.queries, count - first)])
        inputs = StepInputs.of(base.to(self.model.device), shape)
        self.model.prepare(self.ops, shape)
        counters = torch.full((self.model.counter_count(shape),), 7, dtype=torch.int32, device=self.model.device)
        w, eps = self.model.weights, self.model.config.rms_eps
        x = self.model.run(self.ops, shape, inputs, counters)[:count]
        hidden, logits = torch.empty_like(x), x.new_empty(count, w.head.shape[1])
        self.ops.rmsnorm(x, w.norm, eps, hidden)
        self.model.product(self.ops, hidden, w.head, None, logits)
        return logits.cpu()


KINDS = ("qwen2", "qwen3", "llama")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {}
    for i, kind in enumerate(KINDS):
        out[kind] = tmp_path_factory.mktemp(kind)
        random_hf(kind, 150, 64, 1 + (i < 2), i).save_pretrained(out[kind])
    return out


def walk(model: Transformer, stage: Stage, pages: list[int], parts: list[tuple[int, StepShape]], error: float) -> None:
    """One slot through steps of given shapes: logits and cache are the CPU path's."""
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 150, 24)]
    cache, start = model.new_cache(9, PAGE), 0
    for count, shape in parts:
        tokens = ids[start : start + count]
        wanted = model.forward(batch_of(tokens, start, pages), cache)
        found = stage.logits(tokens, start, shape)
        torch.testing.assert_close(found, wanted, rtol=error, atol=error, msg=lambda m, s=shape: f"{s}\n{m}")
        start += count
    filled = pages[: -(-start // PAGE)]
    mine, theirs = (torch.cat([kv[:, page] for page in filled], 1)[:, :start] for kv in (stage.model.kv.cpu(), cache))
    torch.testing.assert_close(mine, theirs, rtol=error, atol=error)


PROMPT = (9, StepShape(9, 1, 9, 16, split=False))
DECODE = (1, StepShape(1, 1, 1, 1))
MIXED = (5, StepShape(8, 8, 8, 8))  # padded
AMONG_EMPTY_ROWS = (1, StepShape(4, 4, 4, 1))
TWO_TILES = (2, StepShape(2, 2, 2, 1))
PAGES = [5, 2, 7, 0, 3, 1, 6]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param("llama", [PROMPT, DECODE], id="llama, decode"),
        *(
            pytest.param(
                kind, [PROMPT, DECODE, MIXED, AMONG_EMPTY_ROWS, TWO_TILES, DECODE], id=kind, marks=pytest.mark.slow
            )
            for kind in KINDS
        ),
    ],
)
def test_logits_equal_the_cpu_path(
    device: torch.device, kind: str, parts: list[tuple[int, StepShape]], saved: dict[str, Path]
) -> None:
    plain = load_model(saved[kind], dtype=torch.float32)
    model = load_model(saved[kind], dtype=torch.float32, device=device) if device.type == "cuda" else by_rows(plain)
    walk(plain, Stage(model, launchers(device), PAGES), PAGES, parts, 2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_references_are_the_cpu_path_in_float64(kind: str, saved: dict[str, Path]) -> None:
    model = load_model(saved[kind], dtype=torch.float64)
    parts = [PROMPT, DECODE, MIXED, AMONG_EMPTY_ROWS, TWO_TILES]
    walk(model, Stage(model, step_ops(torch.device("cpu")), PAGES), PAGES, parts, 1e-9)
