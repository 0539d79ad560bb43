"""The Triton kernels that gpu_first.py times, with the configurations it tries and one launcher each.

    read        streams a buffer and keeps one sum per program: the ceiling of anything that reads weights once
    tick        adds one to one number: what a node of a graph costs by itself
    gemv        y[N] = w[N, K] x[K]: fp32 accumulation, a tile of BN rows by BK columns per step
    link        the same for K below one tile; under dependent launch it asks for its weights before it waits
    attend      one query per head over one of S splits of a paged cache: partial sums, maxima, denominators
    merge       the S partials of each head into one

Layouts are the runtime's: a page holds PAGE slots of [2, Hkv, D] (k, then v), query head g * Hkv + h reads kv head h.
bf16 becomes fp32 right after each load, so TRITON_INTERPRET=1 computes the same. Importing this file imports Triton.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tlx

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
HEAD, PAGE, LINK = 128, 64, 1536  # head dimension, slots per page, K of `link`


@dataclass(frozen=True, slots=True)
class Gemv:
    """A tile of rows by cols, on `warps` warps; `stages` > 0: loads run ahead through shared memory (cp.async)."""

    rows: int
    cols: int
    warps: int
    stages: int = 0

    def __str__(self) -> str:
        return f"BN{self.rows} BK{self.cols} w{self.warps}" + (f" s{self.stages}" if self.stages else "")


@dataclass(frozen=True, slots=True)
class Attend:
    """Keys per step of the loop, warps, pipeline stages."""

    tile: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"T{self.tile} w{self.warps} s{self.stages}"


# One to four 16-byte loads per thread and step: fewer leaves threads idle, more spills.
GEMVS = (
    *(Gemv(1, 512, 1), Gemv(1, 512, 2), Gemv(1, 1024, 1), Gemv(1, 1024, 4)),
    *(Gemv(2, 512, 1), Gemv(2, 512, 2), Gemv(2, 1024, 8), Gemv(2, 512, 2, stages=4)),
    *(Gemv(4, 256, 1), Gemv(4, 512, 2), Gemv(4, 512, 4), Gemv(4, 1024, 8), Gemv(4, 512, 4, stages=4)),
    *(Gemv(8, 256, 4), Gemv(8, 512, 8), Gemv(8, 512, 8, stages=4)),
)
ATTENDS = (Attend(64, 4, 2), Attend(64, 8, 2), Attend(32, 4, 3))
SPLITS = (8, 16, 32, 64, 128)
READS = ((2048, 4, 8), (4096, 8, 8), (4096, 8, 16), (8192, 8, 8), (8192, 8, 16), (2048, 4, 32))  # block, warps, steps


@triton.jit
def read_kernel(x, sums, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, STEPS, loop_unroll_factor=4):
        total += tl.load(x + first + step * BLOCK + at, eviction_policy="evict_first")
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def tick_kernel(x, y, PDL: tl.constexpr):
    if PDL:
        tlx.gdc_launch_dependents()
        tlx.gdc_wait()
    at = tl.program_id(0)
    tl.store(y + at, tl.load(x + at) + 1.0)


@triton.jit
def gemv_kernel(x, w, y, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BK)
    total = tl.zeros([BN, BK], tl.float32)
    tiles = w + rows[:, None].to(tl.int64) * K + cols[None, :]
    for k in tl.range(0, K, BK, num_stages=STAGES if STAGES else None):
        if K % BK == 0:
            tile = tl.load(tiles + k, eviction_policy="" if STAGES else "evict_first")
            part = tl.load(x + k + cols)
        else:
            inside = k + cols < K
            tile = tl.load(tiles + k, mask=inside[None, :], other=0.0, eviction_policy="" if STAGES else "evict_first")
            part = tl.load(x + k + cols, mask=inside, other=0.0)
        total += tile.to(tl.float32) * part.to(tl.float32)[None, :]
    tl.store(y + rows, tl.sum(total, axis=1))


@triton.jit
def link_kernel(x, w, y, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tlx.gdc_launch_dependents()
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BK)
    inside = cols < K
    tile = tl.load(w + rows[:, None] * K + cols[None, :], mask=inside[None, :], other=0.0)
    if PDL:
        tlx.gdc_wait()
    part = tl.load(x + cols, mask=inside, other=0.0)
    tl.store(y + rows, tl.sum(tile.to(tl.float32) * part.to(tl.float32)[None, :], axis=1))


@triton.jit
def dot(a, b):
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def attend_kernel(
    q,
    cache,
    table,
    length,
    sums,
    tops,
    weights,
    scale,
    GROUP: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    FIXED: tl.constexpr,
):
    """FIXED: tiles per split when known beforehand (for the interpreter, whose loops want numbers); 0: from length."""
    split, head = tl.program_id(0), tl.program_id(1)
    tokens = tl.load(length)
    share = tl.cdiv(tl.cdiv(tokens, PAGE), tl.num_programs(0)) * PAGE
    begin = split * share
    end = tl.minimum(begin + share, tokens)
    group, d, at = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, TILE)
    heads = group * HKV + head
    query = tl.load(q + heads[:, None] * D + d[None, :], mask=group[:, None] < GROUP, other=0.0)
    top = tl.full([16], float("-inf"), tl.float32)
    weight = tl.zeros([16], tl.float32)
    total = tl.zeros([16, D], tl.float32)
    for step in tl.range(0, FIXED if FIXED else tl.cdiv(tl.maximum(end - begin, 0), TILE), num_stages=STAGES):
        key = begin + step * TILE
        live = key + at < end
        page = tl.load(table + key // PAGE, mask=key < end, other=0)
        slots = page.to(tl.int64) * PAGE + key % PAGE + at
        keys = cache + (slots * (2 * HKV) + head)[:, None] * D + d[None, :]
        k = tl.load(keys, mask=live[:, None], other=0.0)
        score = tl.where(live[None, :], dot(query, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp2(-inf - 0) = 0
        p = tl.exp2(score - base[:, None])
        decay = tl.exp2(top - base)
        v = tl.load(keys + HKV * D, mask=live[:, None], other=0.0)
        weight = weight * decay + tl.sum(p, axis=1)
        total = total * decay[:, None] + dot(p if INTERPRET else p.to(v.dtype), v)
        top = higher
    out = split * (GROUP * HKV) + heads
    tl.store(tops + out, top, mask=group < GROUP)
    tl.store(weights + out, weight, mask=group < GROUP)
    if begin < end:
        tl.store(sums + out[:, None] * D + d[None, :], total, mask=group[:, None] < GROUP)


@triton.jit
def merge_kernel(sums, tops, weights, y, HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    head, d = tl.program_id(0), tl.arange(0, D)
    at = tl.arange(0, SPLITS) * HEADS + head
    top = tl.load(tops + at)
    share = tl.exp2(top - tl.max(top, axis=0))
    parts = tl.load(sums + at[:, None] * D + d[None, :], mask=(share > 0.0)[:, None], other=0.0)  # empty: not written
    weight = tl.sum(share * tl.load(weights + at), axis=0)
    tl.store(y + head * D + d, tl.sum(parts * share[:, None], axis=0) / weight)


def read(x: Tensor, sums: Tensor, block: int, warps: int, steps: int) -> None:
    """x [T] fp32, T a multiple of block * steps; sums: [T / block / steps] fp32."""
    read_kernel[(sums.numel(),)](x, sums, BLOCK=block, STEPS=steps, num_warps=warps)


def tick(x: Tensor, y: Tensor, pdl: bool) -> None:
    """y = x + 1, one program per number."""
    more: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    tick_kernel[(x.numel(),)](x, y, PDL=pdl, num_warps=1, **more)


def gemv(x: Tensor, w: Tensor, y: Tensor, how: Gemv) -> None:
    """x [K], w [N, K], y [N]; N a multiple of how.rows."""
    grid, k = (w.shape[0] // how.rows,), w.shape[1]
    gemv_kernel[grid](x, w, y, K=k, BN=how.rows, BK=how.cols, STAGES=how.stages, num_warps=how.warps)


def link(x: Tensor, w: Tensor, y: Tensor, pdl: bool) -> None:
    """As gemv, for K = LINK: one tile of 2 rows."""
    more: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    link_kernel[(w.shape[0] // 2,)](x, w, y, K=LINK, BN=2, BK=2048, PDL=pdl, num_warps=4, **more)


@dataclass(frozen=True, slots=True)
class Partials:
    """Scratch of one split decode: sums [S, H, D], tops and weights [S, H], all fp32."""

    sums: Tensor
    tops: Tensor
    weights: Tensor

    @staticmethod
    def of(splits: int, heads: int, device: str) -> Partials:
        """Poisoned: what is read without having been written shows."""
        sums = torch.full((splits, heads, HEAD), torch.nan, device=device)
        return Partials(sums, torch.full_like(sums[..., 0], torch.nan), torch.full_like(sums[..., 0], torch.nan))


def attend(
    q: Tensor, cache: Tensor, table: Tensor, length: Tensor, scratch: Partials, y: Tensor, how: Attend, fixed: int = 0
) -> None:
    """q, y [H, D]; cache [pages, PAGE, 2, Hkv, D]; table [pages] int32; length [1] int32."""
    (heads, dim), (splits, *_) = q.shape, scratch.sums.shape
    kv, scale = cache.shape[3], dim**-0.5 * 1.4426950408889634  # log2(e): the kernels use exp2
    parts = (scratch.sums, scratch.tops, scratch.weights)
    sizes = {"GROUP": heads // kv, "HKV": kv, "D": dim, "PAGE": PAGE, "TILE": how.tile, "STAGES": how.stages}
    attend_kernel[(splits, kv)](q, cache, table, length, *parts, scale, **sizes, FIXED=fixed, num_warps=how.warps)
    merge_kernel[(heads,)](*parts, y, HEADS=heads, D=dim, SPLITS=splits, num_warps=8 if splits > 32 else 4)
