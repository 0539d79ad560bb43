"""Lanes that run content ahead of need: nobody who waits for pages loses any to them, and their own are soon taken."""

from __future__ import annotations

from oracles.lanes import Shape, World, word, words


def writing(world: World, *lengths: tuple[int, int]) -> list[int]:
    """A sequence for each pair of prompts of so many tokens; both its lanes write 'a' for ever."""
    seqs = []
    for n, pair in enumerate(lengths):
        seqs.append(world.add([words(*"abx<>"[n] * length) for length in pair]))
        for lane in range(2):
            world.script[seqs[-1], lane] = dict.fromkeys(range(world.shape.max_len), word("a"))
    return seqs


def test_a_row_waits_for_a_lane_that_runs_ahead_and_takes_its_pages() -> None:
    """The step in the air lands soon; the youngest would have lost all it had in both lanes."""
    world = World(Shape(pages=6, page_size=2, caching=False, depth=2, fill=(0, 1)))
    old, young = writing(world, (1, 5), (1, 5))
    world.mirror(young, 1)
    world.write(old, 1)
    world.write(young, 0)
    world.step(0)
    assert world.rows(1) == [(old, 0, 5), (young, 0, 5)]  # six pages
    world.land(1)
    world.step(0)
    assert world.rows(1) == [(old, 5, 1), (young, 5, 1)]
    assert world.rows(1) == []
    world.land(1)
    assert world.rows(1) == [(old, 6, 1)]
    assert (world.scheduler.preemptions, world.scheduler.idle_evictions) == (0, 1)
    world.check()
    world.drain()


def test_what_a_waiting_row_was_left_does_not_go_to_a_lane_that_runs_ahead() -> None:
    """One memory: the pages come free in the other pool, whose lanes would take them at once, again and again."""
    world = World(Shape(pages=3, page_size=4, max_len=16, extent=1, depth=2, rows=1, caching=False, fill=(0, 1)))
    seqs = writing(world, (1, 9), (1, 9))
    for seq in seqs:
        world.mirror(seq, 1)
        world.write(seq, 1, mark=2)
        for _ in range(2):
            world.step(1)
    for seq in seqs:
        world.write(seq, 0)
    assert world.pools[1].in_use == 6  # the whole memory
    assert world.rows(1) == [(seqs[0], 10, 2)]
    assert world.rows(0) == []  # the other one's pages are free when that step has landed
    world.land(1)
    assert world.pools[1].available == 3
    assert world.rows(1) == []
    assert world.rows(0) == [(seqs[0], 0, 1)]
    world.check()
    world.drain()
