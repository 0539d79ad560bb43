"""Tiny random pairs on transformers' models, and vocabularies small enough to write tags often.

The toy vocabulary holds tag pieces that merge with content at both edges. Random weights would hardly ever spell a tag,
so a bigram table is added to every logit row, in the runtime and in the oracle alike.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from splitdecode.models import Transformer, load_model

TAGS = ("<bigmodel>", "</bigmodel>")
PIECES = ["<|eos|>", "a", "b", "c", " d", "e.", "<", "</", "(<", ".</", "big", "model", ">", ">T", ">\n\n", "></"]
PIECES += ["ig", "\n", "mod", "el>", "T", "(", ".", "é", "el", "\n\n", "i", "g", "/", "m", "o", "d", "e", "l", "|", "s"]
WHOLE = ["<bigmodel>", "</bigmodel>"]


class ToyTokenizer:
    """What PairTokens asks of a tokenizer, over a list of strings; spells by the longest piece that fits."""

    def __init__(self, pieces: Sequence[str], special: Collection[int] = (0,)) -> None:
        self.token_bytes = [piece.encode() for piece in pieces] + [b"\xc3", b"\xa9"]
        self.special_ids = frozenset(special)
        self.size = len(self.token_bytes)
        self.eos_id, self.bos_id = 0, None
        self._added = {piece: i for i, piece in enumerate(pieces) if piece in WHOLE or i in special}

    def id_of(self, content: str) -> int | None:
        return self._added.get(content)

    def encode(self, text: str) -> list[int]:
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes) -> list[int]:
        ids = []
        while data:
            usable = [
                i for i, t in enumerate(self.token_bytes) if t and data.startswith(t) and i not in self.special_ids
            ]
            best = max(usable, key=lambda i: len(self.token_bytes[i]))
            ids.append(best)
            data = data[len(self.token_bytes[best]) :]
        return ids

    def encode_inserted(self, text: str, *, avoid: Collection[int] = ()) -> list[int]:
        for piece, index in self._added.items():
            if index not in avoid and piece in text:
                left, right = text.split(piece, 1)
                return [*self.encode_bytes(left.encode()), index, *self.encode_inserted(right, avoid=avoid)]
        return self.encode_bytes(text.encode())

    def same_ids(self, other: ToyTokenizer) -> bool:
        shared = min(self.size, other.size)
        return self.token_bytes[:shared] == other.token_bytes[:shared]


def bigrams(tokenizer: ToyTokenizer, vocab: int, strength: float, seed: int) -> np.ndarray:
    """[V, V] float64: what is likely to follow what. Text opens tags now and then and spells them out."""
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 1.0, (vocab, vocab))
    words = tokenizer.token_bytes

    def likes(left: str, right: str, by: float = 1.0) -> None:
        for i, a in enumerate(words):
            for j, b in enumerate(words):
                if a.endswith(left.encode()) and b == right.encode():
                    table[i, j] += strength * by

    for chain in (["<", "big", "model", ">"], ["</", "big", "model", ">"], ["big", "mod", "el>"]):
        for left, right in pairwise(chain):
            likes(left, right)
    likes("model", ">T", 0.9)
    likes("model", ">\n\n", 0.9)
    likes("model", "></", 0.5)
    for text in ("a", "b", "c", " d", "T"):
        likes(text, "<", 0.45)
        likes(text, "(<", 0.4)
        likes(text, "</", 0.5)
        likes(text, ".</", 0.5)
        for tag in WHOLE:
            likes(text, tag, 0.5)
    table[:, 0] -= 1.5
    return table


def random_hf(kind: str, vocab: int, hidden: int, layers: int, seed: int, max_positions: int = 512) -> Any:
    """A transformers model in float64 whose logits depend strongly on the whole context."""
    torch.manual_seed(seed)
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    config = config_class(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=max(8, hidden // 4),
        max_position_embeddings=max_positions, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = model_class(config).double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(0.2 * torch.randn_like(value))
    return model


class Biased:
    """A Transformer whose logits get a bigram table added: what the oracle adds too."""

    def __init__(self, inner: Transformer, table: np.ndarray) -> None:
        self.inner, self.table = inner, torch.from_numpy(table)
        self.config, self.dtype, self.device = inner.config, inner.dtype, inner.device

    def new_cache(self, num_pages: int, page_size: int) -> Tensor:
        return torch.full_like(self.inner.new_cache(num_pages, page_size), float("nan"))  # unwritten slots poison

    def forward(self, batch: Any, kv: Tensor, rows: Tensor) -> Tensor:
        logits = self.inner.forward(batch, kv, rows)
        return logits + self.table[batch.tokens[rows].long()].to(logits.dtype)


def load_twin(hf: Any, directory: Path, dtype: torch.dtype) -> Transformer:
    """The same weights in our transformer."""
    hf.save_pretrained(directory)
    return load_model(directory, dtype=dtype)
