"""F1: paged attention of long steps: catching up, prefill, probes and mixtures. One program per tile and kv head.

    keys of a tile     0 . . . . . . . . . . . . . . p0 | p0+1 . . p0+count-1
                       `-- whole tiles: no masks --'`-- masked: the causal end --'

    row i * G + g of a tile: query i, group g            token at position p sees the keys 0 .. p

| argument  | shape                             | dtype            | unit                                             |
|-----------|-----------------------------------|------------------|--------------------------------------------------|
| q         | [T, G, Hkv, D]                    | fp32, bf16, fp16 | rotated; query head g * Hkv + h reads kv head h  |
| cache     | [pages + 1, page_size, 2, Hkv, D] | as q             | one layer; holds this step's k and v already     |
| table     | [S, P]                            | int32            | page ids of each slot in order                   |
| tiles     | [C, 2]                            | int32            | first token, count 0 .. `queries`; see README.md |
| positions | [T]                               | int32            | rises by one within a tile; -1: padding          |
| slots     | [T]                               | int32            | row of `table`                                   |
| out       | [T, G * Hkv * D]                  | as q             | written: every row; zeros where position is -1   |
| queries   |                                   |                  | most tokens of a tile; queries * G <= 128        |

G <= 8; D 16, 32, 64 or 128; page_size a power of two. queries * G just below 64 or 128 wastes least: rows are padded to
a power of two. Entries of the cache past a slot's last position are never used: they may hold NaN. The reference takes
float64 too.

Sources: FlashAttention-2, arXiv 2307.08691 (rows over programs, one pass over the keys).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels import shims
from splitdecode.kernels.attend import LOG2E, attend_ref, blank, bound, meet, pages_of
from splitdecode.kernels.shims import cast, release, wait


class Config(NamedTuple):
    """One shape's choices: keys per step of the loops, warps, stages."""

    keys: int
    warps: int
    stages: int


_CONFIGS: dict[tuple[str, tuple[int, ...]], Config] = {}


def _rule(rows: int, dim: int, itemsize: int) -> Config:
    if itemsize == 4:  # exact products have no matrix instructions: small tiles, or they spill
        return Config(16, 8, 2)
    return Config(64, 4 if rows <= 64 else 8, 3)


@triton.jit(do_not_specialize=["pages", "tokens"])
def _extend_kernel(
    q, cache, table, tiles, positions, slots, out, pages, tokens, scale,
    G: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    wait(PDL)
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a sequence's last tile has most keys: it starts first
    first, count = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
    position = tl.load(positions + first, mask=count > 0, other=0)
    slot = tl.load(slots + first, mask=count > 0, other=0)
    row, heads = table + slot.to(tl.int64) * pages, cache + head * D
    end = tl.where(count > 0, position + count, 0)
    page = pages_of(row, 0, end, PAGE, KEYS)
    m, d = tl.arange(0, M), tl.arange(0, D)
    live, last = count * G, position + m // G
    at = (first * G + m)[:, None] * (HKV * D) + head * D + d[None, :]
    query = tl.load(q + at, mask=(m < live)[:, None], other=0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    weight = tl.zeros([M], tl.float32)
    total = tl.zeros([M, D], tl.float32)
    whole = tl.minimum(position + 1, end) // KEYS
    for step in tl.range(0, bound(whole), num_stages=STAGES):
        key = step * KEYS
        upcoming = pages_of(row, key + KEYS, end, PAGE, KEYS)
        top, weight, total = meet(
            query, top, weight, total, heads, page, key, end, last, scale, HKV, D, PAGE, KEYS, False
        )
        page = upcoming
    for step in tl.range(0, bound(tl.cdiv(end, KEYS) - whole), num_stages=STAGES):
        key = (whole + step) * KEYS
        upcoming = pages_of(row, key + KEYS, end, PAGE, KEYS)
        top, weight, total = meet(
            query, top, weight, total, heads, page, key, end, last, scale, HKV, D, PAGE, KEYS, True
        )
        page = upcoming
    weight = tl.where(m < live, weight, 1.0)
    tl.store(out + at, cast(total / weight[:, None], out.dtype.element_ty), mask=(m < live)[:, None])
    blank(positions, out + head * D, tokens, G, HKV, D)


def extend_ref(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    tiles: Tensor,
    positions: Tensor,
    slots: Tensor,
    out: Tensor,
    *,
    queries: int,
    pdl: bool = False,
) -> None:
    """The contract above: what attend computes."""
    attend_ref(q, cache, table, tiles, positions, slots, None, None, out, queries=queries)


def extend(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    tiles: Tensor,
    positions: Tensor,
    slots: Tensor,
    out: Tensor,
    *,
    queries: int,
    pdl: bool = False,
) -> None:
    """Writes out as the contract above says."""
    tokens, groups, heads, dim = q.shape
    page, rows = cache.shape[1], queries * groups
    if not 1 <= rows <= 128:
        raise ValueError(
            f"extend: queries: found {queries} with {groups} groups, expected queries * groups in 1 .. 128"
        )
    if page & (page - 1):
        raise ValueError(f"extend: page_size: found {page}, expected a power of two")
    if cache.shape[2:] != (2, heads, dim):
        raise ValueError(f"extend: cache: found {list(cache.shape)}, expected [.., {page}, 2, {heads}, {dim}]")
    if out.shape != (tokens, groups * heads * dim):
        raise ValueError(f"extend: out: found {list(out.shape)}, expected [{tokens}, {groups * heads * dim}]")
    height = max(16, triton.next_power_of_2(rows))
    how = shims.tuned(_CONFIGS, q.device, (height, dim, q.element_size()), _rule)
    _extend_kernel[(tiles.shape[0], heads)](
        q, cache, table, tiles, positions, slots, out, table.shape[1], tokens, dim**-0.5 * LOG2E,
        G=groups, HKV=heads, D=dim, PAGE=page, M=height, KEYS=how.keys, STAGES=how.stages,
        PDL=shims.wants_pdl(pdl), num_warps=how.warps, **shims.launch_options(pdl),
    )  # fmt: skip
