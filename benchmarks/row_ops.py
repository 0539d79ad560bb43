"""Benchmarks: what a step of many rows costs a CPU op by op, in C++ (csrc/attend.hpp, rowwise.hpp) and in torch.

    rows    | decode, kv 110 | decode, kv 97 | ...        one query each, pages scattered as decoding scatters them

Shapes are those of the embedded pair with 64 requests, and of random-100m with 16. For kernels.py --what rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kernels import EPS, Contest, Work
from torch import Tensor

from splitdecode import ops
from splitdecode._C import multiply

PAGE = 16
# hidden, intermediate, heads, kv heads, dim, rows, mean keys
SHAPES = {
    "embedded small": (32, 64, 2, 1, 16, 64, 110),
    "embedded large": (128, 384, 4, 2, 32, 64, 110),
    "random-100m": (768, 2048, 12, 4, 64, 16, 256),
}


def all_rows() -> Iterator[Contest]:
    """Every contest; buffers of one are dropped before the next is made."""
    for name, (hidden, inner, heads, kv_heads, dim, rows, keys) in SHAPES.items():
        title = f"{name}, {rows} rows"
        yield attention_contest(title, heads, kv_heads, dim, rows, keys)
        yield norm_contest(title, hidden, rows)
        yield swiglu_contest(title, inner, rows)
        yield product_contest(title, rows, hidden, 2 * inner)


def decodes(rows: int, keys: int) -> ops.PagedBatch:
    """One query per row behind about `keys` positions; a page of each row, then the next page of each."""
    lengths = np.array([keys - 13 + 26 * r // rows for r in range(rows)], dtype=np.int32)
    used = -(-lengths // PAGE)
    pages = np.concatenate([np.arange(count) * rows + r for r, count in enumerate(used)]).astype(np.int32)
    ends = np.concatenate(([0], np.cumsum(used))).astype(np.int32)
    last = pages[ends[1:] - 1] * PAGE + (lengths - 1) % PAGE

    def host(array: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))

    zero, one = np.zeros(rows), np.arange(rows + 1)
    return ops.PagedBatch(
        host(zero), host(lengths - 1), host(last), host(one), host(lengths), host(ends), host(pages), PAGE
    )


def attention_contest(title: str, heads: int, kv_heads: int, dim: int, rows: int, keys: int) -> Contest:
    """Read in place; or padded, gathered and masked for one SDPA call. Building the plan is part of neither."""
    batch, groups = decodes(rows, keys), heads // kv_heads
    q = torch.randn(rows, groups, kv_heads, dim)
    kv = torch.randn(1, int(batch.pages.max()) + 1, PAGE, 2, kv_heads, dim)
    plan = ops.plan_attention(batch, q)
    (cache,) = ops.bind_cache(plan, kv)
    lengths = batch.kv_len.numpy()
    at = np.arange(lengths.max())[None]
    seen = at < lengths[:, None]
    owned = np.where(seen, at, 0)
    pages = batch.pages.numpy()[batch.page_indptr.numpy()[:-1, None] + owned // PAGE]
    places = torch.from_numpy((pages.astype(np.int64) * PAGE + owned % PAGE).reshape(-1))
    mask = torch.zeros(rows, 1, groups, at.shape[1]).masked_fill_(torch.from_numpy(~seen)[:, None, None], float("-inf"))

    def gathered() -> Tensor:
        k, v = cache.flat.index_select(0, places).view(rows, -1, 2, kv_heads, dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(rows, -1)

    works: dict[str, Work] = {"C++, in place": lambda: ops.attention(q, cache, plan), "gather, SDPA": gathered}
    size = 4 * (int(lengths.sum()) * 2 * kv_heads * dim + 2 * q.numel())
    return Contest("attention", f"{title}, {keys} keys", size, works, alike=2)


def norm_contest(title: str, width: int, rows: int) -> Contest:
    """A norm in front of a matrix, without the matrix: one of a single column stands for it."""
    x, gain, matrix, out = torch.randn(rows, width), torch.rand(width), torch.randn(width, 1), torch.empty(rows, 1)
    works: dict[str, Work] = {
        "C++": lambda: ops.norm_linear(x, gain, EPS, matrix, None, out),
        "six torch ops": lambda: torch.mm(ops.rmsnorm(x, gain, EPS), matrix, out=out),
        "rms_norm": lambda: torch.mm(F.rms_norm(x, (width,), gain, EPS), matrix, out=out),
    }
    return Contest("norm", title, 8 * x.numel(), works, alike=3)


def swiglu_contest(title: str, inner: int, rows: int) -> Contest:
    """The two halves of one product."""
    gate, up = torch.randn(rows, 2 * inner).split(inner, 1)
    out = torch.empty(rows, inner)
    works: dict[str, Work] = {
        "C++": lambda: ops.swiglu(gate, up, out),
        "mul(silu) into out": lambda: torch.mul(F.silu(gate), up, out=out),
    }
    return Contest("swiglu", title, 12 * out.numel(), works, alike=2)


def product_contest(title: str, rows: int, depth: int, width: int) -> Contest:
    """What is added to the residual stream; the three ways over one and the same matrix."""
    x, matrix = torch.randn(rows, depth), torch.randn(depth, width) * depth**-0.5
    used, own, other, third = (torch.zeros(rows, width) for _ in range(4))
    onednn = torch.ops.mkldnn._linear_pointwise.default

    def alone() -> Tensor:
        multiply(x.numpy(), matrix.numpy(), None, own.numpy(), True)
        return own

    works: dict[str, Work] = {
        "in use": lambda: ops.add_product(x, matrix, used),
        "C++": alone,
        "MKL": lambda: other.addmm_(x, matrix),
        "oneDNN": lambda: third.add_(onednn(x, matrix.t(), None, "none", [], "")),
    }
    return Contest("product", f"{title}, {depth}x{width}", 4 * (matrix.numel() + x.numel() + used.numel()), works, 4)
