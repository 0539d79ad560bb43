"""Norm, both projections and the gate of one token: against float64, between NaNs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles.fences import fenced
from torch import Tensor

from splitdecode.kernels.gate_up import gate_up, gate_up_ref

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def sample(device: torch.device, dtype: torch.dtype, inner: int, d: int) -> tuple[Tensor, ...]:
    """x, norm, w, bias."""
    generator = torch.Generator().manual_seed(inner * 7919 + d)
    x, norm, w, bias = (torch.randn(s, generator=generator) for s in ((1, d), (d,), (2 * inner, d), (2 * inner,)))
    return tuple(fenced(t.to(device, dtype)) for t in (x, norm, w / d**0.5, bias))


@pytest.mark.parametrize(("inner", "d"), [(1, 8), (9, 40), (6, 1536), (5, 2700)])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", EPS)
def test_against_float64(device: torch.device, dtype: torch.dtype, inner: int, d: int, plain: bool) -> None:
    """plain: no gain, no bias."""
    x, norm, w, bias = sample(device, dtype, inner, d)
    wide = [None if plain and i % 2 else t.double() for i, t in enumerate((x, norm, w, bias))]
    wanted = torch.full((1, inner), torch.nan, dtype=torch.float64, device=device)
    gate_up_ref(wide[0], wide[1], 1e-5, wide[2], wide[3], wanted)

    y = F.rms_norm(wide[0], (d,), wide[1], 1e-5)
    gate, up = F.linear(y, wide[2], wide[3]).chunk(2, -1)
    torch.testing.assert_close(wanted, F.silu(gate) * up, rtol=1e-12, atol=1e-12)
    sums = y.abs() @ wide[2].abs().T + (0 if wide[3] is None else wide[3].abs())
    magnitude = (sums.chunk(2, -1)[0] + 1) * up.abs() + F.silu(gate).abs() * sums.chunk(2, -1)[1]
    for run in (gate_up, gate_up_ref):
        act = fenced(torch.full((1, inner), torch.nan, dtype=dtype, device=device))
        run(x, None if plain else norm, 1e-5, w, None if plain else bias, act, pdl=True, prefetch=w)
        error = (act.double() - wanted).abs()
        assert (error <= EPS[dtype] / 2 * wanted.abs() + 2e-6 * magnitude).all(), (run, error.max())
        assert act._base is not None
        assert act._base.isnan().sum() == 128, "wrote outside of act"


def test_a_gate_far_below_zero_closes(device: torch.device) -> None:
    """exp(-gate) would overflow there."""
    w = torch.tensor([[-1000.0], [1000.0], [3.0], [3.0]], device=device)
    act = torch.full((1, 2), torch.nan, device=device)
    gate_up(torch.ones(1, 1, device=device), None, 0.0, w, None, act)
    assert act.tolist() == [[0.0, 3000.0]]


def test_shapes_are_checked(device: torch.device) -> None:
    x, _, w, _ = sample(device, torch.float32, 4, 6)
    with pytest.raises(
        ValueError, match=r"gate_up: expected x \[1, 6\] and act \[1, 8 / 2\], found \[1, 6\], \[1, 6\]"
    ):
        gate_up(x, None, 1e-5, w, None, x.clone())
