"""F2: the one door to device code.

Two sets of ops. What a CPU runs eagerly (`attention`, `norm_linear`, ...) are the torch and numpy functions of
kernels/host. A step over static memory (models/step.py) runs on StepOps: Triton launchers on CUDA, their torch
references elsewhere.
Importing this file imports no Triton; `step_ops` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from splitdecode.kernels.host.attention import AttentionPlan, LayerCache, PagedBatch, bind_cache, plan_attention
from splitdecode.kernels.host.attention import attention_ref as attention
from splitdecode.kernels.host.product import add_product_ref as add_product
from splitdecode.kernels.host.rmsnorm import norm_linear_ref as norm_linear
from splitdecode.kernels.host.rmsnorm import rmsnorm_ref as rmsnorm
from splitdecode.kernels.host.rope import qk_norm_ref as qk_norm
from splitdecode.kernels.host.rope import rope_ref as rope
from splitdecode.kernels.host.rope import write_ref as write
from splitdecode.kernels.host.sampling import GUMBEL_MAX, gumbel_dense_host, gumbel_host
from splitdecode.kernels.host.sampling import gumbel_ref as gumbel
from splitdecode.kernels.host.swiglu import swiglu_ref as swiglu
from splitdecode.kernels.state import (
    BANNED,
    CUT,
    DRAW,
    EDIT,
    END,
    ENTERING,
    FEEDS_DEVICE,
    LOGPROBS,
    PROMPT,
    STOP,
    SUPPRESS_END,
    SamplingState,
)

__all__ = [
    "AttentionPlan",
    "BANNED",
    "CUT",
    "DRAW",
    "EDIT",
    "END",
    "ENTERING",
    "FEEDS_DEVICE",
    "GUMBEL_MAX",
    "LOGPROBS",
    "LayerCache",
    "PROMPT",
    "PagedBatch",
    "STOP",
    "SUPPRESS_END",
    "SamplingState",
    "StepOps",
    "add_product",
    "attention",
    "bind_cache",
    "gumbel",
    "gumbel_dense_host",
    "gumbel_host",
    "norm_linear",
    "plan_attention",
    "qk_norm",
    "rmsnorm",
    "rope",
    "step_ops",
    "swiglu",
    "write",
]

Op = Callable[..., None]


@dataclass(frozen=True, slots=True)
class StepOps:
    """What a step over static memory is made of; the contract of each op is the file of its name in triton_kernels/.

    gemm(a, w, bias, out, *, add): as skinny, by the library, for any number of rows.
    call(function, *arguments): any other work on static tensors, recorded like an op.
    attend_scratch, splits_for, head_scratch, sample_scratch: memory of ops of that name, and its shape.
    """

    embed: Op
    rmsnorm: Op
    qkv: Op
    linear: Op
    gate_up: Op
    skinny: Op
    gemm: Op
    rope_write: Op
    swiglu: Op
    attend: Op
    extend: Op
    head: Op
    sample: Op
    nucleus: Op
    logprobs: Op
    advance: Op
    patch: Op
    count_patch: Op
    call: Op
    attend_scratch: Callable[..., Any]
    splits_for: Callable[[int, int], int]
    head_scratch: Callable[[Tensor], tuple[Tensor, Tensor]]
    sample_scratch: Callable[..., Any]


_FILES = {
    **{name: name for name in ("embed", "rmsnorm", "qkv", "linear", "gate_up", "skinny", "rope_write", "swiglu")},
    **{name: name for name in ("attend", "extend", "head", "sample", "nucleus", "logprobs")},
    **dict.fromkeys(("advance", "patch", "count_patch"), "step"),
}


def step_ops(device: torch.device, *, pdl: bool = False, launchers: bool | None = None) -> StepOps:
    """The ops of a step on that device. pdl: programmatic dependent launch (CUDA, sm_90 and up).

    launchers: Triton's half or the references; None: Triton's on CUDA (elsewhere it needs Triton's interpreter).
    """
    launchers = device.type == "cuda" if launchers is None else launchers
    found: dict[str, Any] = {}
    for name, file in _FILES.items():
        op = getattr(import_module(f"splitdecode.kernels.{file}"), name if launchers else f"{name}_ref")
        found[name] = partial(op, pdl=True) if launchers and pdl else op
    attend, head, sampling = (import_module(f"splitdecode.kernels.{name}") for name in ("attend", "head", "sample"))
    return StepOps(
        **found,
        gemm=_gemm,
        call=_call,
        attend_scratch=attend.AttendScratch.new,
        splits_for=attend.splits_for,
        head_scratch=partial(_head_scratch, head.head_programs),
        sample_scratch=sampling.SampleScratch.new,
    )


def _gemm(a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, *, add: bool = False) -> None:
    """out (+)= a [M, K] @ w [N, K]^T + bias."""
    if add:
        out.addmm_(a, w.t())
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(a, w.t(), out=out)
    else:
        torch.addmm(bias, a, w.t(), out=out)


def _head_scratch(programs: Callable[[Tensor], int], w: Tensor) -> tuple[Tensor, Tensor]:
    """best and best_id of `head` with these weights."""
    best = torch.empty(programs(w), dtype=torch.float32, device=w.device)
    return best, torch.empty_like(best, dtype=torch.int32)


def _call(function: Callable[..., object], *arguments: Any) -> None:
    function(*arguments)
