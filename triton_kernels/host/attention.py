"""F1: ragged paged attention: any mix of decode, catch-up, probe and prefill rows against one paged cache.

    tokens  | row 0 | row 1      | row 2 |       cu_q = [0, 3, 8, 11]
    row r's queries are the LAST q_len of its kv_len positions, causal among themselves:

        keys      0 . . . . . . . kv_len - q_len . . . kv_len
        query 0   x x x x x x x x x
        query 1   x x x x x x x x x x

    flat slot of position p of row r = pages[page_indptr[r] + p // page_size] * page_size + p % page_size

| argument | shape              | dtype                  | unit                                                       |
|----------|--------------------|------------------------|------------------------------------------------------------|
| q        | [T, G, Hkv, D]     | fp64, fp32, bf16, fp16 | queries; query head g * Hkv + h reads kv head h            |
| cache    | [slots, 2, Hkv, D] | as q                   | `flat` of LayerCache, this step's k and v already written  |
| plan     |                    |                        | built once per step from PagedBatch, reused by every layer |
| result   | [T, G * Hkv * D]   | as q                   |                                                            |

Query heads are group-major (the loader permutes them) so that [T, G] merge into one axis of a view: no head of k or v
is ever repeated, no q is copied. Short rows are the C++ core's (csrc/attend.hpp: in place, nothing gathered or padded);
in half precision, or on a device, they are padded and gathered together. A long row reads its runs of contiguous slots
in place and merges them by log-sum-exp. Slots past a row's kv_len are never read: they may be NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from splitdecode._C import PagedRows

_SHORT = 16  # rows with at most this many queries are taken together
_LIGHT = 1 << 19  # and, where that is C++, rows with at most this many queries times keys times query elements
_MAX_RUNS = 8  # a row in more runs than this is gathered instead
_MASK_CAP = 1 << 22  # elements of one mask; longer prefills go in chunks of queries
_GATHER_CAP = 1 << 17  # cache rows gathered by one padded group

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Pending tokens of some lanes, packed flat; int32 (or int64) host tensors, as they come from the scheduler.

    tokens, positions, slots: [T] input ids, absolute positions, flat KV slots the tokens' k and v are written to.
    cu_q: [R + 1] query offsets of the rows.  kv_len: [R] context of each row INCLUDING this step's tokens.
    page_indptr: [R + 1] CSR into pages.  pages: [P] page ids of each row in order, at least ceil(kv_len / page_size)
    per row.  page_size: tokens per page.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    cu_q: Tensor
    kv_len: Tensor
    page_indptr: Tensor
    pages: Tensor
    page_size: int


class RowPlan(NamedTuple):
    """One row, tokens [begin, end): `kv_len` keys read in place in `runs` of (first slot, length), or gathered.

    mask: [T * G, kv_len] additive; None for one query, and for rows so long that masks are made per chunk.
    """

    begin: int
    end: int
    kv_len: int
    runs: list[tuple[int, int]]
    gather: Tensor | None
    mask: Tensor | None


class GroupPlan(NamedTuple):
    """Short rows padded to [R, Q] queries and [R, S] keys; padding points at a valid token and slot, masked.

    keys: [R * S] slots.  queries: [R * Q] tokens, absent when they are all T tokens in order.
    mask: [R, 1, Q * G, S] additive.  valid: [N] places of [R * Q] that are real; tokens: [N] where their results go.
    """

    rows: int
    keys: Tensor
    queries: Tensor | None
    mask: Tensor
    valid: Tensor
    tokens: Tensor


class AttentionPlan(NamedTuple):
    """How one step's queries meet the cache; the same for every layer.

    groups: short rows, where they run by C++ all of them in one.  slots: [T] int64, where this step's k and v go;
    `target` is (first, T) when they are one contiguous run.
    """

    rows: list[RowPlan]
    groups: list[GroupPlan | PagedRows]
    slots: Tensor
    target: tuple[int, int] | None


class LayerCache(NamedTuple):
    """One layer of the cache, cut once per step for all layers.

    flat: [slots, 2, Hkv, D].  target: [T, 2, Hkv, D] view of this step's slots when contiguous.
    k, v: [1, Hkv, kv_len, D] views when the step is one row in one run.
    """

    flat: Tensor
    target: Tensor | None
    k: Tensor | None
    v: Tensor | None


def bind_cache(plan: AttentionPlan, kv: Tensor) -> list[LayerCache]:
    """Cuts kv [L, num_pages, page_size, 2, Hkv, D] into layers for one step: views only, nothing is copied."""
    flat = kv.flatten(1, 2)
    count = kv.shape[0]
    targets: tuple[Tensor | None, ...] = (None,) * count
    keys = values = targets
    if plan.target is not None:
        targets = flat.narrow(1, *plan.target).unbind(0)
    if len(plan.rows) == 1 and not plan.groups and len(plan.rows[0].runs) == 1:
        own_k, own_v = flat.narrow(1, *plan.rows[0].runs[0]).permute(2, 0, 3, 1, 4).unsqueeze(2).unbind(0)
        keys, values = own_k.unbind(0), own_v.unbind(0)
    return list(map(LayerCache, flat.unbind(0), targets, keys, values))


def plan_attention(batch: PagedBatch, q: Tensor) -> AttentionPlan:
    """Builds the plan of one step; q [T, G, Hkv, D] gives the number of groups, the dtype and the device."""
    kv_len, pages = batch.kv_len.numpy(), batch.pages.numpy()
    slots, target = _plan_slots(batch.slots, q.device)
    native = q.is_cpu and q.dtype.itemsize >= 4
    if native and (q.shape[0] <= _SHORT or q.shape[0] == len(kv_len)):
        return AttentionPlan([], [_short_rows(np.arange(len(kv_len)), batch)], slots, target)
    q_len = np.diff(batch.cu_q.numpy())
    brief = q_len <= _SHORT
    if native:
        brief |= q_len.astype(np.int64) * kv_len <= _LIGHT // (q.shape[1] * q.shape[2] * q.shape[3])
        if brief.all():
            return AttentionPlan([], [_short_rows(np.arange(len(kv_len)), batch)], slots, target)
    if len(kv_len) == 1:
        row = _plan_row(0, q.shape[0], int(kv_len[0]), pages, batch.page_size, q)
        return AttentionPlan([row], [], slots, target)
    cu_q, indptr = batch.cu_q.numpy(), batch.page_indptr.numpy()
    rows = []
    for r in np.flatnonzero(~brief).tolist():
        own = pages[indptr[r] : indptr[r + 1]]
        rows.append(_plan_row(int(cu_q[r]), int(cu_q[r + 1]), int(kv_len[r]), own, batch.page_size, q))
    short = np.flatnonzero(brief & (q_len > 0))
    groups: list[GroupPlan | PagedRows] = []
    if native:
        groups += [_short_rows(short, batch)] if len(short) else []
        return AttentionPlan(rows, groups, slots, target)
    for part in _alike(short, kv_len, q_len):
        keys = _keys(indptr[part], kv_len[part], pages, batch.page_size)
        groups.append(_plan_group(cu_q[part], q_len[part], kv_len[part], keys, q))
    return AttentionPlan(rows, groups, slots, target)


def _short_rows(rows: Ints, batch: PagedBatch) -> PagedRows:
    arrays = (batch.cu_q, batch.kv_len, batch.page_indptr, batch.pages)
    cu_q, kv_len, indptr, pages = (np.ascontiguousarray(array.numpy(), dtype=np.int32) for array in arrays)
    return PagedRows(rows.astype(np.int32), cu_q, kv_len, indptr, pages, batch.page_size)


def _plan_slots(slots: Tensor, device: torch.device) -> tuple[Tensor, tuple[int, int] | None]:
    host = slots.numpy()
    count = len(host)
    target = None
    if count and int(host[-1]) - int(host[0]) == count - 1 and (count == 1 or bool((host[1:] > host[:-1]).all())):
        target = (int(host[0]), count)
    return slots.to(device=device, dtype=torch.int64), target


def _plan_row(begin: int, end: int, kv_len: int, pages: Ints, size: int, q: Tensor) -> RowPlan:
    count, groups = end - begin, q.shape[1]
    mask = _mask(q, count, kv_len - count, kv_len) if 1 < count <= _chunk(groups, kv_len) else None
    used = -(-kv_len // size)
    pages = pages[:used]
    if used == 1 or bool((pages[1:] - pages[:-1] == 1).all()):
        return RowPlan(begin, end, kv_len, [(int(pages[0]) * size, kv_len)], None, mask)
    breaks = np.flatnonzero(pages[1:] != pages[:-1] + 1)
    if len(breaks) >= _MAX_RUNS:
        slots = (pages.astype(np.int64)[:, None] * size + np.arange(size)).reshape(-1)[:kv_len]
        return RowPlan(begin, end, kv_len, [], torch.from_numpy(slots).to(q.device), mask)
    starts = np.concatenate(([0], breaks + 1))
    lengths = np.diff(np.concatenate((starts * size, [kv_len])))
    runs = list(zip((pages[starts].astype(np.int64) * size).tolist(), lengths.tolist(), strict=True))
    return RowPlan(begin, end, kv_len, runs, None, mask)


def _alike(rows: Ints, kv_len: Ints, q_len: Ints) -> list[Ints]:
    """Splits short rows into groups that pad well: decodes apart from the rest, contexts within a factor of two."""
    if len(rows) == 0:
        return []
    key = np.frexp(kv_len[rows].astype(np.float64))[1] * 2 + (q_len[rows] > 1)
    if len(rows) <= 4:
        key[:] = 0
    parts = []
    for value in np.unique(key).tolist():
        part = rows[key == value]
        step = max(1, _GATHER_CAP // int(kv_len[part].max()))
        parts += [part[i : i + step] for i in range(0, len(part), step)]
    return parts


def _keys(first: Ints, kv_len: Ints, pages: Ints, size: int) -> Ints:
    """Flat slots [R, S] of each row's positions; positions past kv_len repeat position 0."""
    position = np.arange(int(kv_len.max()), dtype=np.int64)[None, :]
    position = np.where(position < kv_len[:, None], position, 0)
    page, offset = np.divmod(position, size)
    slots: Ints = pages[first[:, None] + page].astype(np.int64) * size + offset
    return slots


def _plan_group(begin: Ints, q_len: Ints, kv_len: Ints, keys: Ints, q: Tensor) -> GroupPlan:
    rows, width = len(q_len), int(q_len.max())
    step = np.arange(width, dtype=np.int64)[None, :]
    real = step < q_len[:, None]
    step = np.where(real, step, 0)
    queries = (begin[:, None] + step).reshape(-1)
    hidden = np.arange(keys.shape[1])[None, None, :] > ((kv_len - q_len)[:, None] + step)[:, :, None]
    hidden = np.repeat(hidden, q.shape[1], axis=1)[:, None]
    mask = q.new_zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden).to(q.device), float("-inf"))
    valid = np.flatnonzero(real.reshape(-1))
    ordered = len(queries) == q.shape[0] and bool((queries == np.arange(len(queries))).all())

    def put(array: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(q.device)

    picked = None if ordered else put(queries)
    return GroupPlan(rows, put(keys.reshape(-1)), picked, mask, put(valid), put(queries[valid]))


def attention_ref(q: Tensor, cache: LayerCache, plan: AttentionPlan) -> Tensor:
    """The contract above: returns [T, G * Hkv * D] like q."""
    if cache.k is not None and cache.v is not None and q.shape[0] == 1:  # decode at batch 1: one op and its views
        y = F.scaled_dot_product_attention(q.transpose(1, 2), cache.k, cache.v)
        return y.transpose(1, 2).reshape(1, -1)
    if len(plan.rows) == 1 and not plan.groups:
        return _attend_row(q, cache.flat, plan.rows[0])
    alone = plan.groups[0] if len(plan.groups) == 1 and not plan.rows else None
    if isinstance(alone, GroupPlan) and alone.queries is None:
        return _attend_group(q, cache.flat, alone)
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2] * q.shape[3])
    for row in plan.rows:
        out[row.begin : row.end] = _attend_row(q[row.begin : row.end], cache.flat, row)
    for group in plan.groups:
        if isinstance(group, PagedRows):
            group.attend(q.numpy(), cache.flat.numpy(), out.numpy())
            continue
        out.index_copy_(0, group.tokens, _attend_group(q, cache.flat, group).index_select(0, group.valid))
    return out


def _attend_group(q: Tensor, flat: Tensor, plan: GroupPlan) -> Tensor:
    rows, (groups, heads, dim) = plan.rows, q.shape[1:]
    picked = q if plan.queries is None else q.index_select(0, plan.queries)
    picked = picked.reshape(rows, -1, heads, dim).transpose(1, 2)  # [R, Hkv, Q * G, D]
    k, v = flat.index_select(0, plan.keys).view(rows, -1, 2, heads, dim).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(picked, k, v, attn_mask=plan.mask)
    return y.transpose(1, 2).reshape(-1, groups * heads * dim)


def _attend_row(q: Tensor, flat: Tensor, plan: RowPlan) -> Tensor:
    count, past = q.shape[0], plan.kv_len - q.shape[0]
    runs = plan.runs
    if plan.gather is not None:
        flat, runs = flat.index_select(0, plan.gather), [(0, plan.kv_len)]
    step = _chunk(q.shape[1], plan.kv_len)
    if count <= step:
        return _attend_runs(q, flat, runs, past, plan.mask)
    parts = [_attend_runs(q[i : i + step], flat, runs, past + i, None) for i in range(0, count, step)]
    return torch.cat(parts)


def _attend_runs(q: Tensor, flat: Tensor, runs: list[tuple[int, int]], past: int, mask: Tensor | None) -> Tensor:
    """Queries at positions past .. past + len(q) - 1 against keys 0 .. past + len(q) - 1 of `runs`."""
    count, groups, heads, dim = q.shape
    rows = q.reshape(count * groups, heads, dim).transpose(0, 1).unsqueeze(0)  # [1, Hkv, T * G, D]
    if count > 1 and mask is None:
        mask = _mask(q, count, past, past + count)
    if len(runs) == 1:
        k, v = flat[runs[0][0] : runs[0][0] + past + count].permute(1, 2, 0, 3).unsqueeze(1)
        y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(count, groups * heads * dim)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = rows.to(wide).mul(dim**-0.5)
    outs, sizes, first = [], [], 0
    for slot, length in runs:
        length = min(length, past + count - first)
        if length <= 0:
            break
        k, v = flat[slot : slot + length].permute(1, 2, 0, 3).to(wide)
        score = rows @ k.mT
        if mask is not None:
            score += mask[:, first : first + length]
        size = score.logsumexp(-1, keepdim=True)
        # A run may be hidden from some queries altogether: its size is -inf there, its share 0.
        outs.append((score - size.clamp_min(torch.finfo(wide).min)).exp_() @ v)
        sizes.append(size)
        first += length
    share = torch.stack(sizes).softmax(0)
    y = (torch.stack(outs) * share).sum(0)
    return y[0].transpose(0, 1).reshape(count, groups * heads * dim).to(q.dtype)


def _chunk(groups: int, kv_len: int) -> int:
    """Queries whose mask stays within the cap."""
    return max(_SHORT, _MASK_CAP // (groups * kv_len))


def _mask(q: Tensor, count: int, past: int, keys: int) -> Tensor:
    """Additive mask [count * G, keys] like q: query t sees keys up to past + t."""
    last = torch.arange(past, past + count, device=q.device).repeat_interleave(q.shape[1])
    hidden = torch.arange(keys, device=q.device) > last[:, None]
    return q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
