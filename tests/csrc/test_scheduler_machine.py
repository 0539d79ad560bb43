"""The scheduler at random against a twin: writes, reads, retargets, switches and aborts over two lanes, late landings.

After every step World.check() (oracles/lanes.py) holds every id against a model without a cache and every cached slot
against a fresh prefill; this file adds what content must be, and that sequences end however small the pools are.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracles.lanes import TAGS, WORDS, Shape, World, encode, visible, word

from splitdecode._C import Event, EventKind, Phase

OVER = (EventKind.END, EventKind.STOP, EventKind.LENGTH, EventKind.FULL, EventKind.BROKEN)
MAX_LEN = 22
PROMPTS = [[1, 2, 3], [1, 2, 3, 4, 5, 1, 2], [1, 2, 3, 4, 5, 1, 2, 8, 8], [2, 1], [1]]


@dataclass
class Story:
    """What content a sequence must have: what is settled, and which mode adds to it now."""

    settled: bytes = b""
    mode: str = "rest"  # rest | direct | scan | block | read | confirm
    lane: int = 0
    start: int = 0  # position from which the active lane's ids are new
    drawn: tuple[int, int, int] | None = None  # READ: lane, first position, draws


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        spare=st.integers(0, 4),
        caching=st.booleans(),
        depth=st.integers(1, 3),
        steps=st.sampled_from([1, 1, 2, 3, 8]),
        tokens=st.integers(1, 12),
        rows=st.integers(1, 4),
        logits=st.integers(1, 6),
        max_seqs=st.integers(1, 4),
        extent=st.sampled_from([0, 0, 1, 2, 3]),
        spare_extents=st.integers(0, 2),
        shelf=st.sampled_from([0, 0, 3, 40]),
        patience=st.sampled_from([0.0, 0.0, 1.0, 4.0]),
        fill=st.sampled_from([(0, 1 << 30), (4, 3), (0, 1), (8, 1 << 30)]),
    )
    def build(self, page_size: int, spare: int, **sizes: Any) -> None:
        pages = -(-MAX_LEN // page_size) + spare
        self.world = World(Shape(pages=pages, page_size=page_size, max_len=MAX_LEN, plan_pages=200, **sizes))
        self.stories: dict[int, Story] = {}

    # ---- rules

    @precondition(lambda self: len(self.stories) < 4)
    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        prompts = [data.draw(st.sampled_from(PROMPTS)) for _ in range(2)]
        leader = data.draw(st.sampled_from([-1, -1, *self.stories]))
        limit = data.draw(st.sampled_from([1 << 30, 1, 3, 9]))
        seq = self.world.add(prompts, max_tokens=limit, leader=leader, exact=data.draw(st.booleans()))
        self.stories[seq] = Story()
        self.write(data, seq)
        if seq in self.stories and data.draw(st.booleans()):
            self.world.mirror(seq, data.draw(st.integers(0, 1)))

    @precondition(lambda self: self.stories)
    @rule(data=st.data())
    def decide(self, data: st.DataObject) -> None:
        """At any time, asked or not."""
        seq = data.draw(st.sampled_from(sorted(self.stories)))
        choices = [self.write, self.write, self.cut, self.cut, self.read, self.read, self.confirm, self.abort]
        data.draw(st.sampled_from(choices))(data, seq)

    @precondition(lambda self: self.stories)
    @rule(data=st.data())
    def hurry(self, data: st.DataObject) -> None:
        self.world.scheduler.hurry(data.draw(st.sampled_from(sorted(self.stories))))

    @rule(lane=st.integers(0, 1), times=st.integers(1, 3))
    def plan(self, lane: int, times: int) -> None:
        for _ in range(times):
            self.world.plan(lane)

    @rule(data=st.data(), ticks=st.integers(1, 8))
    def tick(self, data: st.DataObject, ticks: int) -> None:
        """Both lanes in turn, as deep as the scheduler goes, as the decoder does."""
        for _ in range(ticks):
            for lane in range(2):
                while len(self.world.flights[lane]) < self.world.shape.depth and self.world.plan(lane):
                    pass
            for lane in range(2):
                if self.world.flights[lane]:
                    self.apply(data, self.world.land(lane))
                    self.holds()

    @rule(data=st.data(), ticks=st.integers(8, 20))
    def tick_on(self, data: st.DataObject, ticks: int) -> None:
        self.tick(data, ticks)

    @precondition(lambda self: any(self.world.flights))
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        lane = data.draw(st.sampled_from([lane for lane in range(2) if self.world.flights[lane]]))
        self.apply(data, self.world.land(lane))

    # ---- decisions

    def write(self, data: st.DataObject, seq: int) -> None:
        self.settle(seq)
        lane, story = data.draw(st.integers(0, 1)), self.stories[seq]
        phase = data.draw(st.sampled_from([Phase.DIRECT, Phase.SCAN, Phase.SCAN, Phase.PROVISIONAL]))
        story.mode = {Phase.DIRECT: "direct", Phase.SCAN: "scan", Phase.PROVISIONAL: "block"}[phase]
        story.lane, story.start = lane, len(self.world.ids(seq, lane))
        mark = data.draw(st.sampled_from([-1, -1, self.world.scheduler.content_size(seq) + 2]))
        self.apply(data, self.world.write(seq, lane, phase, lane, interval=data.draw(st.integers(1, 4)), mark=mark))

    def cut(self, data: st.DataObject, seq: int) -> None:
        """Any lane changes course; then somebody writes on."""
        self.settle(seq)
        lane = data.draw(st.integers(0, 1))
        size, prompt = len(self.world.ids(seq, lane)), self.world.scheduler.lane_state(seq, lane)["prompt_len"]
        keep = data.draw(st.integers(prompt, size))
        tail = self.world.ids(seq, lane)[keep:] if data.draw(st.booleans()) else []
        ids = (tail + data.draw(st.lists(st.integers(0, len(WORDS) - 1), max_size=6)))[: MAX_LEN - keep]
        self.world.retarget(seq, lane, keep, ids)
        self.world.check()
        self.write(data, seq)

    def read(self, data: st.DataObject, seq: int) -> None:
        """The other lane takes some ids and reads them; a block waits meanwhile."""
        story = self.stories[seq]
        lane = 1 - story.lane
        size = len(self.world.ids(seq, lane))
        ids = data.draw(st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=5))[: MAX_LEN - size]
        if not ids:
            return self.write(data, seq)
        if story.mode != "block":
            self.settle(seq)
        self.world.retarget(seq, lane, size, ids)
        start = data.draw(st.integers(size - 1, size + len(ids) - 1))
        start = max(start, self.world.scheduler.lane_state(seq, lane)["prompt_len"])
        self.world.read(seq, lane, start)
        story.mode, story.lane = "read", lane
        story.drawn = (lane, start, size + len(ids) - start)

    def confirm(self, data: st.DataObject, seq: int) -> None:
        story = self.stories[seq]
        draws = self.world.scheduler.draws(seq)
        if story.drawn is None or -1 in draws:
            return self.write(data, seq)
        lane, start, count = story.drawn
        entering = [n for n in range(count) if self.world.scheduler.enters(lane, 1, draws[n])]
        draw = data.draw(st.sampled_from([*range(-1, count), *entering * 4]))
        keep = start + 1 + draw if draw >= 0 else data.draw(st.integers(start, start + count))
        if keep > len(self.world.ids(seq, lane)) or keep >= MAX_LEN:
            return self.write(data, seq)
        self.settle(seq)
        known = self.world.ids(seq, lane)[:keep]
        story.mode, story.lane, story.drawn = "confirm", lane, None
        events = self.world.confirm(seq, lane, keep, draw, data.draw(st.sampled_from([0, 0, 1, 4])))
        assert self.world.ids(seq, lane) == known + ([draws[draw]] if draw >= 0 else [])
        self.apply(data, events)

    def abort(self, data: st.DataObject, seq: int) -> None:
        self.world.finish(seq)
        del self.stories[seq]

    # ---- events

    def settle(self, seq: int) -> None:
        """Whatever the present mode added stands; what it only held or proposed does not."""
        story = self.stories[seq]
        story.settled, story.mode = self.content(seq), "rest"
        self.world.scheduler.drop_provisional(seq)
        self.stories[seq] = story

    def content(self, seq: int) -> bytes:
        return self.world.scheduler.content_bytes(seq, 0, self.world.scheduler.content(seq)[4][-1:].sum())

    def apply(self, data: st.DataObject, events: list[Event]) -> None:
        for event in events:
            story = self.stories[event.seq]
            getattr(self, f"on_{event.kind.name.lower()}", lambda *_: None)(event, story)
            self.compare(event.seq, event)
            if event.kind in OVER:
                self.abort(data, event.seq)
            elif event.kind == EventKind.DUE and data.draw(st.booleans()):
                count = data.draw(st.integers(0, event.a))
                waiting = self.world.scheduler.provisional(event.seq)[:count].tolist()
                more = self.world.scheduler.accept(event.seq, count, True)
                if not more:
                    story.settled += b"".join(b"" if i in (0, 21) else WORDS[i] for i in waiting)
                    story.mode = "rest"
                    assert self.content(event.seq) == story.settled
                    data.draw(st.sampled_from([self.write, self.read]))(data, event.seq)
                elif more[0].kind in OVER:
                    self.abort(data, event.seq)
                else:
                    self.write(data, event.seq)
            elif event.kind == EventKind.READ and event.a >= 0:
                self.confirm(data, event.seq)
            else:
                data.draw(st.sampled_from([self.write, self.cut, self.read, self.confirm]))(data, event.seq)

    def on_read(self, event: Event, story: Story) -> None:
        assert story.mode == "read"
        assert story.drawn is not None
        lane, start, count = story.drawn
        ids = self.world.ids(event.seq, lane)
        draws = self.world.scheduler.draws(event.seq)
        assert draws == [self.world.foreseen_draw(event.seq, lane, ids[: start + n + 1]) for n in range(count)]
        entering = [n for n in range(count) if self.world.scheduler.enters(lane, 1, draws[n])]
        assert event.a == (entering[0] if entering else -1)

    def on_completed(self, event: Event, story: Story) -> None:
        tried = b"".join(WORDS[i] for i in self.world.ids(event.seq, story.lane)[event.b : event.c])
        tried += WORDS[self.world.ids(event.seq, story.lane)[event.c]][: event.d]
        assert story.mode == "confirm"
        assert tried.endswith(TAGS[1].encode())

    def on_tag(self, event: Event, story: Story) -> None:
        assert story.mode == "scan"
        ids = self.world.ids(event.seq, story.lane)
        tag = b"".join(WORDS[i] for i in ids[event.b : event.c]) + WORDS[ids[event.c]][: event.d]
        assert tag.endswith(TAGS[0].encode())
        assert tag.count(TAGS[0].encode()) == 1

    def compare(self, seq: int, event: Event | None = None) -> None:
        """Content is what brute force releases of the ids the active lane has taken since it was asked."""
        story = self.stories[seq]
        fresh = self.world.ids(seq, story.lane)[story.start :] if story.mode in ("direct", "scan") else []
        kind = event.kind if event is not None else None
        if kind == EventKind.END:
            fresh = fresh[:-1]
        if 21 in fresh or (story.mode == "scan" and kind in (EventKind.LENGTH, EventKind.MARK)):
            return  # cut short in the middle of what a token released, or text that is not shown
        if story.mode == "direct":
            assert self.content(seq) == story.settled + b"".join(WORDS[i] for i in fresh)
            return
        shown, held, opened = visible(fresh, open_ends=True)
        assert opened == (kind == EventKind.TAG)
        assert self.content(seq) == story.settled + shown + (held if kind == EventKind.END else b"")

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.check()
        for seq in self.stories:
            self.compare(seq)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestSchedulerAgainstTwin = SchedulerMachine.TestCase


@pytest.mark.slow
class TestSchedulerAgainstTwinForLong(SchedulerMachine.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=800, stateful_step_count=60, deadline=None)


# ---- every sequence ends


def run_dry(world: World, seqs: set[int], chance: random.Random, ticks: int) -> None:
    """Both lanes in turn, as the decoder does; the pen changes hands now and then."""
    for _ in range(ticks):
        for lane in range(2):
            if len(world.flights[lane]) < world.shape.depth:
                world.plan(lane)
        for lane in range(2):
            if not world.flights[lane] or (len(world.flights[lane]) < world.shape.depth and chance.random() < 0.3):
                continue
            for event in world.land(lane):
                mark = mark_of(world, event.seq)
                if event.kind in OVER or world.write(event.seq, chance.randrange(2), Phase.DIRECT, mark=mark):
                    world.finish(event.seq)  # its text ended, or the lane that should write on is full
                    seqs.discard(event.seq)
        world.check()
        if not seqs:
            return
    raise AssertionError(f"{sorted(seqs)} are still running after {ticks} ticks")


def write_six(world: World, chance: random.Random, *lengths: int) -> None:
    """Six sequences that write so many tokens each, to their end."""
    seqs = set()
    for _ in range(6):
        seq = world.add([chance.choice(PROMPTS), chance.choice(PROMPTS)], max_tokens=chance.choice(lengths))
        seqs.add(seq)
        world.write(seq, chance.randrange(2), Phase.DIRECT, mark=mark_of(world, seq))
        if chance.random() < 0.5:
            world.mirror(seq, chance.randrange(2))
    run_dry(world, seqs, chance, 4000)
    world.drain()


def mark_of(world: World, seq: int) -> int:
    return world.scheduler.content_size(seq) + 3


@pytest.mark.parametrize("seed", range(40))
def test_every_sequence_ends_in_pools_that_hold_barely_one(seed: int) -> None:
    """No hold-and-wait: pages of both pools are wanted in both orders."""
    chance = random.Random(seed)
    size = chance.choice([1, 2, 4])
    shape = Shape(page_size=size, pages=-(-MAX_LEN // size) + chance.randrange(3), max_len=MAX_LEN, end_ids=())
    shape = replace(shape, extent=chance.choice([0, 1, 2, 3]), shelf=chance.choice([0, 3, 40]))
    shape = replace(shape, patience=chance.choice([0.0, 1.0, 5.0]), fill=chance.choice([(0, 1 << 30), (4, 2), (0, 1)]))
    shape = replace(shape, depth=1 + seed % 3, caching=seed % 2 == 0, tokens=chance.choice([1, 3, 9]), max_seqs=5)
    world = World(shape)
    write_six(world, chance, 4, 12)


def test_caches_that_left_a_shared_memory_come_back_whole() -> None:
    """More sequences than fit with both their caches, and the pen goes to and fro: World holds what comes back from a
    shelf against a fresh prefill."""
    met: Counter[tuple[str, str]] = Counter()
    for seed in range(40):
        chance = random.Random(seed)
        size = chance.choice([1, 2, 4])
        pages = -(-MAX_LEN // size)
        shape = Shape(page_size=size, pages=pages, max_len=MAX_LEN, end_ids=(), tokens=chance.choice([3, 9, 64]))
        shape = replace(shape, extent=chance.choice([1, 2, 3]), shelf=chance.choice([pages, 99]))
        shape = replace(shape, spare_extents=chance.randrange(pages), fill=chance.choice([(0, 1 << 30), (2, 2)]))
        shape = replace(shape, depth=1 + seed % 3, caching=seed % 2 == 0, max_seqs=5)
        world = World(shape)
        write_six(world, chance, 9, 18)
        met += world.memory.met
    assert min(met["put", "planned"], met["taken", "planned"], met["put", "other"]) > 100


def test_a_crossing_is_resolved_by_preemption() -> None:
    """Each sequence sits in one pool and wants the other: the younger gives way, both end."""
    world = World(Shape(page_size=1, pages=12, max_len=12, end_ids=(), caching=False))
    seqs = {world.add([[1, 2], [1, 2]], max_tokens=9) for _ in range(2)}
    for seq in seqs:
        world.write(seq, seq, Phase.DIRECT, mark=6)
    run_dry(world, seqs, random.Random(0), 200)
    assert world.scheduler.preemptions > 0
    world.drain()


def test_the_twin_notices_a_stolen_page() -> None:
    """The checks above can fail: one wrong slot is enough."""
    world = World(Shape())
    seq = world.add([encode(b"ababab"), [word("a")]])
    world.write(seq, 0)
    world.step(0)
    world.memory.write(0, int(world.scheduler.lane_state(seq, 0)["pages"][0]) * 4 + 1, 7)
    with pytest.raises(AssertionError):
        world.check()
    with pytest.raises(AssertionError, match="context slot"):
        world.plan(0)
