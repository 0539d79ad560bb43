"""F3: safetensors headers, read and checked by hand before any tensor is mapped.

| 8 bytes: n, little endian | n bytes: JSON header | tensor data, offsets relative to its start |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from splitdecode.errors import CheckpointError
from splitdecode.models.checkpoint import parse_json, read_json

_HEADER_CAP = 100_000_000
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it is: `dtype` is the file's name for it (F64, F32, F16, BF16)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def list_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint directory, single or sharded, from headers alone.

    Raises CheckpointError naming file, tensor, found and expected.
    """
    single, index = directory / "model.safetensors", directory / _INDEX
    if single.is_file():
        return read_header(single)
    if index.is_file():
        return _sharded(directory, index)
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return read_header(found[0])
    if found:
        raise CheckpointError(f"{directory}: expected {_INDEX} beside {len(found)} safetensors files, found none")
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in directory.glob(f"*.{suffix}"))
    if pickles:
        raise CheckpointError(
            f"{directory}: expected safetensors, found {pickles[0]}: pickled weights can run code, refused"
        )
    raise CheckpointError(f"{directory}: expected model.safetensors or {_INDEX}, found neither")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file. Raises CheckpointError when header and file size do not fit each other."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        cap = min(max(size - 8, 0), _HEADER_CAP)
        if size < 8 or length > cap:
            raise CheckpointError(f"{path}: expected a header of at most {cap} bytes, found {length} announced")
        raw = parse_json(file.read(length), f"{path} (header)")
    room = size - 8 - length
    raw.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in raw.items():
        tensors[name], begin, end = _entry(path, name, entry, room)
        spans.append((begin, end, name))
    covered = 0
    for begin, end, name in sorted(spans):
        if begin != covered:
            raise CheckpointError(
                f"{path}: {name}: expected data to begin at {covered}, found {begin} (a hole or an overlap)"
            )
        covered = end
    if covered != room:
        raise CheckpointError(f"{path}: expected {covered} bytes of tensor data, found {room}")
    return tensors


def _entry(path: Path, name: str, entry: object, room: int) -> tuple[TensorInfo, int, int]:
    label = f"{path}: {name[:120]}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{label}: expected an object, found {str(entry)[:80]}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _FLOATS:
        raise CheckpointError(
            f"{label}: expected floating-point weights ({', '.join(_FLOATS)}), found {str(dtype)[:40]}"
        )
    if not _naturals(shape) or len(shape) > 8:
        raise CheckpointError(f"{label}: shape: expected a list of sizes, found {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{label}: data_offsets: expected [begin, end], found {str(offsets)[:80]}")
    begin, end = offsets
    if end > room or begin > end:
        raise CheckpointError(f"{label}: data_offsets: expected them within {room} bytes, found {offsets} (truncated?)")
    wanted = math.prod(shape) * _FLOATS[dtype]
    if end - begin != wanted:
        raise CheckpointError(f"{label}: expected {wanted} bytes for {dtype} {shape}, found {end - begin}")
    return TensorInfo(path, dtype, tuple(shape)), begin, end


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 62 for one in value
    )


def _sharded(directory: Path, index: Path) -> dict[str, TensorInfo]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor names, found {str(where)[:80]}")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted({str(name) for name in where.values()}):
        # Plain names only: "../x" or an absolute path would let an index read anywhere on the machine.
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map: expected plain *.safetensors names, found {shard[:120]!r}")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{index}: weight_map: expected {shard} in the directory, found none")
        for name, info in read_header(directory / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"{directory / shard}: {name}: expected once, found in {tensors[name].path.name} too"
                )
            if where.get(name) != shard:
                raise CheckpointError(f"{index}: {name}: expected {shard} (it is there), found {where.get(name)!r}")
            tensors[name] = info
    for name, shard in where.items():
        if name not in tensors:
            raise CheckpointError(f"{directory / str(shard)}: {name}: expected by the index, found missing")
    return tensors
