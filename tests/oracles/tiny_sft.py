"""A checkpoint with nothing learned: a random Qwen2 of some ten thousand weights and a byte-level BPE, on disk.

The merges cross the edges of the tags, as those of the released checkpoints do: `.</` and `>The` are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from splitdecode.train.scratch import Shape, write_scratch


def save_checkpoint(directory: Path, texts: Sequence[str], *, hidden: int = 48, padding: int = 0) -> Path:
    """Random weights (seed 0), tied embeddings, and a tokenizer trained on `texts`; `padding` rows without an id."""
    shape = Shape(hidden, layers=2, heads=4, kv_heads=2, inner=2 * hidden, positions=1024)
    return write_scratch(directory, texts, shape, vocabulary=331, padding=padding)
