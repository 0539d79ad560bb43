"""A scripted pair that fails where it is told to: NaN logits, a forward that raises, a policy that raises."""

from __future__ import annotations

from typing import Any

import torch
from oracles.scripted import Scripted
from oracles.tiny import PIECES, ToyTokenizer
from torch import Tensor

from splitdecode import ControlTags, EngineConfig, SplitDecoder
from splitdecode.split.roles import Pair, Role

IDS = {piece: i for i, piece in enumerate(PIECES)}
A, B, C, EOS = IDS["a"], IDS["b"], IDS["c"], 0
PROMPT = [A, B, C]


class Flaky(Scripted):
    """A scripted model that can be told to give NaN logits at a position, or to raise at a forward."""

    nan_at = -1
    raises_at = -1

    def forward(self, batch: Any, kv: Tensor, rows: Tensor) -> Tensor:
        if len(self.forwards) == self.raises_at:
            self.forwards.append(-1)
            raise RuntimeError("the device is gone")
        logits = super().forward(batch, kv, rows).clone()
        logits[batch.positions[rows].long() + 1 == self.nan_at, 2] = torch.nan
        return logits


class Broken(ControlTags):
    """Raises where it is told to."""

    def __init__(self, method: str, position: int) -> None:
        super().__init__()
        object.__setattr__(self, "fault", (method, position))

    def owner(self, position: int) -> Role | None:
        if self.fault == ("owner", position):  # type: ignore[attr-defined]
            raise ZeroDivisionError("no such owner")
        return super().owner(position)

    def next_mark(self, position: int) -> int | None:
        if self.fault == ("next_mark", position):  # type: ignore[attr-defined]
            raise ZeroDivisionError("no such mark")
        return super().next_mark(position)


def build(padding: Pair[int] | None = None, more: list[str] | None = None, **engine: Any) -> SplitDecoder:
    """padding: rows of each model beyond its tokenizer; more: pieces only the large tokenizer knows."""
    tokenizers = Pair(ToyTokenizer(PIECES), ToyTokenizer(PIECES))
    tokenizers.large.token_bytes += [piece.encode() for piece in more or []]
    tokenizers.large.size += len(more or [])
    models = Pair.of(lambda r: Flaky(tokenizers[r].size + (padding[r] if padding else 0)))
    config = EngineConfig(**{"kv_cache_memory": "1MiB", "page_size": 2, **engine})
    decoder = SplitDecoder(models, tokenizers, eos_ids=Pair((EOS,), (EOS,)), config=config)  # type: ignore[arg-type]
    for model in models:
        model.table[:, C] = 0.0  # where nothing is scripted: c
    return decoder


def opened(decoder: SplitDecoder) -> None:
    """The small model writes `a`, opens, and the large one writes on."""
    decoder.models.small.says(3, [A, *(IDS[piece] for piece in ("<", "big", "model", ">"))])


def pages(decoder: SplitDecoder) -> list[int]:
    decoder.engine.scheduler.check_invariants()
    return [runner.cache.pool.in_use for runner in decoder.engine.runners]
