"""Pages of the prefix cache as the scheduler uses them: adopted, never written, given back, named by their past."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.lanes import Shape, World, word, words

LONG = words(*"ababababab")


def writer(world: World, prompt: list[int], **limits: object) -> int:
    """A sequence whose lane 0 writes 'a' for ever."""
    seq = world.add([prompt, prompt], **limits)
    world.script[seq, 0] = dict.fromkeys(range(world.shape.max_len), word("a"))
    world.write(seq, 0)
    return seq


def cached(world: World, seq: int) -> int:
    return int(world.scheduler.lane_state(seq, 0)["cached"])


def test_a_prompt_is_adopted_from_the_cache() -> None:
    world = World(Shape())
    first = writer(world, LONG)
    world.step(0)
    second = world.add([LONG, LONG])
    world.write(second, 0)
    assert world.rows(0) == [(first, 10, 1), (second, 8, 2)]
    assert world.scheduler.stats(second, 0)["cached_tokens"] == 8
    shared = [list(world.scheduler.lane_state(seq, 0)["pages"][:2]) for seq in (first, second)]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("change", ["salt", "caching", "prompt"])
def test_what_is_not_adopted(change: str) -> None:
    world = World(Shape(caching=change != "caching"))
    writer(world, LONG)
    world.step(0)
    prompt = words("b") + LONG[1:] if change == "prompt" else LONG
    second = world.add([prompt, prompt], salt=b"other" if change == "salt" else b"")
    world.write(second, 0)
    assert world.rows(0)[1] == (second, 0, 10)


def test_a_retarget_into_a_published_page_gives_it_back() -> None:
    """At most a page is computed again; the published one is not written."""
    world = World(Shape())
    seq = writer(world, LONG)
    world.step(0)
    before = world.scheduler.lane_state(seq, 0)["pages"].tolist()
    world.retarget(seq, 0, 10, [])
    world.write(seq, 0)
    assert cached(world, seq) == 9  # page 2 holds 8 and 9, and is nobody else's
    twin = world.add([LONG[:7], LONG[:7]])
    world.write(twin, 0)
    world.step(0)
    world.retarget(twin, 0, 7, [])
    assert cached(world, twin) == 7
    world.check()
    assert world.scheduler.lane_state(seq, 0)["pages"].tolist() == before


def test_a_read_from_inside_a_published_page_recomputes_it() -> None:
    world = World(Shape())
    seq = world.add([words("a"), words("a")])
    world.retarget(seq, 0, 1, LONG)
    world.write(seq, 0)
    world.step(0)
    assert cached(world, seq) == 11
    world.read(seq, 0, 6)
    assert cached(world, seq) == 4
    assert world.rows(0) == [(seq, 4, 8)]
    world.land(0)
    world.check()


def test_a_reader_adopts_no_page_it_must_draw_from() -> None:
    world = World(Shape(page_size=2, pages=40))
    writer(world, LONG)
    world.step(0)
    seq = world.add([LONG[:1], LONG[:1]])
    world.retarget(seq, 0, 1, LONG[1:])
    world.read(seq, 0, 5)
    assert world.rows(0)[1] == (seq, 4, 6)
    world.land(0)
    assert -1 not in world.scheduler.draws(seq)


def test_a_rewritten_duplicate_gets_a_name_of_its_own() -> None:
    """Two lanes compute one page; the copy may be written again, and what follows it has another past."""
    world = World(Shape(page_size=2, pages=40))
    seqs = [world.add([words("a"), words("a")]) for _ in range(2)]
    for seq in seqs:
        world.retarget(seq, 0, 1, words("b", "a", "b", "a"))
        world.write(seq, 0)
    world.step(0)
    copy = world.scheduler.lane_state(seqs[1], 0)["pages"].tolist()
    world.retarget(seqs[1], 0, 3, words("x", "a", "b", "a"))
    assert cached(world, seqs[1]) == 3
    world.write(seqs[1], 0)
    world.step(0)
    world.check()
    assert world.scheduler.lane_state(seqs[1], 0)["pages"].tolist()[:2] == copy[:2]
    third = writer(world, words(*"abababa"))
    world.step(0)
    world.check()
    assert world.scheduler.stats(third, 0)["cached_tokens"] == 4
    fourth = writer(world, words(*"abaxaba"))
    world.step(0)
    world.check()
    assert world.scheduler.stats(fourth, 0)["cached_tokens"] == 6


def test_pages_written_before_a_broken_draw_are_never_adopted() -> None:
    """A prompt in chunks: only the last one draws, and only a draw tells whether the numbers are sound."""
    world = World(Shape(tokens=4))
    broken = writer(world, LONG)
    for _ in range(2):
        assert world.step(0) == []
    world.plan(0)
    world.flights[0].clear()
    world.scheduler.commit(0, np.array([-1], np.int32), np.zeros(1, np.float32), 1.0)
    world.finish(broken)
    assert world.rows(0) == []
    other = writer(world, LONG)
    assert world.rows(0) == [(other, 0, 4)]


def test_a_cache_on_the_shelf_is_not_adopted_as_well() -> None:
    """A row of the same step took the pages of a lane that was about to run ahead; two of them are known by hash."""
    world = World(Shape(pages=6, page_size=2, shelf=8, fill=(0, 1)))
    first, second = (world.add([LONG[:1], prompt]) for prompt in (LONG[:4], LONG[1:6]))
    for seq, lane in ((first, 0), (first, 1), (second, 1)):
        world.script[seq, lane] = dict.fromkeys(range(40), word("a"))
    world.write(first, 1)
    for _ in range(2):
        world.step(1)
    world.mirror(first, 1)
    world.write(first, 0)
    world.write(second, 1)
    for _ in range(2):
        assert world.rows(1)[0][0] == second
        world.land(1)
    world.step(0)  # the first lane 1 owes a token from here on
    assert world.rows(1) == [(second, 6, 1)]
    world.check()
    state = world.scheduler.lane_state(first, 1)
    assert (state["shelved"], state["cached"], len(state["pages"])) == (5, 0, 0)
    world.land(1)
    world.finish(second)
    world.write(first, 1)
    assert world.rows(1) == [(first, 5, 1)]
    world.land(1)
    world.check()
