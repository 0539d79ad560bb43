"""Benchmarks: when requests arrive, and what drives an engine through them.

    closed loop   so many are unfinished at a time; when one finishes, the next arrives
    open loop     they arrive at times of their own, however busy the engine is (Poisson: exponential gaps)

A driver knows an engine by add(), tick(), unfinished and clock, and waits by a callable it is given. It never looks at
wall time, so a simulated engine, whose clock jumps from step to step, is driven like a real one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from splitdecode.errors import RequestError
from splitdecode.split.engine import Choice


class Driven(Protocol):
    """What a driver asks of an engine; splitdecode's Engine is one."""

    def add(self, choice: Choice) -> None: ...

    def tick(self) -> None: ...

    @property
    def unfinished(self) -> int: ...

    @property
    def clock(self) -> Callable[[], float]: ...


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Arrival times of `count` requests in seconds, `rate` a second on average; all 0.0 at an infinite rate.

    The same seed gives the same pattern at every rate, only faster or slower. RequestError unless rate > 0.
    """
    if not rate > 0:
        raise RequestError(f"--request-rate: found {rate:g}, expected more than 0 requests per second, or inf")
    rng = random.Random(f"poisson/{seed}")
    gaps = [rng.expovariate(1.0) for _ in range(count)]
    return [0.0] * count if math.isinf(rate) else [at / rate for at in accumulate(gaps)]


def closed_loop(
    engine: Driven, choices: Sequence[Choice], concurrency: int, after: Callable[[], None] = lambda: None
) -> None:
    """Runs all of them, at most `concurrency` at a time; `after` is called behind every tick."""
    waiting: Iterator[Choice] = iter(choices)
    left = len(choices)
    while left or engine.unfinished:
        while left and engine.unfinished < concurrency:
            engine.add(next(waiting))
            left -= 1
        engine.tick()
        after()


def open_loop(
    engine: Driven,
    choices: Sequence[Choice],
    arrivals: Sequence[float],
    sleep_until: Callable[[float], None],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Runs all of them; choice i arrives `arrivals[i]` seconds from now, in rising order.

    What arrives while a step runs is added behind it, and has waited since it arrived. sleep_until: called with a time
    of the engine's clock when there is nothing to do before it.
    """
    begin, added = engine.clock(), 0
    while added < len(choices) or engine.unfinished:
        now = engine.clock()
        while added < len(choices) and begin + arrivals[added] <= now:
            choices[added].metrics.arrival_time = begin + arrivals[added]
            engine.add(choices[added])
            added += 1
        if engine.unfinished:
            engine.tick()
            after()
        else:
            sleep_until(begin + arrivals[added])


def sleeper(clock: Callable[[], float]) -> Callable[[float], None]:
    """Sleeps in earnest until a time of `clock`."""
    return lambda until: time.sleep(max(0.0, until - clock()))
