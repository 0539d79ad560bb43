"""The first launch of a layer: against float64, in a cache of NaNs of which it may write one token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splitdecode.kernels.qkv import qkv, qkv_ref

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
PAGE, PAGES = 4, 5


@dataclass(frozen=True)
class Layer:
    """One call's arguments."""

    x: Tensor
    norm: Tensor | None
    w: Tensor
    bias: Tensor | None
    cis: Tensor
    positions: Tensor
    slots: Tensor
    table: Tensor
    cache: Tensor
    q: Tensor

    def run(self, kernel: Callable[..., None]) -> tuple[Tensor, Tensor]:
        """q and the cache of a call into NaNs."""
        q, cache = torch.full_like(self.q, torch.nan), torch.full_like(self.cache, torch.nan)
        step = (self.cis, self.positions, self.slots, self.table, cache, q)
        kernel(self.x, self.norm, 1e-5, self.w, self.bias, *step, pdl=True, prefetch=self.w)
        return q, cache

    def to(self, dtype: torch.dtype) -> Layer:
        """Every tensor but the step's in another type."""
        names = [name for name in ("x", "norm", "w", "bias", "cache", "q") if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def layer(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int], position: int, plain: bool = False
) -> Layer:
    """plain: no gain, no bias. The slot's pages lie backwards; the other slot's ids would be out of range."""
    d, groups, heads, dim = sizes
    generator = torch.Generator().manual_seed(d * 31 + dim)
    n = (groups + 2) * heads * dim
    x, norm, w, bias = (torch.randn(s, generator=generator) for s in ((1, d), (d,), (n, d), (n,)))
    angle = torch.rand(PAGE * PAGES, dim // 2, generator=generator) * 6
    small = Layer(
        x=x,
        norm=None if plain else norm,
        w=w / d**0.5,
        bias=None if plain else bias,
        cis=torch.stack((angle.cos(), angle.sin()), -1).to(device),
        positions=torch.tensor([position], dtype=torch.int32, device=device),
        slots=torch.tensor([1], dtype=torch.int32, device=device),
        table=torch.tensor([[1 << 20] * PAGES, [3, 1, 4, 0, 2]], dtype=torch.int32, device=device),
        cache=torch.empty(PAGES + 1, PAGE, 2, heads, dim),
        q=torch.empty(1, groups, heads, dim),
    ).to(dtype)
    tensors = {name: value.to(device) for name, value in vars(small).items() if isinstance(value, Tensor)}
    return replace(small, **tensors)


F32, F16, BF16 = EPS
# (d, G, Hkv, D): rows of x within a tile, in one chunk of whole tiles, in two chunks
CASES = (
    *((dtype, (40, 2, 2, 16), False) for dtype in EPS),
    *((F32, (40, 2, 2, 16), True), (F16, (33, 3, 1, 32), False)),
    *((BF16, (1536, 1, 1, 16), False), (F32, (2700, 1, 1, 16), False)),
)


@pytest.mark.parametrize(("dtype", "sizes", "plain"), CASES)
def test_against_float64(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int], plain: bool
) -> None:
    position = 9  # page 4 of the table, offset 1
    given = layer(device, dtype, sizes, position, plain)
    wide = given.to(torch.float64)
    wanted_q, wanted_cache = wide.run(qkv_ref)
    scale = wide.x.square().mean().add(1e-5).rsqrt() * (1 if wide.norm is None else wide.norm.abs())
    magnitude = (wide.x.abs() * scale) @ wide.w.abs().T + (0 if wide.bias is None else wide.bias.abs())
    magnitude = magnitude.view(-1, 2).sum(1, keepdim=True).expand(-1, 2)  # a rotated pair mixes both
    groups = given.q.shape[1]
    for kernel in (qkv, qkv_ref):
        q, cache = given.run(kernel)
        token = cache[4, 1]
        assert cache.isnan().sum() == cache.numel() - token.numel(), "wrote another token"
        got = torch.cat((q[0], token)).double().flatten()
        wanted = torch.cat((wanted_q[0], wanted_cache[4, 1])).flatten()
        error = (got - wanted).abs()
        assert got.numel() == (groups + 2) * given.q.shape[2] * given.q.shape[3]
        assert (error <= EPS[dtype] / 2 * wanted.abs() + 1e-6 * magnitude.flatten()).all(), (kernel, error.max())


@pytest.mark.parametrize(("dim", "position"), [(16, 0), pytest.param(128, 19, marks=pytest.mark.slow)])
def test_first_and_last_position(device: torch.device, dim: int, position: int) -> None:
    given = layer(device, torch.float32, (24, 1, 1, dim), position)
    for got, wanted in zip(given.run(qkv), given.run(qkv_ref), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_padding_writes_the_null_page(device: torch.device) -> None:
    for kernel in (qkv, qkv_ref):
        _, cache = layer(device, torch.float32, (40, 2, 2, 16), -1).run(kernel)
        assert cache[:-1].isnan().all()
        assert cache[-1].isfinite().sum() == cache[-1, 0].numel()


def test_the_reference_is_torchs() -> None:
    given = layer(torch.device("cpu"), torch.float64, (40, 2, 2, 16), 9)
    q, cache = given.run(qkv_ref)
    packed = F.linear(F.rms_norm(given.x, (40,), given.norm, 1e-5), given.w, given.bias).view(4, 2, 8, 2)
    angle = torch.atan2(given.cis[9, :, 1], given.cis[9, :, 0]).double()
    even, odd = packed.unbind(-1)
    turned = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1)
    torch.testing.assert_close(q[0], turned[:2].flatten(-2), rtol=1e-6, atol=1e-6)  # cis is fp32
    torch.testing.assert_close(cache[4, 1, 0], turned[2].flatten(-2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cache[4, 1, 1], packed[3].flatten(-2), rtol=1e-12, atol=1e-12)


def test_shapes_are_checked(device: torch.device) -> None:
    given = layer(device, torch.float32, (40, 2, 2, 16), 0)
    with pytest.raises(ValueError, match=r"qkv: one token: expected w \[128, 40\], found \[127, 40\]"):
        replace(given, w=given.w[1:]).run(qkv)
    with pytest.raises(ValueError, match=r"qkv: expected heads of q .* found cache .*, cis \[20, 4, 2\]"):
        replace(given, cis=given.cis[:, :4]).run(qkv)
    with pytest.raises(ValueError, match="qkv: D: expected a multiple of 4, found 2"):
        layer(device, torch.float32, (40, 1, 1, 2), 0).run(qkv)
