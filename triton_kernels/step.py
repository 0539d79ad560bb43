"""F1: what opens and closes a step: edits of what lies on the device, and what the next step of a graph starts from.

    patch         table[slot, index] = value
    count_patch   counts[slot, id] += delta: penalties are counted and rewound by the host
    advance       ids -> outbox, last; tokens, positions, left, tiles and draws of the next step

`patch` and `count_patch`:

| argument | shape  | dtype | unit                                                     |
|----------|--------|-------|----------------------------------------------------------|
| edits    | [E, 3] | int32 | slot (below zero: nothing), index or id, value or delta  |
| table    | [S, P] | int32 | written; no two edits of one place                       |
| counts   | [S, V] | int32 | added to                                                 |

`advance`; with `more`, another step of the same graph follows: T = C = N, and token, tile and draw i are one row:

| argument     | shape        | dtype         | unit                                                                   |
|--------------|--------------|---------------|------------------------------------------------------------------------|
| tokens       | [T]          | int32         | with `more` written: the id                                            |
| positions    | [T]          | int32         | with `more` written: one more; -1 where a row stops                    |
| left         | [T]          | int32         | steps a row still takes, this one included; with `more` one less       |
| tiles        | [C, 2]       | int32         | with `more` written: count 0 where a row stops                         |
| draws        | [N, 6]       | int32         | with `more` written: position one more; token -1 where a row stops     |
| ids          | [N]          | int32         | below zero: none                                                       |
| logprobs     | [N]          | fp32, or None | of ids                                                                 |
| last         | [S]          | int32         | written for rows with FEEDS_DEVICE that have an id                     |
| ends         | [S, E]       | int32         | ids at which a slot stops; -1: none                                    |
| outbox       | [F, K, >= N] | int32         | [place, step] written: ids, NOTHING for padding; may be pinned         |
| out_logprobs | as outbox    | fp32, or None | [place, step] written: logprobs, NaN for padding                       |
| place        | [1]          | int32         | 0 .. F - 1                                                             |

A row goes on while it has steps left, has an id, and that id does not end its slot. Otherwise it is padding from here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels import shims
from splitdecode.kernels import state as bits
from splitdecode.kernels.sample import FEEDS_DEVICE, NOTHING
from splitdecode.kernels.shims import release, wait

_BLOCK = 128  # rows per program


@triton.jit(do_not_specialize=["count"])
def _patch_kernel(edits, target, count, WIDTH: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    slot = tl.load(edits + i * 3, mask=i < count, other=-1)
    real = slot >= 0
    index, value = tl.load(edits + i * 3 + 1, mask=real, other=0), tl.load(edits + i * 3 + 2, mask=real, other=0)
    at = target + slot.to(tl.int64) * WIDTH + index
    if ADD:
        tl.atomic_add(at, value, mask=real, sem="relaxed")
    else:
        tl.store(at, value, mask=real)


@triton.jit(do_not_specialize=["count"])
def _advance_kernel(
    tokens, positions, left, tiles, draws, ids, logprobs, last, ends, outbox, out_logprobs, place, count,
    STEP: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, ENDS: tl.constexpr, MORE: tl.constexpr,
    LOGPROBS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    wait(PDL)
    live = tl.load(draws + i * 6, mask=inside, other=-1) >= 0
    slot = tl.load(draws + i * 6 + 1, mask=live, other=0).to(tl.int64)
    chosen = tl.load(ids + i, mask=live, other=NOTHING)
    out = (tl.load(place) * STEPS + STEP) * WIDTH + i
    tl.store(outbox + out, chosen, mask=inside)
    if LOGPROBS:
        tl.store(out_logprobs + out, tl.load(logprobs + i, mask=live, other=float("nan")), mask=inside)
    feeds = (tl.load(draws + i * 6 + 5, mask=live, other=0) & FEEDS_DEVICE) != 0
    tl.store(last + slot, chosen, mask=feeds & (chosen >= 0))
    if MORE:
        budget = tl.load(left + i, mask=inside, other=0) - 1
        tl.store(left + i, budget, mask=inside)
        on = (budget > 0) & (chosen >= 0)
        for e in range(ENDS):
            on = on & (chosen != tl.load(ends + slot * ENDS + e, mask=live, other=-1))
        stops = inside & ~on
        tl.store(tokens + i, chosen, mask=on)
        position = tl.load(positions + i, mask=on, other=0) + 1
        tl.store(positions + i, tl.where(on, position, -1), mask=inside)
        tl.store(draws + i * 6 + 2, tl.load(draws + i * 6 + 2, mask=on, other=0) + 1, mask=on)
        tl.store(draws + i * 6, -1, mask=stops)
        tl.store(tiles + i * 2 + 1, 0, mask=stops)


def patch_ref(edits: Tensor, table: Tensor, *, pdl: bool = False) -> None:
    """The contract above."""
    real, (slot, index, value) = edits[:, 0] >= 0, edits.long().unbind(1)
    flat = torch.cat((table.flatten(), table.new_zeros(1)))  # the last place takes edits that do nothing
    at = torch.where(real, slot * table.shape[1] + index, table.numel())
    flat.scatter_(0, at, value.to(table.dtype))
    table.copy_(flat[:-1].view_as(table))


def count_patch_ref(edits: Tensor, counts: Tensor, *, pdl: bool = False) -> None:
    """The contract above."""
    real, (slot, index, delta) = edits[:, 0] >= 0, edits.long().unbind(1)
    at = (torch.where(real, slot, 0), torch.where(real, index, 0))
    counts.index_put_(at, torch.where(real, delta, 0).to(counts.dtype), accumulate=True)


def advance_ref(
    tokens: Tensor,
    positions: Tensor,
    left: Tensor,
    tiles: Tensor,
    draws: Tensor,
    ids: Tensor,
    logprobs: Tensor | None,
    last: Tensor,
    ends: Tensor,
    outbox: Tensor,
    out_logprobs: Tensor | None,
    place: Tensor,
    step: int,
    *,
    more: bool,
    pdl: bool = False,
) -> None:
    """The contract above."""
    live = draws[:, 0] >= 0
    slot = torch.where(live, draws[:, 1], 0).long()
    chosen = torch.where(live, ids, bits.NOTHING)
    outbox[place.long(), step, : len(draws)] = chosen
    if logprobs is not None and out_logprobs is not None:
        out_logprobs[place.long(), step, : len(draws)] = torch.where(live, logprobs, torch.nan)
    feeds = live & ((draws[:, 5] & bits.FEEDS_DEVICE) != 0) & (chosen >= 0)
    room = torch.cat((last, last.new_zeros(1)))
    room.scatter_(0, torch.where(feeds, slot, len(last)), chosen)
    last.copy_(room[:-1])
    if more:
        left -= 1
        on = (left > 0) & (chosen >= 0) & ~(ends[slot] == chosen[:, None]).any(1)
        tokens.copy_(torch.where(on, chosen, tokens))
        positions.copy_(torch.where(on, positions + 1, -1))
        tiles[:, 1] = torch.where(on, tiles[:, 1], 0)
        draws[:, 2] += on.int()
        draws[:, 0] = torch.where(on, draws[:, 0], -1)


def _patch(name: str, edits: Tensor, target: Tensor, add: bool, pdl: bool) -> None:
    if edits.dim() != 2 or edits.shape[1] != 3:
        raise ValueError(f"{name}: edits: found {list(edits.shape)}, expected [E, 3]")
    count = edits.shape[0]
    if count:
        _patch_kernel[(triton.cdiv(count, _BLOCK),)](
            edits, target, count, WIDTH=target.shape[1], ADD=add, BLOCK=_BLOCK, PDL=shims.wants_pdl(pdl),
            num_warps=4, **shims.launch_options(pdl),
        )  # fmt: skip


def patch(edits: Tensor, table: Tensor, *, pdl: bool = False) -> None:
    """Writes table as the contract above says."""
    _patch("patch", edits, table, False, pdl)


def count_patch(edits: Tensor, counts: Tensor, *, pdl: bool = False) -> None:
    """Adds to counts as the contract above says."""
    _patch("count_patch", edits, counts, True, pdl)


def advance(
    tokens: Tensor,
    positions: Tensor,
    left: Tensor,
    tiles: Tensor,
    draws: Tensor,
    ids: Tensor,
    logprobs: Tensor | None,
    last: Tensor,
    ends: Tensor,
    outbox: Tensor,
    out_logprobs: Tensor | None,
    place: Tensor,
    step: int,
    *,
    more: bool,
    pdl: bool = False,
) -> None:
    """Closes a step as the contract above says."""
    rows = draws.shape[0]
    if (logprobs is None) != (out_logprobs is None):
        raise ValueError("advance: logprobs and out_logprobs: found one, expected both or none")
    if outbox.shape[2] < rows or not 0 <= step < outbox.shape[1]:
        raise ValueError(f"advance: outbox: found {list(outbox.shape)}, expected [_, > {step}, >= {rows}]")
    if more and not tokens.shape[0] == tiles.shape[0] == left.shape[0] == rows:
        raise ValueError(f"advance: tokens and tiles: found {tokens.shape[0]} and {tiles.shape[0]}, expected {rows}")
    if not rows:
        return
    _advance_kernel[(triton.cdiv(rows, _BLOCK),)](
        tokens, positions, left, tiles, draws, ids, ids if logprobs is None else logprobs, last, ends,
        outbox, outbox if out_logprobs is None else out_logprobs, place, rows,
        STEP=step, STEPS=outbox.shape[1], WIDTH=outbox.shape[2], ENDS=ends.shape[1], MORE=more,
        LOGPROBS=logprobs is not None, BLOCK=_BLOCK, PDL=shims.wants_pdl(pdl), num_warps=4,
        **shims.launch_options(pdl),
    )  # fmt: skip
