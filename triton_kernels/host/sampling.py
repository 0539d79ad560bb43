"""F1: counter-based randomness and Gumbel-max sampling.

One random number per (sequence, position, purpose, token id), and no state anywhere: the same draw can be made again on
any backend, in any batch, after any rewind.

    key      64 bits of the sequence            low word, high word
    counter  word 0  token id >> 2              one Philox block serves four neighbouring ids,
             word 1  position in the lane       id t taking output word t & 3
             word 2  stream | step << 8         who draws (config.Stream)
             word 3  attempt                    counts openings that were rejected at this position

    u = float(x) * 2**-32 + 2**-33              rounded once, clamped below 1, in the working dtype
    gumbel = -log(-log1p(-u))                   small u <-> large gumbel: the tail that wins is the finely resolved one

Integers are bit-identical on every backend; floats agree to the last bits of log and log1p. The working dtype is
float64 for float64 logits and float32 for everything else.

`*_ref` is the definition, in torch, on any device. `*_host` is the same in numpy, for logits that already lie in host
memory: the overhead of an operation is several times smaller there, which decides a batch of one. Tests hold the
two together.

Sources: Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Gumbel-max: Gumbel 1954;
argmax_i(z_i + g_i) is distributed as softmax(z).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
GUMBEL_MAX = 22.9  # above 33 ln 2 = 22.874, the largest noise a 32-bit u can give: who trails by more cannot win


def philox_ref(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10. counter [4, ...] and key [2, ...] int64, words in 0..2**32-1 -> [4, ...] int64, likewise.

    The product of two 32-bit words wraps in int64; its bits are right, so shift and mask recover both halves.
    """
    c0, c1, c2, c3 = counter.unbind(0)
    k0, k1 = key.unbind(0)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return torch.stack((c0, c1, c2, c3))


def gumbel_ref(
    ids: Tensor, key: Tensor, position: Tensor, stream: Tensor, attempt: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Gumbel noise of token ids.

    ids [R, K] int64; key [R] int64 (64-bit patterns); position, stream (word 2), attempt [R] int64
    returns [R, K] `dtype`, float32 or float64
    """
    words = torch.stack(
        [word.expand_as(ids) for word in (ids >> 2, position[:, None], stream[:, None], attempt[:, None])]
    )
    keys = torch.stack((key & _MASK, key >> 32 & _MASK))[:, :, None].expand(2, *ids.shape)
    x = philox_ref(words & _MASK, keys).gather(0, (ids & 3)[None])[0]
    below_one = 1.0 - (2.0**-24 if dtype == torch.float32 else 2.0**-53)
    u = (x.to(dtype) * 2.0**-32 + 2.0**-33).clamp(max=below_one)
    return -torch.log(-torch.log1p(-u))


def philox_host(word0: Array, word1: Array, word2: Array, word3: Array, key: Array) -> Array:
    """philox_ref in numpy. Words: unsigned or signed integers of broadcastable shapes [...]; key uint64 [...].

    Returns uint32 [4, ...]. The state is two arrays, words (0, 2) and words (1, 3), so that a round is one product of
    [2, n] and two xors; halves of the 64-bit products are taken as views (little-endian hosts, as everywhere here).
    """
    shape = np.broadcast_shapes(word0.shape, word1.shape, word2.shape, word3.shape, key.shape)
    state = np.empty((4, *shape), dtype=np.uint32)
    state[0], state[1], state[2], state[3] = word0, word2, word1, word3
    size = state[0].size
    even, odd = state.reshape(4, size)[:2], state.reshape(4, size)[2:]
    multipliers = np.array(_MULTIPLIERS, dtype=np.uint64)[:, None]
    keys = _round_keys(np.broadcast_to(key, shape).reshape(size) if key.size > 1 else key.reshape(1))
    for round_key in keys:
        halves = np.multiply(even, multipliers, dtype=np.uint64).view(np.uint32)[::-1]
        even = halves[:, 1::2] ^ odd
        even ^= round_key
        odd = halves[:, ::2]
    return np.stack((even[0], odd[0], even[1], odd[1])).reshape(4, *shape)


def _round_keys(key: Array) -> Array:
    """[rounds, 2, n] uint32: the Weyl sequence of both key words; uint32 arithmetic wraps as it should."""
    steps = np.arange(_ROUNDS, dtype=np.uint32)[:, None] * np.array(_WEYL, dtype=np.uint32)
    words = np.stack((key & np.uint64(_MASK), key >> np.uint64(32))).astype(np.uint32)
    keys: Array = steps[:, :, None] + words
    return keys


def _gumbel_of(x: Array, dtype: npt.DTypeLike) -> Array:
    """uint32 -> gumbel, in float32 or float64."""
    u: Array = x.astype(dtype)
    u *= u.dtype.type(2.0**-32)
    u += u.dtype.type(2.0**-33)
    np.minimum(u, u.dtype.type(1.0) - np.finfo(u.dtype).epsneg, out=u)
    np.negative(u, out=u)
    np.log1p(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    np.negative(u, out=u)
    return u


def gumbel_host(
    ids: Array, key: Array, position: Array, stream: Array, attempt: Array, dtype: npt.DTypeLike = np.float32
) -> Array:
    """gumbel_ref in numpy: ids [R, K]; key uint64 [R]; position, stream, attempt integers [R] -> [R, K] `dtype`."""
    words = philox_host(ids >> 2, position[:, None], stream[:, None], attempt[:, None], key[:, None])
    return _gumbel_of(np.take_along_axis(words, (ids & 3)[None], axis=0)[0], dtype)


def gumbel_dense_host(
    vocab: int, key: Array, position: Array, stream: Array, attempt: Array, dtype: npt.DTypeLike = np.float32
) -> Array:
    """gumbel_host of all ids 0..vocab-1, a quarter of the work -> [R, vocab]."""
    blocks = np.arange((vocab + 3) // 4)[None]
    words = philox_host(blocks, position[:, None], stream[:, None], attempt[:, None], key[:, None])
    return _gumbel_of(words.transpose(1, 2, 0).reshape(len(key), -1)[:, :vocab], dtype)
