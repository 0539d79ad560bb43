"""F5: what an engine did when, as a Chrome trace: open the file in Perfetto (https://ui.perfetto.dev).

    small      |prefill|decode|decode|          |read|decode        a slice per step of a model
    large                            |catch-up  |    ...
    catch-up   |-------|             |--------- |--|                the share of a step, by tokens, that is no decoding
    queue      counters: waiting, running, tokens per step, pages in use; a slice per request that waits
    request 3  |------ small --------|-- large ----- | small ...    who holds the pen; seams are instants

Times are microseconds of the engine's clock. A step whose ids are known once it is launched ends there (a CPU); any
other ends when it lands, and begins no earlier than the end of the one before it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from splitdecode._C import Phase
from splitdecode.errors import RequestError
from splitdecode.runtime.batch import Batch
from splitdecode.runtime.runner import Flight
from splitdecode.split.roles import Pair, Role

if TYPE_CHECKING:
    from splitdecode.runtime.device import DeviceFlight
    from splitdecode.split.engine import Choice, Engine

KINDS = ("decode", "prefill", "catch_up", "read")
_PID = 1
_CATCH_UP, _QUEUE = 3, 4  # track numbers; a role's is its own number + 1


class Tracer:
    """Hears what an engine does, while it does it. Notes nothing itself: a subclass overrides what it wants to know."""

    def arrived(self, engine: Engine, choice: Choice) -> None:
        """It was queued."""

    def started(self, engine: Engine, choice: Choice) -> None:
        """It has a handle; nobody holds the pen yet."""

    def applied(self, engine: Engine, choice: Choice) -> None:
        """It was started or given an event: the pen may have changed hands, at most once."""

    def retired(self, engine: Engine, choice: Choice) -> None:
        """It has its output. If it ever started, its handle still stands."""

    def planned(self, engine: Engine, role: Role, batch: Batch) -> None:
        """A step is about to be launched."""

    def launched(self, engine: Engine, role: Role, flight: Flight | DeviceFlight) -> None:
        """The step last planned for that model was launched."""

    def landed(self, engine: Engine, role: Role, flight: Flight | DeviceFlight) -> None:
        """Its ids are known, and not yet looked at."""


@dataclass(slots=True)
class Work:
    """What the rows of one step are for, by KINDS.

    A row counts under what its first token is for; `forwards` is the sum of the steps its rows take.
    """

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    forwards: int = 0
    steps: int = 1

    @staticmethod
    def of(engine: Engine, role: Role, batch: Batch) -> Work:
        """The same count as the scheduler's own, before the step lands."""
        work = Work(steps=batch.steps)
        edges, positions = batch.paged.cu_q.tolist(), batch.paged.positions
        for row, (seq, steps) in enumerate(zip(batch.seqs.tolist(), batch.row_steps.tolist(), strict=True)):
            begin, count = edges[row], edges[row + 1] - edges[row]
            known = len(engine.running[seq].prompts[role]) - int(positions[begin]) if count else 0
            prompt = min(max(known, 0), count)
            rest = "read" if engine.scheduler.phase(seq) == Phase.READ else "catch_up"
            rest = rest if rest == "read" or count - prompt > 1 else "decode"
            work.rows["prefill" if prompt else rest] += 1
            work.tokens["prefill"] += prompt
            work.tokens[rest] += count - prompt
            work.tokens["decode"] += steps - 1
            work.forwards += steps
        return work

    @property
    def name(self) -> str:
        """The one kind it is of, or "mixed"."""
        found = [kind for kind in KINDS if self.rows[kind]]
        return found[0].replace("_", "-") if len(found) == 1 else "mixed"

    @property
    def total(self) -> int:
        """Tokens of all kinds."""
        return sum(self.tokens.values())

    def args(self) -> dict[str, int]:
        """What a slice shows."""
        return {
            "rows": sum(self.rows.values()),
            "tokens": self.total,
            "steps": self.steps,
            "forwards": self.forwards,
            "decode_rows": self.rows["decode"],
            **{f"{kind}_tokens": self.tokens[kind] for kind in KINDS[1:]},
        }


@dataclass(slots=True, eq=False)
class _Step:
    work: Work
    start: float
    flight: Flight | DeviceFlight | None = None


@dataclass(slots=True)
class _Request:
    """One answer as the trace knows it. pen: who holds it; since: content tokens when it was taken."""

    number: int
    waiting: bool
    pen: Role | None = None
    since: int = 0


class _Driver(Protocol):
    @property
    def engine(self) -> Engine: ...


class ChromeTrace(Tracer):
    """Records a Chrome trace: `with ChromeTrace(decoder) as trace: ...; trace.save(path)`, or engine.tracer = trace."""

    def __init__(self, driver: Engine | _Driver | None = None) -> None:
        """driver: an engine, or what has one (a SplitDecoder); needed only for the `with` statement."""
        self.events: list[dict[str, Any]] = []
        engine: Any = getattr(driver, "engine", driver)
        self._engine: Engine | None = engine
        self._before: Tracer | None = None
        self._requests: dict[Choice, _Request] = {}
        self._count = 0
        self._planned: Pair[_Step | None] = Pair(None, None)
        self._open: Pair[deque[_Step]] = Pair(deque(), deque())
        self._edges: dict[int, float] = {}  # by track: where its last slice ends
        self._shown: dict[str, float] = {}
        tracks = {role + 1: str(role) for role in Role} | {_CATCH_UP: "catch-up", _QUEUE: "queue"}
        self._label("process_name", 0, {"name": "splitdecode"})
        for track, name in tracks.items():
            self._label("thread_name", track, {"name": name})
            self._label("thread_sort_index", track, {"sort_index": track})

    def __enter__(self) -> ChromeTrace:
        if self._engine is None:
            raise ValueError("ChromeTrace: found no engine, expected ChromeTrace(decoder) in a with statement")
        self._before, self._engine.tracer = self._engine.tracer, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._engine is not None
        self._engine.tracer = self._before

    def save(self, path: str | Path) -> None:
        """Writes what was recorded so far."""
        document = {"traceEvents": self.events, "displayTimeUnit": "ms"}
        Path(path).write_text(json.dumps(document, separators=(",", ":")) + "\n", "utf-8")

    # ---- requests

    def arrived(self, engine: Engine, choice: Choice) -> None:
        self._known(engine, choice)
        self._levels(engine)

    def started(self, engine: Engine, choice: Choice) -> None:
        request = self._known(engine, choice)
        if request.waiting:
            self._async("e", "queue", "waiting", request, engine.clock())
            request.waiting = False
        self._levels(engine)

    def applied(self, engine: Engine, choice: Choice) -> None:
        sequence = choice.sequence
        assert sequence is not None
        request, pen = self._known(engine, choice), sequence.handoff.pen
        if pen is request.pen:
            return
        now, size = engine.clock(), engine.scheduler.content_size(sequence.handle)
        self._lay_down(request, now, size)
        if pen is Role.LARGE or request.pen is Role.LARGE:
            self._async("n", "request", "opening" if pen is Role.LARGE else "closing", request, now, position=size)
        request.pen, request.since = pen, size
        self._async("b", "request", str(pen), request, now)

    def retired(self, engine: Engine, choice: Choice) -> None:
        output, request = choice.output, self._known(engine, choice)
        assert output is not None
        now = engine.clock() if request.waiting else choice.metrics.finished_time or engine.clock()
        if request.waiting:
            self._async("e", "queue", "waiting", request, now)
        self._lay_down(request, now, len(output.token_ids))
        tokens = Pair.of(lambda r: sum(span.end - span.start for span in output.spans if span.model == str(r)))
        self._async(
            "e",
            "request",
            f"request {request.number}",
            request,
            now,
            finish_reason=output.finish_reason,
            tokens={str(role): tokens[role] for role in Role},
            preemptions=0 if choice.sequence is None else engine.scheduler.preempted(choice.sequence.handle),
        )
        del self._requests[choice]
        self._levels(engine, running=-1 if choice.sequence is not None else 0)

    def _known(self, engine: Engine, choice: Choice) -> _Request:
        """Its record; one that arrived before the trace began gets one now."""
        if (request := self._requests.get(choice)) is not None:
            return request
        request = self._requests[choice] = _Request(self._count, choice.sequence is None)
        self._count += 1
        arrival = choice.metrics.arrival_time
        prompts = {str(role): len(choice.prompts[role]) for role in Role}
        self._async("b", "request", f"request {request.number}", request, arrival, prompt_tokens=prompts)
        if request.waiting:
            self._async("b", "queue", "waiting", request, arrival)
        return request

    def _lay_down(self, request: _Request, now: float, size: int) -> None:
        if request.pen is not None:
            self._async("e", "request", str(request.pen), request, now, tokens=size - request.since)

    # ---- steps

    def planned(self, engine: Engine, role: Role, batch: Batch) -> None:
        self._planned[role] = _Step(Work.of(engine, role, batch), engine.clock())

    def launched(self, engine: Engine, role: Role, flight: Flight | DeviceFlight) -> None:
        step = self._planned[role]
        assert step is not None
        step.flight, self._planned[role] = flight, None
        if isinstance(flight, Flight):
            self._ended(engine, role, step)
        else:
            self._open[role].append(step)

    def landed(self, engine: Engine, role: Role, flight: Flight | DeviceFlight) -> None:
        while self._open[role]:  # flights that were dropped never land
            step = self._open[role].popleft()
            if step.flight is flight:
                self._ended(engine, role, step)
                break

    def _ended(self, engine: Engine, role: Role, step: _Step) -> None:
        work, now = step.work, engine.clock()
        start = self._slice(role + 1, work.name, step.start, now, work.args())
        apart = {kind: work.tokens[kind] for kind in KINDS[1:] if work.tokens[kind]}
        if apart:
            end = start + (now - start) * sum(apart.values()) / work.total
            rows = {f"{kind}_rows": work.rows[kind] for kind in apart}
            tokens = {f"{kind}_tokens": count for kind, count in apart.items()}
            self._slice(_CATCH_UP, str(role), start, end, rows | tokens)
        pool = engine.runners[role].cache.pool
        self._counter(f"tokens per step, {role}", now, work.total)
        self._counter(f"pages in use, {role} (of {pool.num_pages})", now, pool.in_use)

    # ---- writing

    def _slice(self, track: int, name: str, start: float, end: float, args: dict[str, int]) -> float:
        """A slice that begins where the last one on its track ended, at the earliest. Returns where it begins."""
        start = max(start, self._edges.get(track, start))
        end = self._edges[track] = max(start, end)
        at = _us(start)
        self._event("X", name, track, start, dur=round(_us(end) - at, 3), cat="step", args=args)
        return start

    def _levels(self, engine: Engine, running: int = 0) -> None:
        now = engine.clock()
        self._counter("waiting", now, len(engine.waiting))
        self._counter("running", now, len(engine.running) + running)

    def _counter(self, name: str, time: float, value: int) -> None:
        if self._shown.get(name) != value:
            self._shown[name] = value
            self._event("C", name, _QUEUE, time, args={"value": value})

    def _async(self, phase: str, kind: str, name: str, request: _Request, time: float, **args: Any) -> None:
        self._event(phase, name, _QUEUE, time, cat=kind, id=request.number, args=args)

    def _label(self, what: str, track: int, args: dict[str, Any]) -> None:
        self._event("M", what, track, 0.0, args=args)

    def _event(self, phase: str, name: str, track: int, time: float, **more: Any) -> None:
        self.events.append({"ph": phase, "name": name, "pid": _PID, "tid": track, "ts": _us(time), **more})


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)


@contextmanager
def traced(driver: Engine | _Driver, file: Path | None) -> Iterator[None]:
    """Records what runs inside into `file`, also when it fails; None: nothing is recorded.

    Raises RequestError at once when there is no folder to write into.
    """
    if file is None:
        yield
        return
    if not file.absolute().parent.is_dir():
        raise RequestError(f"chrome trace: found no folder {file.absolute().parent}")
    with ChromeTrace(driver) as trace:
        try:
            yield
        finally:
            trace.save(file)
