"""The kernel of `head`: its logits against the reference and torch, its ids against `sample` on these logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitdecode.kernels import head as module
from splitdecode.kernels import state as bits
from splitdecode.kernels.head import head, head_programs, head_ref
from splitdecode.kernels.sample import SampleScratch, sample
from splitdecode.kernels.state import SamplingState

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # for every dtype: inputs are exact, products and sums fp32; logits are about 6
GREEDY, DRAWN = 0, bits.DRAW


def draws_of(*words: int) -> Tensor:
    return torch.tensor([words], dtype=torch.int32)


class Call:
    """One call's arguments on a device, outputs and scratch poisoned."""

    def __init__(
        self, device: torch.device, rows: int, hidden: int, vocab: int, dtype: torch.dtype, norm: bool
    ) -> None:
        torch.manual_seed(rows + hidden)
        self.x = (torch.randn(3, hidden) * 3).to(dtype).to(device)
        self.norm = (1 + 0.2 * torch.randn(hidden)).to(dtype).to(device) if norm else None
        self.w = (torch.randn(rows, hidden) * 2 * hidden**-0.5).to(dtype).to(device)
        self.state = SamplingState.new(2, vocab, device)
        self.state.kind[1] = DRAWN
        self.state.key[1], self.state.temperature[1] = -(2**62) - 12345, 0.7
        self.state.forbid[[1, 5]], self.state.forbid[[2]] = bits.BANNED, bits.ENTERING
        self.logits = torch.full((1, rows), torch.nan, device=device)
        self.ids = torch.full((1,), -77, dtype=torch.int32, device=device)

    def run(self, draws: Tensor, launch: object = head) -> tuple[Tensor, int]:
        assert callable(launch)
        blocks, device = head_programs(self.w), self.w.device
        best = torch.full((blocks,), torch.nan, device=device)
        best_id = torch.full((blocks,), -77, dtype=torch.int32, device=device)
        counters = torch.zeros(2, dtype=torch.int32, device=device)
        outputs = (self.logits.fill_(torch.nan), best, best_id, counters, self.ids.fill_(-77))
        launch(self.x, self.norm, 1e-5, self.w, draws.to(device), self.state, *outputs)
        assert counters.tolist() == [0, 0]
        return self.logits.clone(), int(self.ids)

    def sampled(self, draws: Tensor) -> int:
        """What `sample` makes of the logits that were written."""
        device, ids = self.w.device, torch.full((1,), -77, dtype=torch.int32, device=self.w.device)
        scratch = SampleScratch.new(1, self.state.vocab, device)
        sample(self.logits, draws.to(device), self.state, scratch, torch.zeros_like(ids), ids)
        return int(ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "hidden", "vocab", "norm"), [(64, 512, 64, True), (130, 40, 125, False), (33, 1100, 31, True)]
)
def test_logits_and_ids(
    device: torch.device, rows: int, hidden: int, vocab: int, norm: bool, dtype: torch.dtype
) -> None:
    call = Call(device, rows, hidden, vocab, dtype, norm)
    x = call.x.double()
    if call.norm is not None:
        x = torch.nn.functional.rms_norm(x, (hidden,), call.norm.double(), 1e-5)
    exact = x @ call.w.double().T
    for slot, token in ((0, 0), (1, 2)):
        draws = draws_of(token, slot, 17 + token, 3 << 8, 0, bits.FEEDS_DEVICE)
        logits, chosen = call.run(draws)
        torch.testing.assert_close(logits[0].double(), exact[token], **CLOSE)
        assert chosen == call.sampled(draws)
        assert 0 <= chosen < vocab
        assert chosen not in (1, 5)
        reference, expected = call.run(draws, head_ref)
        torch.testing.assert_close(logits, reference, **CLOSE)
        assert chosen == expected


@pytest.mark.parametrize("launch", [head, head_ref])
def test_rows_that_are_not_plain_get_logits_only(device: torch.device, launch: object) -> None:
    call = Call(device, 40, 32, 40, torch.float32, True)
    for needs in (bits.CUT | bits.DRAW, bits.EDIT, bits.LOGPROBS):
        call.state.kind[0] = needs
        logits, chosen = call.run(draws_of(0, 0, 0, 0, 0, 0), launch)
        assert logits.isfinite().all()
        assert chosen == -77
    call.state.kind[0] = GREEDY
    for attempt, flags, untouched in ((1, 0, True), (0, bits.SUPPRESS_END, True), (-1, 0, False)):
        logits, chosen = call.run(draws_of(0, 0, 0, 0, attempt, flags), launch)
        assert logits.isfinite().all()
        assert (chosen == -77) == untouched


@pytest.mark.parametrize("launch", [head, head_ref])
def test_padding_gets_nothing(device: torch.device, launch: object) -> None:
    logits, chosen = Call(device, 40, 32, 40, torch.float32, True).run(draws_of(-1, 99, 0, 0, 0, 0), launch)
    assert chosen == bits.NOTHING
    assert logits.isnan().all()


@pytest.mark.parametrize("launch", [head, head_ref])
@pytest.mark.parametrize("slot", [0, 1])
def test_broken_rows(device: torch.device, slot: int, launch: object) -> None:
    """NaN and +inf break a row, at banned ids too, but not from V on; so does a row of which nothing is left."""
    draws = draws_of(0, slot, 5, 0, 0, 0)
    cases = ((39, torch.nan, True), (5, torch.inf, True), (39, -torch.inf, False), (45, torch.nan, False))
    for token, value, broken in cases:
        call = Call(device, 48, 16, 40, torch.float32, False)
        call.x[0] = 1.0
        call.w[token] = value
        assert (call.run(draws, launch)[1] == bits.BROKEN) == broken
    call.state.forbid.fill_(bits.BANNED)
    assert call.run(draws, launch)[1] == bits.BROKEN


def test_leaders_are_compared_in_passes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More programs than the last one compares at a time; equals go to the lowest id of all."""
    monkeypatch.setattr(module, "_STEP", 2)
    call = Call(device, 16 * 5, 8, 16 * 5, torch.float32, False)
    for wanted, places in ((70, [70]), (9, [9, 70]), (35, [35, 66, 40]), (64, [64, 79])):
        call.w.zero_()
        call.w[places] = call.x[0]
        assert call.run(draws_of(0, 0, 0, 0, 0, 0))[1] == wanted


def test_sizes_are_checked(device: torch.device) -> None:
    call = Call(device, 40, 32, 40, torch.float32, True)
    rest = (call.state, call.logits, call.logits[0, :1], call.ids, call.ids, call.ids)
    with pytest.raises(ValueError, match=r"x: found \[3, 31\], expected \[_, 32\]"):
        head(call.x[:, :31], None, 0.0, call.w, draws_of(0, 0, 0, 0, 0, 0), *rest)
    with pytest.raises(ValueError, match=r"w: found strides \(1, 40\)"):
        head(call.x, None, 0.0, call.w.reshape(32, 40).t(), draws_of(0, 0, 0, 0, 0, 0), *rest)
    with pytest.raises(ValueError, match="logits: found"):
        head(call.x, None, 0.0, call.w[:39], draws_of(0, 0, 0, 0, 0, 0), *rest)
    with pytest.raises(ValueError, match=r"draws: found \[2, 6\]"):
        head(call.x, None, 0.0, call.w, draws_of(0, 0, 0, 0, 0, 0).repeat(2, 1), *rest)
    with pytest.raises(ValueError, match="best: found 1"):
        head(call.x, None, 0.0, call.w, draws_of(0, 0, 0, 0, 0, 0), *rest)
