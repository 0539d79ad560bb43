"""F1: the first half of the feed-forward block for one token: norm, both projections, and the gated activation.

    gate, up = norm(x) w^T + bias, the first and second half        norm(x) = x / sqrt(mean(x^2) + eps) * gain
    act      = gate / (1 + exp(-gate)) * up

| argument | shape    | dtype            | unit                                        |
|----------|----------|------------------|---------------------------------------------|
| x        | [1, d]   | fp32, bf16, fp16 | residual stream                             |
| norm     | [d]      | as x, or absent  | gain; absent = ones                         |
| eps      |          | float            | added to the mean square                    |
| w        | [2 I, d] | as x             | row i: gate of output i; row I + i: its up  |
| bias     | [2 I]    | as x, or absent  |                                             |
| act      | [1, I]   | as x             | written                                     |
| prefetch | any      | any, or absent   | as in linear.py                             |

The scale of the norm is applied to finished dot products, as in qkv.py. A program owns both rows of its outputs; all is
fp32 from the products on and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels.host.rmsnorm import rmsnorm_ref
from splitdecode.kernels.linear import Gemv, fetch, gemv_begin, gemv_end, gemv_options, gemv_rule, optional
from splitdecode.kernels.shims import cast, release, tuned, wait

# (device name, (2 I, d, bytes per number)): what a sweep on that device found.
_CONFIGS: Mapping[tuple[str, tuple[int, ...]], Gemv] = {}


@triton.jit
def _gate_up_kernel(
    x,
    norm,
    w,
    bias,
    act,
    target,
    eps,
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
    nth = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), N - 1)
    rows = nth // 2 + nth % 2 * (N // 2)  # gate and up of one output are neighbours
    begun, offset = gemv_begin(norm, w, rows, K, BK, AHEAD), optional(bias, rows, BN)
    fetch(target, LINES, EACH)
    wait(PDL)
    total, squares = gemv_end(begun, x, norm, w, rows, K, BN, BK, AHEAD)
    value = total * tl.rsqrt(squares / K + eps) + offset
    gate, up = tl.split(tl.reshape(value, [BN // 2, 2]))
    outs = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    shut = tl.exp(-tl.abs(gate))  # of the absolute value: never overflows
    value = gate * tl.where(gate < 0, shut, 1.0) / (1 + shut) * up
    tl.store(act + outs, cast(value, act.dtype.element_ty), mask=outs < N // 2)


def gate_up_ref(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    w: Tensor,
    bias: Tensor | None,
    act: Tensor,
    *,
    pdl: bool = False,
    prefetch: Tensor | None = None,
) -> None:
    """The same in torch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = rmsnorm_ref(x.to(wide), None if norm is None else norm.to(wide), eps) @ w.to(wide).T
    gate, up = (y if bias is None else y + bias).chunk(2, -1)
    act.copy_(F.silu(gate) * up)


def gate_up(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    w: Tensor,
    bias: Tensor | None,
    act: Tensor,
    *,
    pdl: bool = False,
    prefetch: Tensor | None = None,
) -> None:
    """act = silu(gate) * up of norm(x), for one token."""
    n, d = w.shape
    if x.shape != (1, d) or act.shape != (1, n // 2) or n % 2:
        raise ValueError(f"gate_up: expected x [1, {d}] and act [1, {n} / 2], found {list(x.shape)}, {list(act.shape)}")
    how = tuned(_CONFIGS, x.device, (n, d, w.element_size()), gemv_rule)
    _gate_up_kernel[(triton.cdiv(n, how.rows),)](x, norm, w, bias, act, eps=eps, **gemv_options(w, how, prefetch, pdl))
