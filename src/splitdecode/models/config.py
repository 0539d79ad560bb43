"""F3: what a checkpoint's config.json says, checked once and kept as data.

Qwen2, Qwen3 and Llama are one transformer; what tells them apart (biases, q/k norms, tied head, rope) are fields here.
Both written forms are read: v4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and v5 (`rope_parameters`, `dtype`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitdecode.errors import CheckpointError

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_CAPS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 10,
    "max_position_embeddings": (1 << 31) - 1,
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions turn into angles. Lengths are in tokens, `theta` and the factors are plain numbers.

    `kind` is "default", "linear", "llama3" or "yarn"; fields a kind does not use keep their defaults.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The geometry and the switches of one decoder-only transformer; sizes are element counts."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def q_size(self) -> int:
        """Width of all query heads side by side."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads side by side."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of the packed q | k | v projection."""
        return self.q_size + 2 * self.kv_size

    @staticmethod
    def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads a Hugging Face config object.

        Raises CheckpointError naming `where`, the field, what was found and what was expected.
        """
        field = _Fields(raw, where)
        model_type = _model_type(raw, where)
        _refuse_unsupported(field, model_type)
        heads = field.size("num_attention_heads")
        hidden = field.size("hidden_size")
        kv_heads = field.size("num_key_value_heads", default=heads)
        if heads % kv_heads:
            field.fail("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
        if raw.get("head_dim") is None and hidden % heads:
            field.fail("hidden_size", f"a multiple of num_attention_heads {heads} (head_dim is absent)")
        head_dim = field.size("head_dim", default=hidden // heads)
        if head_dim % 2:
            raise CheckpointError(f"{where}: head_dim: expected an even number, found {head_dim}")
        max_positions = field.size("max_position_embeddings")
        rope = _rope(raw, where, max_positions)
        if rope.kind == "yarn":  # the field keeps the trained length; yarn stretches it
            max_positions = max(max_positions, int(rope.factor * rope.original_max_positions))
        biased = model_type != "qwen2" and field.flag("attention_bias")
        return ModelConfig(
            model_type=model_type,
            vocab_size=field.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=field.size("intermediate_size"),
            num_layers=field.size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=max_positions,
            rms_eps=field.positive("rms_norm_eps", default=1e-6),
            rope=rope,
            tied=field.flag("tie_word_embeddings"),
            qkv_bias=model_type == "qwen2" or biased,
            o_bias=biased,
            mlp_bias=model_type == "llama" and field.flag("mlp_bias"),
            qk_norm=model_type == "qwen3",
        )


class _Fields:
    """Typed access to one JSON object; every failure names file, field, found and expected."""

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.raw = raw
        self.where = where
        self.prefix = prefix

    def fail(self, name: str, expected: str) -> None:
        found = repr(self.raw.get(name, "nothing"))
        found = found if len(found) <= 80 else found[:77] + "..."
        raise CheckpointError(f"{self.where}: {self.prefix}{name}: expected {expected}, found {found}")

    def size(self, name: str, default: int | None = None) -> int:
        cap = _CAPS.get(name, (1 << 31) - 1)
        value = self.raw.get(name)
        if value is None and default is not None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= cap:
            self.fail(name, f"an integer in 1..{cap}")
        return int(value)  # type: ignore[arg-type]

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not 0 < value < 1e30 or not math.isfinite(value):  # type: ignore[operator, arg-type]
            self.fail(name, "a finite number above 0")
        return float(value)  # type: ignore[arg-type]

    def optional(self, name: str) -> float | None:
        return None if self.raw.get(name) is None else self.positive(name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return bool(value)


def _model_type(raw: Mapping[str, Any], where: str) -> str:
    known = ", ".join(_ARCHITECTURES)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise CheckpointError(f"{where}: model_type: expected one of {known}, found {str(model_type)[:80]!r}")
    wanted = _ARCHITECTURES[model_type]
    named = raw.get("architectures")
    if named is not None and (not isinstance(named, list) or wanted not in named):
        raise CheckpointError(f"{where}: architectures: expected [{wanted!r}], found {str(named)[:80]}")
    return model_type


def _refuse_unsupported(field: _Fields, model_type: str) -> None:
    raw = field.raw
    if raw.get("quantization_config") is not None:
        quant = raw["quantization_config"]
        method = quant.get("quant_method") if isinstance(quant, Mapping) else quant
        raise CheckpointError(
            f"{field.where}: quantization_config: quantised weights ({str(method)[:40]}) are not supported"
        )
    if raw.get("hidden_act", "silu") != "silu":
        field.fail("hidden_act", "'silu'")
    if raw.get("partial_rotary_factor", 1.0) not in (None, 1):
        field.fail("partial_rotary_factor", "1 (all of a head rotates)")
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        field.fail("layer_types", "only 'full_attention'")
    if kinds is None and field.flag("use_sliding_window"):
        first = raw.get("max_window_layers")
        layers = field.size("num_hidden_layers")
        if raw.get("sliding_window") is not None and not (isinstance(first, int) and first >= layers):
            field.fail("use_sliding_window", "false (sliding windows are not supported)")


def _rope(raw: Mapping[str, Any], where: str, max_positions: int) -> RopeConfig:
    name = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    given = raw.get(name)
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}: {name}: expected an object, found {str(given)[:80]!r}")
    field = _Fields(given, where, f"{name}.")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise CheckpointError(
            f"{where}: {name}.rope_type: expected one of {', '.join(_ROPE_TYPES)}, found {str(kind)[:80]!r}"
        )
    if given.get("partial_rotary_factor", 1.0) not in (None, 1):
        field.fail("partial_rotary_factor", "1 (all of a head rotates)")
    theta_field = field if given.get("rope_theta") is not None else _Fields(raw, where)
    theta = theta_field.positive("rope_theta", default=10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = field.positive("factor")
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    original = field.size("original_max_position_embeddings", default=max_positions)
    if kind == "llama3":
        low, high = field.positive("low_freq_factor"), field.positive("high_freq_factor")
        if low >= high:
            field.fail("low_freq_factor", f"a number below high_freq_factor {high}")
        return RopeConfig(theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=field.positive("beta_fast", default=32.0),
        beta_slow=field.positive("beta_slow", default=1.0),
        attention_factor=field.optional("attention_factor"),
        mscale=field.optional("mscale"),
        mscale_all_dim=field.optional("mscale_all_dim"),
        truncate=field.flag("truncate", default=True),
    )
