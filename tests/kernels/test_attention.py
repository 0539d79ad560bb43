"""Ragged paged attention against a loop over tokens, on random geometries; unused slots hold NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from splitdecode import ops
from splitdecode.kernels.contract import Contract


def brute_force(q: Tensor, flat: Tensor, batch: ops.PagedBatch) -> Tensor:
    """One token, one head, one key at a time."""
    out = torch.zeros_like(q)
    size, cu_q, indptr = batch.page_size, batch.cu_q.tolist(), batch.page_indptr.tolist()
    for r, kv_len in enumerate(batch.kv_len.tolist()):
        pages = batch.pages[indptr[r] : indptr[r + 1]].tolist()
        for t in range(cu_q[r], cu_q[r + 1]):
            seen = kv_len - (cu_q[r + 1] - t) + 1
            slots = [pages[p // size] * size + p % size for p in range(seen)]
            for g in range(q.shape[1]):
                for h in range(q.shape[2]):
                    scores = flat[slots, 0, h] @ q[t, g, h] / q.shape[3] ** 0.5
                    out[t, g, h] = scores.softmax(0) @ flat[slots, 1, h]
    return out.flatten(1)


def make_case(
    rng: np.random.Generator,
    q_lens: list[int],
    kv_lens: list[int],
    size: int,
    scatter: bool,
    shape: tuple[int, int, int],
) -> tuple[Tensor, Tensor, ops.PagedBatch]:
    """q [T, G, Hkv, D], kv [2 layers, ...] whose unused slots are NaN, and the batch; float64."""
    groups, heads, dim = shape
    need = [-(-length // size) for length in kv_lens]
    pool = np.arange(sum(need) + 3)
    if scatter:
        rng.shuffle(pool)
    indptr = np.concatenate(([0], np.cumsum(need)))
    pages = pool[: indptr[-1]]
    kv = torch.full((2, len(pool), size, 2, heads, dim), float("nan"), dtype=torch.float64)
    slots = []
    for r, (count, length) in enumerate(zip(q_lens, kv_lens, strict=True)):
        own = pages[indptr[r] : indptr[r + 1]]
        positions = np.arange(length)
        row = own[positions // size] * size + positions % size
        kv.flatten(1, 2)[:, row] = torch.from_numpy(rng.standard_normal((2, length, 2, heads, dim)))
        slots.append(row[length - count :])
    total = sum(q_lens)

    def int32(values: object) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int32))

    batch = ops.PagedBatch(
        tokens=int32(np.zeros(total)),
        positions=int32(np.zeros(total)),
        slots=int32(np.concatenate(slots)),
        cu_q=int32(np.concatenate(([0], np.cumsum(q_lens)))),
        kv_len=int32(kv_lens),
        page_indptr=int32(indptr),
        pages=int32(pages),
        page_size=size,
    )
    q = torch.from_numpy(rng.standard_normal((total, groups, heads, dim)))
    return q, kv, batch


def check(q: Tensor, kv: Tensor, batch: ops.PagedBatch) -> None:
    plan = ops.plan_attention(batch, q)
    for layer, cache in enumerate(ops.bind_cache(plan, kv)):
        out = ops.attention(q, cache, plan)
        contract = Contract("attention", D=q.shape[3], Hkv=q.shape[2])
        contract.expect("q", q, "T G Hkv D", torch.float64)
        contract.expect("cache", cache.flat, "S 2 Hkv D", q.dtype)
        contract.expect("result", out, "T _", q.dtype)
        torch.testing.assert_close(out, brute_force(q, kv[layer].flatten(0, 1), batch), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(40))
def test_random_batches_equal_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([1, 1, 2, 5, 9]))
    q_lens = [int(rng.choice([1, 1, 2, 7, 16, 17, 40])) for _ in range(rows)]
    kv_lens = [count + int(rng.choice([0, 1, 5, 33, 90])) for count in q_lens]
    size = int(rng.choice([1, 2, 4, 16, 64, int(rng.integers(1, 65))]))
    shape = (int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.choice([2, 8])))
    check(*make_case(rng, q_lens, kv_lens, size, bool(rng.integers(2)), shape))


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]])
def test_one_row_in_one_two_and_many_runs(count: int, order: list[int]) -> None:
    q, kv, batch = make_case(np.random.default_rng(0), [count], [30], 8, False, (2, 2, 4))
    pages = torch.tensor(order, dtype=torch.int32)
    kv = kv.index_copy(1, pages.long(), kv[:, :4].clone())  # the same tokens, laid out in `order`
    slots = pages[torch.arange(30 - count, 30) // 8] * 8 + torch.arange(30 - count, 30) % 8
    check(
        q,
        kv,
        ops.PagedBatch(
            batch.tokens, batch.positions, slots.int(), batch.cu_q, batch.kv_len, batch.page_indptr, pages, 8
        ),
    )


def test_a_long_prefill_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitdecode.kernels.host.attention._MASK_CAP", 1)
    check(*make_case(np.random.default_rng(1), [50], [70], 16, False, (2, 1, 4)))
    check(*make_case(np.random.default_rng(1), [50], [70], 16, True, (2, 1, 4)))
    check(*make_case(np.random.default_rng(1), [40, 50], [70, 50], 3, True, (2, 1, 4)))


def test_rows_without_queries_are_skipped() -> None:
    check(*make_case(np.random.default_rng(2), [1, 0, 2], [5, 4, 9], 4, True, (2, 2, 4)))


def test_a_row_does_not_feel_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    q, kv, batch = make_case(rng, [1] * 12, [9 + 7 * r for r in range(12)], 16, True, (3, 2, 8))
    plan = ops.plan_attention(batch, q)
    together = ops.attention(q, ops.bind_cache(plan, kv)[0], plan)
    for r in range(12):
        own = batch.pages[batch.page_indptr[r] : batch.page_indptr[r + 1]]
        ends = torch.tensor([0, len(own)], dtype=torch.int32)
        one = torch.tensor([0, 1], dtype=torch.int32)
        alone = ops.PagedBatch(
            batch.tokens[:1], batch.positions[:1], batch.slots[r : r + 1], one, batch.kv_len[r : r + 1], ends, own, 16
        )
        plan = ops.plan_attention(alone, q[r : r + 1])
        single = ops.attention(q[r : r + 1], ops.bind_cache(plan, kv)[0], plan)
        torch.testing.assert_close(single[0], together[r], rtol=1e-12, atol=1e-12)


def test_many_decodes_are_grouped_not_looped() -> None:
    q, _kv, batch = make_case(np.random.default_rng(4), [1] * 64, [100] * 64, 16, True, (1, 1, 2))
    plan = ops.plan_attention(batch, q)
    assert len(plan.rows) == 0
    assert len(plan.groups) == 1


def test_writes_land_in_their_slots_contiguous_or_not() -> None:
    for scatter in (False, True):
        q, kv, batch = make_case(np.random.default_rng(5), [6], [11], 4, scatter, (1, 2, 4))
        plan = ops.plan_attention(batch, q)
        assert scatter or plan.target is not None
        new = torch.randn(6, 2, 2, 4, dtype=torch.float64)
        before = kv.clone()
        ops.write(new, ops.bind_cache(plan, kv)[1], plan.slots)
        before[1].flatten(0, 1)[batch.slots.long()] = new
        assert torch.equal(before.nan_to_num(7.0), kv.nan_to_num(7.0))
