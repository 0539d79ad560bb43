"""The linear family at the shapes of a 1.5B and a 32B model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from oracles.compiled import Case, dependent
from torch import Tensor

from splitdecode.kernels.embed import embed
from splitdecode.kernels.gate_up import gate_up
from splitdecode.kernels.linear import linear
from splitdecode.kernels.qkv import qkv
from splitdecode.kernels.rmsnorm import rmsnorm
from splitdecode.kernels.skinny import skinny

# d, q heads per kv head, kv heads, I
SIZES = {"1.5b": (1536, 6, 2, 8960), "32b": (5120, 5, 8, 27648)}


def real(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return real(*shape, dtype=torch.int32)


def run_linear(n: int, k: int) -> None:
    linear(real(1, k), real(n, k), None, real(1, n), pdl=dependent(), prefetch=real(1 << 24))


def run_gate_up(d: int, inner: int) -> None:
    gate_up(real(1, d), real(d), 1e-6, real(2 * inner, d), None, real(1, inner), pdl=dependent())


def run_qkv(d: int, groups: int, heads: int) -> None:
    n = (groups + 2) * heads * 128
    cis = real(32768, 64, 2, dtype=torch.float32)
    step = (cis, ints(1), ints(1), ints(64, 512), real(4097, 64, 2, heads, 128), real(1, groups, heads, 128))
    qkv(real(1, d), real(d), 1e-6, real(n, d), real(n), *step, pdl=dependent(), prefetch=real(1 << 24))


def run_skinny(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> None:
    out = real(m, n, dtype=dtype)
    skinny(real(m, k, dtype=dtype), real(n, k, dtype=dtype), None, out, add=True, pdl=dependent())


def run_rmsnorm(d: int, picked: bool) -> None:
    more = {"rows": ints(7, 6)[:, 0]} if picked else {"residual": real(7, d)}
    rmsnorm(real(7, d), real(d), 1e-6, real(7, d), pdl=dependent(), **more)


def run_embed(d: int) -> None:
    embed(ints(7), ints(64), real(151936, d), real(7, d), ints(300), pdl=dependent())


def cases() -> Iterator[Case]:
    """GEMV: 128 registers leave 16 warps per SM, each with a first chunk of 6 to 12 loads of 512 bytes; the whole grid
    of the qkv of 1.5b is 8 warps per SM, so it may have more. skinny: three programs per SM of an H200."""
    for name, (d, groups, heads, inner) in SIZES.items():
        yield Case(f"qkv {name}", partial(run_qkv, d, groups, heads), regs=160 if d == 1536 else 128, smem=1024)
        yield Case(f"o {name}", partial(run_linear, d, groups * heads * 128), regs=128, smem=1024)
        yield Case(f"gate_up {name}", partial(run_gate_up, d, inner), regs=128, smem=1024)
        yield Case(f"down {name}", partial(run_linear, d, inner), regs=128, smem=1024)
        yield Case(f"rmsnorm {name}", partial(run_rmsnorm, d, picked=d == 1536), regs=96, smem=1024)
    fits = {"regs": 168, "smem": 72 << 10}
    for m, n, k in ((5, 1536, 8960), (5, 5120, 5120), (16, 17920, 1536), (32, 17920, 1536), (64, 5120, 5120)):
        yield Case(f"skinny {m} {n}x{k}", partial(run_skinny, m, n, k), mma=True, **fits)
    yield Case("skinny 16 1536x1536 fp32", partial(run_skinny, 16, 1536, 1536, torch.float32), **fits)
    yield Case("embed 1.5b", partial(run_embed, 1536), regs=64, smem=0)
