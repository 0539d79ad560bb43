"""Scheduler.plan() and commit(), case by case: packing, run-ahead, epochs, limbo, admission, preemption.

Events are in test_events.py, adopted pages in test_prefix_cache.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from oracles.lanes import EOS, Shape, World, word, words

from splitdecode._C import EventKind, Phase

SUPPRESS_END, FEEDS_DEVICE = 1, 2
LONG = words(*"ababababab")


def writing(shape: Shape, prompt: list[int] = LONG, **limits: object) -> tuple[World, int]:
    """One sequence whose lane 0 writes 'a' for ever."""
    world = World(shape)
    seq = world.add([prompt, prompt], **limits)
    world.script[seq, 0] = dict.fromkeys(range(shape.max_len), word("a"))
    world.write(seq, 0, stream=5)
    return world, seq


def state(world: World, seq: int, lane: int = 0) -> dict[str, object]:
    found = world.scheduler.lane_state(seq, lane)
    return {key: value for key, value in found.items() if key not in ("pages", "epoch")}


# ---- packing


def test_a_prompt_is_cut_to_the_token_budget() -> None:
    world, seq = writing(Shape(tokens=4))
    for expected in [(0, 4), (4, 4), (8, 2)]:
        step = world.plan(0)
        assert step is not None
        assert (step.rows[0].positions[0], len(step.rows[0].tokens)) == expected
        assert len(step.logits) == (1 if expected == (8, 2) else 0)
        assert world.land(0) == []
    assert world.ids(seq, 0) == [*LONG, word("a")]


def test_rows_share_the_budget_in_order_of_arrival() -> None:
    world = World(Shape(tokens=5, caching=False))
    for prompt in (words("a", "b", "a"), words("b", "b", "b"), words("a")):
        world.write(world.add([prompt, prompt]), 0)
    assert world.rows(0) == [(0, 0, 3), (1, 0, 2)]
    world.land(0)
    assert world.rows(0) == [(0, 3, 1), (1, 2, 1), (2, 0, 1)]


def test_no_more_rows_than_there_is_room_for() -> None:
    world = World(Shape(rows=2, logits=1))
    for _ in range(3):
        world.write(world.add([words("a"), words("a")]), 0)
    assert world.rows(0) == [(0, 0, 1)]  # one row of logits


def test_a_logits_row_names_its_draw() -> None:
    """[token index, seq, position, stream, attempt, flags]"""
    world, seq = writing(Shape(), words("a", "b"), min_tokens=1)
    other = world.add([words("b"), words("b")])
    world.write(other, 0, stream=9)
    step = world.plan(0)
    assert step is not None
    assert step.logits == [(1, seq, 2, 5, 0, SUPPRESS_END | FEEDS_DEVICE), (2, other, 1, 9, 0, FEEDS_DEVICE)]


def test_a_reading_row_draws_behind_every_position() -> None:
    world, seq = writing(Shape(), words("a", "b"))
    world.retarget(seq, 0, 2, words("a", "b", "a"))
    world.read(seq, 0, 3, stream=7)
    step = world.plan(0)
    assert step is not None
    assert step.logits == [(3, seq, 4, 7, 0, 0), (4, seq, 5, 7, 0, 0)]
    world.land(0)
    assert world.scheduler.stats(seq, 0)["read_tokens"] == 3


def test_a_penalised_row_reads_one_position_at_a_time() -> None:
    world, seq = writing(Shape(), words("a", "b"), exact=True)
    world.retarget(seq, 0, 2, words("a", "b", "a"))
    world.read(seq, 0, 3)
    step = world.plan(0)
    assert step is not None
    assert (len(step.rows[0].tokens), len(step.logits)) == (4, 1)
    assert world.land(0) == []
    assert world.rows(0) == [(seq, 4, 1)]
    assert [e.kind for e in world.land(0)] == [EventKind.READ]


def test_a_confirming_row_is_keyed_by_candidate_and_step() -> None:
    world, seq = writing(Shape(), words("a", "b"))
    world.retarget(seq, 0, 2, words("a", "b"))
    assert world.confirm(seq, 0, 3, -1, 4, stream=3) == []
    world.script[seq, 0][3] = word("<")
    keys = []
    for _ in range(2):
        step = world.plan(0)
        assert step is not None
        keys += [row[2:] for row in step.logits]
        world.land(0)
    assert keys == [(3, 3, 0, FEEDS_DEVICE), (3, 3 | 1 << 8, 0, FEEDS_DEVICE)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_steps_run_ahead_of_the_host(depth: int) -> None:
    """The next step is planned before the id it runs is known: token -1 - seq."""
    world, seq = writing(Shape(depth=depth), words("a", "b"))
    steps = [world.plan(0) for _ in range(4)]
    tokens = [step.rows[0].tokens for step in steps if step]
    assert tokens == [words("a", "b"), *[[-1 - seq]] * (depth - 1)]
    assert state(world, seq)["inflight"] == depth
    for _ in range(depth):
        assert world.land(0) == []
    world.check()
    assert len(world.ids(seq, 0)) == 2 + depth


def test_nothing_is_drawn_that_nobody_may_keep() -> None:
    world, _ = writing(Shape(depth=3), max_tokens=2)
    assert [bool(world.plan(0)) for _ in range(3)] == [True, True, False]


def test_a_full_context_stops_the_run_ahead() -> None:
    world, seq = writing(Shape(depth=3, max_len=12))
    assert [bool(world.plan(0)) for _ in range(3)] == [True, True, False]
    assert [e.kind for _ in range(2) for e in world.land(0)] == [EventKind.FULL]
    assert world.scheduler.room(seq, 0) == 0


@pytest.mark.parametrize("limits", [{"exact": True}, {"min_tokens": 3}])
def test_the_host_is_waited_for_when_the_draw_depends_on_it(limits: dict[str, object]) -> None:
    world, _ = writing(Shape(depth=3), **limits)
    flags = []
    for _ in range(4):
        step = world.plan(0)
        assert step is not None
        ahead = world.plan(0)
        assert (ahead is None) == ("exact" in limits or len(flags) < 3)
        flags.append(step.logits[0][5] & SUPPRESS_END)
        while world.flights[0]:
            world.land(0)
    assert flags == ([0] * 4 if "exact" in limits else [1, 1, 1, 0])


# ---- landing


def test_a_change_of_course_makes_flights_stale() -> None:
    world, seq = writing(Shape(depth=3), words("a", "b"))
    for _ in range(3):
        world.plan(0)
    world.retarget(seq, 0, 2, words("b", "b"))
    world.write(seq, 0)
    assert [world.land(0) for _ in range(3)] == [[], [], []]
    assert world.ids(seq, 0) == words("a", "b", "b", "b")
    assert world.scheduler.stats(seq, 0)["discarded"] == 3
    world.step(0)
    world.check()


def test_pages_wait_in_limbo_for_the_flights_that_use_them() -> None:
    world, seq = writing(Shape(depth=2, page_size=1, caching=False), words("a", "b", "a"))
    world.plan(0)
    world.plan(0)
    world.finish(seq)
    assert world.pools[0].in_use == 4
    world.land(0)
    assert world.pools[0].in_use == 4
    world.land(0)
    assert world.pools[0].in_use == 0


def test_a_discarded_flight_leaves_older_ones_in_the_air() -> None:
    world, seq = writing(Shape(depth=2, page_size=1, caching=False), words("a", "b", "a"))
    world.plan(0)
    world.plan(0)
    with pytest.raises(RuntimeError, match="finish or preempt"):
        world.scheduler.discard_flight(0)
    world.finish(seq)
    world.flights[0].pop()
    world.scheduler.discard_flight(0)
    assert (world.scheduler.in_flight(0), world.pools[0].in_use) == (1, 4)
    world.scheduler.check_invariants()
    other = world.add([words("b"), words("b")])
    world.write(other, 0)
    world.plan(0)
    world.land(0)
    assert world.pools[0].in_use == 1
    world.drain()


def test_commit_wants_an_id_for_every_logits_row() -> None:
    world, seq = writing(Shape(), words("a", "b"))
    with pytest.raises(RuntimeError, match="without a flight"):
        world.scheduler.commit(0, np.zeros(1, np.int32), np.zeros(1, np.float32), 1.0)
    world.plan(0)
    for ids, logprobs in [(2, 2), (0, 0), (1, 2)]:
        with pytest.raises(ValueError, match="commit"):
            world.scheduler.commit(0, np.ones(ids, np.int32), np.zeros(logprobs, np.float32), 1.0)
    assert world.land(0) == []  # the flight is still there
    assert world.ids(seq, 0) == words("a", "b", "a")


def test_arrays_are_never_converted() -> None:
    world, _ = writing(Shape(), words("a", "b"))
    for n in range(len(world.buffers)):
        wrong = list(world.buffers)
        wrong[n] = wrong[n].astype(np.int64)
        with pytest.raises(TypeError):
            world.scheduler.plan(0, *wrong)
    world.plan(0)
    for dtypes in [(np.int64, np.float32), (np.int32, np.float64)]:
        with pytest.raises(TypeError):
            world.scheduler.commit(0, np.zeros(1, dtypes[0]), np.zeros(1, dtypes[1]), 1.0)


def test_a_reused_handle_does_not_inherit_accounts() -> None:
    world, seq = writing(Shape(), words("a", "b"))
    world.plan(0)
    world.finish(seq)
    again = world.add([words("b"), words("b")])
    assert again == seq
    world.land(0)
    assert world.scheduler.stats(again, 0)["ms"] == 0
    assert world.scheduler.stats(again, 0)["discarded"] == 0


def test_nothing_lands_between_an_event_and_its_answer() -> None:
    world, seq = writing(Shape(depth=3), words("a", "b"))
    world.script[seq, 0][2] = EOS
    for _ in range(3):
        world.plan(0)
    assert [e.kind for e in world.land(0)] == [EventKind.END]
    assert [world.land(0) for _ in range(2)] == [[], []]
    assert world.ids(seq, 0) == [*words("a", "b"), EOS]
    assert world.scheduler.phase(seq) == Phase.FROZEN


# ---- admission and preemption


def test_first_come_first_served() -> None:
    world = World(Shape(max_seqs=2, end_ids=()))
    seqs = [world.add([words("a"), words("a")]) for _ in range(3)]
    for seq in reversed(seqs):
        world.write(seq, 0)
    assert [row[0] for row in world.rows(0)] == seqs[:2]
    world.land(0)
    world.finish(seqs[0])
    assert [row[0] for row in world.rows(0)] == seqs[1:]


def test_a_large_prompt_is_not_overtaken() -> None:
    world = World(Shape(pages=6, page_size=4, max_len=24, caching=False, end_ids=()))
    first = world.add([words(*"abab"), words("a")])
    large = world.add([words(*"ab" * 10), words("a")])
    small = world.add([words("a"), words("a")])
    for seq in (first, large, small):
        world.write(seq, 0)
    assert [row[0] for row in world.rows(0)] == [first]
    world.land(0)
    world.finish(first)
    assert [row[0] for row in world.rows(0)] == [large]


def test_siblings_wait_for_their_leaders_prompt() -> None:
    world, leader = writing(Shape(tokens=6), LONG)
    sibling = world.add([LONG, LONG], leader=leader)
    world.write(sibling, 0)
    assert world.rows(0) == [(leader, 0, 6)]
    world.land(0)
    assert world.rows(0) == [(leader, 6, 4)]
    world.land(0)
    assert world.rows(0) == [(leader, 10, 1), (sibling, 8, 2)]


@pytest.mark.parametrize("how", ["finish", "other lane"])
def test_a_leader_that_does_not_come_is_not_waited_for(how: str) -> None:
    world, leader = writing(Shape(), LONG)
    sibling = world.add([LONG, LONG], leader=leader)
    world.write(sibling, 0)
    if how == "finish":
        world.finish(leader)
    else:
        world.write(leader, 1)
    assert world.rows(0) == [(sibling, 0, 10)]


def test_the_youngest_gives_up_its_pages_of_every_pool() -> None:
    world = World(Shape(pages=6, page_size=1, max_len=6, caching=False, end_ids=()))
    old, young = (world.add([words("a"), words("a")]) for _ in range(2))
    world.write(young, 1)
    world.step(1)
    world.write(young, 0)
    world.write(old, 0)
    for _ in range(3):
        world.step(0)
        world.check()
    assert world.pools[1].in_use == 1
    world.step(0)
    assert (world.scheduler.preempted(old), world.scheduler.preempted(young)) == (0, 1)
    assert [pool.in_use for pool in world.pools] == [4, 0]
    assert len(world.ids(young, 0)) == 4  # ids stay, all of them are owed again
    assert state(world, young)["cached"] == 0
    world.check()


def test_bad_requests() -> None:
    world, seq = writing(Shape(), words("a", "b"))
    with pytest.raises(ValueError, match="one prompt per lane"):
        world.scheduler.add([[1]], 1, 0, False, True, False, False, [], [], b"", -1)
    for keep, ids in [(1, []), (3, []), (2, [99]), (2, [-1])]:
        with pytest.raises(IndexError, match="retarget"):
            world.scheduler.retarget(seq, 0, keep, ids)
    with pytest.raises(IndexError, match="not in lane 1"):
        world.add([[1], [99]])
    with pytest.raises(IndexError, match="nothing to read"):
        world.scheduler.read(seq, 0, 2, 0)
    with pytest.raises(IndexError, match="no sequence"):
        world.scheduler.finish(7)
    with pytest.raises(IndexError, match="accept"):
        world.scheduler.accept(seq, 1, True)
    with pytest.raises(IndexError, match="no token"):
        world.scheduler.content(seq, 1)
    with pytest.raises(ValueError, match="nothing to run"):
        world.write(world.add([[], [1]]), 0)
