"""When a slow lane steps: its rows wait as long, summed up, as their step makes the fast rows wait. And who is starved.

Steps of World (oracles/lanes.py) take 1 ms on lane 0 and 10 ms on lane 1; its clock goes on by 1 with every plan and
every landing, so each wait is known beforehand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.lanes import Shape, World, word

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
SLOW_MS, MAX_WAIT = 10.0, 50.0


def running(fast: int, slow: int, patience: float) -> World:
    """So many rows decoding on either lane, each lane's step time known; the slow rows have just landed."""
    world = World(Shape(pages=400, max_len=400, max_seqs=16, rows=16, patience=patience))
    for n in range(fast + slow):
        seq = world.add([[1, 2, 3], [2, 3, 1]])
        lane = int(n >= fast)
        world.script[seq, lane] = dict.fromkeys(range(400), word("a"))  # it goes on for ever
        world.write(seq, lane)
    for lane in (0, 1):
        assert len(world.rows(lane)) == (slow if lane else fast)
        world.land(lane)
        assert world.scheduler.step_ms(lane) == (SLOW_MS if lane else 1.0)
    return world


def steps_until_slow(world: World, fast: int, slow: int) -> tuple[float, int]:
    """(how long the slow rows had waited when they stepped, plans that held them)."""
    begin, held = world.now, 0
    while True:
        assert len(world.rows(0)) == fast, "fast rows step every time"
        world.land(0)
        rows = world.rows(1)
        if rows:
            assert len(rows) == slow, "all that wait go in one step"
            return world.now - begin, held
        held += 1
        assert held < 500


@pytest.mark.parametrize("fast", [1, 3, 8])
@pytest.mark.parametrize("slow", [1, 2, 5])
@pytest.mark.parametrize("patience", [0.5, 1.0, 2.0])
def test_rows_wait_until_their_waits_reach_what_they_hold_up(fast: int, slow: int, patience: float) -> None:
    """The first plan at which slow x wait >= patience x fast x step, or wait >= the bound: not earlier, not later."""
    world = running(fast, slow, patience)
    waited, held = steps_until_slow(world, fast, slow)
    needed = min(patience * fast * SLOW_MS / slow, MAX_WAIT)
    each = 3.0  # between two plans of the slow lane: plan, land, plan
    assert waited == max(1.0, math.ceil(needed / each)) * each
    assert held == waited / each - 1
    world.land(1)
    assert steps_until_slow(world, fast, slow) == (waited, held), "and again after the next landing"


def test_no_row_waits_longer_than_the_bound() -> None:
    world = running(8, 1, 1000.0)
    waited, held = steps_until_slow(world, 8, 1)
    assert held > 10
    assert MAX_WAIT <= waited < MAX_WAIT + 3.0


def test_a_row_that_joins_shortens_the_wait() -> None:
    alone, joined = running(4, 1, 1.0), running(4, 1, 1.0)
    before, _ = steps_until_slow(alone, 4, 1)
    seq = joined.add([[1, 2], [3, 1]])
    joined.script[seq, 1] = dict.fromkeys(range(400), word("a"))
    joined.write(seq, 1)
    begin, rows = joined.now, []
    while not rows:
        joined.step(0)
        rows = joined.rows(1)
    assert len(rows) == 2
    assert joined.now - begin < before


def test_without_patience_nothing_is_held() -> None:
    world = running(8, 1, 0.0)
    for _ in range(20):
        assert len(world.rows(0)) == 8
        world.land(0)
        assert len(world.rows(1)) == 1
        world.land(1)


def test_nothing_is_held_when_nobody_else_runs() -> None:
    world = running(3, 2, 5.0)
    world.step(0)
    assert world.rows(1) == []
    for seq in world.live[:3]:
        world.finish(seq)
    assert world.rows(0) == []
    for _ in range(5):
        assert len(world.rows(1)) == 2
        world.land(1)


def test_the_faster_lane_is_never_held() -> None:
    world = running(1, 8, 5.0)
    for _ in range(20):
        assert len(world.rows(0)) == 1
        world.land(0)
        world.step(1)


def test_a_step_whose_time_is_not_known_is_not_held() -> None:
    world = World(Shape(pages=100, max_len=200, patience=5.0))
    for lane in (0, 1):
        world.write(world.add([[1, 2, 3], [2, 3, 1]]), lane)
    world.step(0)
    assert world.scheduler.step_ms(1) == 0.0
    assert len(world.rows(1)) == 1


def test_step_times_are_running_means() -> None:
    world = running(1, 1, 0.0)
    mean = SLOW_MS
    for ms in (20.0, 5.0, 40.0):
        assert world.plan(1) is not None
        step = world.flights[1].popleft()
        world.scheduler.commit(1, *_answers(step.samples), ms, world.now)
        mean += 0.1 * (ms - mean)
        assert world.scheduler.step_ms(1) == pytest.approx(mean)


def _answers(samples: list[int]) -> tuple[Int32, Float32]:
    return np.array(samples, np.int32), np.zeros(len(samples), np.float32)


@pytest.mark.parametrize("bad", [(-1.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.nan)])
def test_patience_and_bound_are_checked(bad: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected numbers from 0 up"):
        World(Shape()).scheduler.pace(*bad)


# ---- a long prompt among decodes

BUDGET = 64  # tokens of a step


def crowd(decodes: int, prompt: int, *, first: bool) -> tuple[World, int]:
    """So many lanes that decode and a prompt of that length, which came before or after them; and whose that is."""
    world = World(Shape(pages=900, plan_pages=900, max_len=400, max_seqs=99, rows=99, tokens=BUDGET, logits=99))

    def add(length: int) -> int:
        seq = world.add([[1 + n % 8 for n in range(length)], [1]])
        world.script[seq, 0] = dict.fromkeys(range(400), word("a"))
        return seq

    long = add(prompt) if first else -1
    others = [add(1) for _ in range(decodes)]
    long = long if first else add(prompt)
    for seq in others:
        world.write(seq, 0)
    world.step(0)
    world.write(long, 0)
    return world, long


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("decodes", [1, 12, 40])
def test_a_long_prompt_shares_the_budget_with_decodes(decodes: int, first: bool) -> None:
    """In every step until its prompt is through: one token of each decode, all that is left for the prompt."""
    world, long = crowd(decodes, 300, first=first)
    at, steps = 0, 0
    while at < 300:
        rows = {seq: (start, count) for seq, start, count in world.rows(0)}
        world.land(0)
        assert sorted(count for seq, (_, count) in rows.items() if seq != long) == [1] * decodes
        assert rows[long] == (at, min(300 - at, BUDGET - decodes))
        at += rows[long][1]
        steps += 1
    assert steps == math.ceil(300 / (BUDGET - decodes))
    assert len(world.rows(0)) == decodes + 1


def test_a_long_prompt_is_not_starved_either() -> None:
    """More decodes than the budget: an older prompt keeps a quarter of it."""
    world, long = crowd(80, 300, first=True)
    quarter = BUDGET // 4
    for chunk in range(300 // quarter):
        rows = world.rows(0)
        world.land(0)
        assert (long, quarter * chunk, quarter) in rows
        assert len(rows) == 1 + BUDGET - quarter
