"""The sampler against the one-row oracle, against the distribution it stands for, and against its own batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from oracles import sampling as oracle
from scipy import stats

from splitdecode.config import SamplingParams, Stream, request_key
from splitdecode.errors import RequestError
from splitdecode.runtime import sampler as module
from splitdecode.runtime.noise import NoiseWindow
from splitdecode.runtime.sampler import SUPPRESS_STOP, Counts, Sampled, Sampler

BANNED, ENTERING, EOS = (3, 17), (5, 6), (0,)


def run(sampler: Sampler, logits: torch.Tensor, slots: list[int], **words: Any) -> Sampled:
    """Sampler.sample with every word 0 unless given."""
    counts = words.pop("counts", ())
    columns = [np.asarray(words.pop(name, [0] * len(slots))) for name in ("positions", "streams", "attempts", "flags")]
    assert not words
    return sampler.sample(logits, np.array(slots), *columns, counts)


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Float64 logits, some rows full of ties."""
    logits = rng.normal(size=(rows, vocab)) * rng.choice([0.5, 3.0, 8.0], size=(rows, 1))
    coarse = rng.random(rows) < 0.4
    logits[coarse] = np.round(logits[coarse])
    return logits


@pytest.mark.parametrize("vocab", [18, 152, 1500])
def test_every_row_equals_the_oracle(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    slots_of = 16
    sampler = Sampler(vocab - 2, slots_of, banned_ids=BANNED, entering_ids=ENTERING, eos_ids=EOS)
    for _ in range(12 if vocab < 1000 else 4):
        params = [oracle.random_params(rng, vocab) for _ in range(slots_of)]
        keys = [request_key(int(rng.integers(99)), slot) for slot in range(slots_of)]
        for slot in range(slots_of):
            sampler.set(slot, params[slot], keys[slot])
        slots = rng.integers(0, slots_of, 24).tolist()
        logits = random_logits(rng, 24, vocab)
        positions, attempts = rng.integers(0, 40, 24), rng.choice([0, 0, 1, 2], 24)
        streams, steps, flags = rng.integers(0, 5, 24), rng.choice([0, 0, 3], 24), rng.choice([0, 0, 1], 24)
        prompts, outputs = rng.integers(0, vocab, (24, 5)), rng.integers(0, vocab, (24, 7))
        counts = [Counts(row, prompts[row], outputs[row]) for row in range(24)]
        words = {"positions": positions, "attempts": attempts, "flags": flags, "streams": streams | steps << 8}
        found = run(sampler, torch.from_numpy(logits), slots, counts=counts, **words).ids
        for row, slot in enumerate(slots):
            expected = oracle.sample_row(
                logits[row],
                params[slot],
                keys[slot],
                int(positions[row]),
                int(streams[row]),
                int(steps[row]),
                int(attempts[row]),
                vocab_limit=vocab - 2,
                banned=BANNED,
                entering=ENTERING,
                suppress=bool(flags[row] & SUPPRESS_STOP),
                stop_ids=(*EOS, *params[slot].stop_ids),
                prompt_ids=prompts[row].tolist(),
                output_ids=outputs[row].tolist(),
            )
            assert found[row] == expected, (row, params[slot])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_does_not_matter(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(5)
    for vocab in (40, 1400):
        params = [
            dataclasses.replace(oracle.random_params(rng, vocab), logprobs=int(rng.integers(3))) for _ in range(8)
        ]
        logits = torch.from_numpy(random_logits(rng, 8, vocab)).to(dtype)
        together = Sampler(vocab, 8, banned_ids=BANNED)
        for slot in range(8):
            together.set(slot, params[slot], slot)
        counts = [Counts(row, [1, 2], [9, 9]) for row in range(8)]
        batch = run(together, logits, list(range(8)), positions=np.arange(8), counts=counts)
        for slot in range(8):
            alone = Sampler(vocab, 8, banned_ids=BANNED)
            alone.set(slot, params[slot], slot)
            one = run(alone, logits[slot : slot + 1], [slot], positions=[slot], counts=[Counts(0, [1, 2], [9, 9])])
            assert one.ids[0] == batch.ids[slot]
            assert one.logprobs is not None
            assert batch.logprobs is not None
            assert one.logprobs[0] == batch.logprobs[slot]


CUTS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_distribution(cut: dict[str, Any]) -> None:
    """Chi-square of 20,000 draws against the softmax of what is kept."""
    vocab, count = 11, 20_000
    logits = np.random.default_rng(8).normal(size=vocab) * 1.5
    params = SamplingParams(**cut)
    sampler = Sampler(vocab, 1)
    sampler.set(0, params, request_key(3, 0))
    rows = torch.from_numpy(np.tile(logits, (count, 1)))
    ids = run(sampler, rows, [0] * count, positions=np.arange(count)).ids
    alive = oracle.processed(logits, params, vocab_limit=vocab)
    assert alive is not None
    kept = sorted(oracle.kept(alive, params))
    weights = np.exp([alive[token] for token in kept])
    seen = np.bincount(ids, minlength=vocab)
    assert seen.sum() == seen[kept].sum()
    assert stats.chisquare(seen[kept], weights / weights.sum() * count).pvalue > 1e-3


def test_streams_are_independent() -> None:
    """Equal key and position, another stream, step or attempt: another draw. Agreement is that of chance."""
    vocab, count = 8, 4000
    sampler = Sampler(vocab, 1)
    sampler.set(0, SamplingParams(), 7)
    rows, positions = torch.zeros(count, vocab), np.arange(count)
    base = run(sampler, rows, [0] * count, positions=positions).ids
    words = [(Stream.CLOSE.word(), 0), (Stream.CONFIRM.word(1), 0), (Stream.CONFIRM.word(2), 0), (0, 1)]
    for word, attempt in words:
        where = {"streams": np.full(count, word), "attempts": np.full(count, attempt)}
        other = run(sampler, rows, [0] * count, positions=positions, **where).ids
        assert (other == base).mean() == pytest.approx(1 / vocab, abs=0.03)


def test_long_rows_are_pruned_exactly() -> None:
    """Beyond the dense path, flat and peaked: only ids that can win are perturbed, and the winner is the same."""
    vocab = 2500
    rng = np.random.default_rng(2)
    logits = np.stack([rng.normal(size=vocab) * scale for scale in (0.1, 1, 4, 9, 30)])
    for cut in ({}, {"temperature": 0.05}, {"top_p": 0.9}, {"min_p": 0.001}, {"top_p": 0.999, "temperature": 3.0}):
        params = SamplingParams(**cut)
        sampler = Sampler(vocab, 5)
        for slot in range(5):
            sampler.set(slot, params, slot)
        for position in range(2):
            found = run(sampler, torch.from_numpy(logits), list(range(5)), positions=[position] * 5).ids
            for row in range(5):
                assert found[row] == oracle.sample_row(logits[row], params, row, position, 0)


def test_greedy_takes_the_lowest_of_equals_and_no_padding() -> None:
    sampler = Sampler(6, 2, banned_ids=[1], entering_ids=[2], eos_ids=[3])
    for slot in range(2):
        sampler.set(slot, SamplingParams(temperature=0, stop_token_ids=[4]), 0)
    logits = torch.tensor([[0.0, 9, 8, 8, 8, 1, 99, torch.nan]]).repeat(4, 1)
    assert run(sampler, logits, [0, 1, 0, 1], attempts=[0, 1, 0, 1], flags=[0, 0, 1, 1]).ids.tolist() == [2, 3, 2, 5]


@pytest.mark.parametrize("heat", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_corrupt_rows_are_flagged_and_alone(heat: float, dtype: torch.dtype) -> None:
    sampler = Sampler(8, 6, banned_ids=[2])
    for slot in range(6):
        sampler.set(slot, SamplingParams(temperature=heat, logprobs=1, top_p=0.9), slot)
    logits = torch.zeros(6, 9, dtype=dtype)
    logits[1, 2] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, [0, 1, 3, 4, 5, 6, 7]] = -torch.inf  # only a banned id is left
    logits[5, 8] = torch.nan  # padding is never read
    result = run(sampler, logits, list(range(6)))
    assert (result.ids == -1).tolist() == [False, True, True, True, True, False]
    assert result.logprobs is not None
    assert result.top is not None
    assert np.isnan(result.logprobs).tolist() == [False, True, True, True, True, False]
    assert [entry is None for entry in result.top] == [False, True, True, True, True, False]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    unlikely = int(logits[0, :9].argmin())
    sampler = Sampler(9, 3, banned_ids=[int(logits[0, :9].argmax())])
    sampler.set(0, SamplingParams(temperature=0, logprobs=3, logit_bias={unlikely: 50.0}), 0)
    sampler.set(1, SamplingParams(temperature=0.1, logprobs=0), 0)
    sampler.set(2, SamplingParams(), 0)
    result = run(sampler, logits, [0, 1, 2])
    expected = torch.log_softmax(logits[:, :9].double(), dim=1)
    assert result.ids[0] == unlikely
    assert result.logprobs is not None
    assert result.top is not None
    assert result.logprobs[:2] == pytest.approx([expected[0, unlikely].item(), expected[1, result.ids[1]].item()])
    assert np.isnan(result.logprobs[2])
    assert result.top[0] is not None
    best = expected[0].topk(3)
    assert result.top[0][0].tolist() == best.indices.tolist()
    assert result.top[0][1] == pytest.approx(best.values.tolist())
    assert result.top[1] is result.top[2] is None
    assert run(sampler, logits[2:], [2]).logprobs is None


def test_requests_are_checked_against_the_vocabulary() -> None:
    sampler = Sampler(100, 1)
    with pytest.raises(RequestError, match="stop_token_ids: found 100, expected ids below 100"):
        sampler.set(0, SamplingParams(stop_token_ids=[5, 100]), 0)
    with pytest.raises(RequestError, match="logit_bias: found 200"):
        sampler.set(0, SamplingParams(logit_bias={200: 1.0}), 0)
    sampler.set(0, SamplingParams(presence_penalty=1.0), 0)
    assert sampler.needs_counts(0)
    with pytest.raises(ValueError, match="counts"):
        run(sampler, torch.zeros(1, 100), [0])
    sampler.clear(0)
    assert not sampler.needs_counts(0)
    assert run(sampler, torch.zeros(1, 100), [0]).ids.tolist() == [0]


def test_windows_hold_what_they_stand_for() -> None:
    rng = np.random.default_rng(4)
    window = NoiseWindow(21, 4, np.float64)
    for _ in range(60):
        rows = int(rng.integers(1, 7))
        slots = rng.integers(0, 4, rows)
        words = (rng.integers(0, 2, rows).astype(np.uint64), rng.integers(0, 50, rows))
        draw = module.Draw(*words, rng.integers(0, 2, rows), rng.integers(0, 2, rows))
        expected = module.ops.gumbel_dense_host(21, *draw, np.float64)
        assert np.array_equal(window.get(slots, draw), expected)
    assert NoiseWindow(1000, 30_000, np.float32).width == 1
