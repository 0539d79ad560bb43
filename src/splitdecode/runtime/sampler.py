"""F4: logits of one model -> token ids, many requests at a time, each by its own parameters.

    raw logits, ids < vocab_limit        log-probs are of these
      -> banned ids, entering ids (attempt > 0), EOS and stop ids (SUPPRESS_STOP): -inf
      -> logit_bias -> repetition, frequency, presence -> / temperature          (vLLM's order)
      -> min_p -> top_k -> top_p: a prefix of (value descending, id ascending)
      -> + gumbel, argmax, the lowest id among equals

A row's result depends on that row alone, whatever stands beside it in the batch. Rows without randomness, bias or
penalty cost one argmax. Noise is drawn only for ids that can still win.

It works on host memory in numpy; on a GPU the same rules are kernels over runtime/slots.py. What a row costs stands in
SPEED.md (`benchmarks/kernels.py --what sampler`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitdecode import ops
from splitdecode.config import SamplingParams
from splitdecode.errors import RequestError
from splitdecode.runtime.noise import Draw, NoiseWindow

Array = npt.NDArray[Any]

SUPPRESS_STOP = ops.SUPPRESS_END  # min_tokens is not reached, so neither EOS nor a stop id may be sampled

_DRAW, _CUT, _EDIT, _LOGPROBS = ops.DRAW, ops.CUT, ops.EDIT, ops.LOGPROBS
_DENSE = 1024  # ids up to which whole rows are sorted and perturbed at once
_START = 256  # ids ranked at first when only a mass (top_p) or a ratio (min_p) bounds their number


@dataclass(frozen=True, slots=True)
class Counts:
    """What penalties count, for one row of a batch: ids of the prompt and ids generated since (others are ignored)."""

    row: int
    prompt_ids: Sequence[int] | Array
    output_ids: Sequence[int] | Array


@dataclass(frozen=True, slots=True)
class Sampled:
    """ids int32 [N], -1 = a row without a token: NaN, +inf, or everything excluded. logprobs float32 [N] of the chosen
    ids (NaN where not asked for or no token), None when no row asked. top: for each row (ids int32 [k], logprobs
    float32 [k], descending) or None; None when no row asked for k > 0."""

    ids: Array
    logprobs: Array | None = None
    top: list[tuple[Array, Array] | None] | None = None


class Sampler:
    """Sampling state of one model: parameters by slot. Slots are the caller's; rows of a batch name theirs."""

    def __init__(
        self,
        vocab_limit: int,
        max_slots: int,
        *,
        banned_ids: Iterable[int] = (),
        entering_ids: Iterable[int] = (),
        eos_ids: Iterable[int] = (),
    ) -> None:
        """vocab_limit: ids from here on are padding; banned_ids: never sampled; entering_ids: excluded while a row's
        attempt > 0 (ids that would begin the tag again); eos_ids: excluded by SUPPRESS_STOP. Ids at or beyond
        vocab_limit are dropped from all three."""
        self.vocab_limit = vocab_limit
        self._banned_ids, self._entering, self._eos = (
            np.array(sorted({i for i in ids if 0 <= i < vocab_limit}), dtype=np.int64)
            for ids in (banned_ids, entering_ids, eos_ids)
        )
        self._banned = np.zeros(vocab_limit, dtype=bool)
        self._banned[self._banned_ids] = True
        self._params: list[SamplingParams | None] = [None] * max_slots
        self._kind = np.zeros(max_slots, dtype=np.uint8)
        self._key = np.zeros(max_slots, dtype=np.uint64)
        self._temperature = np.ones(max_slots)
        self._top_k = np.full(max_slots, vocab_limit, dtype=np.int64)
        self._top_p = np.ones(max_slots)
        self._log_min_p = np.full(max_slots, -np.inf)
        self._windows: dict[np.dtype[Any], NoiseWindow] = {}

    def set(self, slot: int, params: SamplingParams, key: int) -> None:
        """Gives a slot its parameters and its 64-bit key (config.request_key).

        Raises RequestError when stop_token_ids or logit_bias name an id at or beyond vocab_limit.
        """
        self._kind[slot] = kind_of(params, self.vocab_limit)
        self._params[slot] = params
        bounded = params.top_k > 0
        self._key[slot] = key
        self._temperature[slot] = params.temperature
        self._top_k[slot] = min(params.top_k, self.vocab_limit) if bounded else self.vocab_limit
        self._top_p[slot] = params.top_p
        self._log_min_p[slot] = np.log(params.min_p) if params.min_p > 0 else -np.inf

    def clear(self, slot: int) -> None:
        """Forgets a slot; until it is set again, its rows are greedy."""
        self._params[slot] = None
        self._kind[slot] = 0

    def needs_counts(self, slot: int) -> bool:
        """Whether rows of this slot must come with Counts."""
        params = self._params[slot]
        return params is not None and params.penalised

    def sample(
        self,
        logits: Tensor,
        slots: Array,
        positions: Array,
        streams: Array,
        attempts: Array,
        flags: Array,
        counts: Sequence[Counts] = (),
    ) -> Sampled:
        """Samples one id per row.

        logits [N, V >= vocab_limit] float; slots, positions (in the sampling lane), streams (word 2: Stream.word),
        attempts, flags (SUPPRESS_STOP): integers [N]; counts: one for each row whose slot needs them.
        Raises ValueError when a row lacks its counts.
        """
        raw = host(logits)[:, : self.vocab_limit]
        if len(slots) == 1 and (known := self._greedy_one(raw[0], slots[0], attempts[0], flags[0])) is not None:
            return known
        if (known := self._greedy_all(raw, attempts, flags)) is not None:
            return known
        rows = np.arange(len(slots))
        chosen = raw.argmax(axis=1)
        sound = np.isfinite(raw[rows, chosen])  # argmax stops at a NaN
        kinds = self._kind[slots]
        masks = (attempts > 0) | (flags & SUPPRESS_STOP != 0)
        more = (kinds & (_DRAW | _EDIT) != 0) | masks | self._banned[chosen]
        ids = chosen.astype(np.int32)
        if not sound.all():
            ids[~sound] = -1
            more &= sound
        if more.any():
            every = more.all()
            some: Array | slice = slice(None) if every else more.nonzero()[0]
            values = raw.copy() if every else raw[some]
            draw = Draw(self._key[slots[some]], positions[some], streams[some], attempts[some])
            if self._banned_ids.size:
                values[:, self._banned_ids] = -np.inf
            with np.errstate(over="ignore", invalid="ignore"):
                if masks.any():
                    self._mask(values, slots[some], attempts[some], flags[some])
                if (kinds & _EDIT).any():
                    self._edit(values, slots[some], np.arange(len(slots))[some], counts)
                ids[some] = self._choose(values, slots[some], kinds[some], draw)
        if (kinds & _LOGPROBS).any():
            return self._with_logprobs(raw, slots, ids)
        return Sampled(ids)

    def _greedy_one(self, row: Array, slot: int, attempt: int, flags: int) -> Sampled | None:
        """A single row that asks for nothing but its largest logit, by scalars: a fifth of what arrays cost."""
        if self._kind.item(slot) or attempt > 0 or flags & SUPPRESS_STOP:
            return None
        best = int(row.argmax())
        if self._banned.item(best) or not isfinite(row.item(best)):
            return None
        return Sampled(np.array((best,), dtype=np.int32))

    def _greedy_all(self, raw: Array, attempts: Array, flags: Array) -> Sampled | None:
        """Rows of which no slot asks for more than its largest logit: they need not be sorted by what they ask for."""
        if self._kind.any() or attempts.any() or (flags & SUPPRESS_STOP).any():
            return None
        best = raw.argmax(axis=1)
        if self._banned[best].any() or not np.isfinite(raw[np.arange(len(best)), best]).all():
            return None
        return Sampled(best.astype(np.int32))

    def _mask(self, values: Array, slots: Array, attempts: Array, flags: Array) -> None:
        """Excludes what an attempt or SUPPRESS_STOP excludes, in place."""
        if self._entering.size:
            again = (attempts > 0).nonzero()[0]
            values[again[:, None], self._entering] = -np.inf
        for row in (flags & SUPPRESS_STOP).nonzero()[0]:
            params = self._params[slots[row]]
            values[row, self._eos] = -np.inf
            values[row, list(params.stop_ids) if params else []] = -np.inf

    def _edit(self, values: Array, slots: Array, rows: Array, counts: Sequence[Counts]) -> None:
        """Bias and penalties, in place; `rows` are the places of `values` in the batch, which counts refer to."""
        by_row = {count.row: count for count in counts}
        for i in (self._kind[slots] & _EDIT).nonzero()[0]:
            params = self._params[slots[i]]
            assert params is not None
            _edit(values[i], params, by_row.get(int(rows[i])))

    def _choose(self, values: Array, slots: Array, kinds: Array, draw: Draw) -> Array:
        """Edited logits [R, V] -> ids [R]; -1 where nothing is left. Overwrites `values`."""
        ids: Array = values.argmax(axis=1)
        best = values[np.arange(len(ids)), ids]
        left = np.isfinite(best)
        groups = np.where(left, kinds & (_DRAW | _CUT), 0)
        ids[~left] = -1
        for group in (_DRAW, _DRAW | _CUT):
            member = groups == group
            if not member.any():
                continue
            rows = slice(None) if member.all() else member.nonzero()[0]
            at = slots[rows]
            scale = self._temperature[at].astype(values.dtype)
            scaled = values[rows]
            scaled /= scale[:, None]
            pick = self._cut if group & _CUT else self._free
            ids[rows] = pick(scaled, best[rows] / scale, ids[rows], at, draw.take(rows))
        return ids

    def _free(self, scaled: Array, top: Array, top_ids: Array, slots: Array, draw: Draw) -> Array:
        """Gumbel-max over whole rows. In long rows only over ids that can still beat the likeliest one's draw."""
        vocab = scaled.shape[1]
        if vocab <= _DENSE:
            scaled += self._window(scaled.dtype).get(slots, draw)
            return np.asarray(scaled.argmax(axis=1))
        lead = top + ops.gumbel_host(top_ids[:, None], *draw, scaled.dtype)[:, 0]
        floor = lead - ops.GUMBEL_MAX - 4 * np.finfo(scaled.dtype).eps * np.abs(top)  # the last term: rounding of sums
        ids = np.empty(len(scaled), dtype=np.int64)
        for row, values in enumerate(scaled):
            one = draw.take(slice(row, row + 1))
            able = (values >= floor[row]).nonzero()[0]
            if able.size > vocab // 4:
                ids[row] = (values + ops.gumbel_dense_host(vocab, *one, scaled.dtype)[0]).argmax()
            else:
                ids[row] = able[(values[able] + ops.gumbel_host(able[None], *one, scaled.dtype)[0]).argmax()]
        return ids

    def _cut(self, scaled: Array, top: Array, top_ids: Array, slots: Array, draw: Draw) -> Array:
        """min_p, top_k, top_p, then Gumbel-max over what is left. Ranks few ids first, more where that was not enough;
        how many were ranked changes no result."""
        vocab = scaled.shape[1]
        limits = self._top_k[slots]
        depth = vocab if vocab <= _START else min(vocab, int(np.where(limits < vocab, limits, _START).max()))
        ids = np.empty(len(scaled), dtype=np.int64)
        todo: Array | slice = slice(None)
        while True:
            rows, at = scaled[todo], slots[todo]
            ranked, values = _ranked(rows, depth)
            keep = _kept(rows, values - top[todo, None], limits[todo], self._top_p[at], self._log_min_p[at])
            done = ~keep[:, -1] | (depth >= limits[todo])
            if done.all():
                ids[todo] = self._perturbed(ranked, values, keep, at, draw.take(todo))
                return ids
            todo = np.arange(len(scaled))[todo]
            kept = (ranked[done], values[done], keep[done])
            ids[todo[done]] = self._perturbed(*kept, at[done], draw.take(todo[done]))
            todo, depth = todo[~done], min(vocab, depth * 16)

    def _perturbed(self, ids: Array, values: Array, keep: Array, slots: Array, draw: Draw) -> Array:
        """Gumbel-max over candidate ids [R, K] where `keep`, a prefix of each row; the lowest id among equals."""
        width = int(keep.sum(axis=1).max(initial=0))
        ids, values, keep = ids[:, :width], values[:, :width], keep[:, :width]
        if width <= 1:
            return np.asarray(ids.reshape(-1))
        if self.vocab_limit <= _DENSE:
            noise = self._window(values.dtype).get(slots, draw)[np.arange(len(ids))[:, None], ids]
        else:
            noise = ops.gumbel_host(ids, *draw, values.dtype)
        noisy = np.where(keep, values + noise, -np.inf)
        tied = noisy == noisy.max(axis=1, keepdims=True)
        return np.asarray(np.where(tied, ids, self.vocab_limit).min(axis=1))

    def _window(self, dtype: np.dtype[Any]) -> NoiseWindow:
        if dtype not in self._windows:
            self._windows[dtype] = NoiseWindow(self.vocab_limit, len(self._params), dtype)
        return self._windows[dtype]

    def _with_logprobs(self, raw: Array, slots: Array, ids: Array) -> Sampled:
        """Log-softmax of the raw logits, for the rows that asked."""
        wanted = [params.logprobs if (params := self._params[slot]) else None for slot in slots]
        logprobs = np.full(len(ids), np.nan, dtype=np.float32)
        top: list[tuple[Array, Array] | None] = [None] * len(ids)
        for row, count in enumerate(wanted):
            if count is None or ids[row] < 0:
                continue
            values = raw[row].astype(np.float64)
            peak = values.max()
            total = peak + np.log(np.exp(values - peak).sum())
            logprobs[row] = values[ids[row]] - total
            if count:
                best, found = _ranked(values[None], min(count, len(values)))
                top[row] = (best[0].astype(np.int32), (found[0] - total).astype(np.float32))
        return Sampled(ids, logprobs, top if any(wanted) else None)


def kind_of(params: SamplingParams, vocab_limit: int) -> int:
    """What a slot with these parameters needs, as bits: DRAW, CUT, EDIT, LOGPROBS.

    Raises RequestError when stop_token_ids or logit_bias name an id at or beyond vocab_limit.
    """
    for name, ids in (("stop_token_ids", params.stop_ids), ("logit_bias", tuple(params.logit_bias or ()))):
        if ids and max(ids) >= vocab_limit:
            raise RequestError(f"{name}: found {max(ids)}, expected ids below {vocab_limit}")
    cut = 0 < params.top_k < vocab_limit or params.top_p < 1.0 or params.min_p > 0.0
    kind = 0 if params.greedy else _DRAW | (_CUT if cut else 0)
    kind |= _EDIT if params.logit_bias or params.penalised else 0
    return kind | (_LOGPROBS if params.logprobs is not None else 0)


def host(logits: Tensor) -> Array:
    """[N, V] float32 or float64 in host memory; a view when it already is."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    array: Array = logits.numpy(force=True)
    return array


def _edit(values: Array, params: SamplingParams, counts: Counts | None) -> None:
    """logit_bias, then the penalties, on one row in place. Source: vLLM's logits processors and apply_penalties."""
    if params.logit_bias:
        values[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), dtype=values.dtype)
    if not params.penalised:
        return
    if counts is None:
        raise ValueError("a row with penalties came without its counts")
    written, times = _counted(counts.output_ids, len(values))
    seen = np.union1d(_counted(counts.prompt_ids, len(values))[0], written)
    repetition = values.dtype.type(params.repetition_penalty)
    values[seen] = np.where(values[seen] > 0, values[seen] / repetition, values[seen] * repetition)
    values[written] -= values.dtype.type(params.frequency_penalty) * times.astype(values.dtype)
    values[written] -= values.dtype.type(params.presence_penalty)


def _counted(ids: Sequence[int] | Array, limit: int) -> tuple[Array, Array]:
    """Distinct ids below `limit` and how often each occurs."""
    array = np.asarray(ids, dtype=np.int64)
    return np.unique(array[(array >= 0) & (array < limit)], return_counts=True)


def _ranked(values: Array, depth: int) -> tuple[Array, Array]:
    """The first `depth` ids of each row by (value descending, id ascending) -> ids, values [R, depth]."""
    vocab = values.shape[1]
    if vocab <= _DENSE or depth >= vocab:
        ids = np.argsort(-values, axis=1, kind="stable")[:, :depth]
        return ids, values[np.arange(len(ids))[:, None], ids]
    ids = np.empty((len(values), depth), dtype=np.int64)
    for row, line in enumerate(values):
        last = np.partition(line, vocab - depth)[vocab - depth]
        able = (line >= last).nonzero()[0]  # more than `depth` when values tie with the last one
        ids[row] = able[np.argsort(-line[able], kind="stable")[:depth]]
    return ids, values[np.arange(len(ids))[:, None], ids]


def _kept(rows: Array, relative: Array, limits: Array, top_p: Array, log_min_p: Array) -> Array:
    """Which ranked ids survive, a prefix of each row -> bool [R, depth].

    rows [R, V] scaled logits; relative [R, depth]: ranked values minus the row's maximum. The mass that top_p is a
    share of is what min_p and top_k left over.
    """
    keep: Array = (np.arange(relative.shape[1]) < limits[:, None]) & (relative >= log_min_p[:, None])
    keep &= relative > -np.inf
    if (top_p >= 1).all():
        return keep
    mass = np.where(keep, np.exp(relative), 0).astype(np.float64)
    upto = mass.cumsum(axis=1)
    total = upto[:, -1].copy()
    vocab = rows.shape[1]
    if vocab > _START:  # a rule of the row alone, so that the batch beside it cannot change a rounding
        for row in ((limits == vocab) & (top_p < 1)).nonzero()[0]:
            every = rows[row] - rows[row].max()
            total[row] = np.where(every >= log_min_p[row], np.exp(every), 0).astype(np.float64).sum()
    keep &= (upto - mass < (top_p * total)[:, None]) | (top_p >= 1)[:, None]
    return keep
