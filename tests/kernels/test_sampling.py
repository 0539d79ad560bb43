"""Philox against the published answers; noise and Gumbel-max against the oracle; torch against its numpy twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles.sampling import gumbel, philox

from splitdecode.kernels.host.sampling import (
    GUMBEL_MAX,
    gumbel_dense_host,
    gumbel_host,
    gumbel_ref,
    philox_host,
    philox_ref,
)

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, answer.
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def draws(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "key": rng.integers(0, 2**64, rows, dtype=np.uint64),
        "position": rng.integers(0, 2**31, rows),
        "stream": rng.integers(0, 2**32, rows),
        "attempt": rng.integers(0, 2**20, rows),
    }


def tensors(draw: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(word.astype(np.int64)) for name, word in draw.items()}


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    assert philox(words(counter), words(key)) == words(answer)
    assert philox_ref(torch.tensor(words(counter)), torch.tensor(words(key))).tolist() == words(answer)
    low, high = words(key)
    columns = [np.array([word], dtype=np.uint64) for word in words(counter)]
    assert philox_host(*columns, np.array([low | high << 32], dtype=np.uint64))[:, 0].tolist() == words(answer)


def test_random_words_agree() -> None:
    rng = np.random.default_rng(1)
    counter = rng.integers(0, 2**32, (4, 50), dtype=np.uint64)
    key = rng.integers(0, 2**64, 50, dtype=np.uint64)
    host = philox_host(*counter, key)
    halves = np.stack((key & np.uint64(0xFFFFFFFF), key >> np.uint64(32)))
    ref = philox_ref(torch.from_numpy(counter.astype(np.int64)), torch.from_numpy(halves.astype(np.int64)))
    assert np.array_equal(ref.numpy(), host.astype(np.int64))
    for i in range(50):
        assert (
            philox([int(word) for word in counter[:, i]], [int(word) for word in halves[:, i]]) == host[:, i].tolist()
        )


@pytest.mark.parametrize("vocab", [1, 3, 4, 152, 1001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_is_one_function(vocab: int, dtype: type) -> None:
    draw = draws(3)
    ids = np.tile(np.arange(vocab), (3, 1))
    dense = gumbel_dense_host(vocab, **draw, dtype=dtype)
    assert dense.dtype == dtype
    assert np.array_equal(dense, gumbel_host(ids, **draw, dtype=dtype))
    torch_dtype = torch.float32 if dtype is np.float32 else torch.float64
    ref = gumbel_ref(torch.from_numpy(ids), **tensors(draw), dtype=torch_dtype)
    close = 2e-6 if dtype is np.float32 else 1e-14
    torch.testing.assert_close(ref, torch.from_numpy(dense), rtol=close, atol=close)
    for row in range(3):
        where = [int(draw[name][row]) for name in ("key", "position", "stream", "attempt")]
        for token in {0, vocab // 2, vocab - 1}:
            key, position, stream, attempt = where
            expected = gumbel(token, key, position, stream & 0xFF, stream >> 8, attempt)
            assert dense[row, token] == pytest.approx(expected, rel=close, abs=close)


def test_noise_is_finite_and_bounded_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitdecode.kernels.host import sampling

    ends = np.array([0, 1, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    for dtype in (np.float32, np.float64):
        noise = sampling._gumbel_of(ends, dtype)
        assert np.isfinite(noise).all()
        assert (np.diff(noise) <= 0).all()
        assert noise[0] < GUMBEL_MAX


def test_noise_has_gumbel_moments() -> None:
    noise = gumbel_dense_host(40_000, **draws(1), dtype=np.float64)
    assert noise.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.06)
