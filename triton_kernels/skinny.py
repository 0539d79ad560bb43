"""F1: a few tokens times a weight matrix on the matrix units: verification of drafts, batches up to 64.

    out = a w^T + bias          or, with add, out += a w^T + bias

| argument | shape  | dtype            | unit                                                |
|----------|--------|------------------|-----------------------------------------------------|
| a        | [M, K] | fp32, bf16, fp16 | M at most 64                                        |
| w        | [N, K] | as a             | contiguous: a row is one output's; streamed once    |
| bias     | [N]    | as a, or absent  |                                                     |
| out      | [M, N] | as a, or fp32    | written; with add it is the residual and added to   |

A program owns BN rows of w, the left operand; the tokens, padded to 16, 32 or 64, are the right one. Of each tile every
warp multiplies its own part of the columns, a batch of PARTS products, so that a narrow matrix keeps all warps busy:

    rows of w   | warp 0 | warp 1 | warp 2 | warp 3 |        tile of 4 x BK columns, STAGES - 1 of them on their way
                `------ summed over the warps at the end, in fp32: no split of K between programs, no atomics

The tokens are read again by every program, from the L2: what reaches an SM is (BN + M) / BN of the weights. Up to 16
tokens that is little; towards 64 it outweighs them on wide matrices, where a library's product is the better choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels.shims import cast, dot, launch_options, prefetch, release, tuned, wait, wants_pdl

_PARTS = 4


@dataclass(frozen=True, slots=True)
class Skinny:
    """rows: of w, per program.  cols: of a tile, per warp.  stages: of the pipeline, tiles in flight + 1."""

    rows: int
    cols: int
    stages: int


# (device name, (N, K, bytes per number, tokens padded)): what a sweep on that device found.
_CONFIGS: Mapping[tuple[str, tuple[int, ...]], Skinny] = {}


def _rule(n: int, k: int, itemsize: int, padded: int) -> Skinny:
    """A program per SM before taller tiles, at most 64 sums per thread, three programs' tiles in an H200's SM.

    fp32 multiplies without matrix units, from registers: half the columns.
    """
    rows = next((rows for rows in (64, 32) if n >= rows * 132 and rows * padded <= 2048), 16)
    cols = (128 if rows + padded <= 48 else 64) // itemsize
    return Skinny(rows, cols, 1 + (72 << 10) // ((rows + padded) * _PARTS * cols * itemsize))


@triton.jit(do_not_specialize=["count"])
def _skinny_kernel(
    a,
    w,
    bias,
    out,
    count,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = w + tl.minimum(outs, N - 1).to(tl.int64) * K
    tokens = tl.arange(0, BM)
    if PDL:  # the first tile: on its way into the L2 while the kernel in front still runs
        line: tl.constexpr = 128 // (w.dtype.element_ty.primitive_bitwidth // 8)
        prefetch(rows[:, None] + tl.minimum(tl.arange(0, PARTS * BK // line) * line, K - 1)[None, :])
    wait(PDL)
    cols = tl.arange(0, PARTS)[:, None] * BK + tl.arange(0, BK)[None, :]
    total = tl.zeros([PARTS, BN, BM], tl.float32)
    for k in tl.range(0, K, PARTS * BK, num_stages=STAGES):
        at, inside = (k + cols)[:, None, :], (k + cols < K)[:, None, :]
        tile = tl.load(rows[None, :, None] + at, mask=inside, other=0.0, eviction_policy="evict_first")
        at, inside = (k + cols)[:, :, None], (k + cols < K)[:, :, None] & (tokens < count)[None, None, :]
        part = tl.load(a + tokens[None, None, :] * K + at, mask=inside, other=0.0)
        total += dot(tile, part)
    value = tl.sum(total, axis=0)
    live = (outs < N)[:, None] & (tokens < count)[None, :]
    if bias is not None:
        value += tl.load(bias + tl.minimum(outs, N - 1)).to(tl.float32)[:, None]
    into = out + tokens[None, :] * N + outs[:, None]
    if ADD:
        value += tl.load(into, mask=live, other=0.0).to(tl.float32)
    tl.store(into, cast(value, out.dtype.element_ty), mask=live)


def skinny_ref(a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, *, add: bool = False, pdl: bool = False) -> None:
    """The same in torch, rounded once."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    total = a.to(wide) @ w.to(wide).T
    if bias is not None:
        total += bias
    out.copy_(total + out if add else total)


def skinny(a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, *, add: bool = False, pdl: bool = False) -> None:
    """out (+)= a w^T + bias, for up to 64 tokens."""
    (n, k), count = w.shape, a.shape[0]
    if a.shape[1] != k or out.shape != (count, n) or count > 64:
        raise ValueError(f"skinny: expected a [M <= 64, {k}], out [M, {n}], found {list(a.shape)}, {list(out.shape)}")
    if not w.is_contiguous():
        raise ValueError(f"skinny: w: expected contiguous rows [{n}, {k}], found strides {w.stride()}")
    padded = max(16, triton.next_power_of_2(count))
    how = tuned(_CONFIGS, a.device, (n, k, w.element_size(), padded), _rule)
    _skinny_kernel[(triton.cdiv(n, how.rows),)](
        *(a, w, bias, out, count),
        **{"N": n, "K": k, "BM": padded, "BN": how.rows, "BK": how.cols, "PARTS": _PARTS, "STAGES": how.stages},
        ADD=add,
        PDL=wants_pdl(pdl),
        num_warps=_PARTS,
        **launch_options(pdl),
    )
