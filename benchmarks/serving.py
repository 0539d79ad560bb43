"""Benchmarks: what many requests on one engine look like: how long each waited, how full the steps were.

    arrival ...... first token . . ... . . . <bigmodel> ...... L L L . L L ... </bigmodel> . . finish
    |--- TTFT ----|           |-| ITL       |-- stall --|

A Watch hears of every event through the engine's tracer and looks at every answer behind each tick. Tokens that come in
one tick come together: an inter-token latency is the time between two ticks in which an answer grew, and belongs to the
author of the first token that was waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from harness import quantile

from splitdecode.runtime.batch import Batch
from splitdecode.split.engine import Choice, Engine
from splitdecode.split.outputs import RequestMetrics
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tracing import Tracer

SHARES = (50, 90, 99)


@dataclass(slots=True)
class Track:
    """One answer: when it grew, to how many content tokens; the opening it waits behind, as (time, tokens before)."""

    growth: list[tuple[float, int]] = field(default_factory=list)
    pen: Role | None = None
    opened: tuple[float, int] | None = None


@dataclass(slots=True)
class Load:
    """What one model ran: forwards, and rows, tokens and draws in them; ticks in which it ran."""

    forwards: int = 0
    rows: int = 0
    tokens: int = 0
    draws: int = 0
    ticks: int = 0


class Watch(Tracer):
    """One run under observation; call look() behind every tick."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tracks: dict[Choice, Track] = {}
        self.stalls: list[float] = []
        self.loads = Pair.of(lambda _: Load())
        self.ticks = 0
        self.most = 0  # requests unfinished at once
        self._ran = Pair(False, False)
        self._hits = self._prefix()

    def __enter__(self) -> Watch:
        self.engine.tracer = self
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.tracer = None

    # ---- heard

    def arrived(self, engine: Engine, choice: Choice) -> None:
        self.tracks[choice] = Track()
        self.most = max(self.most, engine.unfinished)

    def applied(self, engine: Engine, choice: Choice) -> None:
        track, sequence = self.tracks[choice], choice.sequence
        assert sequence is not None
        pen = sequence.handoff.pen
        if pen is track.pen:
            return
        now, size = engine.clock(), engine.scheduler.content_size(sequence.handle)
        self._answered(track, now, size)
        track.opened = (now, size) if pen is Role.LARGE and track.pen is Role.SMALL else None
        track.pen = pen

    def retired(self, engine: Engine, choice: Choice) -> None:
        assert choice.output is not None
        self._grown(self.tracks[choice], engine.clock(), len(choice.output.token_ids))

    def planned(self, engine: Engine, role: Role, batch: Batch) -> None:
        load = self.loads[role]
        load.forwards += batch.steps
        load.rows += int(batch.row_steps.sum())
        load.tokens += batch.num_tokens + int(batch.row_steps.sum()) - len(batch.seqs)
        load.draws += len(batch.draws) * batch.steps
        load.ticks += not self._ran[role]
        self._ran[role] = True

    def look(self) -> None:
        """What grew in this tick."""
        self.ticks += 1
        self._ran = Pair(False, False)
        now, size_of = self.engine.clock(), self.engine.scheduler.content_size
        for handle, choice in self.engine.running.items():
            self._grown(self.tracks[choice], now, size_of(handle))

    def _grown(self, track: Track, now: float, size: int) -> None:
        if size > (track.growth[-1][1] if track.growth else 0):
            track.growth.append((now, size))
            self._answered(track, now, size)

    def _answered(self, track: Track, now: float, size: int) -> None:
        if track.opened is not None and size > track.opened[1]:
            self.stalls.append(now - track.opened[0])
            track.opened = None

    def _prefix(self) -> tuple[int, int]:
        pools = [runner.cache.pool for runner in self.engine.runners]
        return sum(pool.queries for pool in pools), sum(pool.hits for pool in pools)

    # ---- told

    def work(self) -> dict[str, Any]:
        """What was run for these answers: the same in every run of a greedy workload."""
        total = RequestMetrics()
        for metrics in (choice.metrics for choice in self.tracks):
            for role in Role:
                total.models[role].add(metrics.models[role])
            total.handoffs += metrics.handoffs
            total.preemptions += metrics.preemptions
        queries, hits = (new - old for new, old in zip(self._prefix(), self._hits, strict=True))
        return {
            "requests": len(self.tracks),
            "tokens": total.tokens,
            "offload_fraction": total.offload_fraction,
            "handoffs": total.handoffs,
            "preemptions": total.preemptions,
            "most_at_once": self.most,
            "discarded_tokens": sum(model.discarded_tokens for model in total.models),
            "prefix_cache": {
                "pages_asked": queries,
                "pages_found": hits,
                "tokens": sum(model.cached_tokens for model in total.models),
            },
            "occupancy": {str(role): self._occupancy(self.loads[role]) for role in Role},
        }

    def _occupancy(self, load: Load) -> dict[str, Any]:
        return {
            "forwards": load.forwards,
            "rows_per_forward": load.rows / load.forwards if load.forwards else None,
            "tokens_per_forward": load.tokens / load.forwards if load.forwards else None,
            "share_of_steps": load.ticks / self.ticks if self.ticks else None,
        }

    def latencies(self) -> dict[str, Any]:
        """Percentiles in ms by the engine's clock, over all answers."""
        gaps = [gap for choice, track in self.tracks.items() for gap in gaps_of(choice, track)]
        metrics = [choice.metrics for choice in self.tracks]
        firsts = ((m.first_token_time, m.arrival_time) for m in metrics)
        lasts = ((m.finished_time, m.arrival_time) for m in metrics)
        return {
            "ttft_ms": percentiles(first - arrival for first, arrival in firsts if first is not None),
            "itl_ms": {
                "all": percentiles(seconds for _, seconds in gaps),
                **{str(role): percentiles(s for author, s in gaps if author == str(role)) for role in Role},
            },
            "tpot_ms": percentiles(s for track in self.tracks.values() if (s := _per_token(track)) is not None),
            "request_ms": percentiles(last - arrival for last, arrival in lasts if last is not None),
            "seam_stall_ms": percentiles(self.stalls),
        }


def gaps_of(choice: Choice, track: Track) -> list[tuple[str, float]]:
    """(author, seconds) of every time the answer grew but the first."""
    assert choice.output is not None
    authors = [span.model for span in choice.output.spans for _ in range(span.start, span.end)]
    pairs = zip(track.growth, track.growth[1:], strict=False)
    return [(authors[size], now - before) for (before, size), (now, _) in pairs]


def _per_token(track: Track) -> float | None:
    """Seconds per token behind the first growth; None where nothing came behind it."""
    if len(track.growth) < 2:
        return None
    (first, size), (last, total) = track.growth[0], track.growth[-1]
    return (last - first) / (total - size)


def percentiles(seconds: Iterable[float]) -> dict[str, float | int | None]:
    """Count, mean, p50, p90 and p99 (nearest rank), in ms; None of nothing."""
    values = sorted(1e3 * value for value in seconds)
    out: dict[str, float | int | None] = {"count": len(values)}
    out["mean"] = sum(values) / len(values) if values else None
    for share in SHARES:
        out[f"p{share}"] = quantile(values, share / 100)
    return out
