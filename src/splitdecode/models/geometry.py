"""F3: shapes of the models this runtime is built around, and what a token costs on each.

Counts are exact from the config; bytes assume one `itemsize` for everything (2 for bf16). Flops count a multiply and an
add as two.
"""

from __future__ import annotations

import math

from splitdecode.errors import CheckpointError
from splitdecode.models.config import ModelConfig, RopeConfig
from splitdecode.models.weights import expected_tensors


def preset_names() -> tuple[str, ...]:
    """Every name `preset` knows."""
    return tuple(_presets())


def preset(name: str) -> ModelConfig:
    """The geometry of a released model by its short name. Raises CheckpointError for a name that is not known."""
    known = _presets()
    if name not in known:
        raise CheckpointError(f"geometry: expected one of {', '.join(known)}, found {name!r}")
    return known[name]


def parameters(config: ModelConfig) -> int:
    """Number of weights; a tied head counts once."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def weight_bytes(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of weights one decode step streams: all layers and the head; the embedding is a gather and is left out."""
    gathered = 0 if config.tied else config.vocab_size * config.hidden_size
    return (parameters(config) - gathered) * itemsize


def kv_bytes(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes the cache holds per token."""
    return 2 * config.num_layers * config.kv_size * itemsize


def linear_flops(config: ModelConfig) -> int:
    """Flops per token in the layers' matrices."""
    d = config.hidden_size
    attention = d * config.qkv_size + config.q_size * d
    return 2 * config.num_layers * (attention + 3 * d * config.intermediate_size)


def head_flops(config: ModelConfig) -> int:
    """Flops per token whose logits are wanted."""
    return 2 * config.hidden_size * config.vocab_size


def attention_flops(config: ModelConfig, context: int) -> int:
    """Flops per token that attends to `context` tokens: scores and weighted values of all layers."""
    return 4 * config.num_layers * config.q_size * context


def _presets() -> dict[str, ModelConfig]:
    # hidden, intermediate, layers, heads, kv heads, vocabulary, tied
    qwen2 = {
        "0.5b": (896, 4864, 24, 14, 2, 151936, True),
        "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
        "3b": (2048, 11008, 36, 16, 2, 151936, True),
        "7b": (3584, 18944, 28, 28, 4, 152064, False),
        "14b": (5120, 13824, 48, 40, 8, 152064, False),
        "32b": (5120, 27648, 64, 40, 8, 152064, False),
        "72b": (8192, 29568, 80, 64, 8, 152064, False),
    }
    found = {name: _qwen2(*row, theta=1e6, max_positions=32768, eps=1e-6) for name, row in qwen2.items()}
    # DeepSeek-R1-Distill: the math bases (1.5b, 7b) turn at theta 1e4, and no head is tied.
    for name, theta, eps in (("1.5b", 1e4, 1e-6), ("7b", 1e4, 1e-6), ("14b", 1e6, 1e-5), ("32b", 1e6, 1e-5)):
        found[f"r1-distill-{name}"] = _qwen2(*qwen2[name][:6], False, theta=theta, max_positions=131072, eps=eps)
    found["r1-distill-8b"] = _llama(4096, 14336, 32, 32)
    found["r1-distill-70b"] = _llama(8192, 28672, 80, 64)
    return found


def _qwen2(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool,
    *,
    theta: float,
    max_positions: int,
    eps: float,
) -> ModelConfig:
    return ModelConfig(
        model_type="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_positions=max_positions,
        rms_eps=eps,
        rope=RopeConfig(theta=theta),
        tied=tied,
        qkv_bias=True,
    )


def _llama(hidden: int, inner: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        max_positions=131072,
        rms_eps=1e-5,
        rope=RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_positions=8192),
    )
