"""Tensors between NaNs: who reads or writes outside of one shows."""

from __future__ import annotations

import torch
from torch import Tensor


def fenced(tensor: Tensor) -> Tensor:
    """A copy of the tensor with 64 NaNs on either side."""
    room = tensor.new_full((tensor.numel() + 128,), torch.nan)
    inner = room[64:-64].view(tensor.shape)
    return inner.copy_(tensor)
