"""Products of a step by either library, on both sides of the sizes at which they change places."""

from __future__ import annotations

import pytest
import torch

from splitdecode import ops
from splitdecode.kernels.host import product

ONEDNN = torch.ops.mkldnn._linear_pointwise.default
SHAPES = ((0, 32, 9), (1, 640, 2048), (7, 640, 2048), (8, 640, 256), (8, 640, 255), (64, 128, 768), (300, 65, 97))


@pytest.mark.parametrize("library", [None, ONEDNN])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_those_in_float64(
    library: object, dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return ONEDNN(*arguments)

    monkeypatch.setattr(product, "_ONEDNN", library and counted)
    rows, depth, width = shape
    generator = torch.Generator().manual_seed(rows)
    x, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, depth), (width,)))
    # Both layouts that weights come in: their own, and the transposed view of tied embeddings.
    own = (torch.randn(depth, width, generator=generator) * depth**-0.5).to(dtype)
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    for matrix in (own, own.t().contiguous().t()):
        exact = x.double() @ matrix.double()
        for given in (None, bias):
            out = torch.full((rows, width), float("nan"), dtype=dtype)
            got = product.product_ref(x, matrix, given, out)
            assert got.data_ptr() == out.data_ptr()
            wanted = exact if given is None else exact + given.double()
            torch.testing.assert_close(out.double(), wanted, rtol=bound, atol=bound)
        out = torch.ones(rows, width, dtype=dtype)
        assert ops.add_product(x, matrix, out) is out
        torch.testing.assert_close(out.double(), exact + 1, rtol=bound, atol=bound)
    big = rows >= 8 and rows * depth * width >= 5 << 18
    assert len(calls) == (6 if library is not None and big and dtype == torch.float32 else 0)
