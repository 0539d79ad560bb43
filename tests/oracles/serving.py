"""What tests of the async engine share: a hook before every tick, and a look for whatever a request left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from oracles.flaky import IDS, A, build, pages

from splitdecode import AsyncSplitDecoder, Delta, SamplingParams, SplitDecoder

T = TypeVar("T")
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
UNPACED: dict[str, Any] = {"handoff_patience": 0.0}  # else measured times decide how many ticks an answer takes
LONG = SamplingParams(temperature=0.0, max_tokens=200)


def run(main: Coroutine[Any, Any, T]) -> T:
    """A consumer left hanging fails instead of hanging the tests."""
    return asyncio.run(asyncio.wait_for(main, 60))


class Watch:
    """The engine's tick with a hook before each; both run on the engine's thread."""

    def __init__(self, decoder: SplitDecoder, before: Callable[[int], object] = lambda tick: None) -> None:
        self.ticks, self.before, self.tick = 0, before, decoder.engine.tick
        decoder.engine.tick = self._watched  # type: ignore[method-assign]

    def _watched(self) -> None:
        self.before(self.ticks)
        self.ticks += 1
        self.tick()


@asynccontextmanager
async def serving(decoder: SplitDecoder, **options: Any) -> AsyncIterator[AsyncSplitDecoder]:
    """An engine that must be empty when its tests are through with it, and whose thread must end."""
    engine = AsyncSplitDecoder(decoder, **options)
    try:
        yield engine
        await settled(engine)
    finally:
        await engine.shutdown()
    assert not engine._thread.thread.is_alive()


@contextmanager
def paused(engine: AsyncSplitDecoder) -> Iterator[None]:
    """The engine's thread does nothing until the block ends: what is asked inside is all there before the next tick."""
    go = threading.Event()
    engine._thread._inbox.put(lambda: go.wait(10))
    yield
    go.set()


async def settled(engine: AsyncSplitDecoder) -> None:
    """Waits until the thread has done what it was asked before, then looks for anything left of any request."""
    await engine.abort("nobody")
    thread = engine._thread
    assert (engine.decoder.engine.unfinished, pages(engine.decoder)) == (0, [0, 0])
    assert (thread._live, thread._running, thread._names, thread._not_started, thread._wake) == ({}, {}, set(), 0, {})


async def last(following: AsyncIterator[T]) -> T:
    """The last item; there must be one."""
    return (await collect(following))[-1]


async def collect(following: AsyncIterator[T]) -> list[T]:
    return [item async for item in following]


def merged(deltas: list[Delta]) -> list[Delta]:
    """Each choice's deltas, neighbours by one author joined; nothing else may differ between a slow and a fast one."""
    out = []
    for delta in sorted(deltas, key=lambda delta: delta.index):
        same = out and (out[-1].index, out[-1].model) == (delta.index, delta.model)
        if same and delta.finish_reason is None:
            out[-1] = replace(delta, text=out[-1].text + delta.text)
        else:
            out.append(delta)
    return out


def tagged(**engine: Any) -> SplitDecoder:
    """Prefills in chunks, opens, is read along two by two, closes, writes on."""
    fixed: dict[str, Any] = {"max_num_batched_tokens": 5, "read_interval": 2, "enable_prefix_caching": False}
    decoder = build(**fixed, **{"max_num_seqs": 2, **UNPACED, **engine})
    tag = [IDS[piece] for piece in ("big", "model", ">")]
    decoder.models.small.says(12, [A, IDS["<"], *tag]).says(22, [IDS["</"], *tag])
    return decoder
