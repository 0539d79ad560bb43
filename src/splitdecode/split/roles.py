"""F5: the two models of a pair. Things that come in twos are a Pair indexed by a Role, never two names.

Role is also the lane number the scheduler knows (it knows no more of it than that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Role(IntEnum):
    """Which of the two models; SMALL or LARGE."""

    SMALL = 0
    LARGE = 1

    @property
    def other(self) -> Role:
        """The one that is not this one."""
        return Role(1 - self)

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(slots=True)
class Pair(Generic[T]):
    """One T per role; pair[role] picks."""

    small: T
    large: T

    def __getitem__(self, role: int) -> T:
        return self.large if role else self.small

    def __setitem__(self, role: int, value: T) -> None:
        if role:
            self.large = value
        else:
            self.small = value

    def __iter__(self) -> Iterator[T]:
        yield self.small
        yield self.large

    def map(self, function: Callable[[T], U]) -> Pair[U]:
        """The pair of what `function` makes of each."""
        return Pair(function(self.small), function(self.large))

    @staticmethod
    def of(function: Callable[[Role], U]) -> Pair[U]:
        """The pair of what `function` makes of each role."""
        return Pair(function(Role.SMALL), function(Role.LARGE))
