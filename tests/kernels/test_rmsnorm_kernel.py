"""The norm of many tokens on the device: with the residual sum, with picked rows, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splitdecode.kernels.rmsnorm import rmsnorm, rmsnorm_ref

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
COUNTS = [0, 1, 5]
WIDTHS = [1, 40, 512, 1536]


def sample(device: torch.device, dtype: torch.dtype, count: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, residual."""
    generator = torch.Generator().manual_seed(count * 7919 + d)
    x, weight, residual = (torch.randn(s, generator=generator) for s in ((count, d), (d,), (count, d)))
    return x.to(device, dtype), weight.to(device, dtype), residual.to(device, dtype)


def check(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to dtype and a few of fp32; fp16 below its normal numbers has steps of 2^-24."""
    assert ((got.double() - wanted).abs() <= (EPS[dtype] / 2 + 1e-6) * wanted.abs() + 2.0**-24).all()


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", EPS)
def test_alone(device: torch.device, dtype: torch.dtype, count: int, d: int) -> None:
    x, weight, _ = sample(device, dtype, count, d)
    before = x.clone()
    for gain in (weight, None):
        wanted = F.rms_norm(x.double(), (d,), None if gain is None else gain.double(), 1e-5)
        for run in (rmsnorm, rmsnorm_ref):
            out = torch.full((count + 1, d), torch.nan, dtype=dtype, device=device)
            run(x, gain, 1e-5, out[:count], pdl=True)
            check(out[:count], wanted, dtype)
            assert out[count].isnan().all()
            assert torch.equal(x, before)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", EPS)
def test_with_residual(device: torch.device, dtype: torch.dtype, count: int, d: int) -> None:
    """The sum is rounded once, and the norm is of what was stored: the residual is exact, bit for bit."""
    x, weight, residual = sample(device, dtype, count, d)
    stored = (x.double() + residual.double()).to(torch.float32).to(dtype)
    wanted = F.rms_norm(stored.double(), (d,), weight.double(), 1e-5)
    for run in (rmsnorm, rmsnorm_ref):
        total, out = residual.clone(), torch.full_like(x, torch.nan)
        run(x, weight, 1e-5, out, residual=total)
        assert torch.equal(total, stored)
        check(out, wanted, dtype)


@pytest.mark.parametrize("dtype", EPS)
def test_picked_rows(device: torch.device, dtype: torch.dtype) -> None:
    """Rows nobody asks for are NaN; padding gives zeros; the indices are a column of a wider table."""
    x, weight, _ = sample(device, dtype, 5, 40)
    x[0] = x[2] = torch.nan
    rows = torch.tensor([[4, 9], [-1, 9], [1, 9], [4, 9], [3, 9], [-7, 9]], dtype=torch.int32, device=device)[:, 0]
    wanted = F.rms_norm(x.double(), (40,), weight.double(), 1e-5)[[4, 0, 1, 4, 3, 0]]
    wanted[[1, 5]] = 0.0
    for run in (rmsnorm, rmsnorm_ref):
        out = torch.full((6, 40), torch.nan, dtype=dtype, device=device)
        run(x, weight, 1e-5, out, rows=rows)
        check(out, wanted, dtype)


def test_a_zero_row_stays_zero(device: torch.device) -> None:
    out = torch.full((2, 8), torch.nan, device=device)
    rmsnorm(torch.zeros(2, 8, device=device), None, 1e-6, out)
    assert not out.any()


def test_shapes_are_checked(device: torch.device) -> None:
    x, rows = torch.zeros(3, 8, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"rmsnorm: out: expected \[2, 8\], found \[3, 8\]"):
        rmsnorm(x, None, 1e-6, x.clone(), rows=rows)
    with pytest.raises(ValueError, match=r"rmsnorm: residual: expected \[3, 8\] and no rows"):
        rmsnorm(x, None, 1e-6, x[:2].clone(), residual=x.clone(), rows=rows)
    with pytest.raises(ValueError, match=r"rmsnorm: residual: expected \[3, 8\] and no rows, found \[2, 8\]"):
        rmsnorm(x, None, 1e-6, x.clone(), residual=x[:2].clone())
