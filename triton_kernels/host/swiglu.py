"""F1: the gated activation of the feed-forward block.

    out[t, :] = silu(gate[t, :]) * up[t, :]        silu(z) = z / (1 + exp(-z))

| argument | shape   | dtype                  | unit                                                     |
|----------|---------|------------------------|----------------------------------------------------------|
| gate, up | [T, I]  | fp64, fp32, bf16, fp16 | halves of one [T, 2 I] product, so rows may be strided   |
| out      | [T, I]  | as gate                | written                                                  |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from splitdecode._C import swiglu_rows


def swiglu_ref(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Writes silu(gate) * up into `out` and returns it."""
    if gate.shape[0] == 1 or not gate.is_cpu or gate.dtype.itemsize < 4:
        return torch.mul(F.silu(gate), up, out=out)
    swiglu_rows(gate.numpy(), up.numpy(), out.numpy())
    return out
