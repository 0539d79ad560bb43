"""F5: the part of a span that is provisional: written by the large model, being read by the small one.

small lane   ... <bigmodel> | L1  L2  L3  L4 |          stretches: [(1, [L1]), (1, [L2]), ...]; with unequal
                      base -^    ^- first draw          tokenizers one large token may be several small ids
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Block:
    """Provisional large tokens as the small lane reads them; offsets count ids behind `base`, a small-lane position."""

    base: int
    ids: list[int]
    stretches: list[tuple[int, list[int]]]  # (large tokens, small ids)
    first: int  # small-lane position of the first draw
    start: int  # content position of its first token
    by_stretch: bool  # a candidate is a stretch (CloseRule.CONTINUE), not a draw
    accepted: int = 0  # large tokens of the block that are content
    candidate: int = -1
    found: list[tuple[int, list[int]]] = field(default_factory=list)  # CONTINUE, "last": (candidate, continuation)

    def tokens(self) -> int:
        """Large tokens of the block."""
        return sum(count for count, _ in self.stretches)

    def prefix(self, candidate: int) -> int:
        """Ids of the block before the candidate's first token."""
        if self.by_stretch:
            return sum(len(part) for _, part in self.stretches[: candidate + 1])
        return self.first - self.base + candidate + 1

    def within(self, tokens: int) -> tuple[int, int]:
        """(large tokens, small ids) of the stretches that lie within the first `tokens` large tokens."""
        found = ids = 0
        for count, part in self.stretches:
            if found + count > tokens:
                break
            found, ids = found + count, ids + len(part)
        return found, ids

    def whole(self, prefix: int) -> tuple[int, int]:
        """(large tokens, small ids) of the stretches that lie within the first `prefix` ids."""
        tokens = ids = 0
        for count, part in self.stretches:
            if ids + len(part) > prefix:
                break
            tokens, ids = tokens + count, ids + len(part)
        return tokens, ids
