"""`sample`, `nucleus` and `logprobs` hold to the host's sampler; the kernel of `sample` holds to its reference.

The references are compared with runtime.sampler in float64, where equal means equal. Kernel and reference are compared
in fp32: two perturbed values lie within 1e-5 of each other, where rounding decides, once in 1e5 rows, and not with
these seeds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracles.sampling import random_params
from torch import Tensor

from splitdecode.config import SamplingParams, request_key
from splitdecode.kernels import state as bits
from splitdecode.kernels.logprobs import logprobs_ref
from splitdecode.kernels.nucleus import nucleus_ref
from splitdecode.kernels.sample import SampleScratch, sample, sample_ref
from splitdecode.kernels.state import SamplingState
from splitdecode.runtime.sampler import Counts, Sampler

BANNED, ENTERING, EOS = (3, 17), (5, 6), (0,)


def any_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    """With log-probs or without."""
    return replace(random_params(rng, vocab), logprobs=int(rng.integers(2)) if rng.random() < 0.5 else None)


def fill(state: SamplingState, slot: int, params: SamplingParams, key: int, prompt: Any, output: Any) -> None:
    """What the runtime would write when it admits a request and counts its ids."""
    vocab = state.vocab
    bounded = 0 < params.top_k < vocab
    kind = bits.LOGPROBS if params.logprobs is not None else 0
    kind |= bits.EDIT if params.logit_bias or params.penalised else 0
    if not params.greedy:
        kind |= bits.DRAW | (bits.CUT if bounded or params.top_p < 1 or params.min_p > 0 else 0)
    state.kind[slot] = kind
    state.key[slot] = key - (key >> 63 << 64)
    state.temperature[slot] = params.temperature
    state.top_k[slot] = params.top_k if bounded else vocab
    state.top_p[slot] = params.top_p
    state.log_min_p[slot] = np.log(params.min_p) if params.min_p > 0 else -np.inf
    state.penalties[slot] = torch.tensor(
        [params.repetition_penalty, params.frequency_penalty, params.presence_penalty], dtype=torch.float64
    )
    state.bias[slot] = state.counts[slot] = state.marks[slot] = 0
    for token, bias in (params.logit_bias or {}).items():
        state.bias[slot, token] = bias
    if params.penalised:
        for token in output:
            if token < vocab:
                state.counts[slot, token] += 1
        state.marks[slot, [token for token in prompt if token < vocab]] |= bits.PROMPT
    state.marks[slot, list(params.stop_ids)] |= bits.STOP


def forbid(state: SamplingState) -> None:
    for ids, bit in ((BANNED, bits.BANNED), (ENTERING, bits.ENTERING), (EOS, bits.END)):
        state.forbid[[token for token in ids if token < state.vocab]] |= bit


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Float64 logits: some rows full of ties, some corrupt, some with little left."""
    logits = rng.normal(size=(rows, vocab)) * rng.choice([0.5, 3.0, 8.0], size=(rows, 1))
    coarse = rng.random(rows) < 0.4
    logits[coarse] = np.round(logits[coarse])
    for row in (rng.random(rows) < 0.15).nonzero()[0]:
        logits[row, rng.integers(0, vocab)] = rng.choice([np.nan, np.inf, -np.inf])
    for row in (rng.random(rows) < 0.1).nonzero()[0]:
        logits[row, rng.integers(0, vocab, vocab) > 0] = -np.inf
    logits[rng.random(rows) < 0.05] = -np.inf
    return logits


def random_draws(rng: np.random.Generator, slots: int) -> np.ndarray:
    """One row per slot, padding among them."""
    draws = np.empty((slots, 6), dtype=np.int32)
    draws[:, 0] = np.where(rng.random(slots) < 0.1, -1, np.arange(slots))
    draws[:, 1], draws[:, 2] = rng.permutation(slots), rng.integers(0, 40, slots)
    draws[:, 3] = rng.integers(0, 5, slots) | rng.choice([0, 0, 3], slots) << 8
    draws[:, 4], draws[:, 5] = rng.choice([-1, 0, 0, 1, 2], slots), rng.integers(0, 4, slots)
    return draws


def poisoned(rows: int, vocab: int, device: torch.device | str, real: torch.dtype = torch.float32) -> SampleScratch:
    scratch = SampleScratch.new(rows, vocab, device, real)
    for tensor in (scratch.scaled, scratch.peaks, scratch.best):
        tensor.fill_(torch.nan)
    scratch.best_id.fill_(-77)
    return scratch


def device_draw(logits: Tensor, draws: Tensor, state: SamplingState) -> tuple[Tensor, Tensor]:
    """The references in the order of a step -> ids, log-probs."""
    rows = len(draws)
    scratch = poisoned(rows, state.vocab, "cpu", logits.dtype)
    ids, out = torch.full((rows,), -77, dtype=torch.int32), torch.full((rows,), -77.0)
    sample_ref(logits, draws, state, scratch, None, ids)
    nucleus_ref(draws, state, scratch, ids)
    logprobs_ref(logits, draws, state, ids, out)
    return ids, out


@pytest.mark.parametrize(("vocab", "rounds"), [(18, 12), (152, 12), (1500, 4)])
def test_references_equal_the_host_sampler(vocab: int, rounds: int) -> None:
    rng = np.random.default_rng(vocab)
    slots, limit = 24, vocab - 2
    sampler = Sampler(limit, slots, banned_ids=BANNED, entering_ids=ENTERING, eos_ids=EOS)
    for _ in range(rounds):
        state = SamplingState.new(slots, limit, "cpu", torch.float64)
        forbid(state)
        prompts, outputs = rng.integers(0, vocab, (slots, 5)), rng.integers(0, vocab, (slots, 7))
        for slot in range(slots):
            params, key = any_params(rng, limit), request_key(int(rng.integers(99)), slot)
            sampler.set(slot, params, key)
            fill(state, slot, params, key, prompts[slot], outputs[slot])
        logits, draws = torch.from_numpy(random_logits(rng, slots, vocab)), random_draws(rng, slots)
        at = draws[:, 1]
        counts = [Counts(row, prompts[slot], outputs[slot]) for row, slot in enumerate(at)]
        wanted = sampler.sample(logits, at, *draws[:, 2:5].astype(np.int64).T, draws[:, 5] & bits.SUPPRESS_END, counts)
        ids, out = device_draw(logits, torch.from_numpy(draws), state)
        live = draws[:, 0] >= 0
        assert ids.tolist() == np.where(live, wanted.ids, bits.NOTHING).tolist()
        assert wanted.logprobs is not None
        np.testing.assert_allclose(out.numpy(), np.where(live, wanted.logprobs, np.nan), rtol=1e-6, atol=1e-12)


def random_state(rng: np.random.Generator, slots: int, vocab: int, device: torch.device) -> SamplingState:
    state = SamplingState.new(slots, vocab, "cpu")
    forbid(state)
    for slot in range(slots):
        params, key = any_params(rng, vocab), request_key(slot, 0)
        fill(state, slot, params, key, rng.integers(0, vocab, 9), rng.integers(0, vocab, 30))
    return SamplingState(**{name: getattr(state, name).to(device) for name in SamplingState.__slots__})


@pytest.mark.parametrize(("vocab", "dtype"), [(37, torch.float16), (1024, torch.bfloat16), (2501, torch.float32)])
def test_the_kernel_equals_its_reference(device: torch.device, vocab: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(vocab)
    slots = 24
    state = random_state(rng, slots, vocab, device)
    logits = torch.full((slots + 1, vocab + 7), torch.nan, dtype=dtype)  # ids from V on are never read
    logits[:slots, :vocab] = torch.from_numpy(random_logits(rng, slots, vocab))
    logits, draws = logits.to(device), torch.from_numpy(random_draws(rng, slots)).to(device)
    made, wanted = poisoned(slots, vocab, device), poisoned(slots, vocab, device)
    ids, expected = (torch.full((slots,), -77, dtype=torch.int32, device=device) for _ in range(2))
    counters = torch.zeros(slots + 1, dtype=torch.int32, device=device)
    sample(logits, draws, state, made, counters, ids)
    sample_ref(logits, draws, state, wanted, None, expected)
    assert ids.tolist() == expected.tolist()
    sound = ids >= 0
    torch.testing.assert_close(made.scaled[sound], wanted.scaled[sound], rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(made.peaks[sound], wanted.peaks[sound], rtol=1e-6, atol=1e-6, equal_nan=True)
    assert counters.tolist() == [0] * (slots + 1)
    assert made.best[draws[:, 0] < 0].isnan().all()
    assert {bits.BROKEN, bits.NOTHING} < set(ids.tolist())


def test_equals_go_to_the_lowest_id_of_all_blocks(device: torch.device) -> None:
    """Greedy rows: the maximum stands in several blocks, and twice in one; it is barely the maximum."""
    vocab = 4000
    state = SamplingState.new(1, vocab, device)
    logits = torch.zeros(3, vocab, device=device)
    logits[0, [3999, 2100, 2050]] = 1.0
    logits[1, [7, 9, 1030]] = torch.tensor([1.0, 1.0 + 2**-23, 1.0], device=device)
    draws = torch.tensor([[row, 0, 0, 0, 0, 0] for row in range(3)], dtype=torch.int32, device=device)
    ids, counters = torch.full((3,), -77, dtype=torch.int32, device=device), torch.zeros_like(draws[:, 0])
    sample(logits, draws, state, poisoned(3, vocab, device), counters, ids)
    assert ids.tolist() == [2050, 9, 0]


def test_what_overflows_is_broken(device: torch.device) -> None:
    state = SamplingState.new(2, 8, device)
    state.kind[0], state.kind[1] = bits.EDIT, bits.DRAW
    state.bias[0, 3], state.temperature[1] = 3e38, 1e-4
    logits = torch.full((2, 8), 1e35, device=device)
    logits[0, 3] = 3e38
    draws = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.int32, device=device)
    for run in (sample, sample_ref):
        ids, counters = torch.full((2,), -77, dtype=torch.int32, device=device), torch.zeros_like(draws[:, 0])
        with np.errstate(over="ignore"):
            run(logits, draws, state, poisoned(2, 8, device), counters, ids)
        assert ids.tolist() == [bits.BROKEN, bits.BROKEN]


def test_sizes_are_checked() -> None:
    state, scratch = SamplingState.new(1, 10, "cpu"), SampleScratch.new(2, 10, "cpu")
    draws, ints = torch.zeros(2, 6, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"logits: found \[2, 9\]"):
        sample(torch.zeros(2, 9), draws, state, scratch, ints, ints)
    with pytest.raises(ValueError, match="counters: found 1"):
        sample(torch.zeros(2, 10), draws, state, scratch, ints[:1], ints)
    with pytest.raises(ValueError, match=r"scratch: found \[2, 10\]"):
        sample(torch.zeros(3, 10), draws.repeat(2, 1)[:3], state, scratch, ints.repeat(2), ints.repeat(2))
    sample(torch.zeros(0, 10), draws[:0], state, scratch, ints, ints[:0])
