"""F4: pending tokens of some lanes, packed flat for one forward: the arrays the scheduler writes and the model reads.

    tokens     | seq 3 . . . . | seq 1 | seq 7 . . |     one row per lane, its pending tokens side by side
    logits     [N, 6]  token index, sequence, position, stream, attempt, flags

The arrays are allocated once; a Batch is a set of views that lasts until the next plan() on the same buffers. Steps of
equal size see the same views, so they are cut once: at batch 1 that is once per page instead of once per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitdecode._C import Scheduler
from splitdecode.ops import PagedBatch

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    """Pending tokens of some lanes, packed flat for one forward; `draws` is the [N, 6] table of logits rows.

    seqs [R]: the sequence of each row.  steps > 1: every row is one decode and goes on by itself, row r for
    row_steps[r] [R] steps; the arrays describe the first, and the pages hold them all.
    """

    paged: PagedBatch
    rows: Tensor  # [N] int32 token indices whose logits are wanted
    draws: Ints
    seqs: Ints
    row_steps: Ints
    steps: int

    @property
    def num_tokens(self) -> int:
        return len(self.paged.tokens)


class StepBuffers:
    """Room for one step of one model."""

    def __init__(self, page_size: int, max_tokens: int, max_rows: int, max_pages: int, max_logits: int) -> None:
        sizes = (max_tokens, max_tokens, max_tokens, max_rows + 1, max_rows, max_rows + 1, max_pages, max_rows)
        self._arrays = [np.zeros(size, dtype=np.int32) for size in (*sizes, max_rows, 6 * max_logits)]
        self._tensors: list[Tensor] = [torch.from_numpy(array) for array in self._arrays]
        self._table = self._arrays[-1].reshape(-1, 6)
        self._counts: tuple[int, int, int, int, int] = (0, 0, 0, 0, 1)
        self._batch: Batch | None = None
        self.page_size = page_size

    def plan(self, scheduler: Scheduler, lane: int, steps: int = 1, now: float = 0.0) -> Batch | None:
        """The lane's next step (up to `steps` at once where all it does is decode), or None when nothing is
        pending or the lane is held back. now: milliseconds that never run backwards."""
        counts = scheduler.plan(lane, *self._arrays, steps=steps, now=now)
        if counts[1] == 0:
            return None
        if counts != self._counts:
            self._counts, self._batch = counts, self._views(*counts)
        return self._batch

    def _views(self, tokens: int, rows: int, pages: int, draws: int, steps: int) -> Batch:
        t = self._tensors
        paged = PagedBatch(
            tokens=t[0][:tokens],
            positions=t[1][:tokens],
            slots=t[2][:tokens],
            cu_q=t[3][: rows + 1],
            kv_len=t[4][:rows],
            page_indptr=t[5][: rows + 1],
            pages=t[6][:pages],
            page_size=self.page_size,
        )
        seqs, row_steps = self._arrays[7][:rows], self._arrays[8][:rows]
        return Batch(paged, t[9].view(-1, 6)[:draws, 0], self._table[:draws], seqs, row_steps, steps)
