"""F1: rotate queries and keys, then write keys and values into the paged cache; optional q/k norm before.

    packed projection of one token, in elements          cache of one layer, token-major
    | q: G x Hkv x D | k: Hkv x D | v: Hkv x D |         [slots, 2, Hkv, D]: k and v of a token are adjacent
    `------ rotated ------------'
                     `------ written as one row ------'

Pairs of dimensions (2i, 2i+1) form one complex number (the loader permutes rows of q and k so that the usual
rotate-half pairs (i, i + D/2) become neighbours): rotating is one complex product.

| argument       | shape                   | dtype                  | unit                                            |
|----------------|-------------------------|------------------------|-------------------------------------------------|
| qk             | [T, H + Hkv, D]         | fp64, fp32, bf16, fp16 | view of the projection; rotated in place        |
| cis            | [T, 1, D / 2]           | complex128 / complex64 | cos + i sin of each token's position            |
| kv             | [T, 2, Hkv, D]          | as qk                  | view of the projection's k, v                   |
| cache.flat     | [slots, 2, Hkv, D]      | as qk                  | one layer; rows `slots` are written             |
| slots          | [T]                     | int64                  | flat slot = page * page_size + offset           |
| q_norm, k_norm | [D]                     | as qk                  | gains, permuted like q and k; absent = no norm  |

bf16 and fp16 rotate in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitdecode.kernels.host.attention import LayerCache
from splitdecode.kernels.host.rmsnorm import rmsnorm_ref


def rope_ref(qk: Tensor, cis: Tensor) -> None:
    """Rotates qk [T, heads, D], or its complex view [T, heads, D / 2], in place by cis [T, 1, D / 2]."""
    if qk.dtype == cis.dtype:  # the view taken once per step
        qk.mul_(cis)
        return
    if qk.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(qk.view(*qk.shape[:-1], -1, 2)).mul_(cis)
        return
    wide = torch.view_as_complex(qk.float().view(*qk.shape[:-1], -1, 2))
    qk.copy_(torch.view_as_real(wide.mul_(cis)).flatten(-2))


def qk_norm_ref(qk: Tensor, kv_heads: int, q_norm: Tensor, k_norm: Tensor, eps: float) -> None:
    """Normalises each head of qk [T, H + Hkv, D] in place: the last `kv_heads` heads are keys."""
    heads = qk.shape[1] - kv_heads
    qk[:, :heads] = rmsnorm_ref(qk[:, :heads], q_norm, eps)
    qk[:, heads:] = rmsnorm_ref(qk[:, heads:], k_norm, eps)


def write_ref(kv: Tensor, cache: LayerCache, slots: Tensor) -> None:
    """Writes kv [T, 2, Hkv, D] into rows `slots` of the layer; contiguous slots are one plain copy."""
    if cache.target is not None:
        cache.target.copy_(kv)
    else:
        cache.flat.index_copy_(0, slots, kv)
