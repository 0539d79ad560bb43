"""Benchmarks: from the names on a command line to a pair that is ready to decode.

    demo                    the embedded pair, real weights, real tags
    random-1m ... -100m     geometries small enough for any machine, seeded random weights, float32
    0.5b ... 72b, r1-...    the geometries of released models (splitdecode.models.geometry), random weights, bfloat16
    a directory             a checkpoint in Hugging Face layout

Whether a pair fits is computed from geometry before anything is allocated. Random weights come with a vocabulary in
which every id has bytes of its own; the tags are single tokens at its end (or, on demand, spelled in several).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import free_memory

from splitdecode.config import EngineConfig
from splitdecode.decoder import DTYPES, SplitDecoder
from splitdecode.errors import CapacityError, RequestError
from splitdecode.models import load_model
from splitdecode.models.checkpoint import open_checkpoint
from splitdecode.models.config import ModelConfig, RopeConfig
from splitdecode.models.geometry import kv_bytes, parameters, preset, preset_names, weight_bytes
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG

# hidden, intermediate, layers, heads, kv heads, vocabulary; all tied
RANDOM = {
    "random-1m": (128, 384, 4, 4, 2, 2048),
    "random-5m": (256, 640, 6, 4, 2, 4096),
    "random-20m": (512, 1408, 6, 8, 2, 8192),
    "random-100m": (768, 2048, 12, 12, 4, 32768),
}


@dataclass(frozen=True, slots=True)
class Source:
    """One model of a pair before it is loaded. kind: demo | random | preset | checkpoint."""

    name: str
    kind: str
    config: ModelConfig
    directory: Path | None
    dtype: torch.dtype | None  # None: the file's

    @property
    def itemsize(self) -> int:
        """Bytes of a weight; 2 is assumed where the file decides."""
        return 2 if self.dtype is None else self.dtype.itemsize

    @property
    def step_bytes(self) -> int:
        """Bytes of weights one decode step streams."""
        return weight_bytes(self.config, self.itemsize)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights."""
        return parameters(self.config) * self.itemsize


def resolve(name: str, role: Role, dtype: str) -> Source:
    """What `name` stands for. Raises RequestError or CheckpointError with one line that says what is known."""
    wanted = None if dtype == "auto" else DTYPES[dtype]
    if name == "demo":
        import splitdecode

        directory = Path(splitdecode.__file__).parent / "data" / "tiny-pair" / str(role)
        return Source(f"demo/{role}", "demo", open_checkpoint(directory).config, directory, wanted or torch.float32)
    if name in RANDOM:
        return Source(name, "random", random_config(name), None, wanted or torch.float32)
    if name in preset_names():
        return Source(name, "preset", preset(name), None, wanted or torch.bfloat16)
    if Path(name).is_dir():
        return Source(Path(name).name, "checkpoint", open_checkpoint(name).config, Path(name), wanted)
    known = ", ".join(("demo", *RANDOM, *preset_names()))
    raise RequestError(f"--{role}: found {name!r}, expected a checkpoint directory or one of {known}")


def random_config(name: str) -> ModelConfig:
    """One of RANDOM: a Qwen2 with heads of 64 (random-1m: 32)."""
    hidden, inner, layers, heads, kv_heads, vocab = RANDOM[name]
    return ModelConfig(
        model_type="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_positions=32768,
        rope=RopeConfig(theta=1e4),
        tied=True,
        qkv_bias=True,
    )


def check_fits(sources: Pair[Source], length: int, device: str, copies: int = 1, lanes: int = 1) -> None:
    """Raises CapacityError, with sizes, when the pair and caches of `lanes` times `length` tokens do not fit on
    `device` (`copies` of all: a peer brings its own); RequestError when a context is too short for `length`."""
    for source in sources:
        if length > source.config.max_positions:
            raise RequestError(f"{source.name}: {length} tokens asked for, but its context is "
                               f"{source.config.max_positions}: give --max-tokens")  # fmt: skip
    weights = copies * sum(source.resident_bytes for source in sources)
    caches = copies * lanes * sum(length * kv_bytes(source.config, source.itemsize) for source in sources)
    room = free_memory(device)
    if weights + caches <= 0.95 * room:
        return
    sizes = " + ".join(f"{source.name} {source.resident_bytes / 1e9:.1f} GB" for source in sources)
    twice = f", {copies} copies" if copies > 1 else ""
    message = f"the pair does not fit: weights {sizes}{twice}, caches {caches / 1e9:.1f} GB, free {room / 1e9:.1f} GB"
    names = [source.name for source in sources]
    if all(name in preset_names() for name in names):
        message += f"; see: splitdecode plan --small {names[0]} --large {names[1]} --gpu h200"
    raise CapacityError(message)


def build(
    sources: Pair[Source],
    length: int,
    *,
    device: str,
    page_size: int,
    read_interval: int,
    split_tags: bool,
    prefix_caching: bool = False,
    max_num_seqs: int = 4,
    lanes: int = 1,
    **more: Any,
) -> SplitDecoder:
    """Loads the pair with room for `lanes` sequences of `length` tokens. Without prefix caching every run prefills its
    prompt. more: EngineConfig's fields."""
    pages = 2 * lanes * (length + 2 * page_size)
    options = EngineConfig(
        **more,
        page_size=page_size,
        read_interval=read_interval,
        enable_prefix_caching=prefix_caching,
        max_num_seqs=max_num_seqs,
        max_model_len=min(length, *(source.config.max_positions for source in sources)),
        kv_cache_memory=pages * sum(kv_bytes(source.config, source.itemsize) for source in sources),
    )
    if all(source.directory for source in sources):
        values = {name: getattr(options, name) for name in options.__dataclass_fields__}
        directories = [source.directory or "" for source in sources]
        dtype = sources[Role.SMALL].dtype or "auto"
        return SplitDecoder.from_pretrained(*directories, device=device, dtype=dtype, **values)
    if any(source.directory for source in sources):
        raise RequestError("--small, --large: found a checkpoint and random weights, expected two of one kind")
    models = Pair.of(
        lambda r: load_model(
            sources[r].config, dtype=sources[r].dtype or "auto", device=device, load_format="dummy", seed=int(r)
        )
    )
    words = RandomVocabulary(min(source.config.vocab_size for source in sources), split_tags)
    return SplitDecoder(models, Pair(words, words), eos_ids=Pair((), ()), config=options)  # type: ignore[arg-type]


class RandomVocabulary:
    """Stands in for a Tokenizer: id i spells a word of its own; the tags come last, whole or in pieces."""

    def __init__(self, size: int, split_tags: bool = False) -> None:
        tags = ["<", "</", "big", "model", ">"] if split_tags else [OPEN_TAG, CLOSE_TAG]
        words = [f"{i:x} " for i in range(size - len(tags))]
        self.token_bytes = [word.encode() for word in (*words, *tags)]
        self.special_ids: frozenset[int] = frozenset()
        self.size = size
        self.eos_id = None
        self._ids = {data: i for i, data in enumerate(self.token_bytes)}
        self._longest = max(map(len, self.token_bytes))

    def id_of(self, content: str) -> int | None:
        """The id of a tag that is one token."""
        return self._ids.get(content.encode()) if content in (OPEN_TAG, CLOSE_TAG) else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text made of this vocabulary's words."""
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes, *, avoid: Collection[int] = ()) -> list[int]:
        """The longest words that fit, one after another. Raises RequestError for other bytes."""
        ids = []
        while data:
            fitting = (self._ids.get(data[:n], -1) for n in range(min(len(data), self._longest), 0, -1))
            found = next((i for i in fitting if i >= 0 and i not in avoid), None)
            if found is None:
                raise RequestError(f"random vocabulary: no word spells {data[:20]!r}")
            ids.append(found)
            data = data[len(self.token_bytes[found]) :]
        return ids

    def same_ids(self, other: RandomVocabulary) -> bool:
        """Whether ids can be handed over as they are."""
        return self.token_bytes == other.token_bytes
