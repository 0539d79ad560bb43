"""A few tokens times a matrix on the matrix units: against float64, between NaNs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles.fences import fenced
from torch import Tensor

from splitdecode.kernels.skinny import skinny, skinny_ref

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# (M, N, K): every padding of M, full and not; rows and columns cut; several tiles
SHAPES = ((1, 5, 8), (5, 33, 40), (16, 16, 256), (17, 20, 300), (33, 18, 520), (64, 35, 129))


def sample(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> tuple[Tensor, ...]:
    """a, w, bias, residual."""
    generator = torch.Generator().manual_seed(m * 7919 + n)
    a, w, bias, x = (torch.randn(s, generator=generator) for s in ((m, k), (n, k), (n,), (m, n)))
    return tuple(fenced(t.to(device, dtype)) for t in (a, w / k**0.5, bias, x))


def check(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int, biased: bool, add: bool) -> None:
    a, w, bias, x = sample(device, dtype, m, n, k)
    wide = [t.double() for t in (a, w, bias, x)]
    wanted = F.linear(wide[0], wide[1], wide[2] if biased else None) + (wide[3] if add else 0)
    magnitude = F.linear(wide[0].abs(), wide[1].abs(), wide[2].abs()) + wide[3].abs()
    for run in (skinny, skinny_ref):
        out = fenced(x if add else torch.full_like(x, torch.nan))
        run(a, w, bias if biased else None, out, add=add, pdl=True)
        error = (out.double() - wanted).abs()
        assert (error <= EPS[dtype] / 2 * wanted.abs() + 2e-6 * magnitude).all(), (run, error.max())
        assert out._base is not None
        assert out._base.isnan().sum() == 128, "wrote outside of out"


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", EPS)
def test_against_float64(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int, add: bool) -> None:
    check(device, dtype, m, n, k, biased=not add, add=add)


def test_bias_and_residual_together(device: torch.device) -> None:
    check(device, torch.float32, 3, 20, 70, biased=True, add=True)


@pytest.mark.slow
def test_taller_tiles(device: torch.device) -> None:
    """Enough outputs for 32 rows a program; the last program's are cut."""
    check(device, torch.float16, 2, 32 * 132 + 8, 24, biased=True, add=False)


@pytest.mark.slow
@pytest.mark.parametrize("m", range(1, 65, 3))
def test_every_count(device: torch.device, m: int) -> None:
    check(device, torch.float16, m, 48, 512, biased=True, add=True)


def test_shapes_are_checked(device: torch.device) -> None:
    a, w, _, out = sample(device, torch.float32, 65, 4, 6)
    with pytest.raises(ValueError, match=r"skinny: expected a \[M <= 64, 6\], out \[M, 4\], found \[65, 6\]"):
        skinny(a, w, None, out)
    with pytest.raises(ValueError, match=r"skinny: w: expected contiguous rows \[4, 4\], found strides"):
        skinny(a[:2, :4], w[:, :4].T, None, out[:2])


def test_logits_keep_fp32(device: torch.device) -> None:
    """Half-precision operands into an fp32 output: rounded once, to fp32."""
    a, w, _, _ = sample(device, torch.bfloat16, 3, 50, 72)
    out = torch.full((3, 50), torch.nan, device=device)
    skinny(a, w, None, out)
    torch.testing.assert_close(out.double(), a.double() @ w.double().T, rtol=1e-6, atol=2e-6)
