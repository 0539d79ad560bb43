"""Products of a step by each of the three ways, on both sides of the sizes at which they change places."""

from __future__ import annotations

import pytest
import torch

from splitdecode import ops
from splitdecode.kernels.host import product

ONEDNN = torch.ops.mkldnn._linear_pointwise.default
SHAPES = (
    *((0, 32, 9), (1, 640, 320), (3, 64, 80), (4, 32, 40), (5, 33, 31), (7, 16, 61), (8, 640, 255), (64, 128, 768)),
    *((300, 65, 97), (8, 1025, 1024), (14, 20, 3)),
)
BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("way", ["multiply", "oneDNN", "MKL"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_those_in_float64(
    way: str, dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: object) -> torch.Tensor:
        calls.append("oneDNN")
        return ONEDNN(*arguments)

    def multiply(*arguments: object) -> None:
        calls.append("multiply")
        own(*arguments)

    own = product.multiply
    monkeypatch.setattr(product, "multiply", multiply)
    monkeypatch.setattr(product, "_WIDE", way == "multiply")
    monkeypatch.setattr(product, "_ONEDNN", counted if way == "oneDNN" else None)
    rows, depth, width = shape
    generator = torch.Generator().manual_seed(rows)
    x, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, depth), (width,)))
    matrix = (torch.randn(depth, width, generator=generator) * depth**-0.5).to(dtype)
    exact, bound = x.double() @ matrix.double(), BOUNDS[dtype]
    for given in (None, bias):
        out = torch.full((rows, width), float("nan"), dtype=dtype)
        got = product.product_ref(x, matrix, given, out)
        assert got.data_ptr() == out.data_ptr()
        wanted = exact if given is None else exact + given.double()
        torch.testing.assert_close(out.double(), wanted, rtol=bound, atol=bound)
    out = torch.ones(rows, width, dtype=dtype)
    assert ops.add_product(x, matrix, out) is out
    torch.testing.assert_close(out.double(), exact + 1, rtol=bound, atol=bound)
    fits = {"multiply": rows >= 4 and depth * width <= 1 << 20, "oneDNN": rows >= 8 and rows * depth * width >= 1 << 20}
    assert calls == ([way] * 3 if dtype == torch.float32 and fits.get(way) else [])


def test_one_token_is_the_same_whoever_stands_beside_it() -> None:
    x, matrix, whole = torch.randn(23, 70), torch.randn(70, 93), torch.empty(23, 93)
    product.multiply(x.numpy(), matrix.numpy(), None, whole.numpy())
    for start, stop in ((0, 1), (1, 3), (3, 7), (7, 15), (15, 23)):
        part = torch.empty(stop - start, 93)
        product.multiply(x[start:stop].numpy(), matrix.numpy(), None, part.numpy())
        assert torch.equal(part, whole[start:stop])


def test_views_go_to_the_library() -> None:
    """Tied embeddings are a transposed view; nothing is copied to make them contiguous."""
    x, matrix, out = torch.randn(16, 40), torch.randn(30, 40), torch.empty(16, 30)
    torch.testing.assert_close(product.product_ref(x, matrix.t(), None, out), x @ matrix.t())


def test_wrong_arrays_are_refused() -> None:
    x, matrix, out = (torch.zeros(*shape).numpy() for shape in ((4, 8), (8, 6), (4, 6)))
    with pytest.raises(ValueError, match="differ in shape"):
        product.multiply(x, matrix[:7], None, out)
    with pytest.raises(ValueError, match="bias has another size"):
        product.multiply(x, matrix, x[0], out)
    with pytest.raises(ValueError, match="has its bias already"):
        product.multiply(x, matrix, out[0], out, True)
    with pytest.raises(ValueError, match="float32"):
        product.multiply(x, matrix.astype("float64"), None, out)
