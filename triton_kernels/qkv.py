"""F1: the first launch of a layer for one token: norm, projection, bias, rotation, and the write into the paged cache.

    packed = norm(x) w^T + bias                     norm(x) = x / sqrt(mean(x^2) + eps) * gain
    q, k   = rotated by the token's position: pair (2i, 2i + 1), a complex number, times cis[position, i]
    k, v   -> page table[slot, position // page_size], offset position % page_size

| argument  | shape                             | dtype            | unit                                              |
|-----------|-----------------------------------|------------------|---------------------------------------------------|
| x         | [1, d]                            | fp32, bf16, fp16 | residual stream                                   |
| norm      | [d]                               | as x, or absent  | gain; absent = ones                               |
| eps       |                                   | float            | added to the mean square                          |
| w         | [(G + 2) x Hkv x D, d]            | as x             | contiguous; q heads group-major, k heads, v heads |
| bias      | [(G + 2) x Hkv x D]               | as x, or absent  |                                                   |
| cis       | [positions, D / 2, 2]             | fp32             | cos, sin                                          |
| positions | [1]                               | int32            | -1: padding; k, v go to the null page, q is void  |
| slots     | [1]                               | int32            | whose row of `table`                              |
| table     | [S, P]                            | int32            | page ids of each slot in order                    |
| cache     | [pages + 1, page_size, 2, Hkv, D] | as x             | one layer; one token of it is written             |
| q         | [1, G, Hkv, D]                    | as x             | written                                           |
| prefetch  | any                               | any, or absent   | as in linear.py                                   |

Every program recomputes the sum of squares of x (3 KB, in the L2) and applies the norm's scale to its finished dot
products, so x is read once. All is fp32 until the one rounding at the end. A program's rows lie in one head, pairs
whole. k and v of a token are neighbours in the cache just as in w: row r is element r - G x Hkv x D of the token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels.host.rmsnorm import rmsnorm_ref
from splitdecode.kernels.linear import Gemv, fetch, gemv_begin, gemv_end, gemv_options, gemv_rule, optional
from splitdecode.kernels.shims import cast, release, tuned, wait

# (device name, (rows of w, d, bytes per number)): what a sweep on that device found.
_CONFIGS: Mapping[tuple[str, tuple[int, ...]], Gemv] = {}


@triton.jit(do_not_specialize=["null_page"])
def _qkv_kernel(
    x,
    norm,
    w,
    bias,
    cis,
    positions,
    slots,
    table,
    cache,
    q,
    target,
    eps,
    null_page,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    G: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    AHEAD: tl.constexpr,
    LINES: tl.constexpr,
    EACH: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    first = tl.program_id(0) * BN
    rows = first + tl.arange(0, BN)
    begun, offset = gemv_begin(norm, w, rows, K, BK, AHEAD), optional(bias, rows, BN)
    fetch(target, LINES, EACH)
    wait(PDL)
    # The chain position -> page is two loads deep: it starts before the products.
    position = tl.load(positions)
    at = tl.maximum(position, 0)
    page = tl.load(table + tl.load(slots) * PAGES + at // PAGE)
    page = tl.where(position < 0, null_page, page).to(tl.int64)
    pair = (first % D) // 2 + tl.arange(0, BN // 2)
    turn = cis + at.to(tl.int64) * D + pair * 2
    cos, sin = tl.load(turn), tl.load(turn + 1)
    if first >= (G + 1) * HKV * D:  # v is not rotated
        cos, sin = tl.full([BN // 2], 1.0, tl.float32), tl.zeros([BN // 2], tl.float32)

    total, squares = gemv_end(begun, x, norm, w, rows, K, BN, BK, AHEAD)
    value = total * tl.rsqrt(squares / K + eps) + offset
    even, odd = tl.split(tl.reshape(value, [BN // 2, 2]))
    if first < G * HKV * D:
        out = q + first
    else:
        out = cache + (page * PAGE + at % PAGE) * (2 * HKV * D) + (first - G * HKV * D)
    out += 2 * tl.arange(0, BN // 2)
    tl.store(out, cast(even * cos - odd * sin, q.dtype.element_ty))
    tl.store(out + 1, cast(even * sin + odd * cos, q.dtype.element_ty))


def qkv_ref(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    w: Tensor,
    bias: Tensor | None,
    cis: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: Tensor,
    cache: Tensor,
    q: Tensor,
    *,
    pdl: bool = False,
    prefetch: Tensor | None = None,
) -> None:
    """The same in torch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    _, groups, heads, dim = q.shape
    y = rmsnorm_ref(x.to(wide), None if norm is None else norm.to(wide), eps) @ w.to(wide).T
    packed = (y if bias is None else y + bias).view(1, groups + 2, heads, dim)
    at = positions.clamp(min=0).long()
    turn = torch.view_as_complex(cis.to(wide))[at][:, None, None]
    turned = torch.view_as_complex(packed[:, :-1].unflatten(-1, (-1, 2)).contiguous()) * turn
    qk = torch.view_as_real(turned).flatten(-2)
    q.copy_(qk[:, :groups])
    page = torch.where(positions < 0, cache.shape[0] - 1, table[slots.long(), at // cache.shape[1]])
    cache[page.long(), at % cache.shape[1]] = torch.stack((qk[:, groups], packed[:, -1]), 1).to(cache.dtype)


def qkv(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    w: Tensor,
    bias: Tensor | None,
    cis: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: Tensor,
    cache: Tensor,
    q: Tensor,
    *,
    pdl: bool = False,
    prefetch: Tensor | None = None,
) -> None:
    """q and one token of the cache from x, for one token."""
    tokens, groups, heads, dim = q.shape
    n, d = (groups + 2) * heads * dim, x.shape[-1]
    if tokens != 1 or x.shape != (1, d) or w.shape != (n, d):
        raise ValueError(
            f"qkv: one token: expected w [{n}, {d}], found {list(w.shape)}, x {list(x.shape)}, q {list(q.shape)}"
        )
    if cache.shape[2:] != (2, heads, dim) or cis.shape[1:] != (dim // 2, 2):
        raise ValueError(
            f"qkv: expected heads of q {list(q.shape)}, found cache {list(cache.shape)}, cis {list(cis.shape)}"
        )
    how = tuned(_CONFIGS, x.device, (n, d, w.element_size()), gemv_rule)
    if dim % how.rows:
        raise ValueError(f"qkv: D: expected a multiple of {how.rows}, found {dim}")
    _qkv_kernel[(n // how.rows,)](
        *(x, norm, w, bias, cis, positions, slots, table, cache, q),
        eps=eps,
        null_page=cache.shape[0] - 1,
        **{"PAGES": table.stride(0), "PAGE": cache.shape[1], "G": groups, "HKV": heads, "D": dim},
        **gemv_options(w, how, prefetch, pdl),
    )
