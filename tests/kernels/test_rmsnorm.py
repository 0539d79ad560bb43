"""The norm alone and in front of a product, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitdecode import ops


def formula(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.double()
    y = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.double()


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_and_product(dtype: torch.dtype, bound: float, count: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 32, generator=generator).to(dtype)
    weight = torch.rand(32, generator=generator).to(dtype) if weighted else None
    matrix = (torch.randn(32, 9, generator=generator) * 0.1).to(dtype)
    wanted = formula(x, weight, 1e-6)
    torch.testing.assert_close(ops.rmsnorm(x, weight, 1e-6).double(), wanted, rtol=bound, atol=bound)
    for bias in (None, torch.randn(9, generator=generator).to(dtype)):
        out = torch.full((count, 9), float("nan"), dtype=dtype)
        before = x.clone()
        got = ops.norm_linear(x, weight, 1e-6, matrix, bias, out)
        assert torch.equal(x, before)
        assert got.data_ptr() == out.data_ptr()
        product = wanted @ matrix.double() + (0 if bias is None else bias.double())
        torch.testing.assert_close(out.double(), product, rtol=4 * bound, atol=4 * bound)


def test_a_zero_row_stays_zero() -> None:
    x, matrix = torch.zeros(1, 4), torch.eye(4)
    assert torch.equal(ops.norm_linear(x, torch.ones(4), 1e-6, matrix, None, torch.empty(1, 4)), x)
