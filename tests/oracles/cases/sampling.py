"""The head and what follows it, at the shapes of the 1.5B and the 32B."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from oracles.compiled import Case, dependent
from torch import Tensor

from splitdecode.kernels.head import head, head_programs
from splitdecode.kernels.logprobs import logprobs
from splitdecode.kernels.nucleus import nucleus
from splitdecode.kernels.sample import SampleScratch, sample
from splitdecode.kernels.state import SamplingState
from splitdecode.kernels.step import advance, count_patch

SHAPES = {"1.5B": (151936, 1536), "32B": (152064, 5120)}
VOCAB, ROWS, SLOTS = 151936, 8, 8


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(vocab: int, hidden: int) -> None:
    half = torch.bfloat16
    w = meta(vocab, hidden, dtype=half)
    state = SamplingState.new(SLOTS, vocab, "meta")
    logits, best = meta(1, vocab, dtype=torch.float32), meta(head_programs(w), dtype=torch.float32)
    x, gain = meta(4, hidden, dtype=half), meta(hidden, dtype=half)
    head(x, gain, 1e-6, w, meta(1, 6), state, logits, best, meta(*best.shape), meta(1), meta(1), pdl=dependent())


def samples(vocab: int, dtype: torch.dtype) -> None:
    scratch, state = SampleScratch.new(ROWS, vocab, "meta"), SamplingState.new(SLOTS, vocab, "meta")
    logits = meta(ROWS, vocab, dtype=dtype)
    sample(logits, meta(ROWS, 6), state, scratch, meta(ROWS), meta(ROWS), pdl=dependent())


def cuts(vocab: int) -> None:
    scratch, state = SampleScratch.new(ROWS, vocab, "meta"), SamplingState.new(SLOTS, vocab, "meta")
    nucleus(meta(ROWS, 6), state, scratch, meta(ROWS), pdl=dependent())


def chances(vocab: int) -> None:
    state = SamplingState.new(SLOTS, vocab, "meta")
    logits, out = meta(ROWS, vocab, dtype=torch.float32), meta(ROWS, dtype=torch.float32)
    logprobs(logits, meta(ROWS, 6), state, meta(ROWS), out, pdl=dependent())


def steps() -> None:
    rows, box = meta(ROWS), meta(2, 4, ROWS)
    out, found = meta(2, 4, ROWS, dtype=torch.float32), meta(ROWS, dtype=torch.float32)
    last, ends, place = meta(SLOTS), meta(SLOTS, 16), meta(1)
    advance(rows, rows, rows, meta(ROWS, 2), meta(ROWS, 6), rows, found, last, ends, box, out, place, 0, more=True)
    count_patch(meta(64, 3), meta(SLOTS, 151936))


def cases() -> Iterator[Case]:
    for name, (vocab, hidden) in SHAPES.items():
        yield Case(f"head {name}", lambda v=vocab, d=hidden: heads(v, d), regs=96, smem=4 << 10)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(f"sample {dtype}", lambda t=dtype: samples(VOCAB, t), regs=96, smem=8 << 10)
    yield Case("nucleus", lambda: cuts(VOCAB), regs=255, smem=8 << 10)
    yield Case("logprobs", lambda: chances(VOCAB), regs=128, smem=4 << 10)
    yield Case("advance, count_patch", steps, regs=64, smem=1 << 10, wide=False)
