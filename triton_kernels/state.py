"""F1: device memory the kernels of a step share, by slot: what sampling needs to know about each sequence.

    slot = the scheduler's handle of a sequence, 0 .. S - 1.  V = ids that may be sampled (vocab_limit).

A row of `draws [N, 6] int32` says which logits are wanted and how the draw is keyed; the scheduler writes it:

    token index (-1: padding) | slot | position (word 1) | stream (word 2) | attempt (word 3) | flags
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What a slot needs, as bits of `kind`.
DRAW, CUT, EDIT, LOGPROBS = 1, 2, 4, 8
# Flags of a row of `draws`.
SUPPRESS_END, FEEDS_DEVICE = 1, 2
# Bits of `forbid`, by id: never sampled; excluded while attempt > 0; excluded by SUPPRESS_END.
BANNED, ENTERING, END = 1, 2, 4
# Bits of `marks`, by slot and id: in the prompt; excluded by SUPPRESS_END.
PROMPT, STOP = 1, 2
# Sampled ids that are none: a row that holds NaN or +inf, or nothing above -inf; a row that is padding or has stopped.
BROKEN, NOTHING = -1, -2


@dataclass(frozen=True, slots=True)
class SamplingState:
    """Parameters of every slot; `real` tensors are float64 for float64 logits and float32 for all others.

    kind [S] int32; key [S] int64 (64-bit patterns); temperature, top_p, log_min_p [S] real; top_k [S] int32 (V = off)
    penalties [S, 3] real: repetition, frequency, presence
    bias [S, V] real; counts [S, V] int32: how often each id was generated; marks [S, V] uint8; forbid [V] uint8
    """

    kind: Tensor
    key: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    penalties: Tensor
    bias: Tensor
    counts: Tensor
    marks: Tensor
    forbid: Tensor

    @property
    def vocab(self) -> int:
        return self.forbid.shape[0]

    @staticmethod
    def new(slots: int, vocab: int, device: torch.device | str, real: torch.dtype = torch.float32) -> SamplingState:
        """Every slot greedy, nothing forbidden."""

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return SamplingState(
            kind=full(0, torch.int32, slots),
            key=full(0, torch.int64, slots),
            temperature=full(0.0, real, slots),
            top_k=full(vocab, torch.int32, slots),
            top_p=full(1.0, real, slots),
            log_min_p=full(float("-inf"), real, slots),
            penalties=torch.tensor([1.0, 0.0, 0.0], dtype=real, device=device).repeat(slots, 1),
            bias=full(0.0, real, slots, vocab),
            counts=full(0, torch.int32, slots, vocab),
            marks=full(0, torch.uint8, slots, vocab),
            forbid=full(0, torch.uint8, vocab),
        )
