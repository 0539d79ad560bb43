"""F7: how fast an endpoint may be asked: token buckets by a clock that tests can turn."""

from __future__ import annotations

import asyncio
import time


class Clock:
    """Seconds that only go forward, and a way to let them pass."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Bucket:
    """At most `per_minute` units a minute, evenly; a burst of up to `burst` seconds' worth. None: no limit.

    Those who wait are served in their order. An amount larger than a burst passes once the bucket is full, and those
    behind it wait for its debt.
    """

    def __init__(self, per_minute: float | None, clock: Clock, *, burst: float = 6.0) -> None:
        self._rate = per_minute / 60 if per_minute else 0.0
        self._most = max(1.0, self._rate * burst)
        self._level, self._then = self._most, clock.now()
        self._clock = clock
        self._turn = asyncio.Lock()

    async def take(self, amount: float = 1.0) -> None:
        """Waits until `amount` units may be used, and uses them."""
        if not self._rate:
            return
        async with self._turn:
            while (short := min(amount, self._most) - self._filled()) > 1e-9:
                await self._clock.sleep(short / self._rate)
            self._level -= amount

    def settle(self, taken: float, used: float) -> None:
        """Corrects what was taken by what was really used."""
        if self._rate:
            self._level = min(self._most, self._filled() + taken - used)

    def _filled(self) -> float:
        now = self._clock.now()
        self._level = min(self._most, self._level + (now - self._then) * self._rate)
        self._then = now
        return self._level
