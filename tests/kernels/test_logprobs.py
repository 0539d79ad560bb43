"""Log-probs of chosen ids against torch's log-softmax."""

from __future__ import annotations

import pytest
import torch

from splitdecode.kernels import state as bits
from splitdecode.kernels.logprobs import logprobs, logprobs_ref
from splitdecode.kernels.state import SamplingState


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 300, 20_001])
def test_chosen_ids(device: torch.device, vocab: int, dtype: torch.dtype) -> None:
    """Rows: likely, unlikely, half excluded, and three without a log-prob: no LOGPROBS, no id, padding."""
    torch.manual_seed(vocab)
    logits = torch.full((6, vocab + 3), torch.nan, dtype=dtype)  # ids from V on are never read
    logits[:, :vocab] = torch.randn(6, vocab) * 4
    logits[1, vocab - 1] = 30.0  # the maximum comes last
    logits[2, 1 : vocab // 2] = -torch.inf
    logits[4, 0] = torch.nan
    state = SamplingState.new(3, vocab, device)
    state.kind[1], state.kind[2] = bits.LOGPROBS | bits.DRAW, bits.DRAW
    slots, tokens = [1, 1, 1, 2, 1, 1], [0, 1, 2, 3, 4, -1]
    draws = torch.tensor([[t, s, 0, 0, 0, 0] for t, s in zip(tokens, slots, strict=True)], dtype=torch.int32)
    wide = logits[:, :vocab].double()
    ids = torch.tensor([wide[0].argmax(), wide[1].argmin(), 0, 0, bits.BROKEN, bits.NOTHING], dtype=torch.int32)
    wanted = torch.log_softmax(wide, 1)[torch.arange(3), ids[:3].long()].float()
    for run in (logprobs, logprobs_ref):
        out = torch.full((6,), -77.0, device=device)
        run(logits.to(device), draws.to(device), state, ids.to(device), out)
        torch.testing.assert_close(out[:3].cpu(), wanted, rtol=1e-6, atol=4e-6)
        assert out[3:].isnan().all()


def test_sizes_are_checked() -> None:
    state, ints = SamplingState.new(1, 10, "cpu"), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"logits: found \[2, 9\]"):
        logprobs(torch.zeros(2, 9), torch.zeros(2, 6, dtype=torch.int32), state, ints, torch.zeros(2))
    logprobs(torch.zeros(0, 10), torch.zeros(0, 6, dtype=torch.int32), state, ints[:0], torch.zeros(0))
