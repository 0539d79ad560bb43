"""F1: what one Triton source needs to run compiled and in Triton's interpreter, and the knobs all launchers share.

    INTERPRET      TRITON_INTERPRET=1 when Triton was imported: no PTX, so no dependent launch and no prefetch
    cast(x, dt)    x.to(dt), rounded to nearest even in both modes (the interpreter truncates fp32 -> bf16)
    dot(a, b)      tl.dot with fp32 accumulation; fp32 operands multiply exactly ("ieee"); bf16 widened if interpreted
    wait(PDL)      programmatic dependent launch: from here on everything the previous kernel wrote is visible
    release(PDL)   the next kernel may start; it still waits before it reads
    prefetch(p)    asks the L2 for the line at pointer(s) p
    tuned(...)     a fixed configuration by device name and shape: nothing is tuned at run time

Under programmatic launch every kernel of the chain calls `wait` before its first read or write of anything another
kernel of the step writes: weights may be requested before it, activations, lengths and flags may not.

Sources: interpreter and compiler behaviour as seen on Triton 3.6 and 3.9; PDL: CUDA programming guide,
"Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tlx

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
C = TypeVar("C")


@triton.jit
def cast(x, dt: tl.constexpr):
    """x as dt, to nearest even in both modes."""
    if INTERPRET and dt == tl.bfloat16:
        u = x.to(tl.float32).to(tl.uint32, bitcast=True)
        return ((u + (0x7FFF + ((u >> 16) & 1))) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dt)


@triton.jit
def dot(a, b):
    """a @ b in fp32. fp32 operands stay exact: the device's default would be tf32."""
    if INTERPRET or a.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def wait(PDL: tl.constexpr):
    """Waits for the kernel before this one, when PDL is on."""
    if PDL:
        tlx.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Lets the kernel after this one start, when PDL is on."""
    if PDL:
        tlx.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Requests the L2 lines that hold `pointers`; nothing is waited for. Never called when interpreted."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


def launch_options(pdl: bool) -> dict[str, Any]:
    """Keyword arguments of a launch, when compiled: multiplies and adds are fused (the default changes in Triton 3.10),
    and programmatic dependent launch, when asked for."""
    if INTERPRET.value:
        return {}
    return {"enable_fp_fusion": True, "launch_pdl": pdl}


def wants_pdl(pdl: bool) -> bool:
    """Whether a kernel's PDL constexpr is set: never in the interpreter, which has no such instructions."""
    return pdl and not INTERPRET.value


@lru_cache
def device_name(device: torch.device) -> str:
    """ "NVIDIA H200", or the empty string where there is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def tuned(
    table: Mapping[tuple[str, tuple[int, ...]], C], device: torch.device, shape: tuple[int, ...], rule: Callable[..., C]
) -> C:
    """The configuration of `shape` on this device: the table's row, else what `rule(*shape)` says."""
    found = table.get((device_name(device), shape))
    return rule(*shape) if found is None else found
