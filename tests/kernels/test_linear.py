"""One token times a matrix, added to the residual: against float64, between NaNs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles.fences import fenced
from torch import Tensor

from splitdecode.kernels.linear import gemv_rule, linear, linear_ref

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def sample(device: torch.device, dtype: torch.dtype, n: int, k: int, biased: bool) -> tuple[Tensor, ...]:
    """a, w, bias, x."""
    generator = torch.Generator().manual_seed(n * 7919 + k)
    a, w, bias, x = (torch.randn(s, generator=generator) for s in ((1, k), (n, k), (n,), (1, n)))
    return tuple(fenced(t.to(device, dtype)) for t in (a, w / k**0.5, bias if biased else bias[:0], x))


# A row within one tile, in one chunk, in several; whole tiles and cut ones; fewer outputs than a program owns.
SHAPES = ((3, 5), (7, 40), (10, 1536), (9, 2051), (5, 2700), (3, 5200), (2, 8192))


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", EPS)
def test_against_float64(device: torch.device, dtype: torch.dtype, n: int, k: int, biased: bool) -> None:
    a, w, bias, x = sample(device, dtype, n, k, biased)
    kept = bias if biased else None
    wanted = x.double()
    linear_ref(a.double(), w.double(), bias.double() if biased else None, wanted)
    magnitude = a.double().abs() @ w.double().abs().T + x.double().abs() + (bias.double().abs() if biased else 0)
    for run in (linear, linear_ref):
        got, before = fenced(x), a.clone()
        run(a, w, kept, got, pdl=True, prefetch=w)
        assert torch.equal(a, before)
        error = (got.double() - wanted).abs()
        assert (error <= EPS[dtype] / 2 * wanted.abs() + 1e-6 * magnitude).all(), (run, error.max())
        assert got._base is not None
        assert got._base.isnan().sum() == 128, "wrote outside of x"


def test_the_reference_is_torchs(device: torch.device) -> None:
    a, w, bias, x = sample(device, torch.float32, 12, 33, True)
    wanted = x.double() + F.linear(a.double(), w.double(), bias.double())
    got = x.double()
    linear_ref(a.double(), w.double(), bias.double(), got)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "k"),
    [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960), (7168, 5120), (5120, 5120), (55296, 5120), (5120, 27648)],
)
def test_the_rule_fills_the_device(n: int, k: int) -> None:
    how = gemv_rule(n, k, 2)
    chunk = how.warps * 256 * how.ahead
    programs = n // how.rows
    assert n % how.rows == 0
    assert programs >= 132
    assert -k % chunk < 0.05 * k, "masked columns"
    in_flight = programs * how.rows * min(chunk, k) * 2
    assert in_flight >= min(n * k * 2, 3 << 20), "bytes under way at once"


def test_shapes_are_checked(device: torch.device) -> None:
    a, w, _, x = sample(device, torch.float32, 4, 6, False)
    with pytest.raises(ValueError, match=r"linear: expected a \[1, 6\] and x \[1, 4\], found \[1, 4\] and \[1, 6\]"):
        linear(x, w, None, a)
    with pytest.raises(ValueError, match=r"w: expected contiguous rows \[4, 4\], found strides \(1, 6\)"):
        linear(x, w[:, :4].T, None, x.clone())
