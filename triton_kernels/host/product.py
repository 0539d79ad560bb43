"""F1: products of a step's tokens with a matrix, by whoever multiplies fastest here.

    out[t, :] = x[t, :] @ matrix + bias              add_product: out[t, :] += x[t, :] @ matrix

| argument | shape   | dtype                   | unit                                                     |
|----------|---------|-------------------------|----------------------------------------------------------|
| x        | [T, d]  | fp64, fp32, bf16, fp16  |                                                          |
| matrix   | [d, n]  | as x                    | [in, out]                                                |
| bias     | [n]     | as x, or absent         |                                                          |
| out      | [T, n]  | as x                    | written, or added to                                     |

float32 has three ways; all read the same matrix where it lies (figures: SPEED.md):

    multiply   csrc/product.hpp, where there is AVX-512: some tokens, a matrix that fits a core's caches, and either one
               thread or so little work that threads would only wait for each other
    oneDNN     what is larger, on processors that are not Intel's: MKL keeps to half of the vector width there. torch's
               op is the one that Inductor calls; it cannot write into `out`, hence a copy
    MKL        torch's own product: everything else, and all other types
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitdecode._C import mkl_is_narrow, multiply, vector_bytes

FEW = 4  # tokens from which on `multiply` is faster
CACHED = 1 << 20  # elements of a matrix up to which it is
ALONE = 1 << 23  # multiplications that one thread does before another would be of use
LIBRARY = (8, 1 << 20)  # tokens and multiplications from which on oneDNN is

_WIDE = vector_bytes() == 64
_ONEDNN = (
    torch.ops.mkldnn._linear_pointwise.default
    if mkl_is_narrow() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> bool:
    """Does it by one of the first two ways; False: it is for the third."""
    rows = x.shape[0]
    if rows < FEW or x.dtype != torch.float32 or not x.is_cpu:
        return False
    size = matrix.numel()
    alone = size <= CACHED and (rows * size <= ALONE or torch.get_num_threads() == 1)
    if _WIDE and alone and matrix.is_contiguous() and x.is_contiguous() and out.is_contiguous():
        multiply(x.numpy(), matrix.numpy(), None if bias is None else bias.numpy(), out.numpy(), add)
        return True
    if _ONEDNN is None or rows < LIBRARY[0] or rows * size < LIBRARY[1]:
        return False
    found = _ONEDNN(x, matrix.t(), bias, "none", [], "")
    _ = out.add_(found) if add else out.copy_(found)
    return True


def product_ref(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x @ matrix + bias, written into `out` and returned."""
    if _product(x, matrix, bias, out, False):
        return out
    return torch.mm(x, matrix, out=out) if bias is None else torch.addmm(bias, x, matrix, out=out)


def add_product_ref(x: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """Adds x @ matrix to `out` and returns it."""
    return out if _product(x, matrix, None, out, True) else out.addmm_(x, matrix)
