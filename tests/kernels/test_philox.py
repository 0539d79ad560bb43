"""Philox and Gumbel noise in Triton against the published answers, the reference and exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from splitdecode.kernels.host.sampling import gumbel_ref, philox_ref
from splitdecode.kernels.philox import gumbel, noise

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, answer.
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@triton.jit
def words_kernel(counters, keys, out):
    i, one = tl.program_id(0), tl.arange(0, 1)
    at = counters + i * 4
    words = tl.philox(tl.load(keys + i), tl.load(at + one), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
    for n in tl.static_range(4):
        tl.store(out + i * 4 + n + one, words[n].to(tl.int32, bitcast=True))


@triton.jit
def gumbel_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, gumbel(tl.load(x + at).to(tl.uint32, bitcast=True)))


@triton.jit
def noise_kernel(key, words, out, first, N: tl.constexpr):
    found = noise(first, tl.load(key), tl.load(words), tl.load(words + 1), tl.load(words + 2), N)
    tl.store(out + tl.arange(0, N), found)


def signed(words: np.ndarray) -> torch.Tensor:
    """32-bit patterns as int32."""
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def run_words(device: torch.device, counters: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """counters uint32 [R, 4], keys uint64 [R] -> uint32 [R, 4]."""
    out = torch.zeros(len(keys), 4, dtype=torch.int32, device=device)
    key = torch.from_numpy(keys.view(np.int64).copy()).to(device)
    words_kernel[(len(keys),)](signed(counters).to(device), key, out)
    return out.cpu().numpy().view(np.uint32)


def test_known_answers(device: torch.device) -> None:
    for counter, key, answer in KNOWN:
        words = [np.array([int(word, 16) for word in text.split()], dtype=np.uint64) for text in (counter, key, answer)]
        low, high = words[1]
        found = run_words(device, words[0][None], np.array([low | high << np.uint64(32)], dtype=np.uint64))
        assert found[0].tolist() == words[2].tolist()


def test_random_words_are_identical(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    counters, keys = rng.integers(0, 2**32, (20, 4), dtype=np.uint64), rng.integers(0, 2**64, 20, dtype=np.uint64)
    halves = np.stack((keys & np.uint64(2**32 - 1), keys >> np.uint64(32))).astype(np.int64)
    wanted = philox_ref(torch.from_numpy(counters.T.astype(np.int64).copy()), torch.from_numpy(halves)).T
    assert run_words(device, counters, keys).tolist() == wanted.tolist()


def test_gumbel_is_accurate_everywhere(device: torch.device) -> None:
    """Against exact arithmetic on the same u: the tail that wins is at tiny u, but every u may be drawn."""
    edges = [base + step for power in range(33) for base in (2**power, 2**32 - 2**power) for step in (-3, -1, 0, 1, 3)]
    rng = np.random.default_rng(1)
    x = np.array([0, 1, *(edge for edge in edges if 0 <= edge < 2**32)], dtype=np.uint64)
    x = np.concatenate((x, rng.integers(0, 2**32, 8192 - len(x), dtype=np.uint64)))
    out = torch.full((len(x),), torch.nan, device=device)
    gumbel_kernel[(1,)](signed(x).to(device), out, N=len(x))
    u = np.minimum(x.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33), np.float32(1 - 2**-24))
    exact = -np.log(-np.log1p(-u.astype(np.float64)))
    error = np.abs(out.cpu().numpy() - exact)
    assert (error <= 6e-7 * np.maximum(1, np.abs(exact) / 4)).all(), error.max()


@pytest.mark.parametrize(("first", "count"), [(0, 4), (0, 64), (1024, 256), (151_932, 16)])
def test_noise_of_neighbours(device: torch.device, first: int, count: int) -> None:
    rng = np.random.default_rng(first)
    key = torch.from_numpy(rng.integers(-(2**63), 2**63, 1))
    words = torch.from_numpy(rng.integers(0, 2**31, 3))
    out = torch.full((count,), torch.nan, device=device)
    noise_kernel[(1,)](key.to(device), words.int().to(device), out, first, N=count)
    ids = torch.arange(first, first + count)[None]
    wanted = gumbel_ref(ids, key, *words[:, None])
    torch.testing.assert_close(out.cpu(), wanted[0], rtol=3e-7, atol=1e-6)
