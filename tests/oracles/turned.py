"""A clock for limits and retries that stands still until somebody sleeps by it; every sleep is noted."""

from __future__ import annotations

import asyncio

from splitdecode.annotate.limits import Clock


class TurnedClock(Clock):
    """Time passes only in sleep(), at once."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        until = self.time + seconds
        await asyncio.sleep(0)
        self.time = max(self.time, until)
