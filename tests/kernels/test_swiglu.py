"""silu(gate) * up on the halves of one product."""

from __future__ import annotations

import pytest
import torch

from splitdecode import ops


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5])
def test_against_the_formula(dtype: torch.dtype, count: int) -> None:
    both = torch.randn(count, 12).to(dtype)
    gate, up = both[:, :6], both[:, 6:]
    out = ops.swiglu(gate, up, torch.empty(count, 6, dtype=dtype))
    wide = gate.double()
    torch.testing.assert_close(
        out, (wide / (1 + (-wide).exp()) * up.double()).to(dtype), rtol=2e-2, atol=1e-2 if dtype.itemsize == 2 else 1e-6
    )
