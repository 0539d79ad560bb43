"""F1: products of a step's tokens with a matrix, by the library that multiplies fastest here.

    out[t, :] = x[t, :] @ matrix + bias              add_product: out[t, :] += x[t, :] @ matrix

| argument | shape   | dtype                   | unit                                                     |
|----------|---------|-------------------------|----------------------------------------------------------|
| x        | [T, d]  | fp64, fp32, bf16, fp16  |                                                          |
| matrix   | [d, n]  | as x                    | [in, out]                                                |
| bias     | [n]     | as x, or absent         |                                                          |
| out      | [T, n]  | as x                    | written, or added to                                     |

torch multiplies fp32 matrices by MKL, which keeps to half of the vector width on processors that are not Intel's. There
oneDNN, which torch carries as well, takes half the time from some size on, over the same matrix where it lies: its op
is the one that Inductor calls, and it cannot write into `out`, hence the copy (SPEED.md has the figures).
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitdecode._C import mkl_is_narrow

_ROWS = 8  # fewer tokens, or fewer products in all, are sooner multiplied than handed to oneDNN
_PRODUCTS = 5 << 18

_ONEDNN = (
    torch.ops.mkldnn._linear_pointwise.default
    if mkl_is_narrow() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


def _by_onednn(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor | None:
    """x @ matrix + bias where oneDNN is the faster of the two; else None."""
    rows, depth = x.shape
    if _ONEDNN is None or rows < _ROWS or rows * depth * matrix.shape[1] < _PRODUCTS:
        return None
    if x.dtype != torch.float32 or not x.is_cpu:
        return None
    found: Tensor = _ONEDNN(x, matrix.t(), bias, "none", [], "")
    return found


def product_ref(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x @ matrix + bias, written into `out` and returned."""
    found = _by_onednn(x, matrix, bias)
    if found is not None:
        return out.copy_(found)
    return torch.mm(x, matrix, out=out) if bias is None else torch.addmm(bias, x, matrix, out=out)


def add_product_ref(x: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """Adds x @ matrix to `out` and returns it."""
    found = _by_onednn(x, matrix, None)
    return out.addmm_(x, matrix) if found is None else out.add_(found)
