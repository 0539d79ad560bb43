"""F2: the one door to device code. Today every op is its torch reference; Triton halves will be chosen here."""

from __future__ import annotations

from splitdecode.kernels.host.attention import AttentionPlan, LayerCache, PagedBatch, bind_cache, plan_attention
from splitdecode.kernels.host.attention import attention_ref as attention
from splitdecode.kernels.host.rmsnorm import norm_linear_ref as norm_linear
from splitdecode.kernels.host.rmsnorm import rmsnorm_ref as rmsnorm
from splitdecode.kernels.host.rope import qk_norm_ref as qk_norm
from splitdecode.kernels.host.rope import rope_ref as rope
from splitdecode.kernels.host.rope import write_ref as write
from splitdecode.kernels.host.sampling import GUMBEL_MAX, gumbel_dense_host, gumbel_host
from splitdecode.kernels.host.sampling import gumbel_ref as gumbel
from splitdecode.kernels.host.sampling import sample_ref as sample
from splitdecode.kernels.host.swiglu import swiglu_ref as swiglu

__all__ = [
    "AttentionPlan",
    "GUMBEL_MAX",
    "LayerCache",
    "PagedBatch",
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
    "sample",
    "swiglu",
    "write",
]
