"""Models whose logits are a table over positions: what a test wants written, and nothing to compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from oracles.tiny import PIECES, WHOLE, ToyTokenizer
from torch import Tensor

from splitdecode import ControlAction, EngineConfig, RequestOutput, SamplingParams, SplitDecoder
from splitdecode.requests import gathered
from splitdecode.split.roles import Pair, Role

NEVER = -60.0
EOS = 0
IDS = {piece: index for index, piece in enumerate(PIECES + WHOLE)}


class Scripted:
    """logits for the token at position p: table[p]. Repeats a default row beyond what the script says."""

    def __init__(self, vocab: int, positions: int = 256) -> None:
        self.table = torch.full((positions, vocab), NEVER, dtype=torch.float64)
        self.config = SimpleNamespace(
            vocab_size=vocab, max_positions=positions, num_layers=1, num_kv_heads=1, head_dim=2
        )
        self.dtype, self.device = torch.float64, torch.device("cpu")
        self.forwards: list[int] = []

    def says(self, at: int, ids: Sequence[int]) -> Scripted:
        """The tokens for positions at, at + 1, ..."""
        for offset, token in enumerate(ids):
            self.table[at + offset] = NEVER
            self.table[at + offset, token] = 0.0
        return self

    def draws(self, at: int, logits: Mapping[int, float]) -> Scripted:
        """The distribution of the token at position `at`."""
        self.table[at] = NEVER
        for token, value in logits.items():
            self.table[at, token] = value
        return self

    def new_cache(self, num_pages: int, page_size: int) -> Tensor:
        return torch.zeros(1, num_pages, page_size, 2, 1, 2, dtype=torch.float64)

    def forward(self, batch: Any, kv: Tensor, rows: Tensor) -> Tensor:
        self.forwards.append(len(batch.tokens))
        return self.table[batch.positions[rows].long() + 1]


def scripted_pair(
    pieces: Sequence[str],
    *,
    special: Collection[int] = (0,),
    actions: Mapping[str, ControlAction] | None = None,
    **engine: Any,
) -> tuple[SplitDecoder, Pair[Scripted], ToyTokenizer]:
    """A decoder over two scripted models with one tokenizer; EOS is id 0."""
    tokenizer = ToyTokenizer(pieces, special)
    models = Pair(Scripted(tokenizer.size), Scripted(tokenizer.size))
    engine.setdefault("kv_cache_memory", "4MiB")
    config = EngineConfig(**engine)
    decoder = SplitDecoder(
        models,  # type: ignore[arg-type]
        Pair(tokenizer, tokenizer),  # type: ignore[arg-type]
        eos_ids=Pair((0,), (0,)),
        config=config,
        actions=actions,
    )
    return decoder, models, tokenizer


def ids(*pieces: str) -> list[int]:
    return [IDS[piece] for piece in pieces]


class Stage:
    """Two scripted models and a prompt of three tokens; `lanes` records the ids of both lanes at every tick."""

    def __init__(self, pieces: list[str] = PIECES, **engine: Any) -> None:
        self.decoder, self.models, self.tokenizer = scripted_pair(pieces, **engine)
        self.prompt = ids("a", "b", "c")

    def small(self, at: int, *pieces: str) -> Stage:
        self.models.small.says(3 + at, ids(*pieces))
        return self

    def large(self, at: int, *pieces: str) -> Stage:
        self.models.large.says(3 + at, ids(*pieces))
        return self

    def run(self, handoff: Any = None, **params: Any) -> RequestOutput:
        params = {"temperature": 0.0, "max_tokens": 40, **params}
        made = self.decoder._request(self.prompt, None, SamplingParams(**params), handoff)
        name = self.decoder._queue(made, None)
        self.lanes: list[tuple[list[int], list[int]]] = []
        while made[0].output is None:
            self.decoder.engine.tick()
            if made[0].output is None:
                scheduler, handle = self.decoder.engine.scheduler, made[0].sequence.handle  # type: ignore[union-attr]
                lanes = [scheduler.lane_ids(handle, role)[3:].tolist() for role in Role]
                self.lanes.append((lanes[0], lanes[1]))
        return gathered(name, self.prompt, self.decoder._requests[name])


class Recorder:
    """The engine's scheduler, which notes both lanes of every sequence that ends."""

    def __init__(self, decoder: SplitDecoder) -> None:
        self.engine, self.inner = decoder.engine, decoder.engine.scheduler
        self.lanes: dict[int, Pair[list[int]]] = {}  # by random key
        decoder.engine.scheduler = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def finish(self, handle: int) -> None:
        key = self.engine.running[handle].key
        self.lanes[key] = Pair.of(lambda role: self.inner.lane_ids(handle, role).tolist())
        self.inner.finish(handle)
