"""F5: who should write where. A policy is a plain object; the mechanics of changing hands are in sequence.py.

owner(position)      who writes the content token at that position; None: the control tags decide
next_mark(position)  the next content position at which owner() may change; None: never
opening              what an opening tag by the small model means
tags                 a switch by position writes the tags into the small lane
reads_along          the small model follows the large one's span, prefix by prefix
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from splitdecode.config import Stream, philox_uniform, request_key
from splitdecode.errors import RequestError
from splitdecode.split.roles import Role


class Opening(Enum):
    """What becomes of an opening tag the small model completes."""

    ACCEPT = "accept"  # the large model takes the pen, if it has room
    REJECT = "reject"  # the lane is rewound and drawn again without it
    IGNORE = "ignore"  # it stays in the small lane and out of the text; the small model writes on


class CloseRule(Enum):
    """How the small model, reading along, takes the pen back (DESIGN: the hand-off, rule 4)."""

    NEXT_TOKEN = "next_token"
    CONTINUE = "continue"


class HandoffPolicy:
    """Who holds the pen. Subclasses override what differs; this base is the small model alone."""

    opening = Opening.IGNORE
    tags = False
    reads_along = False
    close_rule = CloseRule.NEXT_TOKEN
    closes_itself = False  # the small model ends a span by its own draws, prefix by prefix

    def bind(self, key: int) -> HandoffPolicy:
        """The policy for one sequence, whose 64-bit random key is `key`."""
        return self

    def owner(self, position: int) -> Role | None:
        """Who writes content token `position`."""
        return Role.SMALL

    def next_mark(self, position: int) -> int | None:
        """The first content position after `position` at which owner() may differ."""
        return None

    def trial(self, candidate: int) -> tuple[int, int, bool]:
        """(steps, draw, waits): how a closing candidate is tried; `waits`: a block is settled when all were tried."""
        return 0, candidate, False


class SmallOnly(HandoffPolicy):
    """The small model writes everything; its tags are left out of the text."""


class LargeOnly(HandoffPolicy):
    """The large model writes everything; the small one never runs."""

    def owner(self, position: int) -> Role | None:
        return Role.LARGE


@dataclass(frozen=True)
class ControlTags(HandoffPolicy):
    """The method: the small model opens with a tag, and closes while reading along.

    close_rule    NEXT_TOKEN: the small model's own probability of closing at each prefix. CONTINUE: the rule of the
                  published code, an oracle: `probe_tokens` of continuation per prefix, searched for the closing tag
    probe_tokens  CONTINUE: length of a continuation, 1 to 64
    which         CONTINUE: "first" or "last" matching prefix of a block wins
    """

    close_rule: CloseRule = CloseRule.NEXT_TOKEN
    probe_tokens: int = 8
    which: str = "first"
    opening = Opening.ACCEPT
    tags = True
    reads_along = True

    def __post_init__(self) -> None:
        if not isinstance(self.close_rule, CloseRule):
            raise RequestError(f"close_rule: found {self.close_rule!r}, expected a CloseRule")
        if not 1 <= self.probe_tokens <= 64:
            raise RequestError(f"probe_tokens: found {self.probe_tokens!r}, expected 1 to 64")
        if self.which not in ("first", "last"):
            raise RequestError(f"which: found {self.which!r}, expected 'first' or 'last'")

    def owner(self, position: int) -> Role | None:
        return None

    @property
    def closes_itself(self) -> bool:  # type: ignore[override]
        return self.close_rule is CloseRule.NEXT_TOKEN

    def trial(self, candidate: int) -> tuple[int, int, bool]:
        if self.close_rule is CloseRule.CONTINUE:
            return self.probe_tokens, -1, self.which == "last"
        return super().trial(candidate)


@dataclass(frozen=True)
class RandomSwitch(HandoffPolicy):
    """Each chunk of `chunk` content tokens is written by the large model with probability p, independently.

    seed=None draws from the request's own seed. No tag enters the small lane.
    """

    p: float
    chunk: int = 32
    seed: int | None = None
    opening = Opening.REJECT
    key: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.p, (int, float)) and 0 <= self.p <= 1):
            raise RequestError(f"p: found {self.p!r}, expected a probability from 0 to 1")
        if not (isinstance(self.chunk, int) and self.chunk >= 1):
            raise RequestError(f"chunk: found {self.chunk!r}, expected a number of tokens, at least 1")

    def bind(self, key: int) -> HandoffPolicy:
        return RandomSwitch(self.p, self.chunk, self.seed, key if self.seed is None else request_key(self.seed, 0))

    def owner(self, position: int) -> Role | None:
        uniform = philox_uniform(self.key, (0, position // self.chunk, Stream.POLICY.word(), 0))
        return Role.LARGE if uniform < self.p else Role.SMALL

    def next_mark(self, position: int) -> int | None:
        return (position // self.chunk + 1) * self.chunk


class ForcedSpans(HandoffPolicy):
    """The large model writes the content tokens in `spans` (half-open positions), the small one the rest.

    tags         True: the tags are put into the small lane around each span. Default: no tag enters it
    reads_along  True: the small model follows as under ControlTags, so a forced trace pays for reading along and for
                 the large tokens written beyond the span's end
    Raises RequestError unless spans are ordered, disjoint and not empty: 0 <= start < stop <= next start.
    """

    opening = Opening.REJECT

    def __init__(self, spans: Sequence[tuple[int, int]], tags: bool = False, reads_along: bool = False) -> None:
        self.tags, self.reads_along = tags, reads_along
        self.spans: list[tuple[int, int]] = []  # neighbours that touch are one span
        edge = 0
        for start, stop in spans:
            if not edge <= start < stop:
                raise RequestError(f"spans: found ({start}, {stop}) after position {edge}, expected ordered, "
                                   "disjoint, half-open spans (start, stop) with start < stop")  # fmt: skip
            if self.spans and start == edge:
                start = self.spans.pop()[0]
            self.spans.append((start, stop))
            edge = stop
        self.edges = [edge for span in self.spans for edge in span]

    def owner(self, position: int) -> Role | None:
        return Role.LARGE if any(start <= position < stop for start, stop in self.spans) else Role.SMALL

    def next_mark(self, position: int) -> int | None:
        index = bisect_right(self.edges, position)
        return self.edges[index] if index < len(self.edges) else None
