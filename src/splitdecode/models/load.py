"""F3: from a directory, a hub id or a preset's name to a Transformer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from splitdecode.errors import CheckpointError
from splitdecode.models.checkpoint import Checkpoint, open_checkpoint
from splitdecode.models.config import ModelConfig
from splitdecode.models.geometry import preset, preset_names
from splitdecode.models.transformer import Transformer
from splitdecode.models.weights import dummy_weights, load_weights


def load_model(
    source: str | Path | Checkpoint | ModelConfig,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    load_format: Literal["auto", "dummy"] = "auto",
    config_overrides: dict[str, Any] | None = None,
    check_finite: bool = True,
    seed: int = 0,
) -> Transformer:
    """Loads a model.

    source: a local directory, a hub id "owner/name", an opened Checkpoint; for dummy weights also a ModelConfig or the
    name of a preset ("0.5b", "r1-distill-1.5b").  dtype "auto": the file's (dummy: bfloat16).  load_format "dummy":
    seeded random weights, no weight file is read.  config_overrides: ModelConfig fields to replace.
    check_finite: refuse weights that hold NaN or infinity.

    Raises CheckpointError for what cannot be used, CapacityError when memory does not suffice.
    """
    if dtype != "auto" and not dtype.is_floating_point:
        raise CheckpointError(f"dtype: expected a floating-point dtype, found {dtype}")
    where = torch.device(device)
    wanted = None if dtype == "auto" else dtype
    directory: Path | None = None
    if isinstance(source, ModelConfig):
        config = source
    elif load_format == "dummy" and isinstance(source, str) and source in preset_names():
        config = preset(source)
    else:
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, revision=revision)
        config, directory = checkpoint.config, checkpoint.directory
    if config_overrides:
        config = replace(config, **config_overrides)
    if load_format == "dummy":
        return Transformer(config, dummy_weights(config, wanted or torch.bfloat16, where, seed=seed))
    if directory is None:
        raise CheckpointError("a ModelConfig has no weights: expected load_format='dummy', found 'auto'")
    return Transformer(config, load_weights(directory, config, wanted, where, check_finite=check_finite))
