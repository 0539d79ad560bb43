"""F7: how fast an endpoint may be asked: evenly, by a clock that tests can turn."""

from __future__ import annotations

import asyncio
import time


class Clock:
    """Seconds that only go forward, and a way to let them pass."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Pace:
    """At most `per_minute` units in any 60 seconds, evenly, nothing saved up: who takes an amount passes as soon as the
    amounts before it are paid for, those who wait in their order. None: no limit.

    Of unequal amounts, such as tokens, 60 seconds may hold more by as much as the last one.
    """

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        self._rate = per_minute / 60 if per_minute else 0.0
        self._clock, self._free = clock, clock.now()
        self._turn = asyncio.Lock()

    async def take(self, amount: float = 1.0) -> None:
        """Waits until `amount` units may be used, and uses them."""
        if not self._rate:
            return
        async with self._turn:
            while (wait := self._free - self._clock.now()) > 1e-9:
                await self._clock.sleep(wait)
            self._free = max(self._free, self._clock.now()) + amount / self._rate

    def settle(self, taken: float, used: float) -> None:
        """Corrects what was taken by what was really used."""
        if self._rate:
            self._free += (used - taken) / self._rate
