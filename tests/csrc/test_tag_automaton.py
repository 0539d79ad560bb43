"""ByteMatcher against brute force: the first match, what may still become one, and no effect of how bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitdecode._C import ByteMatcher

OPEN, CLOSE = "<bigmodel>", "</bigmodel>"
word = st.text("ab<", min_size=1, max_size=5)
patterns = st.lists(word, max_size=4)
stream = st.text("ab<c", max_size=24).map(str.encode)


def first_match(names: list[str], read: bytes) -> int:
    """The longest pattern that ends where `read` does (the first of equals), or -1."""
    fitting = [i for i, name in enumerate(names) if read.endswith(name.encode())]
    return min(fitting, key=lambda i: (-len(names[i]), i), default=-1)


def unsafe(names: list[str], read: bytes) -> int:
    """The longest end of `read` that begins a pattern."""
    return max(n for n in range(len(read) + 1) if n == 0 or any(name.encode().startswith(read[-n:]) for name in names))


def brute_force(names: list[str], data: bytes) -> list[tuple[int, int]]:
    """[(bytes read, pattern)]: every place at which a pattern ends."""
    ends = [(end, first_match(names, data[:end])) for end in range(1, len(data) + 1)]
    return [(end, pattern) for end, pattern in ends if pattern >= 0]


def feed_all(matcher: ByteMatcher, chunks: list[bytes]) -> tuple[int, list[tuple[int, int]]]:
    """The state behind the last chunk, and the matches as brute_force() tells them."""
    state, read, found = 0, 0, []
    for chunk in chunks:
        while True:
            state, pattern, used = matcher.feed(state, chunk)
            read, chunk = read + used, chunk[used:]
            if pattern < 0:
                assert chunk == b""
                break
            found.append((read, pattern))
    return state, found


@given(names=patterns, data=stream)
@settings(max_examples=300, deadline=None)
def test_matches_are_those_of_brute_force(names: list[str], data: bytes) -> None:
    state, found = feed_all(ByteMatcher(names), [data])
    assert found == brute_force(names, data)
    assert ByteMatcher(names).depth(state) == unsafe(names, data)


@given(names=patterns, data=stream, cuts=st.sets(st.integers(0, 24)))
@settings(max_examples=300, deadline=None)
def test_every_chunking_gives_the_same(names: list[str], data: bytes, cuts: set[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    chunks = [data[a:b] for a, b in pairwise(edges)]
    matcher = ByteMatcher(names)
    assert feed_all(matcher, chunks) == feed_all(matcher, [data])


@given(names=patterns, data=stream)
@settings(max_examples=300, deadline=None)
def test_enters_means_a_match_or_the_beginning_of_one(names: list[str], data: bytes) -> None:
    assert ByteMatcher(names).enters(data) == (bool(brute_force(names, data)) or unsafe(names, data) > 0)


@given(names=patterns, data=stream, after=stream)
@settings(max_examples=200, deadline=None)
def test_bytes_outside_depth_are_safe(names: list[str], data: bytes, after: bytes) -> None:
    """No later match begins before the held bytes: what precedes them may be released."""
    matcher = ByteMatcher(names)
    state, _ = feed_all(matcher, [data])
    held = len(data) - matcher.depth(state)
    for end, pattern in brute_force(names, data + after):
        assert end <= len(data) or end - len(names[pattern]) >= held


def test_a_tag_that_begins_inside_another() -> None:
    matcher = ByteMatcher([OPEN, CLOSE])
    assert feed_all(matcher, [b"</big<bigmodel></bigmodel>"])[1] == [(15, 0), (26, 1)]
    assert feed_all(matcher, [b"<bigmodel</bigmodel>"])[1] == [(20, 1)]


def test_the_longest_of_two_endings() -> None:
    assert feed_all(ByteMatcher(["b", "ab"]), [b"abb"])[1] == [(2, 1), (3, 0)]


def test_feed_stops_behind_the_match() -> None:
    state, pattern, used = ByteMatcher([OPEN]).feed(0, b"x<bigmodel>The")
    assert (pattern, used) == (0, 11)
    assert ByteMatcher([OPEN]).depth(state) == len(OPEN)


def test_without_patterns_nothing_is_found() -> None:
    assert ByteMatcher([]).feed(0, b"<bigmodel>") == (0, -1, 10)
    assert not ByteMatcher([]).enters(b"<")


def test_bytes_above_127() -> None:
    matcher = ByteMatcher(["é"])
    assert feed_all(matcher, [b"\xc3", b"\xa9"])[1] == [(2, 0)]
    assert matcher.enters(b"\xc3")
    assert not matcher.enters(b"\xa9")


def test_an_empty_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        ByteMatcher(["a", ""])
