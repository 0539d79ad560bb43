"""Scheduler.plan(steps=k): several decode steps in one flight, what ends them early, and when there is only one."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.lanes import EOS, Shape, World, word, words

from splitdecode._C import EventKind, Phase

LONG = words(*"ababababab")


def writing(shape: Shape, prompt: list[int], phase: Phase = Phase.DIRECT, **limits: object) -> tuple[World, int]:
    """One sequence whose lane 0 has run its prompt and writes 'a' for ever."""
    world = World(shape)
    seq = world.add([prompt, prompt], **limits)
    world.script[seq, 0] = dict.fromkeys(range(shape.max_len), word("a"))
    world.write(seq, 0, phase)
    assert world.step(0) == []  # the prompt is no decode
    return world, seq


def planned(world: World) -> list[tuple[int, int, int]]:
    """(seq, start, ids drawn) of each row."""
    step = world.plan(0)
    if step is None:
        return []
    return [(row.seq, row.positions[0], n) for row, n in zip(step.rows, step.steps, strict=True)]


def test_a_decode_takes_as_many_steps_as_it_is_allowed() -> None:
    world, seq = writing(Shape(steps=4, depth=3), words("a", "b"), max_tokens=8)
    assert planned(world) == [(seq, 2, 4)]
    assert planned(world) == [(seq, 6, 3)]
    assert planned(world) == []
    assert world.land(0) == []
    assert len(world.ids(seq, 0)) == 7
    assert [e.kind for e in world.land(0)] == [EventKind.LENGTH]
    assert world.scheduler.stats(seq, 0)["forwards"] == 8
    world.check()


def test_steps_end_where_the_context_does() -> None:
    world, seq = writing(Shape(steps=8, max_len=12), LONG)
    assert planned(world) == [(seq, 10, 1)]
    assert [e.kind for e in world.land(0)] == [EventKind.FULL]


def test_a_tag_in_the_middle_ends_the_flight_and_gives_its_pages_back() -> None:
    world, seq = writing(Shape(steps=6, depth=2, page_size=1, pages=40), words("a", "b"), Phase.SCAN)
    world.script[seq, 0][4] = word("<x>")
    assert planned(world) == [(seq, 2, 6)]
    assert planned(world) == [(seq, 8, 6)]
    events = world.land(0)
    assert [(e.kind, e.b) for e in events] == [(EventKind.TAG, 4)]
    assert world.ids(seq, 0) == words("a", "b", "a", "a", "<x>")
    lane = world.scheduler.lane_state(seq, 0)
    assert (lane["cached"], lane["launched"], lane["inflight"]) == (4, 4, 0)
    assert world.scheduler.stats(seq, 0)["discarded"] == 4
    world.check()
    assert world.land(0) == []  # of an old epoch
    assert world.scheduler.stats(seq, 0)["discarded"] == 10
    world.retarget(seq, 0, 4, [])
    world.write(seq, 0)
    for _ in range(4):
        assert world.step(0) == []
        world.check()


def test_a_tag_in_the_last_step_leaves_nothing_over() -> None:
    world, seq = writing(Shape(steps=2), words("a", "b"), Phase.SCAN)
    world.script[seq, 0][4] = word("<x>")
    assert [e.kind for e in world.step(0)] == [EventKind.TAG]
    assert world.scheduler.stats(seq, 0)["discarded"] == 0


def test_eos_in_the_middle() -> None:
    world, seq = writing(Shape(steps=5), words("a", "b"))
    world.script[seq, 0][3] = EOS
    assert [(e.kind, e.a) for e in world.step(0)] == [(EventKind.END, EOS)]
    assert world.ids(seq, 0) == [*words("a", "b", "a"), EOS]
    world.check()


def test_a_broken_step_is_heard_at_its_place() -> None:
    world, seq = writing(Shape(steps=4), words("a", "b"))
    world.plan(0)
    world.flights[0].clear()
    ids = np.array([1, -1, -2, -2], np.int32)
    events = world.scheduler.commit(0, ids, np.zeros(4, np.float32), 1.0)
    assert [e.kind for e in events] == [EventKind.BROKEN]
    assert world.ids(seq, 0) == words("a", "b", "a", "a")
    world.scheduler.check_invariants()


def test_one_row_that_does_more_holds_all_to_one_step() -> None:
    world, seq = writing(Shape(steps=4, caching=False), words("a", "b"))
    other = world.add([LONG, LONG])
    world.write(other, 0)
    assert planned(world) == [(seq, 2, 1), (other, 0, 1)]
    world.land(0)
    assert planned(world) == [(seq, 3, 4), (other, 10, 4)]


def test_rows_take_their_own_number_of_steps() -> None:
    world = World(Shape(steps=4))
    seqs = [world.add([words("a"), words("a")], max_tokens=n) for n in (2, 9, 4)]
    for seq in seqs:
        world.script[seq, 0] = dict.fromkeys(range(40), word("a"))
        world.write(seq, 0)
    world.step(0)
    assert planned(world) == [(seqs[0], 1, 1), (seqs[1], 1, 4), (seqs[2], 1, 3)]
    assert [(e.kind, e.seq) for e in world.land(0)] == [(EventKind.LENGTH, seqs[0]), (EventKind.LENGTH, seqs[2])]
    world.check()


@pytest.mark.parametrize("limits", [{"exact": True}, {"min_tokens": 9}])
def test_the_host_is_asked_after_every_step_when_the_draw_depends_on_it(limits: dict[str, object]) -> None:
    world, seq = writing(Shape(steps=4, depth=3), words("a", "b"), **limits)
    assert planned(world) == [(seq, 2, 1)]
    assert planned(world) == []


def test_a_candidate_is_confirmed_one_step_at_a_time() -> None:
    world, seq = writing(Shape(steps=4), words("a", "b"))
    world.retarget(seq, 0, 2, words("a", "b"))
    world.script[seq, 0].update({3: word("<"), 4: word("/")})
    world.confirm(seq, 0, 3, -1, 0)
    assert world.step(0) == []
    assert planned(world) == [(seq, 3, 1)]


def test_nobody_is_preempted_for_a_guess() -> None:
    world = World(Shape(steps=4, pages=4, page_size=2, caching=False))
    seqs = [world.add([words("a"), words("a")]) for _ in range(2)]
    for seq in seqs:
        world.script[seq, 0] = dict.fromkeys(range(40), word("a"))
        world.write(seq, 0)
    world.step(0)
    assert planned(world) == [(seqs[0], 1, 4), (seqs[1], 1, 1)]
    world.land(0)
    assert world.scheduler.preemptions == 0
    world.check()


def test_no_steps_is_a_mistake() -> None:
    world, _ = writing(Shape(), words("a"))
    with pytest.raises(ValueError, match="steps"):
        world.scheduler.plan(0, *world.buffers, steps=0)
