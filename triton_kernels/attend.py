"""F1: paged attention of a few tokens per sequence: decode, reading along, verification. Keys are split over programs.

    keys of tile c     0 . . . . . | . . . . . . | . . . . . . | . . p0 p0+1       chunk: whole tiles of keys
                       split 0       split 1       split 2       split 3           splits past the last key: empty

Program (c, h, s) meets the queries of tile c, kv head h, with the keys of split s and leaves its part in scratch; the
program that arrives last merges the parts in the order of the splits, so that the result does not depend on who was
last. A tile within one split is written at once. All programs, the idle first, ask the L2 for weights to come.

    row i * G + g of a tile: query i, group g            token at position p sees the keys 0 .. p

| argument  | shape                             | dtype            | unit                                             |
|-----------|-----------------------------------|------------------|--------------------------------------------------|
| q         | [T, G, Hkv, D]                    | fp32, bf16, fp16 | rotated; query head g * Hkv + h reads kv head h  |
| cache     | [pages + 1, page_size, 2, Hkv, D] | as q             | one layer; holds this step's k and v already     |
| table     | [S, P]                            | int32            | page ids of each slot in order                   |
| tiles     | [C, 2]                            | int32            | first token, count 0 .. `queries`; see README.md |
| positions | [T]                               | int32            | rises by one within a tile; -1: padding          |
| slots     | [T]                               | int32            | row of `table`                                   |
| scratch   | AttendScratch                     | fp32             | written before it is read                        |
| counters  | [>= C * Hkv]                      | int32            | zero before the call; arrivals after it          |
| out       | [T, G * Hkv * D]                  | as q             | written: every row; zeros where position is -1   |
| queries   | 1 .. 16                           |                  | most tokens of a tile                            |
| prefetch  | any tensor, or None               |                  | its first 8 MiB are requested into the L2        |

G <= 8; D 16, 32, 64 or 128; page_size and splits powers of two. Entries of the cache past a slot's last position are
never used: they may hold NaN. The reference takes float64 too and ignores scratch and counters.

Sources: split keys and their merge: Flash-Decoding (Dao et al. 2023); base-2 online softmax: FlashAttention-2,
arXiv 2307.08691.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels import shims
from splitdecode.kernels.host.attention import LayerCache, PagedBatch, attention_ref, plan_attention
from splitdecode.kernels.shims import INTERPRET, cast, dot, release, wait

LOG2E = 1.4426950408889634
_PROGRAMS = 128  # about one per multiprocessor
_PREFETCH = 8 << 20  # bytes: what the memory delivers in the time attention leaves it idle
_LINE = tl.constexpr(128)  # bytes of a line of the L2


@dataclass(frozen=True, slots=True)
class AttendScratch:
    """What each split found, fp32: parts [C, Hkv, splits, rows, D], its attention over its own keys, and
    sizes [C, Hkv, splits, rows], log2 of the sum of its weights (-inf: it has no key the row sees).

    One scratch serves all calls with at most its tiles and rows; rows = queries * G.
    """

    parts: Tensor
    sizes: Tensor

    @property
    def splits(self) -> int:
        return self.parts.shape[2]

    @staticmethod
    def new(tiles: int, kv_heads: int, splits: int, rows: int, dim: int, device: torch.device | str) -> AttendScratch:
        """Uninitialised."""
        parts = torch.empty(tiles, kv_heads, splits, rows, dim, device=device)
        return AttendScratch(parts, torch.empty_like(parts[..., 0]))


def splits_for(tiles: int, kv_heads: int) -> int:
    """Splits that give 128 to 255 programs, a power of two; 1 where tiles and heads are that many already."""
    return 1 << (-(-_PROGRAMS // (tiles * kv_heads)) - 1).bit_length()


class Config(NamedTuple):
    """One shape's choices.  keys: per step of the loop.  unit: a split is a multiple of so many keys.
    merge: rows and parts per step, stages."""

    keys: int
    unit: int
    warps: int
    stages: int
    merge: tuple[int, int, int]


_CONFIGS: dict[tuple[str, tuple[int, ...]], Config] = {}


def _rule(rows: int, dim: int, itemsize: int) -> Config:
    """Two tiles of k and v in flight. `unit`: one program reads all parts, so a part must be worth its merge; the
    more rows, the more keys (predicted: 0.04 us a row and part, 0.3 us a tile of keys)."""
    warps = 4 if rows <= 16 else 8
    if itemsize == 4:  # exact products have no matrix instructions: small tiles, or they spill
        return Config(16, 64, warps, 2, (8, 4, 2))
    return Config(64, 128 if rows <= 16 else 256, warps, 3, (8, 4, 4))


@triton.jit
def bound(n):
    """A loop's bound that was loaded: the interpreter of Triton 3.6 wants a number there."""
    if INTERPRET:
        return n.handle.data.item()
    else:
        return n


@triton.jit
def pages_of(row, key, end, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """Page ids of the KEYS positions from `key`, a multiple of KEYS: one where they share a page, else one each.

    row: the slot's page ids.  From `end` on: 0.
    """
    if PAGE >= KEYS:
        return tl.load(row + key // PAGE, mask=key < end, other=0)
    else:
        at = key + tl.arange(0, KEYS)
        return tl.load(row + at // PAGE, mask=at < end, other=0)


@triton.jit
def meet(
    query, top, weight, total, heads, page, key, end, last, scale,
    HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax: query [M, D] meets KEYS keys from `key`; returns top, weight, total with them.

    heads: the kv head in the cache.  MASKED: keys from `end` on are not loaded, row m sees keys up to last[m]; a row
    that has seen none keeps top = -inf.
    """
    d = tl.arange(0, D)
    at = key + tl.arange(0, KEYS)
    if PAGE >= KEYS:
        k_at = heads + (page.to(tl.int64) * PAGE + key % PAGE) * (2 * HKV * D)
        k_at += tl.arange(0, KEYS)[:, None] * (2 * HKV * D) + d[None, :]
    else:
        k_at = heads + ((page.to(tl.int64) * PAGE + at % PAGE) * (2 * HKV * D))[:, None] + d[None, :]
    if MASKED:
        k = tl.load(k_at, mask=(at < end)[:, None], other=0.0)
        v = tl.load(k_at + HKV * D, mask=(at < end)[:, None], other=0.0)
        score = tl.where(at[None, :] <= last[:, None], dot(query, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp2(-inf - 0) = 0
    else:
        k = tl.load(k_at)
        v = tl.load(k_at + HKV * D)
        score = dot(query, tl.trans(k)) * scale
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = higher
    p = tl.exp2(score - base[:, None])
    decay = tl.exp2(top - base)
    weight = weight * decay + tl.sum(p, axis=1)  # before the product: p need not outlive it
    return higher, weight, total * decay[:, None] + dot(cast(p, v.dtype), v)


@triton.jit
def blank(positions, y, tokens, G: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr):
    """Zeros in the rows of padding tokens, which the programs of axis 0 share; y: out at the kv head."""
    first = tl.program_id(0) * 64
    d = tl.arange(0, D)
    while first < tokens * G:
        m = first + tl.arange(0, 64)
        padding = tl.load(positions + m // G, mask=m < tokens * G, other=0) < 0
        tl.store(y + m[:, None] * (HKV * D) + d[None, :], tl.zeros([64, D], y.dtype.element_ty), mask=padding[:, None])
        first += tl.num_programs(0) * 64


@triton.jit
def _request(weights, lines, LINES: tl.constexpr):
    """This program's share of the lines of `weights`."""
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    line = tl.minimum(program * LINES + tl.arange(0, LINES), lines - 1)
    shims.prefetch(weights.to(tl.pointer_type(tl.uint8)) + line * _LINE)


@triton.jit
def _merge(
    parts, sizes, first, used, y, live,
    HKV: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows below `live` of y from the parts first .. first + used - 1; other programs wrote them, so past the L1."""
    d = tl.arange(0, D)[None, None, :]
    for m0 in tl.range(0, ROWS, BLOCK):
        m = m0 + tl.arange(0, BLOCK)[:, None]
        top = tl.full([BLOCK, 1], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK, 1], tl.float32)
        total = tl.zeros([BLOCK, D], tl.float32)
        for step in tl.range(0, bound(tl.cdiv(used, STEP)), num_stages=STAGES):
            s = step * STEP + tl.arange(0, STEP)[None, :]
            at = ((first + s) * ROWS + m)[:, :, None]
            there = ((s < used) & (m < live))[:, :, None]
            size = tl.load(sizes + at, mask=there, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(parts + at * D + d, mask=there, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(top, tl.max(size, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            share = tl.exp2(size - base[:, None, :])
            decay = tl.exp2(top - base)
            weight = weight * decay + tl.sum(share, axis=1)
            total = total * decay + tl.sum(part * share, axis=1)
            top = higher
        out = cast(total / tl.where(m < live, weight, 1.0), y.dtype.element_ty)
        tl.store(y + m * (HKV * D) + tl.arange(0, D)[None, :], out, mask=m < live)


@triton.jit(do_not_specialize=["pages", "tokens", "lines"])
def _attend_kernel(
    q, cache, table, tiles, positions, slots, parts, sizes, counters, out, coming,
    pages, tokens, lines, scale,
    G: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, QUERIES: tl.constexpr,
    SPLITS: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, DEPTH: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait(PDL)
    first, count = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
    position = tl.load(positions + first, mask=count > 0, other=0)
    slot = tl.load(slots + first, mask=count > 0, other=0)
    length = tl.where(count > 0, position + count, 0)
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), UNIT) * UNIT
    begin = split * chunk
    end = tl.minimum(begin + chunk, length)
    if split == SPLITS - 1:  # idle but for the longest sequences
        blank(positions, out + head * D, tokens, G, HKV, D)
    if begin >= length:
        if LINES:
            _request(coming, lines, LINES)
        return
    row, heads = table + slot.to(tl.int64) * pages, cache + head * D
    page = pages_of(row, begin, end, PAGE, KEYS)
    m, d = tl.arange(0, M), tl.arange(0, D)
    live, last = count * G, position + m // G
    at = (first * G + m)[:, None] * (HKV * D) + head * D + d[None, :]
    query = tl.load(q + at, mask=(m < live)[:, None], other=0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    weight = tl.zeros([M], tl.float32)
    total = tl.zeros([M, D], tl.float32)
    for step in tl.range(0, bound(tl.cdiv(end - begin, KEYS)), num_stages=STAGES):
        key = begin + step * KEYS
        upcoming = pages_of(row, key + KEYS, end, PAGE, KEYS)
        top, weight, total = meet(
            query, top, weight, total, heads, page, key, end, last, scale, HKV, D, PAGE, KEYS, True
        )
        page = upcoming
    if LINES:
        _request(coming, lines, LINES)
    used = tl.cdiv(length, chunk)
    weight = tl.where(weight > 0.0, weight, 1.0)  # a row that sees no key of this split: zeros, of size log2(0)
    total /= weight[:, None]
    if used == 1:
        tl.store(out + at, cast(total, out.dtype.element_ty), mask=(m < live)[:, None])
    elif SPLITS > 1:
        first_part = (tile * HKV + head) * SPLITS
        part = (first_part + split) * (QUERIES * G) + m
        tl.store(parts + part[:, None] * D + d[None, :], total, mask=(m < live)[:, None])
        tl.store(sizes + part, top + tl.log2(weight), mask=m < live)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(counters + tile * HKV + head, 1, sem="acq_rel") == used - 1:
            y = out + first * (G * HKV * D) + head * D
            _merge(parts, sizes, first_part, used, y, live, HKV, D, QUERIES * G, BLOCK, STEP, DEPTH)


def attend_ref(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    tiles: Tensor,
    positions: Tensor,
    slots: Tensor,
    scratch: AttendScratch | None,
    counters: Tensor | None,
    out: Tensor,
    *,
    queries: int,
    pdl: bool = False,
    prefetch: Tensor | None = None,
) -> None:
    """The contract above, by the host's ragged attention: one row per tile."""
    out.zero_()
    held = tiles[tiles[:, 1] > 0].long()
    if not len(held):
        return
    first, count = held.unbind(1)
    size = cache.shape[1]
    length = positions[first] + count
    tokens = torch.cat([torch.arange(at, at + n) for at, n in held.tolist()]).to(q.device)
    pages = [table[slot, : -(-n // size)] for slot, n in zip(slots[first].tolist(), length.tolist(), strict=True)]

    def offsets(lengths: Tensor) -> Tensor:
        return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int().cpu()

    batch = PagedBatch(
        tokens=tokens.cpu(),
        positions=positions[tokens].cpu(),
        slots=tokens.cpu(),  # where k and v would go: they are there
        cu_q=offsets(count),
        kv_len=length.int().cpu(),
        page_indptr=offsets(torch.tensor([len(own) for own in pages])),
        pages=torch.cat(pages).cpu(),
        page_size=size,
    )
    picked = q[tokens]
    layer = LayerCache(cache.flatten(0, 1), None, None, None)
    out[tokens] = attention_ref(picked, layer, plan_attention(batch, picked))


def _lines(target: Tensor | None, programs: int) -> tuple[int, int]:
    """Lines to request, and how many each program requests (a power of two); none where nothing can be."""
    lines = 0 if target is None or INTERPRET.value else min(target.nbytes, _PREFETCH) // _LINE.value
    return lines, triton.next_power_of_2(-(-lines // programs)) if lines else 0


def attend(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    tiles: Tensor,
    positions: Tensor,
    slots: Tensor,
    scratch: AttendScratch,
    counters: Tensor,
    out: Tensor,
    *,
    queries: int,
    pdl: bool = False,
    prefetch: Tensor | None = None,
) -> None:
    """Writes out as the contract above says."""
    tokens, groups, heads, dim = q.shape
    page, count, splits, rows = cache.shape[1], tiles.shape[0], scratch.splits, queries * groups
    if not 1 <= queries <= 16:
        raise ValueError(f"attend: queries: found {queries}, expected 1 .. 16")
    if page & (page - 1) or splits & (splits - 1):
        raise ValueError(f"attend: page_size and splits: found {page} and {splits}, expected powers of two")
    if cache.shape[2:] != (2, heads, dim):
        raise ValueError(f"attend: cache: found {list(cache.shape)}, expected [.., {page}, 2, {heads}, {dim}]")
    if out.shape != (tokens, groups * heads * dim):
        raise ValueError(f"attend: out: found {list(out.shape)}, expected [{tokens}, {groups * heads * dim}]")
    wanted = [count, heads, splits, rows, dim]
    if any(have < want for have, want in zip(scratch.parts.shape, wanted, strict=True)):
        raise ValueError(f"attend: scratch: found {list(scratch.parts.shape)}, expected at least {wanted}")
    if counters.numel() < count * heads:
        raise ValueError(f"attend: counters: found {counters.numel()}, expected at least {count * heads}")
    height = max(16, triton.next_power_of_2(rows))
    how = shims.tuned(_CONFIGS, q.device, (height, dim, q.element_size()), _rule)
    grid, (block, step, depth) = (count, heads, splits), how.merge
    lines, share = _lines(prefetch, count * heads * splits)
    _attend_kernel[grid](
        q, cache, table, tiles, positions, slots, scratch.parts, scratch.sizes, counters, out,
        out if prefetch is None else prefetch, table.shape[1], tokens, lines, dim**-0.5 * LOG2E,
        G=groups, HKV=heads, D=dim, PAGE=page, QUERIES=queries, SPLITS=splits, M=height,
        KEYS=how.keys, UNIT=how.unit, STAGES=how.stages, BLOCK=block, STEP=step, DEPTH=depth,
        LINES=share, PDL=shims.wants_pdl(pdl), num_warps=how.warps, **shims.launch_options(pdl),
    )  # fmt: skip
