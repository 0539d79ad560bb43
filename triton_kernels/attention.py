"""F1: ragged paged attention: any mix of decode, catch-up, probe and prefill rows against one paged cache.

    tokens  | row 0 | row 1      | row 2 |       cu_q = [0, 3, 8, 11]
    row r's queries are the LAST q_len of its kv_len positions, causal among themselves:

        keys      0 . . . . . . . kv_len - q_len . . . kv_len
        query 0   x x x x x x x x x
        query 1   x x x x x x x x x x

    flat slot of position p of row r = pages[page_indptr[r] + p // page_size] * page_size + p % page_size

| argument | shape                  | dtype                  | unit                                                        |
|----------|------------------------|------------------------|-------------------------------------------------------------|
| q        | [T, G, Hkv, D]         | fp64, fp32, bf16, fp16 | queries; query head g * Hkv + h reads kv head h             |
| cache    | [slots, 2, Hkv, D]     | as q                   | one layer, this step's k and v already written              |
| plan     |                        |                        | built once per step from PagedBatch, reused by every layer  |
| result   | [T, G * Hkv * D]       | as q                   |                                                             |

Query heads are group-major (the loader permutes them) so that [T, G] merge into one axis of a view: no head of k or v
is ever repeated, no q is copied. A row alone reads its runs of contiguous slots in place and merges them by
log-sum-exp; short rows are padded and gathered together. Slots outside a row's kv_len are never read: they may hold NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_SHORT = 16  # rows with at most this many queries are padded and gathered together
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


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row read in place: tokens [begin, end), `kv_len` keys in `runs` of (first slot, length), or by `index` [kv_len]."""

    begin: int
    end: int
    kv_len: int
    runs: list[tuple[int, int]]
    index: Tensor | None


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Short rows padded to [R, Q] queries and [R, S] keys; padding points at a valid token and slot, `last` masks it.

    keys: [R * S] slots.  queries: [R * Q] tokens, absent when they are all T tokens in order.  last: [R, Q] index of the last key
    each query sees.  valid: [N] places of [R * Q] that are real, and tokens: [N] where their results go.
    """

    rows: int
    keys: Tensor
    queries: Tensor | None
    last: Tensor
    valid: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How one step's queries meet the cache; the same for every layer. `total` is T, on `device`."""

    total: int
    rows: list[RowPlan]
    groups: list[GroupPlan]


def plan_attention(batch: PagedBatch, device: torch.device) -> AttentionPlan:
    """Builds the plan of one step; index tensors are placed on `device`."""
    cu_q, kv_len = batch.cu_q.numpy(), batch.kv_len.numpy()
    indptr, pages = batch.page_indptr.numpy(), batch.pages.numpy()
    count = len(kv_len)
    total = int(cu_q[-1])
    if count == 1:
        own = pages[: -(-int(kv_len[0]) // batch.page_size)]
        return AttentionPlan(total, [_plan_row(0, total, int(kv_len[0]), own, batch.page_size, device)], [])
    q_len = np.diff(cu_q)
    rows = []
    for r in np.flatnonzero(q_len > _SHORT).tolist():
        own = pages[indptr[r] : indptr[r] - (-int(kv_len[r]) // batch.page_size)]
        rows.append(_plan_row(int(cu_q[r]), int(cu_q[r + 1]), int(kv_len[r]), own, batch.page_size, device))
    short = np.flatnonzero((q_len > 0) & (q_len <= _SHORT))
    groups = []
    for part in _alike(short, kv_len, q_len):
        slots = _slots(indptr[part], kv_len[part], pages, batch.page_size)
        groups.append(_plan_group(cu_q[part], q_len[part], kv_len[part], slots, total, device))
    return AttentionPlan(total, rows, groups)


def _plan_row(begin: int, end: int, kv_len: int, pages: Ints, size: int, device: torch.device) -> RowPlan:
    if len(pages) == 1 or kv_len <= size:
        return RowPlan(begin, end, kv_len, [(int(pages[0]) * size, kv_len)], None)
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    if len(breaks) == 0:
        return RowPlan(begin, end, kv_len, [(int(pages[0]) * size, kv_len)], None)
    if len(breaks) >= _MAX_RUNS:
        slots = (pages.astype(np.int64)[:, None] * size + np.arange(size)).reshape(-1)[:kv_len]
        return RowPlan(begin, end, kv_len, [], torch.from_numpy(slots).to(device))
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts * size, [kv_len])))
    return RowPlan(begin, end, kv_len, list(zip((pages[starts] * size).tolist(), lengths.tolist(), strict=True)), None)


def _alike(rows: Ints, kv_len: Ints, q_len: Ints) -> list[Ints]:
    """Splits short rows into groups that pad well: decodes apart from the rest, contexts within a factor of two."""
    if len(rows) <= 4:
        return [rows] if len(rows) else []
    key = np.frexp(kv_len[rows].astype(np.float64))[1] * 2 + (q_len[rows] > 1)
    parts = []
    for value in np.unique(key).tolist():
        part = rows[key == value]
        step = max(1, _GATHER_CAP // int(kv_len[part].max()))
        parts += [part[i : i + step] for i in range(0, len(part), step)]
    return parts


def _slots(first: Ints, kv_len: Ints, pages: Ints, size: int) -> Ints:
    """Flat slots [R, S] of each row's positions; positions past kv_len repeat position 0."""
    position = np.arange(int(kv_len.max()), dtype=np.int64)[None, :]
    position = np.where(position < kv_len[:, None], position, 0)
    page, offset = np.divmod(position, size)
    slots: Ints = pages[first[:, None] + page].astype(np.int64) * size + offset
    return slots


def _plan_group(begin: Ints, q_len: Ints, kv_len: Ints, slots: Ints, total: int, device: torch.device) -> GroupPlan:
    rows, width = len(q_len), int(q_len.max())
    step = np.arange(width, dtype=np.int64)[None, :]
    real = step < q_len[:, None]
    step = np.where(real, step, 0)
    queries = (begin[:, None] + step).reshape(-1)
    last = (kv_len - q_len)[:, None] + step
    valid = np.flatnonzero(real.reshape(-1))
    ordered = len(queries) == total and bool((queries == np.arange(total)).all())
    put = [
        torch.from_numpy(array.astype(np.int64)).to(device)
        for array in (slots.reshape(-1), last, valid, queries[valid])
    ]
    picked = None if ordered else torch.from_numpy(queries.astype(np.int64)).to(device)
    return GroupPlan(rows, put[0], picked, put[1], put[2], put[3])


def attention_ref(q: Tensor, cache: Tensor, plan: AttentionPlan) -> Tensor:
    """The contract above: returns [T, G * Hkv * D] like q."""
    if len(plan.rows) == 1 and not plan.groups:
        return _attend_row(q, cache, plan.rows[0])
    if len(plan.groups) == 1 and not plan.rows and plan.groups[0].queries is None:
        return _attend_group(q, cache, plan.groups[0])
    out = q.new_zeros(q.shape[0], q[0].numel())
    for row in plan.rows:
        out[row.begin : row.end] = _attend_row(q[row.begin : row.end], cache, row)
    for group in plan.groups:
        out.index_copy_(0, group.tokens, _attend_group(q, cache, group).index_select(0, group.valid))
    return out


def _attend_group(q: Tensor, cache: Tensor, plan: GroupPlan) -> Tensor:
    rows, (groups, heads, dim) = plan.rows, q.shape[1:]
    picked = q if plan.queries is None else q.index_select(0, plan.queries)
    picked = picked.reshape(rows, -1, heads, dim).transpose(1, 2)  # [R, Hkv, Q * G, D]
    k, v = cache.index_select(0, plan.keys).view(rows, -1, 2, heads, dim).permute(2, 0, 3, 1, 4)
    hidden = torch.arange(k.shape[2], device=q.device) > plan.last.repeat_interleave(groups, 1)[:, None, :, None]
    mask = q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    y = F.scaled_dot_product_attention(picked, k, v, attn_mask=mask)
    return y.transpose(1, 2).reshape(-1, groups * heads * dim)


def _attend_row(q: Tensor, cache: Tensor, plan: RowPlan) -> Tensor:
    count, groups, heads, dim = q.shape
    if plan.index is not None:
        cache, runs = cache.index_select(0, plan.index), [(0, plan.kv_len)]
    else:
        runs = plan.runs
    step = max(_SHORT, _MASK_CAP // (groups * plan.kv_len))
    if count <= step:
        return _attend_runs(q, cache, runs, plan.kv_len - count)
    past = plan.kv_len - count
    parts = [_attend_runs(q[i : i + step], cache, runs, past + i) for i in range(0, count, step)]
    return torch.cat(parts)


def _attend_runs(q: Tensor, cache: Tensor, runs: list[tuple[int, int]], past: int) -> Tensor:
    """Queries at positions past .. past + len(q) - 1 against keys 0 .. of `runs`."""
    count, groups, heads, dim = q.shape
    rows = q.reshape(count * groups, heads, dim).transpose(0, 1).unsqueeze(0)  # [1, Hkv, T * G, D]
    if len(runs) == 1:
        k, v = cache[runs[0][0] : runs[0][0] + past + count].permute(1, 2, 0, 3).unsqueeze(1)
        mask = None if count == 1 else _mask(q, past, past + count)
        y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(count, groups * heads * dim)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = rows.to(wide).mul(dim**-0.5)
    outs, sizes, first = [], [], 0
    for slot, length in runs:
        length = min(length, past + count - first)
        if length <= 0:
            break
        k, v = cache[slot : slot + length].permute(1, 2, 0, 3).to(wide)
        score = rows @ k.mT
        if first + length > past + 1:
            score += _mask(q, past - first, length).to(wide)
        size = score.logsumexp(-1, keepdim=True)
        weight = (score - size.clamp_min(torch.finfo(wide).min)).exp_()  # a run may be hidden from some queries
        outs.append(weight @ v)
        sizes.append(size)
        first += length
    share = torch.stack(sizes).softmax(0)
    y = (torch.stack(outs) * share).sum(0)
    return y.transpose(1, 2).reshape(count, groups * heads * dim).to(q.dtype)


def _mask(q: Tensor, past: int, keys: int) -> Tensor:
    """Additive mask [T * G, keys]: query t sees keys up to past + t."""
    count, groups = q.shape[:2]
    last = torch.arange(past, past + count, device=q.device).repeat_interleave(groups)
    hidden = torch.arange(keys, device=q.device) > last[:, None]
    return q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
