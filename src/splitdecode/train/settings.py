"""F7: the numbers of a fine-tuning run: presets in presets/*.toml or one's own, flags over them, each checked."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
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
        check(self, _CHECKS)
        if self.global_batch % self.micro_batch:
            raise RequestError(f"global_batch: found {self.global_batch}, expected a multiple of micro_batch, "
                               f"{self.micro_batch}")  # fmt: skip
        if self.matrix_rate and self.lora_rank:
            raise RequestError(f"matrix_rate: found {self.matrix_rate} with lora_rank {self.lora_rank}, expected one "
                               "of the two: Muon is for whole matrices")  # fmt: skip


def preset(name: str, **changes: Any) -> Settings:
    """The settings of a preset, or of a .toml file with the same keys, with `changes` over them. Raises RequestError
    for an unknown preset, a file that cannot be read, an unknown field."""
    return Settings(**{**read_preset(name, Settings), **known_fields(changes, Settings, "settings")})


def read_preset(name: str, kind: type[Any], family: str = "") -> dict[str, Any]:
    """The fields of `kind`, a dataclass, that a preset or a .toml file sets; family: what the presets' files begin
    with. Raises RequestError naming the preset, the file or the key that cannot be used."""
    if name in PRESETS:
        return tomllib.loads(
            resources.files(__package__).joinpath("presets", f"{family}{name}.toml").read_text("utf-8")
        )
    if not name.endswith(".toml"):
        raise RequestError(f"preset: found {name!r}, expected {' or '.join(PRESETS)}, or a file that ends in .toml")
    try:
        found = tomllib.loads(Path(name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"preset: {name} cannot be read ({error})") from None
    return known_fields(found, kind, f"preset: {name}")


def known_fields(values: Mapping[str, Any], kind: type[Any], where: str) -> dict[str, Any]:
    """The values, all of which `kind` must have fields for. Raises RequestError that begins with `where`."""
    names = [field.name for field in fields(kind)]
    for name in values:
        if name not in names:
            raise RequestError(f"{where}: found {name!r}, expected {', '.join(names)}")
    return dict(values)


Checks = Mapping[str, tuple[Callable[[Any], bool], str]]  # by field: whether a value will do, what was expected


def check(settings: Any, checks: Checks) -> None:
    """Raises RequestError naming the first field whose value will not do."""
    for name, (holds, expected) in checks.items():
        value = getattr(settings, name)
        if not holds(value):
            raise RequestError(f"{name}: found {value!r}, expected {expected}")


def number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], bool]:
    """Whether a value is a finite number of that range."""

    def holds(value: Any) -> bool:
        kind = isinstance(value, (int, float)) and not isinstance(value, bool)
        return kind and math.isfinite(value) and (low < value if above else low <= value) and value <= high

    return holds


def whole(low: int) -> Callable[[Any], bool]:
    """Whether a value is a whole number from `low`."""
    return lambda value: type(value) is int and value >= low


POSITIVE = (number(0, above=True), "a finite number above 0")
SHARE = (number(0, 1), "a number from 0 to 1")
COUNT = (whole(1), "a whole number from 1")
FLAG = (lambda value: isinstance(value, bool), "true or false")
_CHECKS: Checks = {
    "epochs": POSITIVE,
    "max_steps": (lambda value: value is None or whole(1)(value), "a whole number from 1, or none"),
    "learning_rate": POSITIVE,
    "matrix_rate": (number(0), "a finite number from 0"),
    "min_lr_ratio": SHARE,
    "warmup_ratio": (lambda value: number(0)(value) and value < 1, "a number from 0 up to, but not, 1"),
    "global_batch": COUNT,
    "micro_batch": COUNT,
    "max_length": (whole(2), "a whole number from 2"),
    "packing": FLAG,
    "bf16": FLAG,
    "gradient_checkpointing": FLAG,
    "tag_weight": (number(0), "a finite number from 0"),
    "tags_apart": SHARE,
    "added_tokens": FLAG,
    "lora_rank": (whole(0), "a whole number from 0"),
    "lora_alpha": POSITIVE,
    "save_steps": COUNT,
    "seed": (whole(0), "a whole number from 0"),
}
