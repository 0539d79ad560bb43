"""Benchmarks: the simulator against the real engine: the steps of a real run are recorded, and it is repeated by them.

real       embedded pair, one thread, forced traces:  tick = host + small step + large step      -> tokens / CPU second
fitted     ms of a step by rows, tokens, context, draws; ms of host work by rows and events
simulated  the same requests on the same compiled scheduler, the clock moved by the fitted costs  -> tokens / second
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from time import process_time
from typing import Any

from arrivals import closed_loop
from clockwork import Clock, Fitted, Load, choice_of, clock_engine, load_of
from harness import show_table, use_threads
from traces import Trace, workload

from splitdecode.config import EngineConfig
from splitdecode.decoder import SplitDecoder
from splitdecode.runtime.batch import Batch
from splitdecode.split.engine import Engine
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tracing import Tracer

TRACES = ("math", "minimal", "stress")
TOKENS = 120  # of an answer
OPTIONS: dict[str, Any] = {"page_size": 16, "enable_prefix_caching": False, "max_num_batched_tokens": 512}


class Steps(Tracer):
    """Loads and CPU ms of every step of each model, and of the host work of every tick."""

    def __init__(self) -> None:
        self.loads: Pair[list[Load]] = Pair([], [])
        self.ms: Pair[list[float]] = Pair([], [])
        self.ticks: list[Load] = []
        self.host: list[float] = []
        self._in_steps, self._rows, self._tokens, self._events = 0.0, 0, 0, 0
        self._start = 0.0

    def planned(self, engine: Engine, role: Role, batch: Batch) -> None:
        load = load_of(batch)
        self.loads[role].append(load)
        self._rows += load.rows
        self._tokens += load.tokens
        self._start = process_time()

    def launched(self, engine: Engine, role: Role, flight: Any) -> None:
        ms = 1e3 * (process_time() - self._start)
        self.ms[role].append(ms)
        self._in_steps += ms

    def applied(self, engine: Engine, choice: Any) -> None:
        self._events += 1

    def ticked(self, ms: float) -> None:
        """A tick took so long in all."""
        self.ticks.append(Load(self._rows, self._tokens, 0, self._events))
        self.host.append(ms - self._in_steps)
        self._in_steps, self._rows, self._tokens, self._events = 0.0, 0, 0, 0


def check(batches: Sequence[int], iters: int, seed: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Every trace at every batch size: measured, simulated, error."""
    use_threads(1)
    rows = []
    for name in TRACES:
        for batch in batches:
            rows.append(_compare(name, batch, iters, seed, tokens))
    worst = max(abs(row["error"]) for row in rows)
    show_table(
        "simulated against measured, embedded pair, one thread, tokens per CPU second",
        ["trace", "at a time", "measured", "simulated", "error"],
        [
            [r["trace"], str(r["batch"]), f"{r['measured']:.0f}", f"{r['simulated']:.0f}", f"{100 * r['error']:+.1f} %"]
            for r in rows
        ],
    )
    print(f"largest error {100 * worst:.1f} %")
    return {"check": rows, "largest_error": worst}


def _compare(name: str, batch: int, iters: int, seed: int, tokens: int) -> dict[str, Any]:
    traces = [replace(t.scaled(tokens), seed=n) for n, t in enumerate(workload(name, max(6, 2 * batch), seed))]
    config = EngineConfig(max_num_seqs=batch, kv_cache_memory="64MiB", **OPTIONS)
    rates, found = [], Steps()
    decoder = SplitDecoder.demo(max_num_seqs=batch, **OPTIONS)
    for turn in range(iters + 1):
        steps = Steps()
        rate = _real(decoder, traces, batch, steps)
        if turn:  # the first one warms up
            rates.append(rate)
            for role in Role:
                found.loads[role] += steps.loads[role]
                found.ms[role] += steps.ms[role]
            found.ticks += steps.ticks
            found.host += steps.host
    simulated = _simulated(found, traces, batch, config, decoder)
    measured = median(rates)
    return {
        "trace": name,
        "batch": batch,
        "measured": measured,
        "simulated": simulated,
        "error": simulated / measured - 1,
    }


def _real(decoder: SplitDecoder, traces: Sequence[Trace], batch: int, steps: Steps) -> float:
    """Tokens per CPU second of one run."""
    engine = decoder.engine
    engine.tracer = steps
    tick = engine.tick
    engine.tick = _timed(tick, steps)  # type: ignore[method-assign]
    choices = [choice_of(trace, n) for n, trace in enumerate(traces)]
    start = process_time()
    closed_loop(engine, choices, batch)
    seconds = process_time() - start
    engine.tick = tick  # type: ignore[method-assign]
    engine.tracer = None
    return sum(len(c.output.token_ids) for c in choices if c.output is not None) / seconds


def _timed(tick: Callable[[], None], steps: Steps) -> Callable[[], None]:
    def timed() -> None:
        start = process_time()
        tick()
        steps.ticked(1e3 * (process_time() - start))

    return timed


def _simulated(found: Steps, traces: Sequence[Trace], batch: int, config: EngineConfig, decoder: SplitDecoder) -> float:
    """Tokens per second of the same requests, by fitted costs."""
    costs = Pair.of(lambda r: Fitted.of(found.loads[r], found.ms[r]) if found.loads[r] else _nothing)
    host = Fitted.of(found.ticks, found.host)
    clock = Clock()
    pages = Pair.of(lambda r: decoder.engine.runners[r].cache.pool.present)
    engine = clock_engine(costs, config.on("cpu"), pages, max(decoder.max_len), clock)
    counter = Steps()
    engine.tracer = counter
    choices = [choice_of(trace, n) for n, trace in enumerate(traces)]

    def spend() -> None:
        counter.ticked(0.0)
        clock.now += host(counter.ticks[-1]) / 1e3

    closed_loop(engine, choices, batch, spend)
    return sum(len(c.output.token_ids) for c in choices if c.output is not None) / clock()


def _nothing(load: Load) -> float:
    return 0.0
