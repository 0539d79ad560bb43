"""F7: from a checkpoint to a directory the runtime can load: tokenizer files first, weights last.

Tokenizer files are copied as they are, so that ids mean what they meant. With added tags only the list of added tokens
grows: the tags are not special tokens, or decoders that leave those out would leave out the tags.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from splitdecode.errors import CheckpointError, RequestError
from splitdecode.models.checkpoint import read_json
from splitdecode.models.tokenizer import Tokenizer, read_object
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG

TAGS = (OPEN_TAG, CLOSE_TAG)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")  # fmt: skip
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def write_tokenizer(source: Path, target: Path, added_tokens: bool) -> tuple[Tokenizer, list[int]]:
    """Copies a checkpoint's tokenizer; with added_tokens the tags it lacks become tokens of their own, behind the rest.

    Returns the new tokenizer and the ids that were added, none where the checkpoint had them. Raises CheckpointError.
    """
    Tokenizer.from_directory(source)  # what cannot be used is said before anything is written
    target.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    tokenizer = Tokenizer.from_directory(target)
    lacking = [tag for tag in TAGS if tokenizer.id_of(tag) is None] if added_tokens else []
    new = {tag: tokenizer.size + k for k, tag in enumerate(lacking)}
    if new:
        _add(target, new)
        tokenizer = Tokenizer.from_directory(target)
        if [tokenizer.id_of(tag) for tag in new] != list(new.values()):
            raise CheckpointError(f"{target / 'tokenizer.json'}: the tags could not be added to it")
    return tokenizer, list(new.values())


def _add(target: Path, new: dict[str, int]) -> None:
    spec = read_json(target / "tokenizer.json")
    spec["added_tokens"] = [
        *(spec.get("added_tokens") or []),
        *({"id": index, "content": tag, **_ADDED} for tag, index in new.items()),
    ]
    _write(target / "tokenizer.json", spec)
    config = read_object(target / "tokenizer_config.json")
    if "added_tokens_decoder" in config:  # where it is there, transformers takes added tokens from it
        config["added_tokens_decoder"] |= {str(index): {"content": tag, **_ADDED} for tag, index in new.items()}
        _write(target / "tokenizer_config.json", config)
    if (target / "added_tokens.json").is_file():
        _write(target / "added_tokens.json", read_json(target / "added_tokens.json") | new)


def grow_embeddings(model: Any, size: int, new: list[int]) -> None:
    """Rows `new` of a transformers model's embeddings, in and out, become the mean of the rows below them.

    size: ids of the tokenizer; the matrices grow only where their padding has no room for them.
    """
    import torch

    if not new:
        return
    if model.get_input_embeddings().weight.shape[0] < size:
        model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.weight[new] = module.weight[: min(new)].mean(0)


def write_model(model: Any, source: Path, target: Path) -> None:
    """Saves weights and config beside the tokenizer; generation_config.json is the source's where it has one.

    config.json comes last, so that a directory that is not complete cannot be loaded. Raises RequestError where the
    directory cannot be written to.
    """
    part = target / ".part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", part / "generation_config.json")
        (target / "config.json").unlink(missing_ok=True)
        for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, target / file.name)
        part.rmdir()
    except OSError as error:
        raise RequestError(f"--output: {target} cannot be written to ({error.strerror})") from None


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
