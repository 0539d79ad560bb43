"""F3: weights of one transformer: checked against the config before memory is taken, merged and permuted on the way in.

    file, [out, in]                                memory, [in, out]
    q_proj  H x D rows                             qkv      [d, (G x Hkv + 2 Hkv) x D], query heads group-major
    k_proj, v_proj                                          in q and k, dims (i, i + D/2) become (2i, 2i + 1)
    gate_proj, up_proj                             gate_up  [d, 2 I]
    o_proj [d, H x D]                              o        [H x D, d], rows in the same head order as q
    embed_tokens [V, d]                            embed    [V, d]; when tied, a view of head [d, V]

[in, out] is what torch's matrix-vector product streams fastest on the host (benchmarks/kernels.py). On a GPU the same
matrices are transposed views of [out, in]: there one output is one contiguous stream. Tied models keep one copy of
embed and head: an embedding gather from the transposed view costs microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitdecode.errors import CapacityError, CheckpointError
from splitdecode.models.config import ModelConfig
from splitdecode.models.safetensor import TensorInfo, list_tensors

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, matrices [in, out], biases [out], norm gains [d] (q_norm, k_norm [D]); absent ones are None."""

    attn_norm: Tensor | None
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp_norm: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All of a model: embed [V, d], layers, final norm [d], head [d, V]."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor | None
    head: Tensor


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes a checkpoint of this config holds (Hugging Face names), lm_head apart when tied."""
    d, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.num_layers):
        at = f"model.layers.{i}."
        shapes[at + "input_layernorm.weight"] = (d,)
        shapes[at + "post_attention_layernorm.weight"] = (d,)
        linears = [
            ("self_attn.q_proj", config.q_size, d, config.qkv_bias),
            ("self_attn.k_proj", config.kv_size, d, config.qkv_bias),
            ("self_attn.v_proj", config.kv_size, d, config.qkv_bias),
            ("self_attn.o_proj", d, config.q_size, config.o_bias),
            ("mlp.gate_proj", inner, d, config.mlp_bias),
            ("mlp.up_proj", inner, d, config.mlp_bias),
            ("mlp.down_proj", d, inner, config.mlp_bias),
        ]
        for name, out, width, bias in linears:
            shapes[f"{at}{name}.weight"] = (out, width)
            if bias:
                shapes[f"{at}{name}.bias"] = (out,)
        if config.qk_norm:
            shapes[at + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[at + "self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def check_tensors(found: Mapping[str, TensorInfo], config: ModelConfig, directory: Path) -> None:
    """Compares headers with the config. Raises CheckpointError naming file, tensor, found and expected."""
    if len(found) > 64 + 16 * config.num_layers:
        raise CheckpointError(f"{directory}: expected about {14 * config.num_layers} tensors, found {len(found)}")
    wanted = expected_tensors(config)
    optional = {"lm_head.weight": (config.vocab_size, config.hidden_size)} if config.tied else {}
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{directory}: {name}: expected a tensor of shape {list(shape)}, found none")
    for name, info in found.items():
        shape_wanted = wanted.get(name, optional.get(name))
        if shape_wanted is None:
            if name.endswith(".rotary_emb.inv_freq"):  # a buffer older exporters wrote; the config says the same
                continue
            raise CheckpointError(
                f"{info.path}: {name}: expected no such tensor in a {config.model_type}, found {list(info.shape)}"
            )
        if info.shape != shape_wanted:
            raise CheckpointError(f"{info.path}: {name}: expected shape {list(shape_wanted)}, found {list(info.shape)}")


def check_memory(config: ModelConfig, dtype: torch.dtype, device: torch.device, separate_head: bool) -> None:
    """Raises CapacityError, with sizes, when the weights cannot fit into what `device` has free now."""
    count = sum(_numel(shape) for shape in expected_tensors(config).values())
    if config.tied and separate_head:
        count += config.vocab_size * config.hidden_size
    needed, free = count * dtype.itemsize, free_memory(device)
    if free is not None and needed > free:
        raise CapacityError(
            f"weights need {needed / 1e9:.2f} GB as {dtype} on {device}, {free / 1e9:.2f} GB are available"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes a new allocation on `device` may take, or None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def load_weights(
    directory: Path, config: ModelConfig, dtype: torch.dtype | None, device: torch.device, *, check_finite: bool = True
) -> ModelWeights:
    """Reads, checks, converts (dtype None: the file's own) and merges the weights of a directory.

    Raises CheckpointError for files that do not fit the config, CapacityError when memory does not suffice.
    """
    found = list_tensors(directory)
    check_tensors(found, config, directory)
    dtype = dtype or _DTYPES[found["model.embed_tokens.weight"].dtype]
    check_memory(config, dtype, device, "lm_head.weight" in found)
    source = _FileSource(found, dtype, device, check_finite)
    return _assemble(config, source, dtype, device, "lm_head.weight" in found)


def given_weights(
    config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> ModelWeights:
    """Merges tensors in memory, under Hugging Face names, such as a trainer's state_dict().

    Raises CheckpointError for one that is missing, has another shape, or holds NaN or infinity.
    """
    source = _GivenSource(config, tensors, dtype, device)
    return _assemble(config, source, dtype, device, not config.tied)


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, *, seed: int = 0, std: float = 0.02
) -> ModelWeights:
    """Seeded normal weights of standard deviation `std`, norm gains of one; nothing is read."""
    check_memory(config, dtype, device, False)
    return _assemble(config, _NormalSource(config, dtype, device, seed, std), dtype, device, not config.tied)


def shape_weights(config: ModelConfig, dtype: torch.dtype) -> ModelWeights:
    """Weights without memory (torch's meta device): for plans, and for compiling kernels at real shapes."""
    device = torch.device("meta")
    return _assemble(config, _ShapeSource(config, dtype), dtype, device, not config.tied)


class _ShapeSource:
    """Shapes by name; there are no values."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.shapes, self.dtype = expected_tensors(config), dtype

    def get(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], dtype=self.dtype, device="meta")


class _FileSource:
    """Tensors by name from safetensors files, converted and checked one at a time."""

    def __init__(self, found: Mapping[str, TensorInfo], dtype: torch.dtype, device: torch.device, check: bool) -> None:
        self.found, self.dtype, self.device, self.check = found, dtype, device, check

    def get(self, name: str) -> Tensor:
        info = self.found[name]
        try:
            with safe_open(str(info.path), framework="pt", device=str(self.device)) as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.path}: {name}: could not be read: {error}") from error
        tensor = tensor.to(dtype=self.dtype)
        if self.check and tensor.numel():
            low, high = torch.aminmax(tensor)
            if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
                raise CheckpointError(
                    f"{info.path}: {name}: expected finite weights in {self.dtype}, found NaN or infinity"
                )
        return tensor


class _GivenSource:
    """Tensors by name from a mapping, checked and converted one at a time."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes, self.tensors, self.dtype, self.device = expected_tensors(config), tensors, dtype, device

    def get(self, name: str) -> Tensor:
        found, wanted = self.tensors.get(name), list(self.shapes[name])
        if found is None or list(found.shape) != wanted:
            shape = "none" if found is None else list(found.shape)
            raise CheckpointError(f"{name}: expected a tensor of shape {wanted}, found {shape}")
        tensor = found.detach().to(device=self.device, dtype=self.dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: expected finite weights in {self.dtype}, found NaN or infinity")
        return tensor


class _NormalSource:
    """Tensors by name drawn from one seeded generator; norm gains are ones."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int, std: float) -> None:
        self.shapes, self.dtype, self.device, self.std = expected_tensors(config), dtype, device, std
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def get(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self.dtype, device=self.device)
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        return tensor.normal_(0.0, self.std, generator=self.generator)


_Source = _FileSource | _GivenSource | _NormalSource | _ShapeSource


def _assemble(
    config: ModelConfig, source: _Source, dtype: torch.dtype, device: torch.device, own_head: bool
) -> ModelWeights:
    head = _matrix(config.hidden_size, config.vocab_size, dtype, device)
    embed = source.get("model.embed_tokens.weight")
    if own_head:
        head.copy_(source.get("lm_head.weight").t())
    else:
        head.copy_(embed.t())
        embed = head.t()
    layers = tuple(_layer(config, source, f"model.layers.{i}.", dtype, device) for i in range(config.num_layers))
    return ModelWeights(embed, layers, source.get("model.norm.weight"), head)


def _layer(config: ModelConfig, source: _Source, at: str, dtype: torch.dtype, device: torch.device) -> LayerWeights:
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    attn = at + "self_attn."

    def query(rows: Tensor) -> Tensor:
        return group_major(pair_dims(rows, heads, dim), heads, kv_heads, dim)

    def key(rows: Tensor) -> Tensor:
        return pair_dims(rows, kv_heads, dim)

    def merged(kind: str, parts: list[tuple[str, int]]) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for name, width in parts:
            rows = source.get(f"{at}{name}.{kind}")
            rows = query(rows) if name.endswith("q_proj") else key(rows) if name.endswith("k_proj") else rows
            yield slice(start, start + width), rows
            start += width

    def matrix(parts: list[tuple[str, int]]) -> Tensor:
        out = _matrix(config.hidden_size, sum(width for _, width in parts), dtype, device)
        for columns, rows in merged("weight", parts):
            out[:, columns] = rows.t().contiguous() if device.type == "cpu" else rows.t()
        return out

    def stored(matrix: Tensor) -> Tensor:
        return _matrix(matrix.shape[0], matrix.shape[1], dtype, device).copy_(matrix)

    def bias(parts: list[tuple[str, int]]) -> Tensor:
        return torch.cat([rows for _, rows in merged("bias", parts)])

    qkv = [
        ("self_attn.q_proj", config.q_size),
        ("self_attn.k_proj", config.kv_size),
        ("self_attn.v_proj", config.kv_size),
    ]
    gate_up = [("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size)]
    o = source.get(attn + "o_proj.weight")
    return LayerWeights(
        attn_norm=source.get(at + "input_layernorm.weight"),
        qkv=matrix(qkv),
        qkv_bias=bias(qkv) if config.qkv_bias else None,
        q_norm=pair_dims(source.get(attn + "q_norm.weight"), 1, dim) if config.qk_norm else None,
        k_norm=pair_dims(source.get(attn + "k_norm.weight"), 1, dim) if config.qk_norm else None,
        o=stored(group_major(o.t().contiguous(), heads, kv_heads, dim)),
        o_bias=source.get(attn + "o_proj.bias") if config.o_bias else None,
        mlp_norm=source.get(at + "post_attention_layernorm.weight"),
        gate_up=matrix(gate_up),
        gate_up_bias=bias(gate_up) if config.mlp_bias else None,
        down=stored(source.get(at + "mlp.down_proj.weight").t()),
        down_bias=source.get(at + "mlp.down_proj.bias") if config.mlp_bias else None,
    )


def _matrix(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for a matrix [in, out], in the order its device streams fastest."""
    if device.type != "cpu":
        return torch.empty(outputs, inputs, dtype=dtype, device=device).t()
    return torch.empty(inputs, outputs, dtype=dtype, device=device)


def pair_dims(rows: Tensor, heads: int, dim: int) -> Tensor:
    """Reorders rows [heads * dim, ...] within each head: (i, i + dim/2) become (2i, 2i + 1). Returns a new tensor."""
    return rows.view(heads, 2, dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()


def group_major(rows: Tensor, heads: int, kv_heads: int, dim: int) -> Tensor:
    """Reorders the heads of rows [heads * dim, ...] from (kv head, group) to (group, kv head). Returns a new tensor."""
    return rows.view(kv_heads, heads // kv_heads, dim, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape).contiguous()


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
