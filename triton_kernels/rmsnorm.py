"""F1: root-mean-square norm of many tokens, with the residual sum in front or the rows picked by index.

    s      = x + residual, rounded and kept in residual               without residual: s = x
    out[i] = s[i] / sqrt(mean(s[i]^2) + eps) * weight                 with rows: of x[rows[i]]

| argument | shape  | dtype            | unit                                                                    |
|----------|--------|------------------|-------------------------------------------------------------------------|
| x        | [T, d] | fp32, bf16, fp16 |                                                                         |
| weight   | [d]    | as x, or absent  | gain; absent = ones                                                     |
| eps      |        | float            | added to the mean square                                                |
| out      | [M, d] | as x             | written; M = T without rows                                             |
| residual | [T, d] | as x, or absent  | the sum is written back, and what is normalised is the sum as stored    |
| rows     | [M]    | int32, or absent | any stride (column 0 of `draws`); below 0: zeros, nothing is read; not  |
|          |        |                  | together with residual                                                  |

One program per row of out: the row lies in its registers between the two passes. Rows are contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels.host.rmsnorm import rmsnorm_ref as norm_ref
from splitdecode.kernels.shims import cast, launch_options, release, wait, wants_pdl


@triton.jit(do_not_specialize=["stride"])
def _rmsnorm_kernel(
    x, weight, out, residual, rows, stride, eps, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    release(PDL)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    if weight is not None:  # written by no kernel of a step
        gain = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    source = row
    if rows is not None:
        source = tl.load(rows + row * stride).to(tl.int64)
        inside = cols < tl.where(source < 0, 0, D)
    y = tl.load(x + source * D + cols, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + row * D + cols, mask=inside, other=0.0).to(tl.float32)
        stored = cast(y, residual.dtype.element_ty)
        tl.store(residual + row * D + cols, stored, mask=inside)
        y = stored.to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, axis=0) / D + eps)
    if weight is not None:
        y *= gain
    tl.store(out + row * D + cols, cast(y, out.dtype.element_ty), mask=cols < D)


def rmsnorm_ref(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """The same in torch, on the host's norm."""
    if residual is not None:
        x = residual.add_(x)
    if rows is not None:
        x = torch.where((rows < 0)[:, None], 0, x[rows.clamp(min=0).long()])
    out.copy_(norm_ref(x, weight, eps))


def rmsnorm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """out = norm(x [+ residual]) * weight, or the norm of the rows asked for."""
    count = x.shape[0] if rows is None else rows.shape[0]
    if out.shape != (count, x.shape[1]):
        raise ValueError(f"rmsnorm: out: expected [{count}, {x.shape[1]}], found {list(out.shape)}")
    if residual is not None and (rows is not None or residual.shape != x.shape):
        raise ValueError(f"rmsnorm: residual: expected {list(x.shape)} and no rows, found {list(residual.shape)}")
    block = triton.next_power_of_2(x.shape[1])
    _rmsnorm_kernel[(count,)](
        *(x, weight, out, residual, rows, 1 if rows is None else rows.stride(0), eps),
        **{"D": x.shape[1], "BLOCK": block, "PDL": wants_pdl(pdl)},
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(pdl),
    )
