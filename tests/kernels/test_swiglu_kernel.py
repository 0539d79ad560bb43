"""The activation's kernel against torch, at odd widths and where exp overflows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from splitdecode.kernels.swiglu import swiglu, swiglu_ref


def test_the_reference_is_the_formula() -> None:
    gate_up = torch.randn(3, 14, dtype=torch.float64)
    act = torch.full((3, 7), torch.nan, dtype=torch.float64)
    swiglu_ref(gate_up, act)
    torch.testing.assert_close(act, F.silu(gate_up[:, :7]) * gate_up[:, 7:])


@pytest.mark.parametrize("shape", [(1, 16), (3, 1024), (2, 1041), (5, 7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_the_kernel_is_the_reference(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    tokens, width = shape
    gate_up = (torch.randn(tokens, 2 * width, dtype=torch.float64) * 4).to(dtype)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, -0.0, 17.0])
    act = torch.full((tokens + 1, width), torch.nan, dtype=dtype, device=device)
    swiglu(gate_up.to(device), act[:tokens])
    wanted = torch.empty(tokens, width, dtype=torch.float64)
    swiglu_ref(gate_up.double(), wanted)
    torch.testing.assert_close(act[:tokens].double().cpu(), wanted, rtol=tolerance, atol=tolerance)
    assert act[tokens].isnan().all()


def test_a_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match="gate_up"):
        swiglu(torch.empty(2, 9), torch.empty(2, 4))
