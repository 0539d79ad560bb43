"""F1: one token times a weight matrix, added to the residual stream; and the GEMV that qkv and gate_up share.

    x += a w^T + bias

| argument | shape  | dtype            | unit                                                                         |
|----------|--------|------------------|------------------------------------------------------------------------------|
| a        | [1, K] | fp32, bf16, fp16 | attention output, or silu(gate) * up                                         |
| w        | [N, K] | as a             | contiguous: a row of weights is one output's                                 |
| bias     | [N]    | as a, or absent  |                                                                              |
| x        | [1, N] | as a             | residual stream, added to in place; shares no memory with a                  |
| prefetch | any    | any, or absent   | a matrix read by a later kernel: its first PREFETCH_BYTES are asked into the |
|          |        |                  | L2, when compiled                                                            |

A program owns BN rows of w. Its warps stand side by side along K: one load of a warp is 512 neighbouring bytes of one
row, 16 per thread. Sums are fp32 and never leave their owner: no split of K, no atomics, one rounding.

    row of w   | warp 0 | warp 1 || warp 0 | warp 1 || warp 0 | warp 1 |     BN 4, 2 warps, AHEAD 3, K 1536, bf16:
               `---- tile 0 -----'`---- tile 1 -----'`---- tile 2 -----'     12 loads per thread are under way
               `--------- one chunk, asked for before wait(PDL) -------'     before the kernel in front has ended

What hides the latency is bytes in flight (Little's law: 4.3 TB/s times an estimated 0.75 us are 24 KB per SM). The
first chunk is requested whole. The loads of later ones the compiler spreads among the products, and other warps keep
the memory busy: hence registers are what the compile checks bound. A chunk carried around the loop would be requested
whole too, but 16-bit values that a loop carries take a register each (140, not 80: K 5120, BN 4, AHEAD 2, sm_90).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels.shims import INTERPRET, cast, launch_options, prefetch, release, tuned, wait, wants_pdl

PREFETCH_BYTES = 16 << 20
_LINE = tl.constexpr(128)  # bytes of an L2 line
_LOAD = 512  # bytes one load of a warp takes: 32 threads, 16 each


@dataclass(frozen=True, slots=True)
class Gemv:
    """rows: of w, per program.  warps: side by side along K.  ahead: tiles of one chunk, all in flight at once."""

    rows: int
    warps: int
    ahead: int


# (device name, (N, K, bytes per number)): what a sweep on that device found.
_CONFIGS: Mapping[tuple[str, tuple[int, ...]], Gemv] = {}


def gemv_rule(rows: int, columns: int, itemsize: int) -> Gemv:
    """At most 16 loads of a thread in a chunk, as few masked tiles as can be."""
    size = columns * itemsize
    if size <= 4096:
        return Gemv(rows=4, warps=2, ahead=triton.cdiv(size, 2 * _LOAD))
    tiles = triton.cdiv(size, 4 * _LOAD)
    return Gemv(rows=2, warps=4, ahead=min((5, 4, 3), key=lambda ahead: -tiles % ahead))


def gemv_options(w: Tensor, how: Gemv, prefetch: Tensor | None, pdl: bool) -> dict[str, Any]:
    """Constants and launch options of a kernel on the GEMV, `target` being what it prefetches."""
    (n, k), programs = w.shape, triton.cdiv(w.shape[0], how.rows)
    if not w.is_contiguous():
        raise ValueError(f"w: expected contiguous rows [{n}, {k}], found strides {w.stride()}")
    target = None if INTERPRET.value else prefetch
    lines = 0 if target is None else min(target.numel() * target.element_size(), PREFETCH_BYTES) // _LINE.value
    return {
        **{"target": target, "LINES": lines, "EACH": triton.next_power_of_2(triton.cdiv(lines, programs))},
        **{"N": n, "K": k, "BN": how.rows, "BK": how.warps * _LOAD // w.element_size(), "AHEAD": how.ahead},
        **{"PDL": wants_pdl(pdl), "num_warps": how.warps, **launch_options(pdl)},
    }


@triton.jit
def ask(base, at, k, K: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr, POLICY: tl.constexpr):
    """AHEAD neighbouring tiles from column k on, zeros beyond K: a tuple. `at`: offsets of a tile, [rows or 1, BK]."""
    tiles = ()
    if base is not None:
        for i in tl.static_range(AHEAD):
            if K % (AHEAD * BK) == 0:
                tile = tl.load(base + at + (k + i * BK), eviction_policy=POLICY)
            else:
                inside = (tl.arange(0, BK) < K - k - i * BK)[None, :]
                tile = tl.load(base + at + (k + i * BK), mask=inside, other=0.0, eviction_policy=POLICY)
            tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005  (Triton has no starred tuples)
    return tiles


@triton.jit
def add_chunk(tiles, parts, gains, total, squares, AHEAD: tl.constexpr):
    """total [BN, BK] += tile * x * gain and squares [1, BK] += x^2, column by column."""
    for i in tl.static_range(AHEAD):
        part = parts[i].to(tl.float32)
        squares += part * part
        if len(gains) > 0:
            part *= gains[i].to(tl.float32)
        total += tiles[i].to(tl.float32) * part
    return total, squares


@triton.jit
def gemv_begin(gain, w, rows, K: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):
    """Requests the first chunk of w's `rows` [BN] and of the gain: weights, so it stands before wait(PDL)."""
    cols = tl.arange(0, BK)[None, :]
    tiles = ask(w, rows.to(tl.int64)[:, None] * K + cols, 0, K, BK, AHEAD, "evict_first")
    return tiles, ask(gain, cols, 0, K, BK, AHEAD, "")


@triton.jit
def gemv_end(begun, x, gain, w, rows, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):
    """(w[rows] (x * gain) [BN], sum of x^2 [1]) in fp32."""
    cols = tl.arange(0, BK)[None, :]
    total, squares = tl.zeros([BN, BK], tl.float32), tl.zeros([1, BK], tl.float32)
    total, squares = add_chunk(begun[0], ask(x, cols, 0, K, BK, AHEAD, ""), begun[1], total, squares, AHEAD)
    for k in tl.range(AHEAD * BK, K, AHEAD * BK):
        tiles = ask(w, rows.to(tl.int64)[:, None] * K + cols, k, K, BK, AHEAD, "evict_first")
        parts, gains = ask(x, cols, k, K, BK, AHEAD, ""), ask(gain, cols, k, K, BK, AHEAD, "")
        total, squares = add_chunk(tiles, parts, gains, total, squares, AHEAD)
    return tl.sum(total, axis=1), tl.sum(squares, axis=1)


@triton.jit
def optional(bias, rows, BN: tl.constexpr):
    """bias[rows] in fp32, zeros where there is none. A weight: it stands before wait(PDL)."""
    if bias is None:
        return tl.zeros([BN], tl.float32)
    else:
        return tl.load(bias + rows).to(tl.float32)


@triton.jit
def fetch(target, LINES: tl.constexpr, EACH: tl.constexpr):
    """This program's share of a request for the first LINES lines of `target`."""
    if LINES > 0:
        first = tl.program_id(0) * EACH
        if first < LINES:
            line = tl.minimum(first + tl.arange(0, EACH), LINES - 1).to(tl.int64)
            prefetch(target + line * (_LINE * 8 // target.dtype.element_ty.primitive_bitwidth))


@triton.jit
def _linear_kernel(
    a,
    w,
    bias,
    x,
    target,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    AHEAD: tl.constexpr,
    LINES: tl.constexpr,
    EACH: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, live = tl.minimum(outs, N - 1), outs < N
    begun, value = gemv_begin(None, w, rows, K, BK, AHEAD), optional(bias, rows, BN)
    fetch(target, LINES, EACH)
    wait(PDL)
    value += tl.load(x + rows).to(tl.float32)
    total, _ = gemv_end(begun, a, None, w, rows, K, BN, BK, AHEAD)
    tl.store(x + outs, cast(value + total, x.dtype.element_ty), mask=live)


def linear_ref(
    a: Tensor, w: Tensor, bias: Tensor | None, x: Tensor, *, pdl: bool = False, prefetch: Tensor | None = None
) -> None:
    """The same in torch, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = a.to(wide) @ w.to(wide).T + x
    x.copy_(total if bias is None else total + bias)


def linear(
    a: Tensor, w: Tensor, bias: Tensor | None, x: Tensor, *, pdl: bool = False, prefetch: Tensor | None = None
) -> None:
    """x += a w^T + bias, for one token."""
    n, k = w.shape
    if a.shape != (1, k) or x.shape != (1, n):
        raise ValueError(f"linear: expected a [1, {k}] and x [1, {n}], found {list(a.shape)} and {list(x.shape)}")
    how = tuned(_CONFIGS, x.device, (n, k, w.element_size()), gemv_rule)
    _linear_kernel[(triton.cdiv(n, how.rows),)](a, w, bias, x, **gemv_options(w, how, prefetch, pdl))
