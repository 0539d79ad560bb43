"""What the scheduler reports and what becomes content: tags at seams, stop strings, limits, reading, confirming."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.lanes import EOS, SPECIAL, WORDS, Shape, World, logprob, word, words

from splitdecode._C import Event, EventKind, Phase

K = EventKind
PROMPT = words("a", "b")


def started(
    phase: Phase = Phase.SCAN, shape: Shape | None = None, mode: dict[str, int] | None = None, **limits: object
) -> tuple[World, int]:
    """One sequence whose lane 0 writes behind PROMPT."""
    world = World(shape or Shape())
    seq = world.add([PROMPT, PROMPT], **limits)
    assert world.write(seq, 0, phase, **(mode or {})) == []
    return world, seq


def say(world: World, seq: int, *texts: str | int, lane: int = 0) -> Event | None:
    """The lane writes these tokens; the event of the last one (the others raise none)."""
    size = len(world.ids(seq, lane))
    ids = [text if isinstance(text, int) else word(text) for text in texts]
    world.script.setdefault((seq, lane), {}).update({size + n: token for n, token in enumerate(ids)})
    events: list[Event] = []
    for _ in ids:
        assert events == []
        events = world.step(lane)
        world.check()
    return events[0] if events else None


def told(event: Event | None) -> tuple[EventKind, int, int, int, int] | None:
    return (event.kind, event.a, event.b, event.c, event.d) if event else None


def text(world: World, seq: int) -> bytes:
    ends = world.scheduler.content(seq)[4]
    return world.scheduler.content_bytes(seq, 0, int(ends[-1]) if len(ends) else 0)


def ids(world: World, seq: int) -> list[int]:
    return world.scheduler.content(seq)[0].tolist()


# ---- tags


@pytest.mark.parametrize(
    ("tokens", "content", "tag"),
    [
        (["<x>"], b"", (2, 2, 3)),
        (["<", "x", ">"], b"", (2, 4, 1)),
        (["a", "(<", "x", ">(" ], b"a(", (3, 5, 1)),
        (["<x", ">a"], b"", (2, 3, 1)),
        (["<", "<x", ">.<"], b"<", (3, 4, 1)),
        (["</", "<x>"], b"</", (3, 3, 3)),
        (["b", "</", "x", "<", "x>"], b"b</x", (5, 6, 2)),
    ],
)  # fmt: skip
def test_an_opening_tag(tokens: list[str], content: bytes, tag: tuple[int, int, int]) -> None:
    """What precedes it is content, what follows it in its last token is not; it is told by (first, last, bytes)."""
    world, seq = started()
    assert told(say(world, seq, *tokens)) == (K.TAG, 0, *tag)
    assert text(world, seq) == content
    assert world.scheduler.tags(seq) == [(len(content), 0)]
    assert world.scheduler.counted_ids(seq, 0, 99).tolist() == world.ids(seq, 0)[2 : tag[0]]


def test_a_residue_is_encoded_again_and_has_no_logprob() -> None:
    world, seq = started()
    say(world, seq, "a", "(<", "x>")
    found, authors, origins, logprobs, ends = (column.tolist() for column in world.scheduler.content(seq))
    assert (found, authors, origins, ends) == (words("a", "("), [0, 0], [2, -1], [1, 2])
    assert logprobs[0] == logprob(word("a"))
    assert np.isnan(logprobs[1])


@pytest.mark.parametrize(
    ("tokens", "content", "tags"),
    [
        (["a", "</x>", "b"], b"ab", [(1, 1)]),
        (["a</x>b"], b"ab", [(1, 1)]),
        ([".</", "x", ">a", "b"], b".ab", [(1, 1)]),
        (["</", "x", ">.<", "a"], b".<a", [(0, 1)]),
        (["</x>", "</x>", "a"], b"a", [(0, 1), (0, 1)]),
        (["</", "x", ">("], b"(", [(0, 1)]),
    ],
)
def test_a_stray_closing_tag_is_left_out(tokens: list[str], content: bytes, tags: list[tuple[int, int]]) -> None:
    world, seq = started()
    assert say(world, seq, *tokens) is None
    assert text(world, seq) == content
    assert world.scheduler.tags(seq) == tags


def test_an_ignored_opening_tag_is_left_out() -> None:
    world, seq = started(mode={"open_is_event": False})
    assert say(world, seq, "a", "<x>", "b") is None
    assert (text(world, seq), world.scheduler.tags(seq)) == (b"ab", [(1, 0)])


def test_bytes_that_may_become_a_tag_are_held() -> None:
    world, seq = started()
    assert say(world, seq, "a", ".</", "x") is None
    assert (text(world, seq), world.scheduler.settled_bytes(seq)) == (b"a", 1)
    assert world.scheduler.lane_state(seq, 0)["stable"] == 3
    assert say(world, seq, "b") is None
    assert (text(world, seq), world.scheduler.settled_bytes(seq)) == (b"a.</xb", 6)
    assert ids(world, seq) == words("a", ".</", "x", "b")


def test_held_bytes_are_text_once_nothing_follows() -> None:
    world, seq = started()
    say(world, seq, "a", "<x")
    world.scheduler.flush(seq)
    assert text(world, seq) == b"a<x"


def test_an_end_releases_what_was_held() -> None:
    world, seq = started()
    assert told(say(world, seq, "(<", EOS)) == (K.END, EOS, -1, -1, -1)
    assert (text(world, seq), ids(world, seq)) == (b"(<", [word("(<"), EOS])


def test_direct_writing_knows_no_tags() -> None:
    world, seq = started(Phase.DIRECT)
    assert say(world, seq, "<x>", "<") is None
    assert text(world, seq) == b"<x><"


def test_scanning_may_begin_in_what_the_lane_holds() -> None:
    """Behind a confirmed closing tag: its residues are content, the tag is not."""
    world, seq = started()
    world.retarget(seq, 0, 2, words("b", ".</", "x", ">("))
    assert world.write(seq, 0, Phase.SCAN, scan_from=3) == []
    assert (text(world, seq), world.scheduler.tags(seq)) == (b".(", [(1, 1)])
    world.retarget(seq, 0, 2, words("<x>"))
    (event,) = world.write(seq, 0, Phase.SCAN, scan_from=2)
    assert told(event) == (K.TAG, 0, 2, 2, 3)
    assert world.plan(0) is None


def test_a_refused_opening_is_drawn_again_under_a_new_attempt() -> None:
    world, seq = started()
    for attempt in (1, 2):
        assert say(world, seq, "<x>") is not None
        world.retarget(seq, 0, 2, [])
        world.refuse(seq, 0)
        assert world.scheduler.tags(seq) == []
        world.write(seq, 0, Phase.SCAN)
        step = world.plan(0)
        assert step is not None
        assert [row[4] for row in step.logits] == [attempt]
        world.retarget(seq, 0, 2, [])
        world.write(seq, 0, Phase.SCAN)
        world.land(0)
    say(world, seq, "a")
    step = world.plan(0)
    assert step is not None
    assert [row[4] for row in step.logits] == [0]


# ---- ends and limits


def test_end_and_stop_tokens() -> None:
    world, seq = started(Phase.DIRECT, stop_ids=[word("b")], ignore_eos=True)
    assert say(world, seq, "a", EOS) is None
    assert told(say(world, seq, "b")) == (K.END, word("b"), -1, -1, -1)
    assert text(world, seq) == b"a"


@pytest.mark.parametrize(("keep", "shown"), [(False, b"a"), (True, b"ab(")])
def test_a_stop_string_across_tokens(keep: bool, shown: bytes) -> None:
    world, seq = started(Phase.DIRECT, stops=[b"zz", b"b("], include_stop=keep)
    assert say(world, seq, "ab") is None
    assert world.scheduler.settled_bytes(seq) == 1
    assert told(say(world, seq, "(<")) == (K.STOP, 1, -1, -1, -1)
    end = world.scheduler.text_end(seq)
    assert (text(world, seq)[:end], world.scheduler.settled_bytes(seq)) == (shown, end)


def test_a_stop_string_across_a_tag() -> None:
    world, seq = started(stops=[b"ab"])
    assert told(say(world, seq, "a", "</x>", "b")) == (K.STOP, 0, -1, -1, -1)
    assert world.scheduler.text_end(seq) == 0


def test_stop_strings_wait_for_min_tokens() -> None:
    world, seq = started(Phase.DIRECT, stops=[b"a"], min_tokens=3)
    assert told(say(world, seq, "a", "a", "a")) == (K.STOP, 0, -1, -1, -1)
    assert world.scheduler.text_end(seq) == 2


def test_special_tokens_show_no_text() -> None:
    for skip in (True, False):
        world, seq = started(Phase.DIRECT, skip_special=skip)
        say(world, seq, SPECIAL, "b")
        assert text(world, seq) == (b"b" if skip else b"ab")
        assert ids(world, seq) == [SPECIAL, word("b")]


def test_limits_and_marks() -> None:
    world, seq = started(mode={"mark": 2}, max_tokens=4)
    assert told(say(world, seq, "a", "b")) == (K.MARK, -1, -1, -1, -1)
    world.write(seq, 1, Phase.DIRECT)
    assert told(say(world, seq, "a", "b", lane=1)) == (K.LENGTH, -1, -1, -1, -1)
    assert world.scheduler.content(seq)[1].tolist() == [0, 0, 1, 1]


def test_a_full_context() -> None:
    world, seq = started(shape=Shape(max_len=4))
    assert told(say(world, seq, "a", "<")) == (K.FULL, 0, -1, -1, -1)
    assert text(world, seq) == b"a"
    (event,) = world.write(seq, 0, Phase.SCAN)
    assert told(event) == (K.FULL, 0, -1, -1, -1)


def test_nan_logits_break_a_sequence_and_no_other() -> None:
    world, seq = started(Phase.DIRECT)
    other = world.add([PROMPT, PROMPT])
    world.write(other, 0)
    world.script[seq, 0] = {2: -1}
    world.script[other, 0] = {2: word("b")}
    world.plan(0)
    assert [(told(event), event.seq) for event in world.land(0)] == [((K.BROKEN, 0, -1, -1, -1), seq)]
    assert (text(world, seq), text(world, other)) == (b"", b"b")


# ---- provisional, reading, confirming


def test_provisional_tokens_wait_for_their_reader() -> None:
    world, seq = started(Phase.PROVISIONAL, mode={"interval": 2})
    assert told(say(world, seq, "a", "b")) == (K.DUE, 2, -1, -1, -1)
    assert (text(world, seq), world.scheduler.provisional(seq).tolist()) == (b"", words("a", "b"))
    assert world.scheduler.lane_state(seq, 0)["stable"] == 2
    assert world.scheduler.accept(seq, 1, False) == []
    assert (text(world, seq), world.scheduler.lane_state(seq, 0)["stable"]) == (b"a", 3)
    world.scheduler.drop_provisional(seq)
    assert world.scheduler.stats(seq, 0)["discarded"] == 1
    assert (text(world, seq), world.scheduler.provisional(seq).tolist()) == (b"a", [])


def test_an_end_behind_provisional_tokens_waits_too() -> None:
    world, seq = started(Phase.PROVISIONAL, mode={"interval": 9})
    assert told(say(world, seq, "a", EOS)) == (K.DUE, 1, -1, -1, -1)
    assert world.scheduler.has_ending(seq)
    assert world.scheduler.accept(seq, 0, True) == []
    assert world.scheduler.accept(seq, 1, False) == []
    (event,) = world.scheduler.accept(seq, 0, True)
    assert told(event) == (K.END, EOS, -1, -1, -1)


def test_unread_tokens_are_not_published() -> None:
    world, seq = started(Phase.PROVISIONAL, mode={"interval": 9}, shape=Shape(page_size=1))
    say(world, seq, "a", "b", "a")
    pages = world.scheduler.lane_state(seq, 0)["pages"]
    assert [world.pools[0].immutable(page) for page in pages] == [True, True, False, False]


@pytest.mark.parametrize("budget", [64, 1])
@pytest.mark.parametrize(("drawn", "first"), [(["a", "(<", "</"], 1), (["a", "b", ">"], -1), ([".</", "a", "a"], 0)])
def test_reading_finds_the_first_draw_that_enters_the_tag(drawn: list[str], first: int, budget: int) -> None:
    world, seq = started(Phase.DIRECT, shape=Shape(tokens=budget))
    world.retarget(seq, 0, 2, words("b", "b", "b"))
    world.read(seq, 0, 2)
    world.script[seq, 0] = {3 + n: token for n, token in enumerate(words(*drawn))}
    events: list[Event] = []
    while not events:
        events = world.step(0)
    assert [told(event) for event in events] == [(K.READ, first, -1, -1, -1)]
    assert world.scheduler.draws(seq) == words(*drawn)


def reading(*drawn: str) -> tuple[World, int]:
    """A lane that has read 'bb' and drawn these ids behind it."""
    world, seq = started(Phase.DIRECT)
    world.retarget(seq, 0, 2, words("b", "b"))
    world.read(seq, 0, 4 - len(drawn))
    world.script[seq, 0] = {5 - len(drawn) + n: token for n, token in enumerate(words(*drawn))}
    assert [event.kind for event in world.step(0)] == [K.READ]
    return world, seq


@pytest.mark.parametrize(
    ("draw", "more", "steps", "outcome"),
    [
        (".</", ["x", ">a"], 0, (K.COMPLETED, 1, 4, 6, 1)),
        ("</", ["a"], 0, (K.DIED, -1, -1, -1, -1)),
        ("<", ["</"], 0, (K.DIED, -1, -1, -1, -1)),
        ("</", [EOS], 0, (K.DIED, -1, -1, -1, -1)),
        ("a", ["</", "x", ">"], 4, (K.COMPLETED, 1, 5, 7, 1)),
        ("a", ["</", "x"], 3, (K.DIED, -1, -1, -1, -1)),
    ],
)
def test_confirming(draw: str, more: list[str], steps: int, outcome: tuple[EventKind, int, int, int, int]) -> None:
    """Unbounded: the tag must begin in the drawn token. Bounded: anywhere within `steps` tokens."""
    world, seq = reading(draw)
    assert world.confirm(seq, 0, 4, 0, steps) == []
    assert told(say(world, seq, *more)) == outcome
    assert text(world, seq) == b""


@pytest.mark.parametrize(("draw", "kind"), [("a</x>b", K.COMPLETED), ("b", K.DIED)])
def test_a_draw_may_settle_it_alone(draw: str, kind: EventKind) -> None:
    world, seq = reading(draw)
    (event,) = world.confirm(seq, 0, 4, 0, 0)
    assert event.kind == kind
    if kind == K.COMPLETED:
        assert told(event) == (kind, 1, 4, 4, 5)
    assert world.plan(0) is None
    assert WORDS[world.ids(seq, 0)[-1]] == draw.encode()
