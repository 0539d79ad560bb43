"""F1: final norm, the logits of the whole vocabulary and the id, in one launch, for one row.

    logits[v] = sum over k of w[v, k] * norm[k] * x[k]  /  sqrt(mean(x^2) + eps)

A program owns ROWS ids. Its warps stand side by side along K: one load of a warp is 512 neighbouring bytes of one row
of w, 16 per lane, and every x it loads meets ROWS weights. The mean of x^2 is a by-product: the norm costs no pass.

A row is plain when its slot is neither cut nor edited nor wants log-probs, and neither attempt nor SUPPRESS_END
excludes more than the banned ids. Then the programs perturb what they have and elect the id as `sample` does, which
finds the same id in the same logits. Other rows get their logits only; padding reads no weights.

| argument | shape                 | dtype            | unit                                                          |
|----------|-----------------------|------------------|---------------------------------------------------------------|
| x        | [>= 1, d]             | fp32, bf16, fp16 | residual stream; the row is draws[0, 0]                       |
| norm     | [d]                   | as x, or None    | gain; None: x is normalised already, eps is not used          |
| w        | [Vw, d]               | as x             | contiguous; Vw >= V                                           |
| draws    | [1, 6]                | int32            | see state.py                                                  |
| state    | SamplingState         |                  |                                                               |
| logits   | [1, Vw]               | fp32             | written, unless the row is padding                            |
| best     | [>= head_programs(w)] | fp32             | scratch                                                       |
| best_id  | [>= head_programs(w)] | int32            | scratch                                                       |
| counters | [>= 1]                | int32            | zero before the call and after it                             |
| ids      | [1]                   | int32            | written for plain rows: an id, or BROKEN as `sample` has it;  |
|          |                       |                  | and for padding: NOTHING                                      |

The reference takes float64 too and leaves best, best_id and counters alone.

Sources: 16-byte evict-first loads, several under way per warp: SGLang's hopper_bf16_gemv.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels import shims
from splitdecode.kernels import state as bits
from splitdecode.kernels.linear import ask
from splitdecode.kernels.philox import noise
from splitdecode.kernels.sample import (
    CUT,
    DRAW,
    EDIT,
    LOGPROBS,
    NOTHING,
    SUPPRESS_END,
    SampleScratch,
    draw,
    elect,
    excluded,
    sample_ref,
)
from splitdecode.kernels.shims import release, wait
from splitdecode.kernels.state import SamplingState

_LEAD = 8 << 20  # bytes of weights requested into the L2 while the kernel before ends, under dependent launch
_LINE = 128  # bytes of a line of the L2
_STEP = 1024  # leaders compared at a time


class Config(NamedTuple):
    """ids per program, columns per step, warps."""

    rows: int
    cols: int
    warps: int


_CONFIGS: dict[tuple[str, tuple[int, ...]], Config] = {}


def _rule(rows: int, hidden: int) -> Config:
    """64 lanes of 16 bytes; the compiler keeps four to six loads of a warp under way, and ten programs fit an SM."""
    return Config(16, 512, 2)


def _config(w: Tensor) -> Config:
    return shims.tuned(_CONFIGS, w.device, tuple(w.shape), _rule)


def head_programs(w: Tensor) -> int:
    """Programs of a call with these weights: what best and best_id have room for."""
    return -(-w.shape[0] // _config(w).rows)


@triton.jit
def products(x, norm, w, own, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """w (norm * x) for the rows of w at `own` [ROWS, 1], and the sum of x^2. A lane sums its columns as it goes."""
    cols = tl.arange(0, COLS)[None, :]
    total = tl.zeros([ROWS, COLS // 8], tl.float32)
    square = tl.zeros([1, COLS], tl.float32)
    for k in tl.range(0, K, COLS):
        tile = ask(w, own + cols, k, K, COLS, 1, "evict_first")[0].to(tl.float32)
        part = ask(x, cols, k, K, COLS, 1, "")[0].to(tl.float32)
        square += part * part
        if norm is not None:
            part *= ask(norm, cols, k, K, COLS, 1, "")[0].to(tl.float32)
        total += tl.sum(tl.reshape(tile * part, [ROWS, COLS // 8, 8]), axis=2)
    return tl.sum(total, axis=1), tl.sum(square)


@triton.jit
def _head_kernel(
    x, norm, w, draws, kind, key, temperature, marks, forbid, logits, best, best_id, counters, ids, eps,
    VW: tl.constexpr, V: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LEAD: tl.constexpr,
    LINES: tl.constexpr, LINE: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    block = tl.program_id(0)
    first = block * ROWS
    v = first + tl.arange(0, ROWS)
    own = (v if VW % ROWS == 0 else tl.minimum(v, VW - 1)).to(tl.int64)[:, None] * K
    if block < LEAD:  # weights do not depend on the kernel before
        shims.prefetch(w + own + tl.minimum(tl.arange(0, LINES) * LINE, K - 1)[None, :])
    wait(PDL)
    token, slot, position, stream, attempt, flags = draw(draws, 0)
    if token < 0:
        if block == 0:
            tl.store(ids, NOTHING)
        return
    value, square = products(x + token.to(tl.int64) * K, norm, w, own, K, ROWS, COLS)
    if norm is not None:
        value *= tl.rsqrt(square / K + eps)
    tl.store(logits + v, value, mask=v < VW)
    needs = tl.load(kind + slot)
    if ((needs & (CUT | EDIT | LOGPROBS)) == 0) & (attempt <= 0) & ((flags & SUPPRESS_END) == 0):
        corrupt = (v < V) & ~(value < float("inf"))  # NaN too
        value = tl.where(excluded(v, forbid, marks, attempt, flags, V), float("-inf"), value)
        if needs & DRAW:
            value = tl.div_rn(value, tl.load(temperature + slot))
            value += noise(first, tl.load(key + slot), position, stream, attempt, ROWS)
        elect(value, v, corrupt, best, best_id, counters, ids, block, BLOCKS, STEP)


def head_ref(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    w: Tensor,
    draws: Tensor,
    state: SamplingState,
    logits: Tensor,
    best: Tensor | None,
    best_id: Tensor | None,
    counters: Tensor | None,
    ids: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """The contract above."""
    real = state.temperature.dtype
    live = draws[:, 0] >= 0
    row = x[draws[:, 0].clamp(min=0).long()].to(real)
    if norm is not None:
        row = row * torch.rsqrt(row.square().mean(1, keepdim=True) + eps) * norm.to(real)
    logits.copy_(torch.where(live[:, None], row @ w.to(real).T, logits))
    scratch = SampleScratch.new(1, state.vocab, x.device, real)
    found = torch.empty_like(ids)
    sample_ref(logits, draws, state, scratch, None, found)
    needs = state.kind[torch.where(live, draws[:, 1], 0).long()]
    plain = (needs & (bits.CUT | bits.EDIT | bits.LOGPROBS)) == 0
    plain &= (draws[:, 4] <= 0) & ((draws[:, 5] & bits.SUPPRESS_END) == 0)
    ids.copy_(torch.where(plain | ~live, found, ids))


def head(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    w: Tensor,
    draws: Tensor,
    state: SamplingState,
    logits: Tensor,
    best: Tensor,
    best_id: Tensor,
    counters: Tensor,
    ids: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Writes logits and, for a plain row and for padding, ids, as the contract above says."""
    rows, hidden = w.shape
    if x.shape[1] != hidden:
        raise ValueError(f"head: x: found {list(x.shape)}, expected [_, {hidden}]")
    if not w.is_contiguous():
        raise ValueError(f"head: w: found strides {w.stride()}, expected contiguous rows [{rows}, {hidden}]")
    if draws.shape[0] != 1:
        raise ValueError(f"head: draws: found {list(draws.shape)}, expected [1, 6]")
    if logits.numel() != rows or state.vocab > rows:
        raise ValueError(f"head: logits: found {list(logits.shape)}, expected [1, {rows}], of at least {state.vocab}")
    how, blocks = _config(w), head_programs(w)
    if min(best.numel(), best_id.numel()) < blocks:
        raise ValueError(f"head: best: found {best.numel()}, expected at least {blocks}")
    line = _LINE // w.element_size()
    lead = _LEAD // (how.rows * hidden * w.element_size()) if shims.wants_pdl(pdl) else 0
    _head_kernel[(blocks,)](
        x, norm, w, draws, state.kind, state.key, state.temperature, state.marks, state.forbid, logits, best, best_id,
        counters, ids, eps,
        VW=rows, V=state.vocab, K=hidden, ROWS=how.rows, COLS=how.cols, LEAD=lead,
        LINES=triton.next_power_of_2(-(-hidden // line)), LINE=line, BLOCKS=blocks,
        STEP=triton.next_power_of_2(min(blocks, _STEP)), PDL=shims.wants_pdl(pdl), num_warps=how.warps,
        **shims.launch_options(pdl),
    )  # fmt: skip
