"""q/k norm, rotation and the write to the cache in one launch, against torch; nothing else of the cache changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splitdecode.kernels.rope_write import rope_write, rope_write_ref

EPS = 1e-3
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def arguments(groups: int, heads: int, dim: int, page: int, norm: bool, dtype: torch.dtype) -> list[Any]:
    """Three sequences and padding: positions at a page's end, the next one's start, 0 and far on. Outputs are NaN."""
    random = torch.Generator().manual_seed(dim + page)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    pages = 40 // page + 2
    angle = torch.arange(max(41, page + 1))[:, None] * 10000.0 ** (
        torch.arange(dim // 2, dtype=torch.float64) / -(dim // 2)
    )
    return [
        normal(6, (groups + 2) * heads * dim),
        normal(dim) if norm else None,
        normal(dim) if norm else None,
        EPS,
        torch.stack((angle.cos(), angle.sin()), -1).float(),
        torch.tensor([page - 1, page, -1, 0, 40, -1], dtype=torch.int32),
        torch.tensor([2, 2, 0, 0, 1, 0], dtype=torch.int32),
        torch.randperm(3 * pages, generator=random).view(3, pages).int(),
        torch.full((3 * pages + 1, page, 2, heads, dim), torch.nan, dtype=dtype),
        torch.full((6, groups, heads, dim), torch.nan, dtype=dtype),
    ]


def copied(args: list[Any], device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> list[Any]:
    """dtype: of all floating-point tensors."""
    return [
        one.to(device, dtype if dtype and one.is_floating_point() else one.dtype, copy=True)
        if isinstance(one, Tensor)
        else one
        for one in args
    ]


@pytest.mark.parametrize("norm", [False, True])
def test_the_reference_is_a_complex_product(norm: bool) -> None:
    args = copied(arguments(3, 2, 16, 4, norm, torch.float64), dtype=torch.float64)
    qkv, q_norm, k_norm, _, cis, positions, slots, table, cache, q = args
    rope_write_ref(*args)
    heads = qkv.view(6, 10, 8, 2)
    for t, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        own, gains = heads[t].flatten(1), [q_norm] * 6 + [k_norm] * 2
        if norm:
            own = torch.stack([F.rms_norm(x, [16], g, EPS) for x, g in zip(own[:8], gains, strict=True)])
        turned = torch.view_as_complex(own[:8].reshape(8, 8, 2)) * torch.view_as_complex(cis[max(position, 0)])
        turned = torch.view_as_real(turned).flatten(1)
        torch.testing.assert_close(q[t].flatten(0, 1), turned[:6], rtol=1e-12, atol=1e-12)
        if position >= 0:
            k, v = cache[table[slot, position // 4], position % 4]
            torch.testing.assert_close(k, turned[6:], rtol=1e-12, atol=1e-12)
            assert torch.equal(v, heads[t, 8:].flatten(1))
    assert int(cache[:-1].isfinite().sum()) == 4 * 2 * 2 * 16


@pytest.mark.parametrize(
    ("groups", "heads", "dim", "page", "norm", "dtype"),
    [
        (7, 2, 64, 16, False, torch.float32),
        (4, 1, 128, 1, True, torch.float16),
        (1, 3, 16, 8, True, torch.float32),
        (5, 8, 32, 4, False, torch.bfloat16),
        (2, 4, 128, 64, True, torch.bfloat16),
    ],
)
def test_the_kernel_is_the_reference(
    device: torch.device, groups: int, heads: int, dim: int, page: int, norm: bool, dtype: torch.dtype
) -> None:
    args = arguments(groups, heads, dim, page, norm, dtype)
    wanted = copied(args, dtype=torch.float64)
    rope_write_ref(*wanted)
    found = copied(args, device)
    rope_write(*found)
    for old, new in zip(args[:-2], found[:-2], strict=True):
        assert not isinstance(old, Tensor) or torch.equal(old, new.cpu())
    cache, q = (one.double().cpu() for one in found[-2:])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(q, wanted[-1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache[:-1], wanted[-2][:-1], rtol=tolerance, atol=tolerance, equal_nan=True)
    assert cache[-1].flatten(1)[1:].isnan().all()  # padding writes the first place of the null page only
    assert cache[-1, 0].isfinite().all()


def test_wrong_shapes_are_named() -> None:
    args = arguments(2, 1, 16, 4, True, torch.float32)
    for place, wrong, name in (
        (0, args[0][:, 1:], "qkv"),
        (1, None, "q_norm"),
        (8, args[8][:, :, :, :, :8], "cache"),
        (9, torch.empty(6, 2, 1, 24), "q:"),
    ):
        with pytest.raises(ValueError, match=name):
            rope_write(*args[:place], wrong, *args[place + 1 :])
