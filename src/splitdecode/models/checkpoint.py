"""F3: a checkpoint directory, resolved and read: config, generation defaults, where the weights lie.

A local directory never touches the network; a hub id is fetched by allow-list (no pickled weights, no code).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitdecode.errors import CheckpointError
from splitdecode.models.config import ModelConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_JSON_CAP = 64 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says about itself besides its weights.

    directory: where config, tokenizer and weights lie.  eos_ids: ids that end a text, possibly none.
    sampling: the sampling keys of generation_config.json that are numbers or flags.
    """

    directory: Path
    config: ModelConfig
    eos_ids: tuple[int, ...]
    sampling: dict[str, float | int | bool]


def open_checkpoint(path_or_id: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Reads the small files of a local directory or a hub id ("owner/name").

    Raises CheckpointError naming the file and the field that cannot be used.
    """
    directory = resolve(path_or_id, revision)
    where = directory / "config.json"
    if not where.is_file():
        raise CheckpointError(f"{where}: expected a config.json, found none")
    raw = read_json(where)
    config = ModelConfig.from_hf(raw, str(where))
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    if generation.get("eos_token_id") is not None:
        eos = _eos(generation, str(generation_path), config.vocab_size)
    else:
        eos = _eos(raw, str(where), config.vocab_size)
    return Checkpoint(directory, config, eos, _sampling(generation, str(generation_path)))


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The local directory of a checkpoint; fetches a hub id. Raises CheckpointError where there is none."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(path_or_id):
        raise CheckpointError(f"{path_or_id}: expected a directory or a hub id owner/name, found neither")
    from huggingface_hub import snapshot_download  # imported late: a local directory needs no network code

    patterns = ["config.json", "generation_config.json", "*.safetensors", "*.index.json"]
    patterns += ["tokenizer*.json", "special_tokens_map.json", "chat_template*", "*.jinja"]
    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; all mean "no checkpoint under that name"
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(f"{path_or_id}{at}: could not be fetched: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises CheckpointError when it is not one, is too deep or repeats a key."""
    if path.stat().st_size > _JSON_CAP:
        raise CheckpointError(f"{path}: expected at most {_JSON_CAP} bytes, found {path.stat().st_size}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """One JSON object from UTF-8 bytes; `where` names it in errors (CheckpointError)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{where}: expected unique keys, found {twice[:80]!r} twice")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise CheckpointError(f"{where}: expected a JSON object, found one nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: expected a JSON object, found no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _eos(raw: Mapping[str, Any], where: str, vocab: int) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < vocab:
            raise CheckpointError(f"{where}: eos_token_id: expected ids below {vocab}, found {str(value)[:80]}")
    return tuple(dict.fromkeys(ids))


def _sampling(raw: Mapping[str, Any], where: str) -> dict[str, float | int | bool]:
    found: dict[str, float | int | bool] = {}
    for name in _SAMPLING:
        value = raw.get(name)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{where}: {name}: expected a number or a flag, found {str(value)[:80]!r}")
        found[name] = value
    return found
