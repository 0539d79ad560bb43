"""Benchmarks: our runtime at work on jobs: timed from outside, then once more under observation.

Timing is SplitDecoder.generate() and nothing else. What a hand-off costs is seen in a run of its own, one clock reading
per tick, which is not timed:

    tick      ... small | small: tag complete | large: catch-up, first token | large ...
    seam stall                                |<---------------------------->|      also paid where nothing is caught up
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harness import quantile

from splitdecode.config import SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.split.engine import Engine
from splitdecode.split.outputs import ModelMetrics, RequestMetrics, RequestOutput
from splitdecode.split.policies import ControlTags, HandoffPolicy, LargeOnly, SmallOnly
from splitdecode.split.roles import Pair, Role

MODES = ("small", "large", "split")


@dataclass(frozen=True, slots=True)
class Job:
    """One request: a prompt, how many tokens at most, who writes them; ends: it may end of itself before that.

    pieces: what the split mode comes to, as (by the large model, tokens), in order.
    """

    prompt: list[int]
    tokens: int
    policy: HandoffPolicy
    pieces: tuple[tuple[bool, int], ...] = ()
    ends: bool = False

    def fixed(self, output: RequestOutput) -> Job:
        """The request with the tokens and pieces it was answered with."""
        spans = output.outputs[0].spans
        pieces = tuple((span.model == str(Role.LARGE), span.end - span.start) for span in spans)
        return replace(self, tokens=sum(number for _, number in pieces), pieces=pieces)

    def mode(self, mode: str) -> Job:
        """The same request written by one model alone, to its full length."""
        if mode == "split":
            return self
        return Job(self.prompt, self.tokens, SmallOnly() if mode == "small" else LargeOnly())


@dataclass(slots=True)
class Observer:
    """Seam stalls in ms, and the time of ticks in which a lane caught up, by role."""

    stalls: list[float] = field(default_factory=list)
    catch_up_ms: Pair[float] = field(default_factory=lambda: Pair(0.0, 0.0))


def run(decoder: SplitDecoder, jobs: list[Job]) -> list[RequestOutput]:
    """Each job by generate(), one after another: batch 1, greedy."""
    out = []
    for job in jobs:
        params = SamplingParams(temperature=0.0, max_tokens=job.tokens, ignore_eos=not job.ends)
        out += decoder.generate({"prompt_token_ids": job.prompt}, params, handoff=job.policy)
    return out


def observed(decoder: SplitDecoder, jobs: list[Job]) -> tuple[list[RequestOutput], Observer]:
    """The jobs once more, with an eye on every tick."""
    with _watching(decoder.engine) as observer:
        return run(decoder, jobs), observer


def observed_once(decoder: SplitDecoder, work: Callable[[], RequestOutput]) -> tuple[RequestOutput, Observer]:
    """One request, with an eye on every tick."""
    with _watching(decoder.engine) as observer:
        return work(), observer


@contextmanager
def _watching(engine: Engine) -> Iterator[Observer]:
    observer, plain = Observer(), engine.tick
    pen: dict[int, Role] = {}
    opened: dict[int, float] = {}
    before: dict[tuple[int, Role], tuple[int, float]] = {}

    def tick() -> None:
        plain()
        now, scheduler = time.perf_counter(), engine.scheduler
        for handle in [handle for handle in opened if handle not in engine.running]:
            del opened[handle]
        for handle, choice in engine.running.items():
            sequence = choice.sequence
            if sequence is None:
                continue
            for role in Role:
                stats = scheduler.stats(handle, role)
                tokens, ms = before.get((handle, role), (0, 0.0))
                if stats["catchup_tokens"] > tokens:
                    observer.catch_up_ms[role] += stats["ms"] - ms
                before[handle, role] = (stats["catchup_tokens"], stats["ms"])
            holder = sequence.handoff.pen
            if holder is Role.LARGE and pen.get(handle) is Role.SMALL:
                opened[handle] = now
            written = len(scheduler.provisional(handle)) or scheduler.content_size(handle) > sequence.span_start
            if handle in opened and (holder is Role.SMALL or written):
                observer.stalls.append(1e3 * (now - opened.pop(handle)))
            pen[handle] = holder
        if not engine.running:
            pen.clear()
            before.clear()

    engine.tick = tick  # type: ignore[method-assign]
    try:
        yield observer
    finally:
        engine.tick = plain  # type: ignore[method-assign]


def count(outputs: list[RequestOutput]) -> int:
    """Tokens written, all answers together."""
    return sum(output.metrics.tokens for output in outputs)


def describe(outputs: list[RequestOutput], observer: Observer) -> dict[str, Any]:
    """What the runtime says of itself: work by model, hand-offs, stalls. Times are wall ms, sums over all jobs."""
    total = RequestMetrics()
    for output in outputs:
        for role in Role:
            total.models[role].add(output.metrics.models[role])
        total.handoffs += output.metrics.handoffs
    models = {str(role): _model(total.models[role], observer.catch_up_ms[role]) for role in Role}
    firsts = [m.first_token_time - m.arrival_time for m in (o.metrics for o in outputs) if m.first_token_time]
    return {
        "offload_fraction": total.offload_fraction,
        "handoffs": total.handoffs,
        "discarded_tokens": total.large.discarded_tokens,
        "first_token_ms": 1e3 * (quantile(firsts, 0.5) or 0.0),
        "seam_stall_ms": {
            "count": len(observer.stalls),
            "p50": quantile(observer.stalls, 0.5),
            "p95": quantile(observer.stalls, 0.95),
        },
        "models": models,
    }


def _model(metrics: ModelMetrics, catch_up_ms: float) -> dict[str, float | None]:
    each = metrics.ms / metrics.tokens if metrics.tokens else None
    return {**asdict(metrics), "catch_up_ms": catch_up_ms, "ms_per_token": each}


def is_by_tags(job: Job) -> bool:
    """Whether the small model's own tags decide."""
    return isinstance(job.policy, ControlTags)
