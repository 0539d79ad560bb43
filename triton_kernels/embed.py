"""F1: the first launch of a step: gathers embeddings, and zeroes the counters the other kernels meet at.

    x[t] = weight[tokens[t]]               tokens[t] >= 0
    x[t] = weight[last[-1 - tokens[t]]]    below 0: the id last sampled for that slot, which never left the device
    counters[:] = 0

| argument | shape  | dtype            | unit                                                                       |
|----------|--------|------------------|----------------------------------------------------------------------------|
| tokens   | [T]    | int32            | ids, or -1 - slot                                                          |
| last     | [S]    | int32            | by slot; below 0 (no id was sampled): row 0, and nobody reads the outcome  |
| weight   | [V, d] | fp32, bf16, fp16 |                                                                            |
| x        | [T, d] | as weight        | written                                                                    |
| counters | any    | int32            | contiguous; zeroed, a share by every program                               |

One program per token, at least one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels.shims import launch_options, release, wait, wants_pdl


@triton.jit(do_not_specialize=["count"])
def _embed_kernel(
    tokens,
    last,
    weight,
    x,
    counters,
    count,
    COUNTERS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    t = tl.program_id(0)
    first = t * ZEROS
    while first < COUNTERS:
        at = first + tl.arange(0, ZEROS)
        tl.store(counters + at, 0, mask=at < COUNTERS)
        first += tl.num_programs(0) * ZEROS
    if t < count:
        token = tl.load(tokens + t)
        if token < 0:
            token = tl.maximum(tl.load(last - 1 - token), 0)
        for k in tl.static_range(0, D, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            row = tl.load(weight + token.to(tl.int64) * D + cols, mask=cols < D)
            tl.store(x + t.to(tl.int64) * D + cols, row, mask=cols < D)


def embed_ref(tokens: Tensor, last: Tensor, weight: Tensor, x: Tensor, counters: Tensor, *, pdl: bool = False) -> None:
    """The same in torch."""
    sampled = last[(-1 - tokens).clamp(min=0).long()].clamp(min=0)
    torch.index_select(weight, 0, torch.where(tokens < 0, sampled, tokens), out=x)
    counters.zero_()


def embed(tokens: Tensor, last: Tensor, weight: Tensor, x: Tensor, counters: Tensor, *, pdl: bool = False) -> None:
    """x = weight[ids]; counters = 0."""
    count, d = tokens.shape[0], weight.shape[1]
    if x.shape != (count, d):
        raise ValueError(f"embed: x: expected [{count}, {d}], found {list(x.shape)}")
    _embed_kernel[(max(count, 1),)](
        *(tokens, last, weight, x, counters, count),
        **{"COUNTERS": counters.numel(), "D": d, "BLOCK": min(triton.next_power_of_2(d), 2048), "ZEROS": 128},
        PDL=wants_pdl(pdl),
        num_warps=4,
        **launch_options(pdl),
    )
