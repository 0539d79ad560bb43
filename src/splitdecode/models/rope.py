"""F3: rotary tables: for every position, one complex number per pair of head dimensions.

Angles are computed in float32, as the reference implementations do: at position 100,000 a float64 table would differ
from theirs by 4e-3 rad, and the checkpoints were trained against the float32 one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from splitdecode.errors import CheckpointError
from splitdecode.models.config import RopeConfig


def inv_freq(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position of each pair [head_dim / 2] float32, and the factor cos and sin are multiplied by.

    Raises CheckpointError for a kind of scaling that is not known.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / head_dim
    plain = 1.0 / (rope.theta**steps)
    if rope.kind == "default":
        return plain, 1.0
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, rope.theta**steps), _yarn_factor(rope)
    raise CheckpointError(f"rope_type: expected default, linear, llama3 or yarn, found {rope.kind!r}")


def rope_table(rope: RopeConfig, head_dim: int, length: int, dtype: torch.dtype) -> Tensor:
    """cos + i sin of positions 0 .. length - 1: [length, head_dim / 2], complex64 or complex128 (`dtype`)."""
    freq, factor = inv_freq(rope, head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), freq)
    return torch.complex(angles.cos() * factor, angles.sin() * factor).to(dtype)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    low, high, length = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions
    wavelength = 2 * math.pi / plain
    smooth = (length / wavelength - low) / (high - low)
    scaled = torch.where(wavelength > length / low, plain / rope.factor, plain)
    between = (wavelength >= length / high) & (wavelength <= length / low)
    return torch.where(between, (1 - smooth) * scaled / rope.factor + smooth * scaled, scaled)


def _yarn(rope: RopeConfig, head_dim: int, period: Tensor) -> Tensor:
    def dimension(rotations: float) -> float:
        turns = math.log(rope.original_max_positions / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * period) * (1 - keep) + 1.0 / period * keep


def _yarn_factor(rope: RopeConfig) -> float:
    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
