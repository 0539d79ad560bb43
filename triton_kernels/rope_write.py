"""F1: from the packed projection to attention: q/k norm where the model has one, rotation, k and v into the cache.

    row of qkv, one token        | q: G x Hkv heads | k: Hkv heads | v: Hkv heads |
                                 `-------- normed, rotated --------'
                                 `------ to q ------'`- to the token's place in the cache: k and v are adjacent -'

Dimensions (2i, 2i + 1) of a head are one complex number: rotating multiplies it by cos + i sin of (position, i).

| argument       | shape                             | dtype            | unit                                         |
|----------------|-----------------------------------|------------------|----------------------------------------------|
| qkv            | [T, (G + 2) * Hkv * D]            | fp32, bf16, fp16 | packed projection, biases added              |
| q_norm, k_norm | [D]                               | as qkv           | gains, permuted like q and k; None: no norm  |
| eps            |                                   |                  | of the norms                                 |
| cis            | [positions, D / 2, 2]             | fp32             | cos, sin (float64 for the float64 reference) |
| positions      | [T]                               | int32            | -1: padding                                  |
| slots          | [T]                               | int32            | row of `table`                               |
| table          | [S, P]                            | int32            | page ids of each slot in order               |
| cache          | [pages + 1, page_size, 2, Hkv, D] | as qkv           | one layer; each token's k and v are written  |
| q              | [T, G, Hkv, D]                    | as qkv           | written                                      |

Padding is rotated as at position 0; its k and v go to the first place of the last page, which nobody reads.
fp32 inside: nothing is rounded between norm and rotation. The reference takes float64 too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels import shims
from splitdecode.kernels.host.rope import qk_norm_ref, rope_ref
from splitdecode.kernels.shims import cast, release, wait

_BLOCK, _WARPS = 1024, 4  # elements per program: one 16-byte load a thread in half precision


@triton.jit(do_not_specialize=["pages", "null"])
def _rope_write_kernel(
    qkv, q_norm, k_norm, eps, cis, positions, slots, table, cache, q, pages, null,
    G: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr,
    HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    t = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, D)
    is_q, turns, exists = head < G * HKV, head < (G + 1) * HKV, head < (G + 2) * HKV
    at = head[:, None] * D + d[None, :]
    if NORM:
        gain = tl.where(is_q[:, None], tl.load(q_norm + d)[None, :], tl.load(k_norm + d)[None, :]).to(tl.float32)
    wait(PDL)
    position, slot = tl.load(positions + t), tl.load(slots + t)
    x = tl.load(qkv + t.to(tl.int64) * ((G + 2) * HKV * D) + at, mask=exists[:, None], other=0.0)
    turn = tl.load(cis + tl.maximum(position, 0) * D + d)
    page = tl.load(table + slot.to(tl.int64) * pages + position // PAGE, mask=position >= 0, other=null)
    wide = x.to(tl.float32)
    if NORM:
        wide *= tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)[:, None] * gain
    cos, sin = tl.split(tl.reshape(turn, [1, D // 2, 2]))
    real, imag = tl.split(tl.reshape(wide, [HEADS, D // 2, 2]))
    turned = tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), [HEADS, D])
    y = tl.where(turns[:, None], cast(turned, x.dtype), x)
    tl.store(q + t.to(tl.int64) * (G * HKV * D) + at, y, mask=is_q[:, None])
    place = page.to(tl.int64) * PAGE + tl.maximum(position, 0) % PAGE
    tl.store(cache + place * (2 * HKV * D) + at - G * HKV * D, y, mask=(exists & ~is_q)[:, None])


def rope_write_ref(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cis: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: Tensor,
    cache: Tensor,
    q: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """The contract above."""
    (tokens, groups, heads, dim), size = q.shape, cache.shape[1]
    qk, v = qkv.view(tokens, -1, dim).split([(groups + 1) * heads, heads], dim=1)
    qk = qk.to(cis.dtype, copy=True)
    if q_norm is not None and k_norm is not None:
        qk_norm_ref(qk, heads, q_norm.to(cis.dtype), k_norm.to(cis.dtype), eps)
    at = positions.clamp_min(0).long()
    rope_ref(qk, torch.view_as_complex(cis[at]).unsqueeze(1))
    q.copy_(qk[:, : groups * heads].view_as(q))
    page = table[slots.long(), at // size].masked_fill(positions < 0, len(cache) - 1)
    kv = torch.cat((qk[:, groups * heads :].to(v.dtype), v), dim=1)
    cache.flatten(0, 1).index_copy_(0, page.long() * size + at % size, kv.view(tokens, 2, heads, dim))


def rope_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cis: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: Tensor,
    cache: Tensor,
    q: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Writes q and the cache as the contract above says."""
    tokens, groups, heads, dim = q.shape
    if dim & (dim - 1) or dim > _BLOCK:
        raise ValueError(f"rope_write: q: found D = {dim}, expected a power of two up to {_BLOCK}")
    if qkv.shape != (tokens, (groups + 2) * heads * dim):
        raise ValueError(f"rope_write: qkv: found {list(qkv.shape)}, expected [{tokens}, {(groups + 2) * heads * dim}]")
    if cache.shape[2:] != (2, heads, dim):
        raise ValueError(f"rope_write: cache: found {list(cache.shape)}, expected [.., .., 2, {heads}, {dim}]")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_write: q_norm and k_norm: found one, expected both or neither")
    block = _BLOCK // dim
    _rope_write_kernel[(tokens, triton.cdiv((groups + 2) * heads, block))](
        qkv, q if q_norm is None else q_norm, q if k_norm is None else k_norm, eps, cis, positions, slots, table,
        cache, q, table.shape[1], cache.shape[0] - 1,
        G=groups, HKV=heads, D=dim, PAGE=cache.shape[1], NORM=q_norm is not None, HEADS=block,
        PDL=shims.wants_pdl(pdl), num_warps=_WARPS, **shims.launch_options(pdl),
    )  # fmt: skip
