"""F7: the numbers of a fine-tuning run: presets in presets/*.toml, flags over them, each checked once."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from splitdecode.errors import RequestError

PRESETS = ("paper", "toy")


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. Raises RequestError naming the field that cannot be used.

    epochs, max_steps        passes over the traces; optimiser steps, above epochs where given
    learning_rate            its peak, after warmup_ratio of the steps; then a cosine down to min_lr_ratio of it
    matrix_rate              above 0: hidden matrices by Muon at this peak rate, the rest by AdamW (train/muon.py)
    global_batch             rows a step, over all processes; micro_batch: rows a forward, of one process
    max_length               tokens a row; longer traces are left out. packing: rows are filled with several traces
    bf16                     autocast, and the dtype of the saved weights; else both are float32
    tag_weight               of the loss at tokens that hold a byte of a control tag
    tags_apart               share of tags encoded by themselves, as forced hand-offs put them, not merged with what is
                             at their edges
    added_tokens             the tags become tokens of their own; else they stay plain text
    lora_rank, lora_alpha    rank 0: all weights are trained
    save_steps               steps between checkpoints
    """

    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float = 5e-5
    matrix_rate: float = 0.0
    min_lr_ratio: float = 0.1
    warmup_ratio: float = 0.05
    global_batch: int = 64
    micro_batch: int = 1
    max_length: int = 16384
    packing: bool = False
    bf16: bool = False
    gradient_checkpointing: bool = False
    tag_weight: float = 1.0
    tags_apart: float = 0.0
    added_tokens: bool = False
    lora_rank: int = 0
    lora_alpha: float = 32.0
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (holds, expected) = getattr(self, field.name), _CHECKS[field.name]
            if not holds(value):
                raise RequestError(f"{field.name}: found {value!r}, expected {expected}")
        if self.global_batch % self.micro_batch:
            raise RequestError(f"global_batch: found {self.global_batch}, expected a multiple of micro_batch, "
                               f"{self.micro_batch}")  # fmt: skip
        if self.matrix_rate and self.lora_rank:
            raise RequestError(f"matrix_rate: found {self.matrix_rate} with lora_rank {self.lora_rank}, expected one "
                               "of the two: Muon is for whole matrices")  # fmt: skip


def preset(name: str, **changes: Any) -> Settings:
    """The settings of a preset, with `changes` over them. Raises RequestError for an unknown preset or field."""
    if name not in PRESETS:
        raise RequestError(f"preset: found {name!r}, expected one of {', '.join(PRESETS)}")
    text = resources.files("splitdecode.train").joinpath("presets", f"{name}.toml").read_text("utf-8")
    return from_mapping({**tomllib.loads(text), **changes})


def from_mapping(values: Mapping[str, Any]) -> Settings:
    """Settings by name. Raises RequestError for an unknown name."""
    known = [field.name for field in fields(Settings)]
    for name in values:
        if name not in known:
            raise RequestError(f"settings: found {name!r}, expected {', '.join(known)}")
    return Settings(**values)


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        kind = isinstance(value, (int, float)) and not isinstance(value, bool)
        return kind and math.isfinite(value) and (low < value if above else low <= value) and value <= high

    return holds


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= low


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


_POSITIVE = (_number(0, above=True), "a finite number above 0")
_SHARE = (_number(0, 1), "a number from 0 to 1")
_COUNT = (_whole(1), "a whole number from 1")
_FLAG = (_flag, "true or false")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": _POSITIVE,
    "max_steps": (lambda value: value is None or _whole(1)(value), "a whole number from 1, or none"),
    "learning_rate": _POSITIVE,
    "matrix_rate": (_number(0), "a finite number from 0"),
    "min_lr_ratio": _SHARE,
    "warmup_ratio": (lambda value: _number(0)(value) and value < 1, "a number from 0 up to, but not, 1"),
    "global_batch": _COUNT,
    "micro_batch": _COUNT,
    "max_length": (_whole(2), "a whole number from 2"),
    "packing": _FLAG,
    "bf16": _FLAG,
    "gradient_checkpointing": _FLAG,
    "tag_weight": (_number(0), "a finite number from 0"),
    "tags_apart": _SHARE,
    "added_tokens": _FLAG,
    "lora_rank": (_whole(0), "a whole number from 0"),
    "lora_alpha": _POSITIVE,
    "save_steps": _COUNT,
    "seed": (_whole(0), "a whole number from 0"),
}
