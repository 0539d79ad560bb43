"""Checkpoints in all the forms they are written, and every way one can be wrong: a CheckpointError that says what."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.hf import build, oracle_logits, row, save
from safetensors.torch import load_file, save_file

from splitdecode.errors import CapacityError, CheckpointError
from splitdecode.models import ModelConfig, load_model, open_checkpoint
from splitdecode.models.safetensor import list_tensors, read_header

IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen2")
    save("qwen2", directory)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def logits_of(directory: Path, **options: Any) -> torch.Tensor:
    model = load_model(directory, dtype=torch.float32, **options)
    return model.forward(row(IDS, 0, [0, 1, 2], 16), model.new_cache(3, 16))


def edit(directory: Path, name: str = "config.json", drop: tuple[str, ...] = (), **fields: Any) -> None:
    path = directory / name
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**raw, **fields}))


# --- forms that must load -------------------------------------------------------------------------------------------


def test_sharded_equals_single(copy: Path, saved: Path) -> None:
    (copy / "model.safetensors").unlink()
    build("qwen2").save_pretrained(copy, max_shard_size="60KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits_of(copy), logits_of(saved), rtol=0, atol=0)


def test_a_hub_snapshot_of_links_loads(saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    torch.testing.assert_close(logits_of(tmp_path), logits_of(saved), rtol=0, atol=0)


def test_v4_form_equals_v5(copy: Path, saved: Path) -> None:
    edit(copy, drop=("rope_parameters", "dtype", "layer_types", "head_dim"), rope_theta=10000.0, torch_dtype="float32")
    torch.testing.assert_close(logits_of(copy), logits_of(saved), rtol=0, atol=0)
    v4 = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit(copy, rope_theta=1e6, rope_scaling=v4)
    rope = open_checkpoint(copy).config.rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_positions) == ("yarn", 1e6, 4.0, 64)


def test_tied_with_its_own_head_uses_the_file(tmp_path: Path) -> None:
    oracle = save("qwen2", tmp_path)
    edit(tmp_path, tie_word_embeddings=True)
    torch.testing.assert_close(logits_of(tmp_path), oracle_logits(oracle, IDS), rtol=0, atol=1e-4)


def test_old_rotary_buffers_are_ignored(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, copy / "model.safetensors")
    logits_of(copy)


def test_file_dtype_is_kept_or_converted(tmp_path: Path) -> None:
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float64).weights.head.dtype == torch.float64


@pytest.mark.parametrize(
    ("generation", "config", "eos"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 3}, (7,)),
        ({"eos_token_id": [7, 8, 7]}, {}, (7, 8)),
        ({}, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": [3, 4]}, (3, 4)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
    ],
)
def test_eos_ids(copy: Path, generation: dict[str, Any] | None, config: dict[str, Any], eos: tuple[int, ...]) -> None:
    edit(copy, **config)
    if generation is None:
        (copy / "generation_config.json").unlink()
    else:
        (copy / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.6, "top_k": 20}))
        assert open_checkpoint(copy).sampling == {"temperature": 0.6, "top_k": 20}
    assert open_checkpoint(copy).eos_ids == eos


def test_dummy_weights_are_seeded_and_need_no_files() -> None:
    config = ModelConfig("qwen2", 50, 16, 24, 2, 4, 2, 4, 64, tied=True, qkv_bias=True)
    first, again, other = (load_model(config, load_format="dummy", dtype=torch.float32, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.weights.layers[1].qkv, again.weights.layers[1].qkv)
    assert not torch.equal(first.weights.layers[1].qkv, other.weights.layers[1].qkv)
    assert 0.015 < float(first.weights.layers[0].gate_up.std()) < 0.025
    assert first.weights.embed.data_ptr() == first.weights.head.data_ptr()
    with pytest.raises(CheckpointError, match="expected load_format='dummy'"):
        load_model(config)
    small = load_model("0.5b", load_format="dummy", config_overrides={"num_layers": 1, "vocab_size": 64})
    assert (small.dtype, small.config.hidden_size) == (torch.bfloat16, 896)


def test_too_large_for_memory_is_a_capacity_error(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitdecode.models.weights.free_memory", lambda device: 1000)
    with pytest.raises(CapacityError, match=r"weights need 0\.\d+ GB as torch.float64 on cpu, 0.00 GB are available"):
        load_model(copy, dtype=torch.float64)


# --- configs that must not ------------------------------------------------------------------------------------------

SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size")
BAD_SIZES = [(name, value) for name in SIZES for value in (True, 0, -4, 1.5, "8", 1 << 40, math.nan, [])]
BAD_CONFIGS: list[tuple[str, Any, str]] = [
    *((name, value, f"{name}: expected an integer in 1..") for name, value in BAD_SIZES),
    ("num_key_value_heads", 3, "num_key_value_heads: expected a divisor of num_attention_heads 4, found 3"),
    ("head_dim", 15, "head_dim: expected an even number, found 15"),
    ("head_dim", 1 << 20, "head_dim: expected an integer in"),
    ("hidden_size", 66, "hidden_size: expected a multiple of num_attention_heads 4"),
    ("rms_norm_eps", math.nan, "rms_norm_eps: expected a finite number above 0, found nan"),
    ("rms_norm_eps", -1e-6, "rms_norm_eps: expected a finite number above 0"),
    ("rope_parameters", {"rope_theta": math.inf}, "rope_parameters.rope_theta: expected a finite number above 0"),
    ("rope_parameters", {"rope_theta": 0}, "rope_parameters.rope_theta: expected"),
    ("rope_parameters", {"rope_type": "mrope"}, "rope_parameters.rope_type: expected one of default, linear, llama3"),
    ("rope_parameters", {"rope_type": ["yarn"]}, "rope_parameters.rope_type: expected one of"),
    ("rope_parameters", {"rope_type": "linear"}, "rope_parameters.factor: expected a finite number above 0"),
    ("rope_parameters", [1], "rope_parameters: expected an object"),
    ("hidden_act", "gelu", "hidden_act: expected 'silu', found 'gelu'"),
    ("model_type", "gpt2", "model_type: expected one of qwen2, qwen3, llama, found 'gpt2'"),
    ("model_type", None, "model_type: expected one of"),
    ("architectures", ["Qwen2ForSequenceClassification"], "architectures: expected .'Qwen2ForCausalLM'."),
    ("tie_word_embeddings", "no", "tie_word_embeddings: expected true or false, found 'no'"),
    ("quantization_config", {"quant_method": "awq"}, r"quantization_config: quantised weights .awq. are not supported"),
    ("layer_types", ["full_attention", "sliding_attention"], "layer_types: expected only 'full_attention'"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor: expected 1"),
    ("eos_token_id", 999, "eos_token_id: expected ids below 160, found 999"),
    ("eos_token_id", "</s>", "eos_token_id: expected ids below 160"),
]


@pytest.mark.parametrize(("field", "value", "match"), BAD_CONFIGS)
def test_bad_config_fields_are_named(copy: Path, field: str, value: Any, match: str) -> None:
    edit(copy, drop=("head_dim",), **{field: value})
    (copy / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(copy)
    assert str(copy / "config.json") in str(caught.value)


def test_sliding_windows_are_refused_only_when_used(copy: Path) -> None:
    edit(copy, drop=("layer_types",), use_sliding_window=True, sliding_window=32, max_window_layers=1)
    with pytest.raises(CheckpointError, match="use_sliding_window: expected false"):
        open_checkpoint(copy)
    edit(copy, use_sliding_window=True, max_window_layers=2)
    open_checkpoint(copy)
    edit(copy, use_sliding_window=False, max_window_layers=0)
    open_checkpoint(copy)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{", "found no JSON"),
        (b"\xff\xfe", "found no JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "found 'vocab_size' twice"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "found no JSON"),
    ],
)
def test_config_files_that_are_no_config(copy: Path, text: bytes, match: str) -> None:
    (copy / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(copy)


def test_sources_that_are_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="expected a directory or a hub id owner/name, found neither"):
        open_checkpoint(tmp_path / "absent")
    for name in ("no-slash", "../up", "a/b/c", "/absolute/none"):
        with pytest.raises(CheckpointError, match="found neither"):
            open_checkpoint(name)
    with pytest.raises(CheckpointError, match=r"expected a config\.json, found none"):
        open_checkpoint(tmp_path)
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(CheckpointError, match="owner/name at revision abc: could not be fetched: no network"):
        open_checkpoint("owner/name", revision="abc")
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) or pattern == "*" for pattern in asked["allow_patterns"])


# --- weights that must not ------------------------------------------------------------------------------------------

FIRST = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]


def _set(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


BAD_TENSORS: list[tuple[Callable[[Tensors], Any], str]] = [
    (lambda tensors: tensors.pop(FIRST), f"{FIRST}: expected a tensor of shape .64, 64., found none"),
    (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight: expected a tensor of shape .160, 64., found none"),
    (_set("extra.weight", torch.zeros(2)), "extra.weight: expected no such tensor in a qwen2, found .2."),
    (_set(FIRST, torch.zeros(64, 32)), f"{FIRST}: expected shape .64, 64., found .64, 32."),
    (_set(FIRST, torch.zeros(64, 64, dtype=torch.int8)), f"{FIRST}: expected floating-point weights .*, found I8"),
    (_set(FIRST, torch.full((64, 64), math.nan)), f"{FIRST}: expected finite weights in torch.float32, found NaN"),
    (_set("model.norm.weight", torch.full((64,), math.inf)), "model.norm.weight: expected finite weights"),
]


@pytest.mark.parametrize(("spoil", "match"), BAD_TENSORS)
def test_bad_tensors_are_named(copy: Path, spoil: Callable[[Tensors], Any], match: str) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=match):
        load_model(copy, dtype=torch.float32)


def test_the_finite_check_can_be_turned_off_and_sees_overflow(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors[FIRST][0, 0] = 1e6
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"expected finite weights in torch\.float16"):
        load_model(copy, dtype=torch.float16)
    load_model(copy, dtype=torch.float16, check_finite=False)


def header_file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def encoded(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


BAD_HEADERS: list[tuple[bytes, bytes, int | None, str]] = [
    (b"", b"", 1 << 60, "expected a header of at most 0 bytes, found 1152921504606846976 announced"),
    (b"{}", b"", 200, "expected a header of at most 2 bytes, found 200 announced"),
    (b"{", b"", None, "expected a JSON object, found no JSON"),
    (b"[]", b"", None, "expected a JSON object, found list"),
    (b'{"a":1,"a":2}', b"", None, "expected unique keys, found 'a' twice"),
    (encoded(a=3), b"", None, "a: expected an object, found 3"),
    (encoded(a=entry()), b"", None, r"a: data_offsets: expected them within 0 bytes, found \[0, 4\] .truncated"),
    (encoded(a=entry()), b"12345678", None, "expected 4 bytes of tensor data, found 8"),
    (encoded(a=entry(shape=[2])), b"1234", None, r"a: expected 8 bytes for F32 \[2\], found 4"),
    (encoded(a=entry(shape=[-1])), b"1234", None, "a: shape: expected a list of sizes"),
    (encoded(a=entry(shape=[True])), b"1234", None, "a: shape: expected a list of sizes"),
    (encoded(a=entry(shape=[1 << 70])), b"1234", None, "a: shape: expected a list of sizes"),
    (encoded(a=entry(offsets=[4, 0])), b"1234", None, "a: data_offsets: expected them within 4 bytes"),
    (encoded(a=entry(offsets=[0])), b"1234", None, r"a: data_offsets: expected \[begin, end\]"),
    (encoded(a=entry(), b=entry()), b"1234", None, "b: expected data to begin at 4, found 0"),
    (encoded(a=entry(offsets=[4, 8])), b"12345678", None, "a: expected data to begin at 0, found 4"),
    (encoded(a=entry("F8_E4M3", [4])), b"1234", None, "a: expected floating-point weights .*, found F8_E4M3"),
    (encoded(a=entry("I32")), b"1234", None, "found I32"),
]


@pytest.mark.parametrize(("header", "data", "length", "match"), BAD_HEADERS)
def test_bad_headers_are_named(tmp_path: Path, header: bytes, data: bytes, length: int | None, match: str) -> None:
    path = header_file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_files(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[: keep if keep >= 0 else -1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(copy, dtype=torch.float32)


def test_a_header_over_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 150_000_000))
        os.truncate(file.fileno(), 200_000_000)  # sparse: takes no room
    with pytest.raises(CheckpointError, match="expected a header of at most 100000000 bytes, found 150000000"):
        read_header(path)


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "../model.safetensors"}, "expected plain .*safetensors names, found '../model.safetensors'"),
        ({"a": "/etc/passwd"}, "expected plain .*safetensors names"),
        ({"a": "sub/x.safetensors"}, "expected plain .*safetensors names"),
        ({"a": "config.json"}, "expected plain .*safetensors names"),
        ({"a": 3}, "expected plain .*safetensors names"),
        ({"a": "gone.safetensors"}, "expected gone.safetensors in the directory, found none"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "b: expected by the index, found missing"),
        ({"b": "one.safetensors"}, "a: expected one.safetensors .it is there., found None"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "a: expected once, found in one.safetensors too"),
        ({}, "weight_map: expected an object"),
        ([1], "weight_map: expected an object"),
    ],
)
def test_bad_indexes_are_named(tmp_path: Path, weight_map: Any, match: str) -> None:
    for name in ("one", "two"):
        header_file(tmp_path / f"{name}.safetensors", encoded(a=entry()), b"1234")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=match):
        list_tensors(tmp_path)


def test_directories_without_one_set_of_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*index\.json, found neither"):
        list_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin: pickled weights can run code, refused"):
        list_tensors(tmp_path)
    for name in ("one", "two"):
        header_file(tmp_path / f"{name}.safetensors", encoded(a=entry()), b"1234")
    with pytest.raises(CheckpointError, match="beside 2 safetensors files, found none"):
        list_tensors(tmp_path)
