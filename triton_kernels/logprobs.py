"""F1: the log-probability of the id that was chosen: log-softmax of the raw logits over ids < V.

| argument | shape         | dtype            | unit                                                        |
|----------|---------------|------------------|-------------------------------------------------------------|
| logits   | [>= N, >= V]  | fp32, bf16, fp16 | raw; rows may be strided; ids from V on are never read      |
| draws    | [N, 6]        | int32            | see state.py                                                |
| state    | SamplingState |                  |                                                             |
| ids      | [N]           | int32            | chosen; below zero: none                                    |
| out      | [N]           | fp32             | written: natural log; NaN for rows whose slot has not       |
|          |               |                  | LOGPROBS, without an id, and for padding                    |

The reference takes float64 too.

Sources: online softmax: Milakov & Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels import shims
from splitdecode.kernels import state as bits
from splitdecode.kernels.sample import LOGPROBS, draw
from splitdecode.kernels.shims import release, wait
from splitdecode.kernels.state import SamplingState


class Config(NamedTuple):
    """ids per step, warps."""

    step: int
    warps: int


_CONFIGS: dict[tuple[str, tuple[int, ...]], Config] = {}


def _rule(vocab: int) -> Config:
    """32 values a thread in flight."""
    return Config(min(16384, max(256, triton.next_power_of_2(vocab))), 16)


@triton.jit
def _logprobs_kernel(
    logits, draws, kind, ids, out, WIDTH: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr
):
    release(PDL)
    row = tl.program_id(0)
    wait(PDL)
    token, slot, _, _, _, _ = draw(draws, row)
    chosen = tl.load(ids + row)
    if (token < 0) | (chosen < 0) | ((tl.load(kind + slot) & LOGPROBS) == 0):
        tl.store(out + row, float("nan"))
        return
    line = logits + row.to(tl.int64) * WIDTH
    value = tl.load(line + chosen).to(tl.float32)
    top = value  # finite: it was sampled
    total = tl.zeros([STEP], tl.float32)
    for start in range(0, V, STEP):
        v = start + tl.arange(0, STEP)
        x = tl.load(line + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    tl.store(out + row, value - top - tl.log(tl.sum(total, axis=0)))


def logprobs_ref(
    logits: Tensor, draws: Tensor, state: SamplingState, ids: Tensor, out: Tensor, *, pdl: bool = False
) -> None:
    """The contract above."""
    live = draws[:, 0] >= 0
    slot = torch.where(live, draws[:, 1], 0).long()
    wanted = live & (ids >= 0) & ((state.kind[slot] & bits.LOGPROBS) != 0)
    raw = logits[: len(ids), : state.vocab].to(state.temperature.dtype)
    found = raw.log_softmax(1).gather(1, ids.clamp(min=0).long()[:, None])[:, 0]
    out.copy_(torch.where(wanted, found, torch.nan))


def logprobs(
    logits: Tensor, draws: Tensor, state: SamplingState, ids: Tensor, out: Tensor, *, pdl: bool = False
) -> None:
    """Writes out as the contract above says."""
    rows, vocab = draws.shape[0], state.vocab
    if logits.shape[0] < rows or logits.shape[1] < vocab or logits.stride(1) != 1:
        raise ValueError(f"logprobs: logits: found {list(logits.shape)}, expected rows of at least [{rows}, {vocab}]")
    if not rows:
        return
    how = shims.tuned(_CONFIGS, logits.device, (vocab,), _rule)
    _logprobs_kernel[(rows,)](
        logits, draws, state.kind, ids, out, WIDTH=logits.stride(0), V=vocab, STEP=how.step,
        PDL=shims.wants_pdl(pdl), num_warps=how.warps, **shims.launch_options(pdl),
    )  # fmt: skip
