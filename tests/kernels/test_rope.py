"""Rotation against rotate-half on the unpermuted layout; q/k norm; half precision rotates in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitdecode import ops
from splitdecode.models.config import RopeConfig
from splitdecode.models.rope import rope_table
from splitdecode.models.weights import pair_dims


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [2, 8, 64])
def test_pairs_rotate_as_halves_do(dtype: torch.dtype, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(5, 3, dim, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    cis = rope_table(RopeConfig(), dim, 100, wide)[[3, 0, 99, 7, 8]].unsqueeze(1)
    doubled = torch.cat((cis, cis), -1)
    wanted = rotate_half(x.to(doubled.real.dtype), doubled.real, doubled.imag).to(dtype)
    order = pair_dims(torch.arange(dim), 1, dim)
    paired = x[..., order].contiguous()
    ops.rope(paired, cis)
    torch.testing.assert_close(paired, wanted[..., order])


def test_the_complex_view_is_the_same_memory() -> None:
    qk = torch.randn(2, 3, 8)
    twin = qk.clone()
    cis = rope_table(RopeConfig(), 8, 2, torch.complex64).unsqueeze(1)
    ops.rope(torch.view_as_complex(qk.view(2, 3, 4, 2)), cis)
    ops.rope(twin, cis)
    assert torch.equal(qk, twin)


def test_qk_norm_scales_queries_and_keys_by_their_own_gains() -> None:
    qk = torch.randn(4, 5, 8, dtype=torch.float64)
    q_gain, k_gain = torch.rand(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    unit = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    wanted = torch.cat((unit[:, :3] * q_gain, unit[:, 3:] * k_gain), 1)
    ops.qk_norm(qk, 2, q_gain, k_gain, 1e-6)
    torch.testing.assert_close(qk, wanted)
