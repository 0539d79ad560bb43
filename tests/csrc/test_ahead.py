"""Content run ahead of need, case by case: in the room of other rows, by the chunk, and where a hand-off is likely."""

from __future__ import annotations

from oracles.lanes import Shape, World, word, words

from splitdecode._C import Phase

PROMPT = words(*"abab")
NEVER = 1 << 30  # a chunk that never gathers


def mirrored(fill: tuple[int, int], **shape: int) -> tuple[World, int]:
    """One sequence: lane 0 writes 'a' for ever, lane 1 may run what it writes."""
    world = World(Shape(max_len=60, pages=40, fill=fill, end_ids=(), **shape))
    return world, another(world)


def another(world: World, lane: int = 0) -> int:
    seq = world.add([PROMPT, PROMPT])
    for own in range(2):
        world.script[seq, own] = dict.fromkeys(range(60), word("a"))
    world.write(seq, lane)
    world.mirror(seq, 1)
    return seq


def written(world: World, tokens: int) -> None:
    for _ in range(tokens):
        assert world.step(0) == []


def ahead(world: World) -> list[tuple[int, int, int]]:
    """What lane 1 runs now: [(seq, start, count)], landed."""
    found = world.rows(1)
    if found:
        assert world.land(1) == []
    world.check()
    return found


def test_a_chunk_is_worth_a_step_and_the_last_token_waits() -> None:
    world, seq = mirrored((0, 6))
    written(world, 2)
    assert ahead(world) == []
    written(world, 1)
    assert ahead(world) == [(seq, 0, 6)]  # prompt and content but for one
    written(world, 5)
    assert ahead(world) == []
    written(world, 1)
    assert ahead(world) == [(seq, 6, 6)]
    world.drain()


def test_room_is_used_only_beside_rows_that_run_anyway() -> None:
    world, seq = mirrored((4, NEVER))
    written(world, 3)
    assert ahead(world) == []
    large = another(world, 1)
    assert ahead(world) == [(large, 0, 4)], "four tokens of its own leave no room of four"
    assert ahead(world) == [(large, 4, 1), (seq, 0, 3)]
    world.drain()


def test_a_likely_hand_off_runs_what_there_is_at_once() -> None:
    world, seq = mirrored((0, NEVER))
    written(world, 5)
    assert ahead(world) == []
    world.scheduler.hurry(seq)
    assert ahead(world) == [(seq, 0, 8)]
    world.drain()


def test_a_hand_off_that_did_not_come_leaves_no_hurry_behind() -> None:
    world, seq = mirrored((0, NEVER))
    written(world, 5)
    world.scheduler.hurry(seq)
    assert ahead(world) == [(seq, 0, 8)]
    written(world, 1)
    assert ahead(world) == [], "a step of the large model for each token of the small one"
    world.scheduler.hurry(seq)
    assert ahead(world) == [(seq, 8, 1)]
    world.drain()


def test_hurry_lasts_until_all_there_was_has_run() -> None:
    world, seq = mirrored((0, NEVER), tokens=3)
    for _ in range(8):
        world.step(0)
    world.scheduler.hurry(seq)
    starts = []
    while rows := ahead(world):
        starts += [start for _, start, _ in rows]
        world.step(0)
    assert starts == [0, 3, 6, 9], "11 positions were due"
    world.drain()


def test_hurry_of_a_sequence_nobody_mirrors_does_nothing() -> None:
    world, seq = mirrored((0, NEVER))
    world.scheduler.mirror(seq, -1)
    world.scheduler.hurry(seq)
    written(world, 3)
    assert ahead(world) == []
    world.drain()


def test_what_went_to_the_shelf_in_this_very_plan_is_not_looked_up_as_a_prefix() -> None:
    """The page both share is still there when the idle lane has just lost its own."""
    world = World(Shape(max_len=24, pages=6, fill=(0, 1), end_ids=(), shelf=40))
    old, young = another(world, 1), another(world)
    for _ in range(16):
        world.step(1)
        world.check()
        world.step(0)
    assert world.scheduler.idle_evictions == 1
    assert [shelf.in_use for shelf in world.memory.shelves] == [0, 3]
    world.finish(old)
    world.write(young, 1)
    while world.scheduler.phase(young) == Phase.DIRECT:
        world.step(1)
        world.check()
    assert world.memory.shelves[1].in_use == 0
    world.drain()
