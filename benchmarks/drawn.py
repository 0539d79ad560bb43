"""Benchmarks: a small model that writes the tags of a trace itself, so that its hand-offs can be seen coming.

forced   ... text text|<bigmodel> put there at once                 nothing announces it: no draw is made
drawn    ... text text  <  big  model  >|                           each token is drawn from logits that want it
                        ^ from here on a hand-off is likely

Random weights write no tags. A Scribe stands before such a model and edits its logits: at the positions of the trace's
tags their tokens are certain, everywhere else they are impossible. At false alarms, one in so many positions, the first
of them is given 10 % and not drawn (greedy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from traces import Trace

from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.runtime.batch import Batch
from splitdecode.runtime.runner import Flight, ModelRunner
from splitdecode.split.engine import Choice
from splitdecode.split.roles import Role

_ALARM = 0.1  # probability of an opening that does not come


class Scribe:
    """Around the small model of a decoder for the time of a `with`: its choices write the tags of their traces."""

    def __init__(self, decoder: SplitDecoder, traces: Mapping[Choice, Trace], alarm_every: int = 0) -> None:
        """alarm_every: tokens of the small lane per false alarm; 0: none. RequestError where steps are captured."""
        runner: Any = decoder.engine.runners[Role.SMALL]
        if not isinstance(runner, ModelRunner):
            raise RequestError("--drawn: found captured steps, expected a CPU")
        tags = decoder.tokens.tag_ids
        self._running, self._runner, self._alarm_every = decoder.engine.running, runner, alarm_every
        self._tags = torch.tensor(sorted({token for tag in tags for token in tag}))
        self._first = tags[0][0]
        self._wanted = {choice: positions(trace, tags) for choice, trace in traces.items()}
        self._plain: Any = None
        self._batch: Batch | None = None

    def __enter__(self) -> Scribe:
        self._plain, self._runner.model = self._runner.model, self
        self._runner.launch = self._launch  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.model = self._plain
        del self._runner.launch  # type: ignore[method-assign]

    def _launch(self, batch: Batch, *counts: Any) -> Flight:
        self._batch = batch
        return ModelRunner.launch(self._runner, batch, *counts)

    @torch.inference_mode()
    def forward(self, *args: Any) -> Tensor:
        """The model's logits, edited."""
        logits: Tensor = self._plain.forward(*args)
        assert self._batch is not None
        logits[:, self._tags] = -torch.inf
        for row, (_, seq, position, stream, _, _) in enumerate(self._batch.draws.tolist()):
            at = position + (stream >> 8)  # a tried closing is keyed by where it began, and a step
            token = self._wanted[self._running[seq]].get(at)
            if token is not None:
                logits[row, token] = logits[row].max() + 20.0
            elif self._alarm_every and at % self._alarm_every == 0:
                logits[row, self._first] = logits[row].logsumexp(0) + math.log(_ALARM / (1 - _ALARM))
        return logits


def positions(trace: Trace, tags: list[list[int]]) -> dict[int, int]:
    """Position in the small lane -> id, of every tag of the trace."""
    out: dict[int, int] = {}
    before = trace.prompt_tokens
    for start, stop in trace.spans:
        for edge, tag in zip((start, stop), tags, strict=True):
            out.update({before + edge + k: token for k, token in enumerate(tag)})
            before += len(tag)
    return out
