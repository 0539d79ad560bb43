"""F7: Muon for hidden matrices and AdamW for the rest, as one optimiser that a trainer can step, schedule and save.

Tiny models learn facts by it that AdamW alone does not teach them in the time (docs/training.md). Muon: Jordan et al.,
2024, in torch.optim; it is for matrices that map hidden states to hidden states, not for embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MuonAdam(torch.optim.Optimizer):
    """Two optimisers, whose groups of parameters are the groups of this one."""

    def __init__(self, model: torch.nn.Module, *, matrix_rate: float, rate: float) -> None:
        """matrix_rate: learning rate of the hidden matrices, rate: of embeddings, head, norms and biases."""
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = [p for name, p in trained if p.ndim == 2 and id(p) not in embeddings and "lm_head" not in name]
        kept = {id(p) for p in inner}
        outer = [p for _, p in trained if id(p) not in kept]
        super().__init__([{"params": inner}, {"params": outer}], {"lr": rate})
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(inner, lr=matrix_rate),
            torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98)),
        )
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both; "param_groups" as a trainer looks for them."""
        states = [part.state_dict() for part in self.parts]
        return {"parts": states, "param_groups": [group for state in states for group in state["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What state_dict() gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
