"""F1: the id of a row that is cut: min_p, top_k, top_p keep a prefix of (value descending, id ascending); Gumbel-max.

`sample` left the id that wins among all. If the prefix holds it, it wins there too: done. If not, nothing behind it is
kept either: take the winner among the ids before it, and ask again.

    kept:   count before < top_k   and   value - top >= log_min_p   and   mass before < top_p * total
    mass:   sum of exp(value - top);   total: the mass of what min_p and top_k leave

Count and mass before an id are one sum over the blocks whose maximum reaches its value. Blocks are sorted by their
maxima once, so the sum ends early, ids are never sorted, and equals need no care. With top_k, bounds of the total
suffice: they are halved, on integers that sort like the floats, only while the verdict hangs on them. After a refusal
the range of what can be kept is halved too: to perturb a block costs more than to sum it.

| argument        | shape         | dtype | unit                                                                       |
|-----------------|---------------|-------|----------------------------------------------------------------------------|
| draws           | [N, 6]        | int32 | see state.py                                                               |
| state           | SamplingState |       |                                                                            |
| scratch.scaled  | [>= N, V]     | fp32  | what `sample` wrote                                                        |
| scratch.peaks   | [>= N, B]     | fp32  | what `sample` wrote                                                        |
| scratch.best_id | [>= N, B]     | int32 | written: blocks by falling maximum                                         |
| ids             | [N]           | int32 | what `sample` wrote; rewritten for rows with CUT that have an id           |

The reference takes float64 too; it ranks whole rows and leaves peaks and best_id alone. Masses are summed in fp32: a
verdict of top_p closer than that rounding may fall the other way.

Sources: top_k: Fan et al., arXiv 1805.04833; top_p: Holtzman et al., arXiv 1904.09751; min_p: Nguyen et al., arXiv
2407.01082; drawing first and judging after: sorting-free sampling in FlashInfer, 2025.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels import shims
from splitdecode.kernels import state as bits
from splitdecode.kernels.host.sampling import gumbel_ref
from splitdecode.kernels.philox import noise
from splitdecode.kernels.sample import BLOCK, CUT, SampleScratch, draw, leader
from splitdecode.kernels.shims import release, wait
from splitdecode.kernels.state import SamplingState


class Config(NamedTuple):
    """blocks summed at a time, warps."""

    group: int
    warps: int


_CONFIGS: dict[tuple[str, tuple[int, ...]], Config] = {}


def _rule(vocab: int) -> Config:
    """64 values a thread in flight: what one multiprocessor can stream from the L2. A warp owns columns, not rows."""
    return Config(16, 8)


@triton.jit
def order_of(x):
    """fp32 <-> an integer that sorts like it; its own inverse but for the type."""
    k = x.to(tl.int32, bitcast=True)
    return tl.where(k < 0, k ^ 0x7FFFFFFF, k)


@triton.jit
def value_of(key):
    """The float of an int64 key."""
    k = key.to(tl.int32)
    return tl.where(k < 0, k ^ 0x7FFFFFFF, k).to(tl.float32, bitcast=True)


@triton.jit
def by_peak(peak, at, blocks, k, BLOCKS: tl.constexpr):
    """Writes the blocks by falling maximum; returns the k-th largest maximum, -inf where there are fewer blocks."""
    packed = tl.sort(order_of(peak).to(tl.int64) * 4294967296 + at, descending=True)
    tl.store(blocks + at, (packed & 0xFFFFFFFF).to(tl.int32), mask=at < BLOCKS)
    tl.debug_barrier()  # all threads read what all threads wrote
    kth = tl.max(tl.where(at == k - 1, packed >> 32, -0x80000000), axis=0)
    return tl.where(k <= BLOCKS, value_of(kth), float("-inf"))


@triton.jit
def before(row, value, bound, V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """How many ids that pass min_p stand before (value, bound), and their mass."""
    line, blocks, peak, top, ratio = row
    reach = tl.sum(((peak >= value) & (peak - top >= ratio)).to(tl.int32), axis=0)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < reach:
        at = start + tl.arange(0, GROUP)
        block = tl.load(blocks + at, mask=at < reach, other=0)
        v = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(line + v, mask=(at < reach)[:, None] & (v < V), other=float("-inf"))
        here = ((x > value) | ((x == value) & (v < bound))) & (x - top >= ratio)
        count += tl.sum(here.to(tl.int32), axis=0)
        mass += tl.sum(tl.where(here, tl.exp(x - top), 0.0), axis=0)
        start += GROUP
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def settle(
    row, value, count, mass, k, share, low, least, most, V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    """Bounds of the mass of the first k ids, close enough for a verdict on `mass`: that of `count` ids before `value`.

    The first `above` ids weigh `over` and the others are at most value_of(high); k ids or more are at least
    value_of(low). Returns the new low, least and most.
    """
    top = row[3]
    above, over = count, mass
    lower, high = order_of(low).to(tl.int64), order_of(value).to(tl.int64)
    least = tl.maximum(least, over + (k - above) * tl.exp(low - top))
    most = tl.minimum(most, over + (k - above) * tl.exp(value - top))
    while (share * least <= mass) & (mass < share * most) & (high - lower > 1):
        middle = (lower + high) >> 1
        edge = value_of(middle)
        n, m = before(row, edge, V, V, BLOCK, GROUP)
        most = tl.minimum(most, m + (k - n) * tl.exp(edge - top))  # n > k: those too many are at least `edge`
        if n >= k:
            lower = middle
        else:
            high, above, over = middle, n, m
        least = tl.maximum(least, over + (k - above) * tl.exp(value_of(lower) - top))
    return value_of(lower), least, most


@triton.jit
def refused(row, edge, k, limit, V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """A value below which nothing is kept: `edge`, raised while more than GROUP blocks reach it; limit: of mass."""
    peak, top = row[2], row[3]
    low, high = order_of(edge).to(tl.int64), order_of(top).to(tl.int64)
    while (tl.sum((peak >= value_of(low)).to(tl.int32), axis=0) > GROUP) & (high - low > 4096):
        middle = (low + high) >> 1
        count, mass = before(row, value_of(middle), V, V, BLOCK, GROUP)
        if (count >= k) | (mass >= limit):
            low = middle
        else:
            high = middle
    return value_of(low)


@triton.jit
def winner(row, edge, value, bound, key, position, stream, attempt, V: tl.constexpr, BLOCK: tl.constexpr):
    """Gumbel-max over the ids before (value, bound) that are `edge` or more."""
    line, blocks, peak, _, _ = row
    reach = tl.sum((peak >= edge).to(tl.int32), axis=0)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    firsts = tl.full([BLOCK], V, tl.int32)
    at = 0
    while at < reach:
        first = tl.load(blocks + at) * BLOCK
        v = first + tl.arange(0, BLOCK)
        x = tl.load(line + v, mask=v < V, other=float("-inf"))
        here = ((x > value) | ((x == value) & (v < bound))) & (x >= edge)
        noisy = tl.where(here, x + noise(first, key, position, stream, attempt, BLOCK), float("-inf"))
        firsts = tl.where((noisy > tops) | ((noisy == tops) & (v < firsts)), v, firsts)
        tops = tl.maximum(tops, noisy)
        at += 1
    return leader(tops, firsts)


@triton.jit
def _nucleus_kernel(
    scaled, peaks, blocks, draws, kind, key, top_k, top_p, log_min_p, ids,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PEAKS: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    i = tl.program_id(0)
    wait(PDL)
    token, slot, position, stream, attempt, _ = draw(draws, i)
    chosen = tl.load(ids + i)
    if (token < 0) | (chosen < 0) | ((tl.load(kind + slot) & CUT) == 0):
        return
    k, seed = tl.load(top_k + slot), tl.load(key + slot)
    share = tl.maximum(tl.load(top_p + slot), 1.1754943508222875e-38)  # so that the first id is always kept
    ratio = tl.maximum(tl.load(log_min_p + slot), -3.4028234663852886e38)  # so that -inf passes no minimum
    line, blocks = scaled + i.to(tl.int64) * V, blocks + i * BLOCKS
    at = tl.arange(0, PEAKS)
    peak = tl.load(peaks + i * BLOCKS + at, mask=at < BLOCKS, other=float("-inf"))
    top = tl.max(peak, axis=0)
    low = by_peak(peak, at, blocks, k, BLOCKS)  # k ids or more are at least this
    row = (line, blocks, peak, top, ratio)
    least, most = 1.0, float("inf")  # bounds of the total; the first id's mass is one
    if (share < 1.0) & (low - top < ratio):
        count, most = before(row, float("-inf"), 0, V, BLOCK, GROUP)
        least = tl.where(count <= k, most, least)
        k = tl.minimum(k, count)
    low = tl.maximum(low, top + ratio)
    again = True
    while again:
        value = tl.load(line + chosen)
        count, mass = before(row, value, chosen, V, BLOCK, GROUP)
        again = (value - top < ratio) | (count >= k)
        if (share < 1.0) & (not again):
            low, least, most = settle(row, value, count, mass, k, share, low, least, most, V, BLOCK, GROUP)
            again = mass >= share * least
        if again:
            edge = refused(row, tl.maximum(value, low), k, share * most, V, BLOCK, GROUP)
            best, first = winner(row, edge, value, chosen, seed, position, stream, attempt, V, BLOCK)
            again = best > float("-inf")  # always; but a kernel that hangs takes the device with it
            chosen = tl.where(again, first, chosen)
    tl.store(ids + i, chosen)


def nucleus_ref(draws: Tensor, state: SamplingState, scratch: SampleScratch, ids: Tensor, *, pdl: bool = False) -> None:
    """The contract above."""
    real, vocab, rows = state.temperature.dtype, state.vocab, draws.shape[0]
    live = draws[:, 0] >= 0
    slot = torch.where(live, draws[:, 1], 0).long()
    cut = live & (ids >= 0) & ((state.kind[slot] & bits.CUT) != 0)
    value, ranked = scratch.scaled[:rows].sort(dim=1, descending=True, stable=True)
    relative = value - value[:, :1]
    rank = torch.arange(vocab, device=draws.device)
    keep = (rank < state.top_k[slot, None]) & (relative >= state.log_min_p[slot, None]) & (relative > -torch.inf)
    mass = torch.where(keep, relative.exp(), 0.0)
    upto, top_p = mass.cumsum(1), state.top_p[slot, None].clamp(min=torch.finfo(torch.float32).tiny)
    keep &= (upto - mass < top_p * upto[:, -1:]) | (top_p >= 1)
    position, stream, attempt = draws[:, 2:5].long().unbind(1)
    noisy = value + gumbel_ref(ranked, state.key[slot], position, stream, attempt, real)
    noisy = torch.where(keep, noisy, -torch.inf)
    tied = noisy == noisy.amax(1, keepdim=True)
    found = torch.where(tied, ranked, vocab).amin(1)
    ids.copy_(torch.where(cut, found, ids))


def nucleus(draws: Tensor, state: SamplingState, scratch: SampleScratch, ids: Tensor, *, pdl: bool = False) -> None:
    """Rewrites the ids of rows that are cut, as the contract above says."""
    rows, vocab = draws.shape[0], state.vocab
    if scratch.scaled.shape[0] < rows or scratch.scaled.shape[1] != vocab:
        raise ValueError(f"nucleus: scratch: found {list(scratch.scaled.shape)}, expected at least [{rows}, {vocab}]")
    if not rows:
        return
    blocks = scratch.peaks.shape[1]
    width = triton.next_power_of_2(blocks)
    how = shims.tuned(_CONFIGS, ids.device, (vocab,), _rule)
    _nucleus_kernel[(rows,)](
        scratch.scaled, scratch.peaks, scratch.best_id, draws, state.kind, state.key, state.top_k, state.top_p,
        state.log_min_p, ids, V=vocab, BLOCK=BLOCK, BLOCKS=blocks, PEAKS=max(16, width),
        GROUP=min(how.group, width), PDL=shims.wants_pdl(pdl), num_warps=how.warps, **shims.launch_options(pdl),
    )  # fmt: skip
