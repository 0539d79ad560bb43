"""F1: root-mean-square norm, alone and in front of a linear map.

    y[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + eps) * weight

| argument | shape   | dtype                    | unit                                   |
|----------|---------|--------------------------|----------------------------------------|
| x        | [T, d]  | fp64, fp32, bf16, fp16   | residual stream                        |
| weight   | [d]     | as x, or absent (= ones) | gain                                   |
| matrix   | [d, n]  | as x                     | [in, out]                              |
| bias     | [n]     | as x, or absent          |                                        |
| out      | [T, n]  | as x                     | written: norm(x) @ matrix + bias       |

The mean is taken in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitdecode._C import norm_rows
from splitdecode.kernels.host.product import product_ref


def rmsnorm_ref(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalises the last dimension of x [..., d]; returns a new tensor like x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale: Tensor = torch.linalg.vector_norm(x, 2, -1, True, dtype=wide)
    scale = scale.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    y: Tensor = x * scale
    if weight is not None:
        y.mul_(weight)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """rmsnorm_ref of x [T, d], by C++ where it can be: one call instead of six."""
    if not x.is_cpu or x.dtype.itemsize < 4 or not x.is_contiguous():
        return rmsnorm_ref(x, weight, eps)
    y = torch.empty_like(x)
    norm_rows(x.numpy(), None if weight is None else weight.numpy(), eps, y.numpy())
    return y


def norm_linear_ref(
    x: Tensor, weight: Tensor | None, eps: float, matrix: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:
    """out = norm(x) @ matrix + bias, written into `out` and returned.

    For one token on the host the scale is a plain number and rides in the product's alpha: a norm costs one
    reduction instead of torch's composite rms_norm (SPEED.md has the figures).
    """
    if x.shape[0] != 1 or not x.is_cpu:
        return product_ref(_normed(x, weight, eps), matrix, bias, out)
    half = x.dtype.itemsize < 4
    length = torch.linalg.vector_norm(x, dtype=torch.float32) if half else torch.linalg.vector_norm(x)
    size = length.item()
    alpha = (size * size / x.shape[1] + eps) ** -0.5
    h = x if weight is None else x * weight
    if bias is None:
        return out.addmm_(h, matrix, beta=0, alpha=alpha)
    return torch.addmm(bias, h, matrix, alpha=alpha, out=out)
