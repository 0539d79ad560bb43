"""What the C++ core computes for models on a CPU, against torch: attention of paged rows, norm, gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from splitdecode._C import PagedRows, norm_rows, swiglu_rows

TYPES = {"float32": 2e-6, "float64": 1e-13}


def paged(rng: np.random.Generator, lengths: list[tuple[int, int]], size: int, scatter: bool) -> dict[str, Any]:
    """Rows of (queries, keys) over shuffled or neighbouring pages, and the slots of each row's keys."""
    pages = [-(-keys // size) for _, keys in lengths]
    pool = np.arange(sum(pages) + 2, dtype=np.int32)
    if scatter:
        rng.shuffle(pool)
    ends = np.concatenate(([0], np.cumsum(pages))).astype(np.int32)
    own = [pool[ends[r] : ends[r + 1]] for r in range(len(lengths))]
    places = [np.arange(keys) for _, keys in lengths]
    return {
        "cu_q": np.concatenate(([0], np.cumsum([q for q, _ in lengths]))).astype(np.int32),
        "kv_len": np.array([keys for _, keys in lengths], dtype=np.int32),
        "page_indptr": ends,
        "pages": pool[: ends[-1]].copy(),
        "page_size": size,
        "slots": [page[at // size] * size + at % size for page, at in zip(own, places, strict=True)],
        "room": len(pool) * size,
    }


def rows_of(case: dict[str, Any], rows: list[int]) -> PagedRows:
    names = ("cu_q", "kv_len", "page_indptr", "pages", "page_size")
    return PagedRows(np.array(rows, dtype=np.int32), **{name: case[name] for name in names})


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("dim", [2, 16, 32, 64, 128])
def test_rows_attend_as_torch_does(dtype: str, heads: int, dim: int) -> None:
    """All widths, one kv head and blocks of many; slots nobody holds are NaN, and so are tokens of rows left out."""
    rng = np.random.default_rng(dim + heads)
    groups = 3
    lengths = [(1, 1), (1, 40), (5, 77), (3, 16), (1, 130), (2, 5)]
    for scatter, size in ((False, 16), (True, 16), (True, 3)):
        case = paged(rng, lengths, size, scatter)
        cache = np.full((case["room"], 2, heads, dim), np.nan, dtype=dtype)
        for slots in case["slots"]:
            cache[slots] = rng.standard_normal((len(slots), 2, heads, dim))
        tokens = int(case["cu_q"][-1])
        packed = rng.standard_normal((tokens, groups + 2, heads, dim)).astype(dtype)
        q, out = packed[:, :groups], np.full((tokens, groups * heads * dim), np.nan, dtype=dtype)
        named = [0, 2, 3, 4, 5]
        rows_of(case, named).attend(q, cache, out)
        for r, (count, keys) in enumerate(lengths):
            own = slice(case["cu_q"][r], case["cu_q"][r + 1])
            if r not in named:
                assert np.isnan(out[own]).all()
                continue
            k, v = torch.from_numpy(cache[case["slots"][r]].astype(np.float64)).permute(1, 2, 0, 3)
            mask = torch.ones(count, keys, dtype=torch.bool).tril(keys - count)
            wanted = [
                F.scaled_dot_product_attention(
                    torch.from_numpy(q[own, g].astype(np.float64)).transpose(0, 1), k, v, attn_mask=mask
                ).transpose(0, 1)
                for g in range(groups)
            ]
            expected = torch.stack(wanted, 1).reshape(count, -1).numpy()
            np.testing.assert_allclose(out[own], expected, atol=TYPES[dtype], rtol=TYPES[dtype])


@pytest.mark.parametrize("dim", [8, 32])
def test_scores_far_apart_and_nan(dim: int) -> None:
    """Weights of 0 stay 0, equal scores share, and a NaN in a key that is seen reaches the result."""
    case = paged(np.random.default_rng(0), [(1, 20)], 16, False)
    cache = np.zeros((case["room"], 2, 1, dim), dtype=np.float32)
    cache[:20, 1] = np.arange(20)[:, None, None]
    cache[7, 0] = 100.0
    q, out = np.full((1, 1, 1, dim), 9.0, dtype=np.float32), np.zeros((1, dim), dtype=np.float32)
    rows_of(case, [0]).attend(q, cache, out)
    np.testing.assert_array_equal(out, 7.0)
    rows_of(case, [0]).attend(np.zeros_like(q), cache, out)
    np.testing.assert_allclose(out, 9.5, rtol=1e-6)
    cache[3, 0] = np.nan
    rows_of(case, [0]).attend(q, cache, out)
    assert np.isnan(out).all()


def test_a_row_is_the_same_alone() -> None:
    """To the bit: what stands beside a row changes nothing."""
    rng = np.random.default_rng(1)
    case = paged(rng, [(1, 10 + 9 * r) for r in range(8)], 16, True)
    cache = rng.standard_normal((case["room"], 2, 2, 32)).astype(np.float32)
    q = rng.standard_normal((8, 2, 2, 32)).astype(np.float32)
    together, alone = (np.zeros((8, 128), dtype=np.float32) for _ in range(2))
    rows_of(case, list(range(8))).attend(q, cache, together)
    for row in range(8):
        rows_of(case, [row]).attend(q, cache, alone)
    np.testing.assert_array_equal(together, alone)


def test_rows_that_are_not_there_are_refused() -> None:
    case = paged(np.random.default_rng(2), [(1, 20), (2, 9)], 16, False)
    for rows in ([2], [-1]):
        with pytest.raises(IndexError, match="no row"):
            rows_of(case, rows)
    with pytest.raises(IndexError, match="more keys than pages"):
        rows_of(case | {"kv_len": np.array([20, 17], dtype=np.int32)}, [1])
    with pytest.raises(ValueError, match="more queries than keys"):
        rows_of(case | {"kv_len": np.array([20, 1], dtype=np.int32)}, [1])
    with pytest.raises(ValueError, match="one entry more"):
        rows_of(case | {"cu_q": case["cu_q"][:2]}, [0])
    with pytest.raises(IndexError, match="below 0"):
        rows_of(case | {"pages": case["pages"] - 1}, [0])
    rows = rows_of(case, [0, 1])
    q, cache = np.zeros((3, 1, 2, 4), dtype=np.float32), np.zeros((48, 2, 2, 4), dtype=np.float32)
    out = np.zeros((3, 8), dtype=np.float32)
    rows.attend(q, cache, out)
    for wrong in ((q[:2], cache, out), (q, cache[:40], out), (q, cache, out[:2])):
        with pytest.raises(IndexError, match="not there"):
            rows.attend(*wrong)
    with pytest.raises(ValueError, match="differ"):
        rows.attend(q[:, :, :1], cache, out)
    with pytest.raises(ValueError, match="one type"):
        rows.attend(q.astype(np.float64), cache, out)
    with pytest.raises(ValueError, match="side by side"):
        rows.attend(np.zeros((3, 1, 4, 4), dtype=np.float32)[:, :, ::2], cache, out)
    with pytest.raises(ValueError, match="float32 or float64"):
        rows.attend(*(array.astype(np.int32) for array in (q, cache, out)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 70])
def test_norm_and_swiglu(dtype: str, size: int) -> None:
    rng = np.random.default_rng(size)
    x, weight = rng.standard_normal((5, size)).astype(dtype), rng.standard_normal(size).astype(dtype)
    out = np.zeros_like(x)
    for gain in (weight, None):
        norm_rows(x, gain, 1e-6, out)
        wide = x.astype(np.float64)
        wanted = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * (1.0 if gain is None else gain)
        np.testing.assert_allclose(out, wanted, atol=TYPES[dtype], rtol=TYPES[dtype])
    both = np.concatenate([rng.standard_normal((5, size)) * 30, rng.standard_normal((5, size))], axis=1).astype(dtype)
    gate, up = both[:, :size], both[:, size:]
    swiglu_rows(gate, up, out)
    wide = gate.astype(np.float64)
    np.testing.assert_allclose(out, wide / (1 + np.exp(-wide)) * up, atol=TYPES[dtype], rtol=2 * TYPES[dtype])


def test_rows_of_the_wrong_shape_are_refused() -> None:
    x, out = np.zeros((2, 4), dtype=np.float32), np.zeros((2, 4), dtype=np.float32)
    for wrong in ((x, x[0, :3], out), (x, x[0].astype(np.float64), out), (x, None, out[:1])):
        with pytest.raises(ValueError, match="norm_rows"):
            norm_rows(wrong[0], wrong[1], 1e-6, wrong[2])
    with pytest.raises(ValueError, match="differ in shape"):
        swiglu_rows(x[:, :3], x, out)
    with pytest.raises(ValueError, match="strided alike"):
        swiglu_rows(x, np.zeros((2, 8), dtype=np.float32)[:, ::2], out)
