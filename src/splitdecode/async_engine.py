"""F7: the one thread that drives an engine, and what other threads and event loops may ask of it.

    callers   reserve a name -> check the request -> submit; then, again and again: ask, await the future
    thread    commands until there is none left -> one tick -> look at what runs, wake who asked -> commands ...

Callers never touch the engine: a command is a function that the thread runs between two ticks, so an abort takes effect
before the next one. Commands go through a SimpleQueue because its put() is safe in a finalizer, and because the thread
can sleep in its get() while nothing is unfinished. Nothing is sent to a caller that did not ask: a slow one costs
nothing but the text it has not fetched.
"""

from __future__ import annotations

import atexit
from asyncio import AbstractEventLoop, Future, get_running_loop
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from threading import Lock, Thread, current_thread
from typing import Any, TypeVar
from weakref import WeakSet

from splitdecode.async_tickets import News, Ticket
from splitdecode.errors import CapacityError, EngineError, RequestError, SplitDecodeError
from splitdecode.split.engine import Engine

EXIT_SECONDS = 10.0  # how long a step may hold up the interpreter's exit
T = TypeVar("T")
Command = Callable[[], object]


@dataclass(slots=True)
class Reply:
    """What a future will hold. ticket: whose news it is, None where nobody's."""

    future: Future[Any]
    value: Any
    ticket: Ticket[Any] | None = None


class EngineThread:
    """Runs an engine while there is work. Methods up to close() are the callers'; those below run on the thread."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        """max_waiting: requests that may be waiting for their first step."""
        self.engine, self.max_waiting = engine, max_waiting
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._names: set[str] = set()
        self._not_started = 0
        self._counts = Lock()  # names and _not_started; never held while anything else is called
        self._numbers = count()
        self._live: dict[str, Ticket[Any]] = {}
        self._running: dict[Ticket[Any], None] = {}  # those that have started, in that order
        self._wake: dict[AbstractEventLoop, list[Reply]] = {}
        self._stopping = self._over = False
        self._cause: BaseException | None = None
        self._last_words = Lock()  # who answers commands once the thread does not
        self.thread = Thread(target=self._main, name="splitdecode-engine", daemon=True)
        self.thread.start()
        _THREADS.add(self)

    # ---- callers

    def reserve(self, name: str | None) -> str:
        """A place in the queue and the name of a request, given or made up.

        Raises CapacityError when max_waiting requests have not started, RequestError when the name is taken or the
        engine is shut down, EngineError when its thread died.
        """
        with self._counts:
            if self._stopping or self._over:
                raise self._gone()
            if self._not_started >= self.max_waiting:
                raise CapacityError(
                    f"max_waiting: found {self._not_started} requests that have not started, expected fewer than "
                    f"{self.max_waiting}"
                )
            if name is None:
                name = next(made for number in self._numbers if (made := f"request-{number}") not in self._names)
            elif name in self._names:
                raise RequestError(f"request_id: {name!r} is in use")
            self._names.add(name)
            self._not_started += 1
            return name

    def release(self, name: str, *, started: bool = False) -> None:
        """The request is over, or there will be none."""
        with self._counts:
            self._names.discard(name)
            self._not_started -= not started

    def submit(self, ticket: Ticket[Any]) -> None:
        """Queues a request whose name was reserved."""
        self._post(partial(self._admit, ticket))

    async def news(self, ticket: Ticket[T]) -> News[T]:
        """What the caller has not seen yet, as soon as there is any."""
        news: News[T] = await self._reply(partial(self._ask, ticket))
        return news

    async def abort(self, name: str) -> None:
        """Ends a request where it stands; its pages are free when this returns. Unknown names are ignored."""
        await self._reply(partial(self._abort_named, name))

    async def forget(self, ticket: Ticket[Any]) -> None:
        """As abort(), by ticket."""
        await self._reply(partial(self._abort_for, ticket))

    def drop(self, ticket: Ticket[Any]) -> None:
        """As abort(), before the next tick; waits for nothing, and may be called by a finalizer."""
        self._inbox.put(partial(self._abort, ticket))

    def stop(self) -> None:
        """The thread is to abort everything and end."""
        self._stopping = True
        self._inbox.put(_nothing)  # in case it sleeps

    def close(self, timeout: float | None = None) -> None:
        """Stops the thread and waits until it has ended, unless it is the thread that asks."""
        self.stop()
        if current_thread() is not self.thread:
            self.thread.join(timeout)

    def _post(self, command: Command) -> None:
        self._inbox.put(command)
        if self._over:  # set before the thread looked into the inbox for the last time: one of the two sees the other
            self._answer_the_rest()

    async def _reply(self, command: Callable[[AbstractEventLoop, Future[Any]], None]) -> Any:
        loop = get_running_loop()
        future: Future[Any] = loop.create_future()
        self._post(partial(command, loop, future))
        return await future

    def _gone(self) -> SplitDecodeError:
        if self._cause is not None:
            return _because("the engine's thread died", self._cause)
        return RequestError("this engine is shut down")

    # ---- the thread

    def _main(self) -> None:
        try:
            while self._run_commands():
                self._guarded(self._step)
            for ticket in list(self._live.values()):
                self._abort(ticket)
        except BaseException as error:  # whatever it is, somebody waits for an answer
            self._cause = error
        with self._last_words:
            self._over = True
            for ticket in list(self._live.values()):
                self._end(ticket, self._gone())
            self._flush()
        self._answer_the_rest()

    def _run_commands(self) -> bool:
        """Runs what was asked; sleeps while there is nothing else to do. False: stop."""
        while True:
            try:
                command = self._inbox.get(block=not (self.engine.unfinished or self._stopping))
            except Empty:
                return not self._stopping
            self._guarded(command)
            self._flush()

    def _guarded(self, command: Command) -> None:
        try:
            command()
        except Exception as error:
            self._fail(error)
            self._flush()

    def _answer_the_rest(self) -> None:
        with self._last_words, suppress(Empty):
            while True:
                self._inbox.get_nowait()()
                self._flush()

    def _step(self) -> None:
        waiting = len(self.engine.waiting)
        self.engine.tick()
        if len(self.engine.waiting) < waiting:
            self._note_starts()
        for ticket in list(self._running):
            self._look(ticket)
        self._flush()

    def _note_starts(self) -> None:
        started = [ticket for ticket in self._live.values() if not ticket.started and ticket.has_started()]
        for ticket in started:
            ticket.started = True
            self._running[ticket] = None
        with self._counts:
            self._not_started -= len(started)

    def _look(self, ticket: Ticket[Any]) -> None:
        """Passes on what a tick gave a request."""
        try:
            ended = ticket.pull()
        except BaseException as error:  # the caller's on_delta; a CancelledError of its own, say, is no reason to die
            self._fault(ticket, f"{type(error).__name__}: {error}")
            ended = ticket.pull()
        if ended:
            self._end(ticket)
        else:
            self._tell(ticket)

    def _fault(self, ticket: Ticket[Any], reason: str) -> None:
        for choice in ticket.unfinished():
            self.engine.abort(choice)
        ticket.faulted(reason)

    def _fail(self, error: Exception) -> None:
        """A step failed, and the engine has ended every answer; those that had not ended by themselves are lost."""
        for ticket in list(self._live.values()):
            lost = ticket.was_cut()
            for choice in ticket.unfinished():
                self.engine.abort(choice)
            if lost:
                self._end(ticket, _because("a step failed", error))
            else:
                self._look(ticket)
        if self.engine.unfinished or self.engine.scheduler.unfinished:
            raise error  # something is left that nobody asked for: not an engine to go on with

    # ---- commands

    def _admit(self, ticket: Ticket[Any]) -> None:
        if self._over:
            self._end(ticket, self._gone())
            return
        self._live[ticket.name] = ticket
        for choice in ticket.choices:
            self.engine.add(choice)

    def _ask(self, ticket: Ticket[Any], loop: AbstractEventLoop, future: Future[Any]) -> None:
        ticket.waiter = (loop, future)
        self._tell(ticket)

    def _abort(self, ticket: Ticket[Any]) -> None:
        if not ticket.over:
            for choice in ticket.unfinished():
                self.engine.abort(choice)
            self._look(ticket)

    def _abort_for(self, ticket: Ticket[Any] | None, loop: AbstractEventLoop, future: Future[Any]) -> None:
        try:
            if ticket is not None:
                self._abort(ticket)
        finally:
            self._wake.setdefault(loop, []).append(Reply(future, None))

    def _abort_named(self, name: str, loop: AbstractEventLoop, future: Future[Any]) -> None:
        self._abort_for(self._live.get(name), loop, future)

    # ---- ends and news

    def _end(self, ticket: Ticket[Any], error: SplitDecodeError | None = None) -> None:
        if ticket.over:
            return
        ticket.over, ticket.error = True, error
        self._live.pop(ticket.name, None)
        self._running.pop(ticket, None)
        self.release(ticket.name, started=ticket.started)
        self._tell(ticket)

    def _tell(self, ticket: Ticket[Any]) -> None:
        """Answers the caller, if it asked and there is something to say."""
        if ticket.waiter is None:
            return
        news = ticket.news(self.engine.scheduler)
        if news is not None:
            loop, future = ticket.waiter
            ticket.waiter = None
            self._wake.setdefault(loop, []).append(Reply(future, news, ticket))

    def _flush(self) -> None:
        """Wakes every loop once, with all its replies."""
        while self._wake:
            loop, replies = self._wake.popitem()
            try:
                loop.call_soon_threadsafe(_resolve, replies)
            except RuntimeError:  # the loop is closed, so nobody is left to read these answers
                for reply in replies:
                    if reply.ticket is not None:
                        self._abort(reply.ticket)


def _resolve(replies: list[Reply]) -> None:
    for reply in replies:
        if not reply.future.done():
            reply.future.set_result(reply.value)


def _because(what: str, cause: BaseException) -> EngineError:
    error = EngineError(f"{what}: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _nothing() -> None:
    """A command that only wakes the thread."""


_THREADS: WeakSet[EngineThread] = WeakSet()


@atexit.register
def _stop_all() -> None:
    """A thread that still runs when the interpreter is taken down would die inside a kernel, and take it along."""
    for thread in list(_THREADS):
        thread.close(EXIT_SECONDS)
