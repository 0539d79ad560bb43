"""F7: one request on an engine's thread: what its caller has seen, and what there is to see.

    Snapshots   the answers so far, made when the caller asks: only the latest exists
    Pieces      every delta once, in order; those of a slow caller grow together

Choices and tickets belong to the engine's thread from the moment they are submitted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from asyncio import AbstractEventLoop, Future
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from splitdecode._C import Scheduler
from splitdecode.errors import SplitDecodeError
from splitdecode.requests import Growth, closing, gathered
from splitdecode.split.engine import Choice
from splitdecode.split.outputs import Delta, RequestOutput
from splitdecode.split.prompts import Prompt

T = TypeVar("T")
OnDelta = Callable[[Delta], object]


@dataclass(frozen=True, slots=True)
class News(Generic[T]):
    """What a caller gets at once: items; whether these were the last; what to raise behind them."""

    items: list[T]
    over: bool
    error: SplitDecodeError | None


class Ticket(ABC, Generic[T]):
    """One request, and what became of it."""

    def __init__(self, name: str, prompt: Prompt, choices: list[Choice], on_delta: OnDelta | None) -> None:
        self.name, self.prompt, self.choices, self.on_delta = name, prompt, choices, on_delta
        self.started = self.over = False
        self.error: SplitDecodeError | None = None
        self.waiter: tuple[AbstractEventLoop, Future[Any]] | None = None

    def has_started(self) -> bool:
        """Whether the engine gave it a handle, or ended it."""
        return self.choices[0].sequence is not None or self.choices[0].output is not None

    def unfinished(self) -> list[Choice]:
        """Choices that are waiting or being written."""
        return [choice for choice in self.choices if choice.output is None]

    def was_cut(self) -> bool:
        """Whether some choice did not end by itself."""
        return any(choice.output is None or choice.output.finish_reason == "abort" for choice in self.choices)

    def pull(self) -> bool:
        """Takes the deltas there are since the last time; true when they were the last.

        Raises what on_delta raises; what that was called with is kept all the same.
        """
        ended = all(choice.output is not None for choice in self.choices)
        for choice in self.choices:
            if choice.deltas:
                fresh, choice.deltas = choice.deltas, []
                self.keep(choice.index, fresh)
                self._call(fresh)
        if ended and self.choices[0].stream is not None:
            last = closing(self.choices)
            self._call(last)
            for delta in last:
                self.keep(delta.index, [delta])
        return ended

    def faulted(self, reason: str) -> None:
        """on_delta raised. Every choice has ended, and all of them end as errors; it is not called again."""
        self.on_delta = None
        for choice in self.choices:
            assert choice.output is not None
            choice.output = replace(choice.output, finish_reason="error", stop_reason=reason)

    def news(self, scheduler: Scheduler) -> News[T] | None:
        """What the caller has not seen, None when there is nothing new. Each item is given once."""
        items = self.fresh(scheduler)
        return News(items, self.over, self.error) if items or self.over else None

    def keep(self, index: int, deltas: list[Delta]) -> None:
        """Notes deltas of choice `index` for the caller, if it is deltas that it reads."""

    @abstractmethod
    def fresh(self, scheduler: Scheduler) -> list[T]:
        """The items that news() gives."""

    def _call(self, deltas: list[Delta]) -> None:
        if self.on_delta is not None:
            for delta in deltas:
                self.on_delta(delta)


class Snapshots(Ticket[RequestOutput]):
    """What generate() follows."""

    def __init__(
        self, name: str, prompt: Prompt, choices: list[Choice], on_delta: OnDelta | None, tags: tuple[str, ...]
    ) -> None:
        super().__init__(name, prompt, choices, on_delta)
        self._growths = [Growth(choice, tags) for choice in choices]
        self._ended = 0

    def fresh(self, scheduler: Scheduler) -> list[RequestOutput]:
        if self.error is not None:
            return []
        if self.over:
            return [gathered(self.name, self.prompt, self.choices)]
        grew = [growth.extend(scheduler) for growth in self._growths]
        before, self._ended = self._ended, len(self.choices) - len(self.unfinished())
        if not any(grew) and self._ended == before:
            return []
        return [gathered(self.name, self.prompt, self.choices, self._growths)]


class Pieces(Ticket[Delta]):
    """What stream() follows. Beyond `most` waiting deltas of a choice, neighbours by one author become one."""

    def __init__(self, name: str, prompt: Prompt, choices: list[Choice], on_delta: OnDelta | None, most: int) -> None:
        super().__init__(name, prompt, choices, on_delta)
        self._most = most
        self._waiting: list[list[Delta]] = [[] for _ in choices]

    def keep(self, index: int, deltas: list[Delta]) -> None:
        waiting = self._waiting[index]
        for delta in deltas:
            if len(waiting) >= self._most and waiting[-1].model == delta.model and delta.finish_reason is None:
                waiting[-1] = replace(delta, text=waiting[-1].text + delta.text)
            else:
                waiting.append(delta)

    def fresh(self, scheduler: Scheduler) -> list[Delta]:
        out = [delta for waiting in self._waiting for delta in waiting]
        for waiting in self._waiting:
            waiting.clear()
        return out
