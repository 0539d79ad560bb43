"""F1: the gated activation of the feed-forward block, where no matrix product has it built in.

    act[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i]        silu(z) = z / (1 + exp(-z))

| argument | shape    | dtype            | unit                          |
|----------|----------|------------------|-------------------------------|
| gate_up  | [T, 2 I] | fp32, bf16, fp16 | gate, then up, of one product |
| act      | [T, I]   | as gate_up       | written; padding rows as all  |

fp32 inside. The reference takes float64 too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels import shims
from splitdecode.kernels.host.swiglu import swiglu_ref as gated
from splitdecode.kernels.shims import cast, release, wait

_BLOCK, _WARPS = 1024, 4  # 16 bytes a thread of gate and of up in half precision


@triton.jit
def _swiglu_kernel(gate_up, act, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    t, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    gate = tl.load(gate_up + t * (2 * WIDTH) + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * (2 * WIDTH) + WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    shut = tl.exp(-tl.abs(gate))  # of the absolute value: never overflows
    y = gate * tl.where(gate < 0.0, shut, 1.0) / (1.0 + shut) * up
    tl.store(act + t * WIDTH + i, cast(y, act.dtype.element_ty), mask=i < WIDTH)


def swiglu_ref(gate_up: Tensor, act: Tensor, *, pdl: bool = False) -> None:
    """The contract above."""
    gate, up = gate_up.chunk(2, dim=1)
    gated(gate, up, act)


def swiglu(gate_up: Tensor, act: Tensor, *, pdl: bool = False) -> None:
    """Writes act as the contract above says."""
    tokens, width = act.shape
    if gate_up.shape != (tokens, 2 * width):
        raise ValueError(f"swiglu: gate_up: found {list(gate_up.shape)}, expected [{tokens}, {2 * width}]")
    _swiglu_kernel[(tokens, triton.cdiv(width, _BLOCK))](
        gate_up, act, WIDTH=width, BLOCK=_BLOCK, PDL=shims.wants_pdl(pdl), num_warps=_WARPS, **shims.launch_options(pdl)
    )
