"""F3: one transformer for Qwen2, Qwen3 and Llama; checkpoints read without running any of their code.

model = load_model("path/to/checkpoint", dtype=torch.float64)
kv = model.new_cache(num_pages=64, page_size=16)
logits = model.forward(batch, kv, rows)
"""

from __future__ import annotations

from splitdecode.models.checkpoint import Checkpoint, open_checkpoint
from splitdecode.models.config import ModelConfig, RopeConfig
from splitdecode.models.load import load_model
from splitdecode.models.transformer import Transformer

__all__ = ["Checkpoint", "ModelConfig", "RopeConfig", "Transformer", "load_model", "open_checkpoint"]
