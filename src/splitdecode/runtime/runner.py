"""F4: one model, its cache, its sampler: launch(batch) -> Flight. It does not know there is another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from splitdecode.models import Transformer
from splitdecode.ops import FEEDS_DEVICE
from splitdecode.runtime.batch import Batch, Ints
from splitdecode.runtime.kvcache import KVCache
from splitdecode.runtime.sampler import Array, Counts, Sampled, Sampler, host

LIKELY = 0.05  # probability from which a watched id counts as coming
_EMPTY = Sampled(np.zeros(0, dtype=np.int32))


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step not yet read back: ids int32 [N] and raw log-probs float32 [N] of its logits rows.

    draws: the rows' [N, 6] table, kept only when some row wants its likeliest alternatives (`top`).  likely: sequences
    whose next token is likely one of the runner's watched ids.
    """

    ids: Ints
    logprobs: Array
    top: list[tuple[Array, Array] | None] | None
    draws: Ints | None
    tokens: int
    ms: float
    likely: Sequence[int] = ()

    def land(self) -> Flight:
        """Here the ids are known when the step is launched."""
        return self

    def dropped(self) -> tuple[Ints, Array]:
        """Ids and log-probs nobody will look at."""
        return self.ids, self.logprobs


def foretold(logits: Tensor, watched: Tensor) -> Tensor:
    """Rows of logits [N, V] that give the ids `watched` [W] a probability of LIKELY or more together: bool [N]."""
    mass = logits.index_select(1, watched).logsumexp(1) - logits.logsumexp(1)
    return mass >= log(LIKELY)


def rows_foretold(logits: Tensor, watched: Tensor) -> list[int]:
    """The rows of which foretold() is true, in host memory. The watched ids together have at most their number times
    the largest of their probabilities, so mostly two maxima tell that no row can reach LIKELY."""
    values, ids = host(logits), watched.numpy()
    if not len(values):
        return []
    lead = values.max(1) + (log(LIKELY / len(ids)) - 1e-3)  # the last term: rounding
    near = (values.take(ids, 1).max(1) >= lead).nonzero()[0]
    if not len(near):
        return []
    rows: list[int] = near[foretold(torch.from_numpy(values[near]), watched).numpy()].tolist()
    return rows


class ModelRunner:
    """One model, its cache and sampler: `launch(batch) -> Flight`."""

    def __init__(self, model: Transformer, cache: KVCache, sampler: Sampler, max_seqs: int) -> None:
        self.model, self.cache, self.sampler = model, cache, sampler
        self._last = np.zeros(max_seqs, dtype=np.int32)  # the id last sampled for each sequence: next step's input
        self.steps = 1  # decode steps a flight may take
        self.watched: Tensor | None = None  # ids whose coming is foretold
        self.clock: Callable[[], float] = perf_counter  # seconds: what a step takes is read from it
        self._nothing = np.full(64, np.nan, dtype=np.float32)

    @property
    def transformer(self) -> Transformer:
        """The model itself, for what does not go through the cache."""
        return self.model

    def launch(self, batch: Batch, counts: Sequence[Counts] = ()) -> Flight:
        """Runs one step. Tokens below zero stand for the id last sampled for sequence -1 - token."""
        start = self.clock()
        tokens = batch.paged.tokens.numpy()
        if tokens.min() < 0:
            unheard = np.flatnonzero(tokens < 0)
            tokens[unheard] = self._last[-1 - tokens[unheard]]
        logits = self.model.forward(batch.paged, self.cache.kv, batch.rows)
        draws = batch.draws
        sampled = _EMPTY
        if len(draws):
            sampled = self.sampler.sample(
                logits, draws[:, 1], draws[:, 2], draws[:, 3], draws[:, 4], draws[:, 5], counts
            )
            if len(draws) == 1:
                if draws.item(0, 5) & FEEDS_DEVICE:
                    self._last[draws.item(0, 1)] = sampled.ids[0]
            else:
                feeds = (draws[:, 5] & FEEDS_DEVICE) != 0
                self._last[draws[feeds, 1]] = sampled.ids[feeds]
        logprobs = sampled.logprobs
        if logprobs is None:
            logprobs = self._unknown(len(draws))
        kept = None if sampled.top is None else draws.copy()
        likely: Sequence[int] = ()
        if self.watched is not None and (rows := rows_foretold(logits, self.watched)):
            likely = draws[rows, 1].tolist()
        ms = (self.clock() - start) * 1e3
        return Flight(sampled.ids, logprobs, sampled.top, kept, batch.num_tokens, ms, likely)

    def _unknown(self, count: int) -> Array:
        if count > len(self._nothing):
            self._nothing = np.full(2 * count, np.nan, dtype=np.float32)
        return self._nothing[:count]
