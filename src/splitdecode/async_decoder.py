"""F7: AsyncSplitDecoder, the front door for asyncio: many requests at once, each followed by whoever asked.

async with AsyncSplitDecoder.from_pretrained(small, large) as engine:
    async for output in engine.generate("...", SamplingParams(temperature=0.0)): ...
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from splitdecode.async_engine import EngineThread
from splitdecode.async_tickets import OnDelta, Pieces, Snapshots, Ticket
from splitdecode.config import SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError, SplitDecodeError
from splitdecode.split.engine import Choice
from splitdecode.split.outputs import Delta, RequestOutput
from splitdecode.split.policies import HandoffPolicy
from splitdecode.split.prompts import Prompt, as_prompts

T = TypeVar("T")


class Following(AsyncIterator[T], Generic[T]):
    """One request, as its caller follows it. Nothing is queued before the first item is asked for.

    The request ends, and its pages are free before the next step, when the iterator is closed, collected, or cancelled
    while it waits. Not an async generator: those wait for their loop to close them when they are dropped.
    """

    def __init__(self, engine: AsyncSplitDecoder, open_ticket: Callable[[], Ticket[T]]) -> None:
        self._engine = engine  # whoever holds an iterator keeps the engine running
        self._thread = engine._thread
        self._open = open_ticket
        self._ticket: Ticket[T] | None = None
        self._ready: deque[T] = deque()
        self._error: SplitDecodeError | None = None
        self._over = self._waits = False

    def __aiter__(self) -> Following[T]:
        return self

    async def __anext__(self) -> T:
        """Raises what generate() and stream() say; a second task that waits at the same time gets a RuntimeError."""
        if self._waits:
            raise RuntimeError("another task is already waiting for the next item of this request")
        if not self._ready and not self._over:
            await self._fetch()
        if self._ready:
            return self._ready.popleft()
        error, self._error = self._error, None
        raise error or StopAsyncIteration

    async def aclose(self) -> None:
        """Aborts the request unless it has ended; when this returns its pages are free."""
        over, self._over = self._over, True
        self._ready.clear()
        self._error = None
        if self._ticket is not None and not over:
            await self._thread.forget(self._ticket)

    async def _fetch(self) -> None:
        self._waits = True
        try:
            if self._ticket is None:
                self._ticket = self._open()
            news = await self._thread.news(self._ticket)
        except BaseException:
            self._let_go()
            raise
        finally:
            self._waits = False
        if not self._over:
            self._ready.extend(news.items)
            self._over, self._error = news.over, news.error

    def __del__(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._ticket is not None and not self._over:
            self._thread.drop(self._ticket)
        self._over = True


class AsyncSplitDecoder:
    """Drives a SplitDecoder on one thread of its own, for any number of tasks, on any number of event loops.

    What a request gets is what SplitDecoder.generate() gives it, token for token, whatever else runs. A request without
    a seed draws one from the engine's numbering when its first item is asked for, in the order of arrival.
    """

    def __init__(self, decoder: SplitDecoder, *, max_waiting: int = 1024, max_buffered: int = 256) -> None:
        """Takes `decoder` over: it answers nobody else from here on.

        max_waiting: requests that may wait for their first step; the next one is refused. max_buffered: deltas of a
        choice kept apart for a consumer of stream() that does not fetch them.
        Raises RequestError when an argument is out of bounds, or the decoder is closed, taken or busy.
        """
        for name, value in (("max_waiting", max_waiting), ("max_buffered", max_buffered)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"{name}: found {value!r}, expected an integer of at least 1")
        self.decoder, self._max_buffered = decoder, max_buffered
        self._thread = EngineThread(decoder.take_over(), max_waiting)
        weakref.finalize(self, self._thread.stop).atexit = False

    @classmethod
    def from_pretrained(
        cls, small: str | Path, large: str | Path, *, max_waiting: int = 1024, max_buffered: int = 256, **options: Any
    ) -> AsyncSplitDecoder:
        """Loads both checkpoints as SplitDecoder.from_pretrained() does, with its options, and raises what it raises.

        Loading blocks: call it before the loop runs, or through asyncio.to_thread().
        """
        decoder = SplitDecoder.from_pretrained(small, large, **options)
        return cls(decoder, max_waiting=max_waiting, max_buffered=max_buffered)

    @classmethod
    def demo(cls, *, max_waiting: int = 1024, max_buffered: int = 256, **options: Any) -> AsyncSplitDecoder:
        """The embedded pair; options as in SplitDecoder.demo()."""
        return cls(SplitDecoder.demo(**options), max_waiting=max_waiting, max_buffered=max_buffered)

    # ---- answers

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        handoff: HandoffPolicy | None = None,
        large_prompt: Prompt | None = None,
        request_id: str | None = None,
        on_delta: OnDelta | None = None,
    ) -> Following[RequestOutput]:
        """Yields the answer so far (`finished` False) whenever it has grown, and last the finished one with metrics.

        Text, token ids and spans are what is certain: later outputs only add to them. A consumer that is slower than
        the engine skips outputs: it gets the state at the time it asks. on_delta is called on the engine's thread with
        each delta that stream() would yield, and must not wait; what it raises ends this request with "error".

        Raised to whoever asks for the first item, with nothing queued: RequestError for what cannot be served, a
        request_id in use, or an engine that is shut down; CapacityError when max_waiting requests wait already. Raised
        while it runs: EngineError when a step fails, which ends every request, or when the engine's thread dies.
        """
        make = partial(Snapshots, tags=self.decoder.engine.tags)
        asked = (prompt, sampling_params, handoff, large_prompt, request_id, on_delta)
        return Following(self, partial(self._submit, make, on_delta is not None, *asked))

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        handoff: HandoffPolicy | None = None,
        large_prompt: Prompt | None = None,
        request_id: str | None = None,
        on_delta: OnDelta | None = None,
    ) -> Following[Delta]:
        """Yields the answer in pieces as SplitDecoder.stream() does; the last of each choice has its finish reason.

        A consumer slower than the engine loses nothing: beyond max_buffered waiting pieces of a choice, neighbours by
        one model become one. on_delta and what is raised: as in generate(); pieces that were certain come first.
        """

        make = partial(Pieces, most=self._max_buffered)
        asked = (prompt, sampling_params, handoff, large_prompt, request_id, on_delta)
        return Following(self, partial(self._submit, make, True, *asked))

    async def abort(self, request_id: str) -> None:
        """Ends a request where it stands: whoever follows it gets what there is, with finish_reason "abort".

        Both of its lanes are free when this returns. Ids that are unknown, or whose requests have ended, are ignored.
        """
        await self._thread.abort(request_id)

    # ---- the end

    async def shutdown(self) -> None:
        """Aborts everything and waits for the engine's thread to end. Requests made afterwards get a RequestError."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """As shutdown(), for owners outside an event loop."""
        self._thread.close()

    async def __aenter__(self) -> AsyncSplitDecoder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    # ---- requests

    def _submit(
        self,
        make: Callable[[str, Prompt, list[Choice], OnDelta | None], Ticket[T]],
        streams: bool,
        prompt: Prompt,
        params: SamplingParams | None,
        handoff: HandoffPolicy | None,
        large_prompt: Prompt | None,
        request_id: str | None,
        on_delta: OnDelta | None,
    ) -> Ticket[T]:
        """Checks a request, on the caller's thread, and queues it."""
        prompts = as_prompts(prompt)
        if len(prompts) != 1:
            raise RequestError(f"prompt: found {len(prompts)} prompts, expected one: each is a request of its own")
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params: found {type(params).__name__}, expected SamplingParams")
        if request_id is not None and not isinstance(request_id, str):
            raise RequestError(f"request_id: found {type(request_id).__name__}, expected a str")
        if on_delta is not None and not callable(on_delta):
            raise RequestError(f"on_delta: found {type(on_delta).__name__}, expected a function of one Delta")
        name = self._thread.reserve(request_id or None)
        try:
            choices = self.decoder.requests.choices(
                prompts[0], large_prompt, params or self.decoder.default_sampling_params, handoff, streams=streams
            )
            choices[0].metrics.arrival_time = self.decoder.engine.clock()  # not when the thread gets round to it
            ticket = make(name, prompts[0], choices, on_delta)
        except BaseException:
            self._thread.release(name)
            raise
        self._thread.submit(ticket)
        return ticket
