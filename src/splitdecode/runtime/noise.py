"""F4: Gumbel noise of a whole vocabulary, computed for several positions ahead.

Noise depends on (key, position, stream, attempt) alone, never on what was written. With a short vocabulary its cost is
that of some fifty numpy calls, whatever their length; so a miss fills a window of the next positions of that slot:

    slot 3   | base | base + 1 | ... | base + window - 1 |     one stream, one attempt, one key
               [V]     [V]

A window is a cache and nothing else: dropping it at any time changes no result. Memory is held under 64 MiB.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from splitdecode import ops

Array = npt.NDArray[Any]

_WINDOW = 16
_BUDGET = 64 << 20  # bytes


class Draw(NamedTuple):
    """Where the random numbers of R rows come from: key [R] uint64; position, stream (word 2), attempt [R] int64."""

    key: Array
    position: Array
    stream: Array
    attempt: Array

    def take(self, rows: Array | slice) -> Draw:
        """The draws of some rows."""
        return Draw(self.key[rows], self.position[rows], self.stream[rows], self.attempt[rows])


class NoiseWindow:
    """Noise [R, vocab] by slot, in one float dtype."""

    def __init__(self, vocab: int, max_slots: int, dtype: npt.DTypeLike) -> None:
        self._vocab = vocab
        self._dtype = np.dtype(dtype)
        self.width = int(np.clip(_BUDGET // (vocab * max_slots * self._dtype.itemsize), 1, _WINDOW))
        self._noise = np.empty((max_slots, self.width, vocab), dtype=self._dtype)
        self._base = np.full(max_slots, -self.width, dtype=np.int64)
        self._tags = Draw(
            np.zeros(max_slots, np.uint64), *(np.full(max_slots, -1, np.int64) for _ in range(3))
        )  # the position field is unused

    def get(self, slots: Array, draw: Draw) -> Array:
        """Noise of the rows' draws -> [R, vocab]; rows of one slot may ask for different positions and streams."""
        if len(slots) == 1 and (known := self._one(slots[0], draw)) is not None:
            return known
        found = self._found(slots, draw)
        if found.all():
            return self._read(slots, draw)
        out = np.empty((len(slots), self._vocab), dtype=self._dtype)
        out[found] = self._read(slots[found], draw.take(found))  # before a fill moves their windows
        lost = (~found).nonzero()[0]
        _, first = np.unique(slots[lost], return_index=True)
        self._fill(slots[lost[first]], draw.take(lost[first]))
        found = self._found(slots[lost], draw.take(lost))
        out[lost[found]] = self._read(slots[lost[found]], draw.take(lost[found]))
        rest = lost[~found]
        if rest.size:
            out[rest] = ops.gumbel_dense_host(self._vocab, *draw.take(rest), self._dtype)
        return out

    def _one(self, slot: int, draw: Draw) -> Array | None:
        """A single row by scalars, a third of the cost of arrays; None on a miss."""
        ahead = int(draw.position[0]) - self._base.item(slot)
        tags = self._tags
        if not 0 <= ahead < self.width or tags.key.item(slot) != draw.key.item(0):
            return None
        if tags.stream.item(slot) != draw.stream.item(0) or tags.attempt.item(slot) != draw.attempt.item(0):
            return None
        noise: Array = self._noise[slot, ahead : ahead + 1]
        return noise

    def _found(self, slots: Array, draw: Draw) -> Array:
        ahead = draw.position - self._base[slots]
        same = (self._tags.key[slots] == draw.key) & (self._tags.stream[slots] == draw.stream)
        found: Array = same & (self._tags.attempt[slots] == draw.attempt) & (ahead >= 0) & (ahead < self.width)
        return found

    def _read(self, slots: Array, draw: Draw) -> Array:
        noise: Array = self._noise[slots, draw.position - self._base[slots]]
        return noise

    def _fill(self, slots: Array, draw: Draw) -> None:
        rows = np.repeat(np.arange(len(slots)), self.width)
        wide = draw.take(rows)
        wide = wide._replace(position=wide.position + np.tile(np.arange(self.width), len(slots)))
        noise = ops.gumbel_dense_host(self._vocab, *wide, self._dtype)
        self._noise[slots] = noise.reshape(len(slots), self.width, self._vocab)
        self._base[slots] = draw.position
        self._tags.key[slots], self._tags.stream[slots], self._tags.attempt[slots] = draw.key, draw.stream, draw.attempt
