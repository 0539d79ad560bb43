"""The head and what follows it, at the shapes of the 1.5B and the 32B."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from oracles.compiled import Case
from splitdecode.kernels.head import head, head_programs
from splitdecode.kernels.nucleus import nucleus
from splitdecode.kernels.sample import SampleScratch, sample
from splitdecode.kernels.state import SamplingState

SHAPES = {"1.5B": (151936, 1536), "32B": (152064, 5120)}
SLOTS = 8


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(vocab: int, hidden: int) -> None:
    half = torch.bfloat16
    w = meta(vocab, hidden, dtype=half)
    state = SamplingState.new(SLOTS, vocab, "meta")
    logits, best = meta(1, vocab, dtype=torch.float32), meta(head_programs(w), dtype=torch.float32)
    x, gain = meta(4, hidden, dtype=half), meta(hidden, dtype=half)
    head(x, gain, 1e-6, w, meta(1, 6), state, logits, best, meta(*best.shape), meta(1), meta(1), pdl=True)


def samples(vocab: int, dtype: torch.dtype) -> None:
    scratch, state = SampleScratch.new(8, vocab, "meta"), SamplingState.new(SLOTS, vocab, "meta")
    sample(meta(8, vocab, dtype=dtype), meta(8, 6), state, scratch, meta(8), meta(8), pdl=True)


def cuts(vocab: int) -> None:
    scratch, state = SampleScratch.new(8, vocab, "meta"), SamplingState.new(SLOTS, vocab, "meta")
    nucleus(meta(8, 6), state, scratch, meta(8), pdl=True)


def cases() -> Iterator[Case]:
    for name, (vocab, hidden) in SHAPES.items():
        yield Case(f"head {name}", lambda v=vocab, d=hidden: heads(v, d), regs=96, smem=4 << 10)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(f"sample {dtype}", lambda t=dtype: samples(151936, t), regs=96, smem=16 << 10)
    yield Case("nucleus", lambda: cuts(151936), regs=255, smem=16 << 10)
