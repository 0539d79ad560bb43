"""What the stream oracle knows of text, and of a pair: pieces of tags, whole characters, marks, logits of a lane."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from splitdecode.split.roles import Role


class Finished(Exception):
    """Nobody writes any more."""


@dataclass
class Spec:
    """What both sides know: tokenizers, logits of a lane, limits."""

    tokenizers: Any  # Pair
    logits: Callable[[Role, list[int]], np.ndarray]
    tags: tuple[str, str]
    vocab_limit: tuple[int, int]
    eos: tuple[list[int], list[int]]
    max_len: tuple[int, int]
    max_span: int
    same: bool


def enters(piece: bytes, tag: bytes) -> bool:
    """Whether a token, read on its own, holds the tag or ends in a part of it."""
    return tag in piece or longest_partial(piece, [tag]) > 0


def whole_characters(pieces: Iterable[bytes]) -> bool:
    """Whether the text read so far does not end inside a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        decoder.decode(piece)
    return decoder.getstate()[0] == b""


def longest_partial(data: bytes, tags: list[bytes]) -> int:
    """Length of the longest proper beginning of a tag that `data` ends with."""
    return max((n for tag in tags for n in range(len(tag)) if n and data.endswith(tag[:n])), default=0)


def nearest(*marks: float | None) -> float:
    """The first of the content positions there are."""
    return min(mark for mark in marks if mark is not None)


def with_tags(text: bytes, tag_log: list[tuple[int, int]], tags: tuple[str, str]) -> str:
    """A text with its tags, given as (bytes before it, kind). A tag inside a character stands before it."""
    out, at = "", 0
    for offset, kind in tag_log:
        if offset <= len(text):
            upto = len(text[:offset].decode("utf-8", "ignore"))
            out, at = out + text.decode()[at:upto] + tags[kind], upto
    return out + text.decode()[at:]


def locate(pieces: list[tuple[int, int, bytes]], offset: int) -> tuple[int, int]:
    """(piece, byte within it) of a byte offset."""
    for index, (*_, piece) in enumerate(pieces):
        if offset < len(piece):
            return index, offset
        offset -= len(piece)
    raise AssertionError("offset beyond the pieces")


def hf_logits(models: Any, tables: Any) -> Callable[[Role, list[int]], np.ndarray]:
    """Logits of the last position of a lane: one forward over all of it, plus the bigram row of its last token."""

    @torch.inference_mode()
    def logits(role: Role, ids: list[int]) -> np.ndarray:
        out = models[role](torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        return out + tables[role][ids[-1]]

    return logits
