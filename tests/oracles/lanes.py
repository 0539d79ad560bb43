"""The scheduler's counterpart for tests: a fake model behind a shadow KV-cache, and lanes by brute force.

    plan() arrays -> launch: token -> chain hash of everything before it -> cache[slot]      (at once: stream order)
    a logits row  -> the hash its pages hold, and the row's random key   -> a sampled id     (kept until land())

A model whose draws depend on every id before them, read through the pages the plan names: one stale, stolen or
unwritten slot changes a hash, and both the slot checks and the ids disagree with the cache-free model from then on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from oracles.memory import Memory

from splitdecode._C import Event, Phase, Scheduler, Vocabulary

TAGS = ["<x>", "</x>"]
# Ids 1..8 are the single bytes any residue can be written in; 0 ends, 21 is special, 22 is without text.
WORDS = [b"", b"a", b"b", b"(", b"<", b"/", b"x", b">", b"."]
WORDS += [b"<x", b"x>", b"(<", b">a", b">(", b"</", b".</", b"</x>", b"<x>", b"ab", b">.<", b"a</x>b", b"a", b""]
EOS, SPECIAL = 0, 21
ROOT = 1


def word(text: str) -> int:
    """The first id with that text."""
    return WORDS.index(text.encode())


def words(*texts: str) -> list[int]:
    return [word(text) for text in texts]


def encode(residue: bytes) -> list[int]:
    return [WORDS.index(bytes([byte])) for byte in residue]


def vocabulary() -> Vocabulary:
    return Vocabulary(WORDS, bytes(i in (EOS, SPECIAL) for i in range(len(WORDS))), encode)


def mix(*parts: int) -> int:
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
    return state


def hashes(ids: Sequence[int]) -> list[int]:
    """What a cache holds of `ids`: one chain hash per position."""
    out, parent = [], ROOT
    for token in ids:
        parent = mix(parent, token)
        out.append(parent)
    return out


def logprob(token: int) -> float:
    return -(token + 1) / 64


@dataclass
class Mode:
    """What was last asked of a sequence."""

    lane: int
    stream: int
    scanned: bool = False  # SCAN
    read_from: int = -1  # READ
    base: int = -1  # CONFIRM


@dataclass
class Row:
    """One row of a plan."""

    seq: int
    tokens: list[int]
    positions: list[int]
    pages: list[int]


@dataclass
class Step:
    """One plan: its rows, its logits rows, and what the fake model drew for those."""

    rows: list[Row]
    logits: list[tuple[int, ...]]
    samples: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # decode steps of each row


@dataclass
class Shape:
    """Sizes of a World; lanes are alike."""

    pages: int = 16
    page_size: int = 4
    caching: bool = True
    max_len: int = 40
    tokens: int = 64
    rows: int = 8
    plan_pages: int = 400
    logits: int = 64
    depth: int = 1
    steps: int = 1
    max_seqs: int = 8
    end_ids: tuple[int, ...] = (EOS,)
    extent: int = 0  # pages per extent of a memory that both lanes share; `pages` is what one sequence may need
    spare_extents: int = 0  # extents beyond what a single sequence needs in both lanes
    shelf: int = 0  # pages on which caches of idle lanes are kept
    patience: float = 0.0
    fill: tuple[int, int] = (0, 1 << 30)  # free tokens, chunk of lanes that run ahead of need


class World:
    """Two lanes, their shadow caches, one Scheduler."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.memory = Memory(shape.pages, shape.page_size, shape.caching, extent=shape.extent,
                             spare_extents=shape.spare_extents, shelf=shape.shelf)  # fmt: skip
        self.pools = self.memory.pools
        lanes = tuple(
            (pool, vocabulary(), shape.max_len, list(shape.end_ids), shelf)
            for pool, shelf in zip(self.pools, self.memory.shelves, strict=True)
        )
        self.scheduler = Scheduler(lanes, TAGS, shape.max_seqs, shape.depth)
        if self.memory.arena is not None:
            self.scheduler.share(self.memory.arena)
        self.scheduler.pace(shape.patience, 50.0)
        for lane in range(2):
            self.scheduler.fill(lane, *shape.fill)
        self.now = 0.0
        self.mirrored: dict[int, int] = {}
        self.last: list[dict[int, int]] = [{}, {}]  # the device's table of last sampled ids
        self.flights: list[deque[Step]] = [deque(), deque()]
        self.live: list[int] = []
        self.base: dict[int, list[list[int]]] = {}  # ids of each lane when it was last decided about
        self.mode: dict[int, Mode] = {}
        self.attempts: dict[tuple[int, int], tuple[int, int]] = {}
        self.script: dict[tuple[int, int], dict[int, int]] = {}  # (seq, lane) -> position -> id drawn there
        sizes = (shape.tokens, shape.tokens, shape.tokens, shape.rows + 1, shape.rows, shape.rows + 1)
        self.buffers = [
            np.full(n, -7, np.int32) for n in (*sizes, shape.plan_pages, shape.rows, shape.rows, 6 * shape.logits)
        ]

    # ---- decisions, with what they mean for the twin

    def add(self, prompts: Sequence[Sequence[int]], **limits: object) -> int:
        settings = {"max_tokens": 1 << 30, "min_tokens": 0, "stop_ids": [], "stops": [], "salt": b"", "leader": -1}
        settings |= {"ignore_eos": False, "skip_special": True, "include_stop": False, "exact": False}
        assert set(limits) <= set(settings)
        seq = self.scheduler.add([list(p) for p in prompts], **(settings | limits))  # type: ignore[arg-type]
        self.live.append(seq)
        self.base[seq] = [list(p) for p in prompts]
        return seq

    def decided(self, seq: int, mode: Mode | None = None) -> None:
        self.base[seq] = [self.ids(seq, lane) for lane in range(2)]
        if mode is not None:
            self.mode[seq] = mode

    def write(self, seq: int, lane: int, phase: Phase = Phase.DIRECT, stream: int = 0, **mode: int) -> list[Event]:
        self.decided(seq, Mode(lane, stream, phase == Phase.SCAN))
        return self.scheduler.write(seq, lane, phase, stream, **mode)

    def read(self, seq: int, lane: int, start: int, stream: int = 2) -> None:
        self.decided(seq, Mode(lane, stream, read_from=start))
        self.scheduler.read(seq, lane, start, stream)

    def confirm(self, seq: int, lane: int, keep: int, draw: int, steps: int, stream: int = 3) -> list[Event]:
        events = self.scheduler.confirm(seq, lane, keep, draw, steps, stream)
        self.decided(seq, Mode(lane, stream, base=keep))
        return events

    def retarget(self, seq: int, lane: int, keep: int, ids: Sequence[int], in_tag: bool = False) -> None:
        expected = self.ids(seq, lane)[:keep] + list(ids)
        self.scheduler.retarget(seq, lane, keep, list(ids), in_tag)
        assert self.ids(seq, lane) == expected
        self.decided(seq)

    def mirror(self, seq: int, lane: int) -> None:
        """From now on `lane` may run content the other one writes."""
        self.mirrored[seq] = lane
        self.scheduler.set_projected(seq, lane, self.scheduler.content_size(seq))
        self.scheduler.mirror(seq, lane)

    def refuse(self, seq: int, lane: int) -> None:
        at, count = self.attempts.get((seq, lane), (-1, 0))
        size = len(self.ids(seq, lane))
        self.attempts[seq, lane] = (size, count + 1 if at == size else 1)
        self.scheduler.refuse(seq, lane)

    def finish(self, seq: int) -> None:
        self.scheduler.finish(seq)
        self.live.remove(seq)
        for table in (self.base, self.mode, self.mirrored):
            table.pop(seq, None)
        for lane in range(2):
            self.attempts.pop((seq, lane), None)

    def ids(self, seq: int, lane: int) -> list[int]:
        return [int(i) for i in self.scheduler.lane_ids(seq, lane)]

    # ---- the model

    def key(self, seq: int, lane: int, sampled: int) -> tuple[int, int, int]:
        """(position, stream, attempt): the random key of the id that will stand at `sampled`."""
        mode = self.mode[seq]
        if mode.base >= 0:
            return mode.base, mode.stream | (sampled - mode.base) << 8, 0
        at, count = self.attempts.get((seq, lane), (-1, 0))
        return sampled, mode.stream, count if at == sampled and mode.scanned else 0

    def draw(self, seq: int, lane: int, sampled: int, seen: int, key: tuple[int, int, int]) -> int:
        """A pure function of the ids before `sampled` (their chain hash) and the key, unless scripted."""
        scripted = self.script.get((seq, lane), {})
        return scripted.get(sampled, mix(seen, lane, *key) % len(WORDS))

    def foreseen(self, seq: int, lane: int, upto: int) -> list[int]:
        """The lane's first `upto` ids, those beyond what the host knows drawn without any cache."""
        ids = self.ids(seq, lane)
        while len(ids) < upto:
            ids.append(self.foreseen_draw(seq, lane, ids))
        return ids[:upto]

    def foreseen_draw(self, seq: int, lane: int, ids: Sequence[int]) -> int:
        """The id drawn behind `ids`, without any cache."""
        return self.draw(seq, lane, len(ids), hashes(ids)[-1], self.key(seq, lane, len(ids)))

    # ---- steps

    def plan(self, lane: int) -> Step | None:
        """Plans a step and runs it through the shadow cache, with every row checked."""
        self.now += 1.0
        counts = self.scheduler.plan(lane, *self.buffers, steps=self.shape.steps, now=self.now)
        tokens, rows, pages, logits, steps = counts
        self.memory.transfer(self.scheduler, lane)
        if rows == 0:
            assert (tokens, pages, logits, steps) == (0, 0, 0, 1)
            return None
        token, position, slot, cu_q, kv_len, indptr, page, row_seq, row_steps, row_logits = (
            b.tolist() for b in self.buffers
        )
        assert steps == max(row_steps[:rows]) <= self.shape.steps
        assert (cu_q[0], cu_q[rows], indptr[0], indptr[rows]) == (0, tokens, 0, pages)
        step = Step([], [tuple(row_logits[6 * n : 6 * n + 6]) for n in range(logits)])
        wanted: list[int] = []
        for r in range(rows):
            part = slice(cu_q[r], cu_q[r + 1])
            row = Row(row_seq[r], token[part], position[part], page[indptr[r] : indptr[r + 1]])
            assert kv_len[r] == row.positions[-1] + 1
            self._run(lane, row, slot[part], row_steps[r])
            wanted += [cu_q[r] + n for n in self._wanted(lane, row)]
            step.rows.append(row)
            step.steps.append(row_steps[r])
        assert [n[0] for n in step.logits] == wanted
        owner = [row.seq for row in step.rows for _ in row.tokens]
        for index, seq, *key, flags in step.logits:
            assert seq == owner[index]
            assert tuple(key) == self.key(seq, lane, position[index] + 1)
            step.samples.append(self.draw(seq, lane, position[index] + 1, self._seen(lane, slot[index]), (*key,)))
            if flags & 2:
                self.last[lane][seq] = step.samples[-1]
            if steps > 1:
                assert (index, flags & 2) == (owner.index(seq), 2)
                self._run_on(lane, step.rows[index], row_steps[index], (*key,), step.samples)
        self.flights[lane].append(step)
        return step

    def _run_on(self, lane: int, row: Row, steps: int, key: tuple[int, int, int], samples: list[int]) -> None:
        """Further steps of a row that decodes: its own samples go in, whatever they were."""
        (position,), size = row.positions, self.shape.page_size
        for p in range(position + 1, position + steps):
            here, before = (row.pages[n // size] * size + n % size for n in (p, p - 1))
            assert not self.pools[lane].immutable(row.pages[p // size])
            seen = mix(self._seen(lane, before), samples[-1])
            self.memory.write(lane, here, seen)
            drawn = (key[0] + p - position, *key[1:])
            assert drawn == self.key(row.seq, lane, p + 1)
            samples.append(self.draw(row.seq, lane, p + 1, seen, drawn))
            self.last[lane][row.seq] = samples[-1]

    def _run(self, lane: int, row: Row, slots: list[int], steps: int) -> None:
        size, start, end = self.shape.page_size, row.positions[0], row.positions[-1] + 1
        assert row.positions == list(range(start, end))
        assert steps == 1 or start + 1 == end
        assert len(row.pages) == -(-(end + steps - 1) // size)
        ids = self.foreseen(row.seq, lane, end)
        truth = hashes(ids)
        at = [row.pages[p // size] * size + p % size for p in range(end)]
        assert [self.memory.read(lane, s) for s in at[:start]] == truth[:start], (
            "a context slot does not hold the lane's prefix"
        )
        assert slots == at[start:]
        for token, p in zip(row.tokens, row.positions, strict=True):
            assert token >= 0 or token == -1 - row.seq
            resolved = token if token >= 0 else self.last[lane][row.seq]
            assert resolved == ids[p]
            assert not self.pools[lane].immutable(row.pages[p // size])
            self.memory.write(lane, at[p], mix(self._seen(lane, at[p - 1]) if p else ROOT, resolved))

    def _seen(self, lane: int, slot: int) -> int:
        seen = self.memory.read(lane, slot)
        assert seen is not None
        return seen

    def _wanted(self, lane: int, row: Row) -> list[int]:
        """Tokens of the row behind which an id is drawn."""
        mode = self.mode[row.seq]
        if mode.lane != lane:
            assert self.mirrored[row.seq] == lane
            return []
        if mode.read_from >= 0:
            return [n for n, p in enumerate(row.positions) if p >= mode.read_from]
        return [len(row.tokens) - 1] if row.positions[-1] + 1 >= len(self.ids(row.seq, lane)) else []

    def land(self, lane: int) -> list[Event]:
        """Lands the oldest flight."""
        step = self.flights[lane].popleft()
        ids = np.array(step.samples, np.int32)
        logprobs = np.array([logprob(i) for i in step.samples], np.float32)
        self.now += 1.0
        return self.scheduler.commit(lane, ids, logprobs, 1.0 + 9.0 * lane, self.now)

    def rows(self, lane: int) -> list[tuple[int, int, int]]:
        """Plans: [(seq, start, count)]."""
        step = self.plan(lane)
        return [(row.seq, row.positions[0], len(row.tokens)) for row in step.rows] if step else []

    def step(self, lane: int) -> list[Event]:
        """Plans and lands at once; nothing to plan raises no events."""
        return self.land(lane) if self.plan(lane) else []

    # ---- what must hold at any time

    def check(self) -> None:
        """Ids are those of the cache-free model, and the cache of a lane is a fresh prefill of its first ids."""
        self.scheduler.check_invariants()
        size = self.shape.page_size
        for seq in self.live:
            for lane in range(2):
                ids, known = self.ids(seq, lane), self.base[seq][lane]
                assert ids[: len(known)] == known
                seen = hashes(ids)
                if self.mirrored.get(seq) == lane != self.mode[seq].lane:
                    upto = self.scheduler.projected(seq, lane)
                    content = self.scheduler.content(seq)[0][upto - len(ids) + len(known) : upto].tolist()
                    assert ids[len(known) :] == content
                    known = ids
                if len(ids) > len(known):
                    assert self.mode[seq].lane == lane
                for p in range(len(known), len(ids)):
                    assert ids[p] == self.draw(seq, lane, p, seen[p - 1], self.key(seq, lane, p))
                state = self.scheduler.lane_state(seq, lane)
                held = [self.memory.read(lane, int(state["pages"][p // size]) * size + p % size)
                        for p in range(state["cached"])]  # fmt: skip
                assert held == seen[: state["cached"]]

    def drain(self) -> None:
        """Finishes everything and lands everything: no page is left with an owner."""
        for seq in list(self.live):
            self.finish(seq)
        for lane in range(2):
            while self.flights[lane]:
                assert self.land(lane) == []
        self.scheduler.check_invariants()
        assert not any(pool.in_use for pool in (*self.pools, *self.memory.shelves) if pool is not None)
        assert self.scheduler.unfinished == 0


def visible(ids: Sequence[int], *, open_ends: bool) -> tuple[bytes, bytes, bool]:
    """Brute force over the bytes of `ids`: (released content, what is held, whether an opening tag ended it)."""
    data = b"".join(WORDS[i] for i in ids)
    edges = {sum(len(WORDS[i]) for i in ids[:n]) for n in range(len(ids) + 1)}
    tags, content, start = [tag.encode() for tag in TAGS], b"", 0
    for end in range(1, len(data) + 1):
        for number, tag in enumerate(tags):
            if data[start:end].endswith(tag):
                content += data[start : end - len(tag)]
                start = end
                edges.add(end)
                if number == 0 and open_ends:
                    return content, b"", True
    rest = data[start:]
    held = max(n for n in range(len(rest) + 1) if n == 0 or any(tag.startswith(rest[-n:]) for tag in tags))
    safe = max(edge for edge in edges if edge <= len(data) - held)
    return content + data[start : max(safe, start)], data[max(safe, start) :], False
