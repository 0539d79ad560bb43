"""Random tiny Hugging Face models as oracles, and batches to run ours on the same tokens."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from splitdecode import ops
from splitdecode.models import Transformer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
# name: kind and what differs from the common tiny shape
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-mha": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-mqa": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-linear": ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
    "qwen2-yarn-set": (
        "qwen2",
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "attention_factor": 1.3, "beta_fast": 20.0, "beta_slow": 2.0}},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied-biased": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "rope_theta": 1e6, "truncate": False}}),
    "llama": ("llama", {"rms_norm_eps": 1e-5}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
}


def build(name: str) -> PreTrainedModel:
    """A seeded tiny model in float32 with weights large enough that a wrong bias or theta shows."""
    kind, more = MODELS[name]
    config_class, model_class = KINDS[kind]
    shape = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**{**shape, **more})).eval()
    with torch.no_grad():  # defaults hide mistakes: biases are zeros, norms ones
        for key, value in model.named_parameters():
            if key.endswith("bias"):
                value.normal_(0.0, 0.3)
            elif "norm" in key:
                value.uniform_(0.5, 1.5)
    return model


def save(name: str, directory: Path, **options: Any) -> PreTrainedModel:
    """Builds, saves, and returns the oracle."""
    model = build(name)
    model.save_pretrained(directory, **options)
    return model


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """The oracle in float64 throughout: its RMS norms would otherwise round to float32."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())

    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    return model


def row(ids: list[int] | Tensor, start: int, pages: list[int], size: int) -> ops.PagedBatch:
    """A batch of one row: `ids` at positions start .. in `pages`."""
    ids = torch.as_tensor(ids, dtype=torch.int32)
    positions = torch.arange(start, start + len(ids), dtype=torch.int32)
    table = torch.tensor(pages, dtype=torch.int32)
    return ops.PagedBatch(
        tokens=ids,
        positions=positions,
        slots=table[(positions // size).long()] * size + positions % size,
        cu_q=torch.tensor([0, len(ids)], dtype=torch.int32),
        kv_len=torch.tensor([start + len(ids)], dtype=torch.int32),
        page_indptr=torch.tensor([0, len(pages)], dtype=torch.int32),
        pages=table,
        page_size=size,
    )


def packed(rows: list[ops.PagedBatch]) -> ops.PagedBatch:
    """Several one-row batches as one."""

    def offsets(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)

    return ops.PagedBatch(
        tokens=torch.cat([one.tokens for one in rows]),
        positions=torch.cat([one.positions for one in rows]),
        slots=torch.cat([one.slots for one in rows]),
        cu_q=offsets([len(one.tokens) for one in rows]),
        kv_len=torch.cat([one.kv_len for one in rows]),
        page_indptr=offsets([len(one.pages) for one in rows]),
        pages=torch.cat([one.pages for one in rows]),
        page_size=rows[0].page_size,
    )


def nan_cache(model: Transformer, pages: int, size: int) -> Tensor:
    """A cache whose every slot is poisoned until it is written."""
    return model.new_cache(pages, size).fill_(float("nan"))


@torch.inference_mode()
def oracle_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """[T, V] of a fresh prefill."""
    return model(torch.tensor([ids])).logits[0]


def greedy(model: Transformer, ids: list[int], count: int) -> list[int]:
    """`count` greedy tokens of ours after `ids`, one forward each."""
    kv, size = nan_cache(model, 24, 8), 8
    pages = [*range(12, 24), *range(12)]
    out: list[int] = []
    logits = model.forward(row(ids, 0, pages, size), kv, torch.tensor([len(ids) - 1]))
    while True:
        out.append(int(logits[-1].argmax()))
        if len(out) == count:
            return out
        logits = model.forward(row(out[-1:], len(ids) + len(out) - 1, pages, size), kv, torch.tensor([0]))
