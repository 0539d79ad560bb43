"""The kernel of `nucleus` against its reference, which ranks whole rows (and is held to the host in test_sample)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from splitdecode.kernels import nucleus as module
from splitdecode.kernels import state as bits
from splitdecode.kernels.nucleus import nucleus, nucleus_ref
from splitdecode.kernels.sample import BLOCK, SampleScratch, sample_ref
from splitdecode.kernels.state import SamplingState


def cut_state(
    rng: np.random.Generator, rows: int, vocab: int, k: list[int], p: list[float], m: list[float]
) -> SamplingState:
    """One slot per row, each with its top_k, top_p, min_p drawn from these lists; 0: off."""
    state = SamplingState.new(rows, vocab, "cpu")
    state.kind.fill_(bits.DRAW | bits.CUT)
    state.key.copy_(torch.from_numpy(rng.integers(-(2**63), 2**63, rows)))
    state.temperature.copy_(torch.from_numpy(rng.choice([0.6, 1.0, 1.5], rows)))
    state.top_k.copy_(torch.from_numpy(rng.choice([min(one, vocab) or vocab for one in k], rows)))
    state.top_p.copy_(torch.from_numpy(rng.choice([one or 1.0 for one in p], rows)))
    with np.errstate(divide="ignore"):
        state.log_min_p.copy_(torch.from_numpy(np.log(rng.choice(m, rows))))
    return state


def run(device: torch.device, logits: Tensor, state: SamplingState) -> tuple[Tensor, Tensor, Tensor]:
    """ids as `sample` leaves them, as the kernel rewrites them, and as the reference does; one slot per row."""
    rows, vocab = logits.shape
    draws = torch.zeros(rows, 6, dtype=torch.int32)
    draws[:, 0] = draws[:, 1] = draws[:, 2] = torch.arange(rows)
    scratch = SampleScratch.new(rows, vocab, "cpu")
    scratch.best_id.fill_(2**31 - 1)
    drawn = torch.empty(rows, dtype=torch.int32)
    sample_ref(logits, draws, state, scratch, None, drawn)
    wanted = drawn.clone()
    nucleus_ref(draws, state, scratch, wanted)
    there = {name: getattr(state, name).to(device) for name in SamplingState.__slots__}
    held = {name: getattr(scratch, name).to(device) for name in SampleScratch.__slots__}
    found = drawn.clone().to(device)
    nucleus(draws.to(device), SamplingState(**there), SampleScratch(**held), found)
    assert torch.equal(held["scaled"].cpu(), scratch.scaled)
    assert torch.equal(held["peaks"].cpu(), scratch.peaks)
    return drawn, found.cpu(), wanted


CUTS: dict[str, tuple[list[int], list[float], list[float]]] = {
    "top_k": ([1, 2, 7, 40, 5000], [0], [0]),
    "top_p": ([0], [0.05, 0.5, 0.8, 0.95], [0]),
    "min_p": ([0], [0], [0.02, 0.3, 1.0]),
    "all": ([0, 3, 20, 300], [0, 0.3, 0.8, 0.9], [0, 0.05, 0.2]),
    "top_k and top_p": ([5, 20, 64], [0.5, 0.8, 0.95], [0]),
}


SLOW = pytest.mark.slow
CASES: list[Any] = [(2 * BLOCK + 100, 6, cut) for cut in CUTS]
CASES += [
    pytest.param(vocab, rows, cut, marks=SLOW) for vocab, rows in ((40, 20), (17 * BLOCK + 3, 12)) for cut in CUTS
]


@pytest.mark.parametrize(("vocab", "rows", "cut"), CASES)
def test_the_kernel_equals_its_reference(device: torch.device, vocab: int, rows: int, cut: str) -> None:
    """Peaked, flat and coarse rows: the last are full of ties, at the border too. The widest have more blocks than are
    summed at a time."""
    rng = np.random.default_rng([vocab, len(cut)])
    state = cut_state(rng, rows, vocab, *CUTS[cut])
    logits = rng.normal(size=(rows, vocab)) * rng.choice([0.4, 2.0, 5.0], size=(rows, 1))
    logits[::3] = np.round(logits[::3])
    logits[:, rng.integers(0, vocab, vocab // 5)] = -np.inf
    drawn, found, wanted = run(device, torch.from_numpy(logits).float(), state)
    assert found.tolist() == wanted.tolist()
    assert 0 < (drawn != wanted).sum() < rows, "the rows do not test both verdicts"


@pytest.mark.parametrize("cut", ["top_p", pytest.param("all", marks=SLOW)])
def test_one_block_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """Sums of several steps, and halvings after a refusal: what wide vocabularies need."""
    monkeypatch.setattr(module, "_rule", lambda vocab: module.Config(1, 8))
    test_the_kernel_equals_its_reference(device, 2 * BLOCK + 30, 6, cut)


def test_equal_logits_keep_the_first_ids(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    rows, vocab = 3, 500
    state = cut_state(rng, rows, vocab, [1, 3], [0], [0])
    _, found, wanted = run(device, torch.zeros(rows, vocab), state)
    assert found.tolist() == wanted.tolist()
    assert (found < state.top_k).all()
    state = cut_state(rng, rows, vocab, [0], [1.5 / vocab], [0])
    _, found, _ = run(device, torch.zeros(rows, vocab), state)
    assert set(found.tolist()) <= {0, 1}
    state.top_p.fill_(1e-50)  # zero, as fp32
    _, found, wanted = run(device, torch.zeros(rows, vocab), state)
    assert found.tolist() == wanted.tolist() == [0] * rows


def test_the_only_id_left_is_taken(device: torch.device) -> None:
    rows, vocab = 3, BLOCK + 1
    state = cut_state(np.random.default_rng(0), rows, vocab, [50], [0.9], [0.1])
    logits = torch.full((rows, vocab), -torch.inf)
    logits[torch.arange(rows), torch.tensor([7, 0, BLOCK])] = torch.tensor([-2.0, 0.0, 1.0])
    _, found, _ = run(device, logits, state)
    assert found.tolist() == [7, 0, BLOCK]


def test_other_rows_are_left_alone(device: torch.device) -> None:
    """Rows that are padding, broken, or not cut keep their ids, whatever their scratch holds."""
    vocab = 30
    state = SamplingState.new(3, vocab, device)
    state.kind[0] = state.kind[1] = bits.DRAW | bits.CUT
    state.kind[2] = bits.DRAW
    draws = torch.tensor([[-1, 9, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0]], dtype=torch.int32)
    for launch in (nucleus, nucleus_ref):
        scratch = SampleScratch.new(3, vocab, device)
        for tensor in (scratch.scaled, scratch.peaks):
            tensor.fill_(torch.nan)
        ids = torch.tensor([bits.NOTHING, bits.BROKEN, 5], dtype=torch.int32, device=device)
        launch(draws.to(device), state, scratch, ids)
        assert ids.tolist() == [bits.NOTHING, bits.BROKEN, 5]
    with pytest.raises(ValueError, match=r"scratch: found \[3, 30\]"):
        nucleus(draws.repeat(2, 1), state, scratch, ids)
