"""F4: a model that runs by captured steps: launch(batch) -> DeviceFlight, ahead of the host.

    host     plan -> fill a pinned place of the ring -> copy, replay ...  poll the place's outbox -> land
    device             inbox <- place -> embed .. advance -> outbox[place]

A batch becomes the smallest captured shape that holds it, padded; what no shape holds (prompts, long catch-ups) runs
eagerly, the same program on the same memory. The device keeps every sequence's block table: only pages that changed are
sent. Nothing here waits for the device but land().
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitdecode.config import EngineConfig
from splitdecode.errors import RequestError
from splitdecode.models import Transformer
from splitdecode.models.step import SKINNY, StepInputs, StepModel, StepShape
from splitdecode.ops import StepOps, step_ops
from splitdecode.runtime.batch import Batch, Ints
from splitdecode.runtime.graphs import Graph, GraphPool
from splitdecode.runtime.kvcache import KVCache
from splitdecode.runtime.program import Adjust, Program
from splitdecode.runtime.runner import Flight, foretold
from splitdecode.runtime.sampler import Array, Counts
from splitdecode.runtime.slots import DeviceSlots

UNHEARD = -3  # what an outbox word holds until the device has written it
QUERIES = 8  # tokens per tile of a small step that is no decode
LONG_QUERIES = 128  # query rows per tile of a long step: tokens times query heads per kv head
EDITS = 4096  # block-table changes sent at once


@dataclass(slots=True)
class DeviceFlight:
    """A launched step. land() waits for it; `place` is its row of the ring until then."""

    runner: DeviceRunner
    place: int
    shape: StepShape
    row_steps: Ints
    count: int
    tokens: int
    top: list[tuple[int, Tensor, Tensor]]
    draws: Ints | None
    launched: float
    done: Any
    likely: Tensor | None = None  # bool [draws], on the device

    def land(self) -> Flight:
        """Waits until the ids are in host memory."""
        return self.runner.land(self)

    def dropped(self) -> tuple[Ints, Array]:
        """As many ids and log-probs as it has, none of them read: a step failed, and so may this one have.

        Waits until the device is through with it, since its pages are about to be lent to others.
        """
        if self.done is not None:
            with suppress(RuntimeError):  # a device that is lost writes no more
                self.done.synchronize()
        self.runner.forget()
        return np.full(self.count, -1, dtype=np.int32), np.full(self.count, np.nan, dtype=np.float32)


class DeviceRunner:
    """One model on a device: its step program, its captured graphs, its ring of pinned places."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        sampler: DeviceSlots,
        config: EngineConfig,
        max_len: int,
        *,
        ops: StepOps | None = None,
        adjust: Adjust | None = None,
    ) -> None:
        """max_len: positions a lane may have.  ops, adjust: for tests; see Program."""
        max_draws = config.max_draws
        self.cache, self.sampler, self.config = cache, sampler, config
        self.device = model.device
        self.ops = ops or step_ops(self.device, pdl=config.programmatic_launch)
        pinned = self.device.type == "cuda"
        if config.programmatic_launch and pinned and torch.cuda.get_device_capability(self.device) < (9, 0):
            raise RequestError("programmatic_launch: found True, expected False on a GPU older than sm_90")
        self._current = torch.cuda.device(self.device) if pinned else nullcontext()  # where Triton launches
        self._stream = torch.cuda.Stream(self.device) if pinned and config.second_stream else None  # type: ignore[no-untyped-call]
        slots, page = config.max_num_seqs, config.page_size
        self._rings, self._turn = (config.depth or 1) + 1, 0
        self.table = torch.zeros(slots, -(-max_len // page), dtype=torch.int32, device=self.device)
        self._known = np.zeros(self.table.shape, dtype=np.int32)  # the table, as the device will have it
        last = torch.zeros(slots, dtype=torch.int32, device=self.device)
        tokens = config.max_num_batched_tokens
        size = (self._rings, config.steps_per_graph, max_draws)
        self._outbox = torch.full(size, UNHEARD, dtype=torch.int32, pin_memory=pinned)
        self._logprobs = torch.full(size, float("nan"), dtype=torch.float32, pin_memory=pinned)
        largest = StepShape(max(tokens, slots), max(tokens, slots) + slots, max_draws, 1)
        words = sum(StepInputs.sizes(largest))
        self.transformer = model
        self.model = StepModel(model, cache.kv, self.table, last, largest.tokens, prefetch=config.l2_prefetch)
        self.program = Program(self.model, sampler, self._outbox, self._logprobs, words, adjust)
        self._places = torch.zeros(self._rings, 4 + words, dtype=torch.int32, pin_memory=pinned)
        self._sent_edits = torch.zeros(self._rings, 2, EDITS, 3, dtype=torch.int32, pin_memory=pinned)
        self._edits = torch.zeros(2, EDITS, 3, dtype=torch.int32, device=self.device)
        self._graphs: dict[StepShape, Graph] = {}
        self.captures = pinned and not config.enforce_eager  # before the first request
        self._pool = GraphPool(self.device)
        self._landed = 0.0
        self.watched: Tensor | None = None  # ids whose coming is foretold
        self._views: dict[tuple[int, StepShape], dict[str, Array]] = {}

    def forget(self) -> None:
        """A step failed: what the device's block table holds is no longer known, so all of it is sent again."""
        self._known.fill(-1)

    # ---- shapes

    @property
    def steps(self) -> int:
        """Decode steps a flight may take now: one where a step's logits are needed on their own."""
        return 1 if self.sampler.any_top or self.watched is not None else self.config.steps_per_graph

    def shapes(self) -> list[StepShape]:
        """Every shape that is captured: decodes by rows, small mixed steps by tokens, plain and full."""
        out = []
        limit = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        for full in (False, True):
            for rows in _buckets(1, limit):
                out += [
                    StepShape(rows, rows, rows, 1, steps, full) for steps in sorted({1, self.config.steps_per_graph})
                ]
            for tokens in _buckets(2, min(SKINNY, self.config.max_num_batched_tokens)):
                out.append(self._mixed(tokens, full))
        return out

    def _mixed(self, tokens: int, full: bool) -> StepShape:
        return StepShape(tokens, tokens, tokens, QUERIES, 1, full)

    def capture(self, shape: StepShape) -> None:
        """Captures a shape; whatever was launched has landed."""
        self.program.prepare(self.ops, shape)
        self._fill(None, shape, self._places[0])  # padding: a capture may run what it records
        self._places[0, 0] = 0
        self.program.inbox.copy_(self._places[0])
        self._graphs[shape] = self._pool.capture(lambda ops: self.program.run(ops, shape), self.ops)

    def _shape(self, batch: Batch) -> StepShape:
        tokens, rows, count = batch.num_tokens, len(batch.seqs), len(batch.draws)
        full = not self.sampler.is_plain(batch.draws)
        if tokens == rows == count:
            steps = self.config.steps_per_graph if batch.steps > 1 else 1
            size = _bucket(tokens, min(self.config.max_num_seqs, self.config.max_num_batched_tokens))
            return StepShape(size, size, size, 1, steps, full)
        if tokens <= SKINNY:
            return self._mixed(_bucket(max(2, tokens), self.config.max_num_batched_tokens), full)
        config = self.model.config
        queries = max(1, LONG_QUERIES // (config.num_heads // config.num_kv_heads))
        lengths = np.diff(batch.paged.cu_q.numpy())
        tiles = int((-(-lengths // queries)).sum())
        return StepShape(tokens, tiles, count, queries, 1, full, split=False)

    # ---- launching

    def launch(self, batch: Batch, counts: Sequence[Counts] = ()) -> DeviceFlight:
        """Sends a step on its way. Tokens below zero stand for the id last sampled for sequence -1 - token."""
        with self._current:
            if self._stream is None:
                return self._launch(batch, counts)
            self._stream.wait_stream(torch.cuda.default_stream(self.device))  # where slots are set
            with torch.cuda.stream(self._stream):
                return self._launch(batch, counts)

    def _launch(self, batch: Batch, counts: Sequence[Counts]) -> DeviceFlight:
        start = perf_counter()
        shape = self._shape(batch)
        place, self._turn = self._turn, (self._turn + 1) % self._rings
        words = self._places[place]
        self._fill(batch, shape, words)
        words[0] = place
        used = 4 + sum(StepInputs.sizes(shape))
        self._outbox[place].fill_(UNHEARD)
        self.program.inbox[:used].copy_(words[:used], non_blocking=True)
        pages = self._table_edits(batch)
        self._send(place, 0, pages, self.ops.patch, self.table)
        self._known[pages[:, 0], pages[:, 1]] = pages[:, 2]
        if counts:
            edits = self.sampler.count_edits(batch.draws, counts)
            self._send(place, 1, edits, self.ops.count_patch, self.sampler.state.counts)
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.replay()
        else:
            self.program.prepare(self.ops, shape)
            self.program.run(self.ops, shape)
        top = self._alternatives(batch.draws, shape)
        likely = None
        if self.watched is not None and len(batch.draws):
            likely = foretold(
                self.program.logits_of(shape)[: len(batch.draws), : self.sampler.vocab_limit], self.watched
            )
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        kept = batch.draws.copy() if top or likely is not None else None
        count = int(batch.row_steps.sum()) if shape.steps > 1 else len(batch.draws)
        steps = batch.row_steps.copy()
        return DeviceFlight(self, place, shape, steps, count, batch.num_tokens, top, kept, start, done, likely)

    def _fill(self, batch: Batch | None, shape: StepShape, words: Tensor) -> None:
        """Writes the inputs of a step, padded to its shape."""
        at = self._host_views(shape, words)
        tokens, rows, draws = (0, 0, 0) if batch is None else (batch.num_tokens, len(batch.seqs), len(batch.draws))
        at["tokens"][tokens:], at["positions"][tokens:], at["slots"][tokens:] = 0, -1, 0
        at["left"][rows:], at["draws"][draws:] = 0, (-1, 0, 0, 0, 0, 0)
        if batch is None:
            at["tiles"][:] = 0
            return
        at["tokens"][:tokens] = batch.paged.tokens.numpy()
        at["positions"][:tokens] = batch.paged.positions.numpy()
        at["draws"][:draws] = batch.draws
        cu_q = batch.paged.cu_q.numpy()
        if tokens == rows:
            at["slots"][:tokens] = batch.seqs
        else:
            at["slots"][:tokens] = np.repeat(batch.seqs, np.diff(cu_q))
        if shape.queries == 1:
            at["left"][:rows] = batch.row_steps
            at["tiles"][:rows, 0], at["tiles"][:rows, 1] = np.arange(rows), 1
            at["tiles"][rows:] = 0
        else:
            tiles = _tiles(cu_q, shape.queries)
            at["tiles"][: len(tiles)], at["tiles"][len(tiles) :] = tiles, 0

    def _host_views(self, shape: StepShape, words: Tensor) -> dict[str, Array]:
        key = (words.data_ptr(), shape)
        found = self._views.get(key)
        if found is None:
            inputs = StepInputs.of(words[4:], shape)
            names = ("tokens", "positions", "slots", "left", "tiles", "draws")
            found = {name: getattr(inputs, name).numpy() for name in names}
            if shape in self._graphs:
                self._views[key] = found
        return found

    def _table_edits(self, batch: Batch) -> Ints:
        """(slot, index, page) [E, 3] of block-table entries the device does not have yet."""
        pages, indptr = batch.paged.pages.numpy(), batch.paged.page_indptr.numpy()
        if len(batch.seqs) == 1:
            slot = int(batch.seqs[0])
            index = (self._known[slot, : len(pages)] != pages).nonzero()[0]
            slots = np.full(len(index), slot, dtype=np.int32)
            changed = pages[index]
        else:
            lengths = np.diff(indptr)
            slots = np.repeat(batch.seqs, lengths)
            index = np.arange(len(pages)) - np.repeat(indptr[:-1], lengths)
            new = self._known[slots, index] != pages
            slots, index, changed = slots[new], index[new], pages[new]
        return np.stack((slots, index.astype(np.int32), changed), axis=1)

    def _send(self, place: int, kind: int, edits: Ints, op: Any, target: Tensor) -> None:
        """Applies edits in stream order; more than fit in one go wait for the device."""
        for start in range(0, len(edits), EDITS):
            part = edits[start : start + EDITS]
            if start and self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            size = _bucket(max(16, len(part)), EDITS)
            room = self._sent_edits[place, kind, :size]
            room.numpy()[len(part) :] = -1
            room.numpy()[: len(part)] = part
            self._edits[kind, :size].copy_(room, non_blocking=True)
            op(self._edits[kind, :size], target)

    def _alternatives(self, draws: Ints, shape: StepShape) -> list[tuple[int, Tensor, Tensor]]:
        """(row, ids, log-probs) of rows that want their likeliest alternatives; computed in stream order."""
        if not len(draws) or not (most := self.sampler.top(draws[:, 1])):
            return []
        raw = self.program.logits_of(shape)[: len(draws), : self.sampler.vocab_limit].double()
        values, ids = raw.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
        wanted = [(row, self.sampler.top(draws[row : row + 1, 1])) for row in range(len(draws))]
        values, ids = values[:, :most].float(), ids[:, :most].int()
        return [(row, ids[row, :count], values[row, :count]) for row, count in wanted if count]

    # ---- landing

    def land(self, flight: DeviceFlight) -> Flight:
        """Waits for a flight and reads it. Raises what the device raised."""
        shape, count = flight.shape, flight.count
        box = self._outbox[flight.place, : shape.steps, : shape.draws].numpy()
        self._wait(flight, box)
        logprobs = self._logprobs[flight.place, : shape.steps, : shape.draws].numpy()
        if shape.steps > 1:
            rows = len(flight.row_steps)
            taken = np.arange(shape.steps)[None, :] < flight.row_steps[:, None]
            ids, chances = box[:, :rows].T[taken], logprobs[:, :rows].T[taken]
        else:
            ids, chances = box[0, :count].copy(), logprobs[0, :count].copy()
        if not shape.full:
            chances = np.full(count, np.nan, dtype=np.float32)
        top: list[tuple[Array, Array] | None] | None = None
        if flight.top:
            top = [None] * count
            for row, best, values in flight.top:
                if ids[row] >= 0:
                    top[row] = (best.cpu().numpy(), values.cpu().numpy())
        now = perf_counter()
        ms = 1e3 * (now - max(self._landed, flight.launched))
        self._landed = now
        coming: list[int] = []
        if flight.likely is not None and flight.draws is not None:
            coming = flight.draws[:, 1][flight.likely.cpu().numpy()].tolist()
        return Flight(ids, chances, top, flight.draws, flight.tokens, ms, coming)

    def _wait(self, flight: DeviceFlight, box: npt.NDArray[np.int32]) -> None:
        if flight.done is None:
            return
        if flight.shape.full or not box.size or flight.top:
            flight.done.synchronize()
            return
        while (box == UNHEARD).any():
            if flight.done.query() and (box == UNHEARD).any():
                raise RuntimeError("the device finished a step without writing its ids")

    def warm_up(self, progress: Any = None) -> None:
        """Captures every shape; progress: a wrapper of the list of shapes, tqdm for one."""
        shapes = self.shapes()
        for shape in progress(shapes) if progress else shapes:
            self.capture(shape)


def _bucket(count: int, limit: int) -> int:
    """The smallest power of two that holds `count`, or the limit."""
    return min(limit, 1 << max(0, count - 1).bit_length())


def _buckets(first: int, limit: int) -> list[int]:
    """Powers of two from `first` on, and the limit."""
    return sorted({_bucket(n, limit) for n in range(first, limit + 1)})


def _tiles(cu_q: Ints, queries: int) -> Ints:
    """(first token, count) [C, 2]: every row cut into tiles of at most `queries` tokens."""
    out = []
    for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        out += [(first, min(queries, end - first)) for first in range(begin, end, queries)]
    return np.array(out, dtype=np.int32).reshape(-1, 2)
