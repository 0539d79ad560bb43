"""What scheduling costs the host: plan, pack and commit of one step, by sequences, and how much of it is Python.

    PYTHONPATH=src python benchmarks/scheduler.py                        1, 64, 256, 1024, 4096 sequences
    ... scheduler.py --sequences 64,1024 --trace math --output-json out.json

Two measurements, both over the compiled scheduler and without any model:

    scheduler   every sequence writes: one plan() into caller-owned arrays and one commit() per step, from Python
    engine      ticks of the engine under hand-off traffic, models that answer at once: events, policies, metrics too

Times are medians of wall time over steps (a step takes microseconds: process CPU time is too coarse for it), least of
--repeats runs, since other work on the machine only ever adds. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from clockwork import Clock, Load, choice_of, clock_engine, positions_of
from harness import finish, machine, show_table
from latency import positive
from traces import NAMES, workload

from splitdecode._C import Phase
from splitdecode.config import EngineConfig
from splitdecode.split.engine import Engine
from splitdecode.split.roles import Pair, Role

PAGE = 64
TARGETS = {64: 20.0, 1024: 120.0}  # microseconds per step, plan + pack + commit


def bare(sequences: int, steps: int, context: int) -> dict[str, float]:
    """Medians in us of plan() and commit() when all sequences write, at `context` positions each."""
    engine = _engine(sequences, context + steps + 2, sequences * context)
    scheduler = engine.scheduler
    for number in range(sequences):
        ids = [1 + (number * 7919 + k * 104729) % 97 for k in range(context)]
        handle = scheduler.add(
            [ids, ids], 1 << 30, 0, True, True, False, False, [], [], str(number).encode(), leader=-1
        )
        scheduler.write(handle, 0, Phase.SCAN, 0)
    plans, commits = [], []
    token = engine.tokens.tokenizers[Role.SMALL].encode("1")[-1]
    ids_of = np.full(max(sequences, engine.config.max_draws), token, dtype=np.int32)
    none = np.full(len(ids_of), np.nan, dtype=np.float32)
    while len(plans) < steps:
        start = perf_counter()
        batch = engine.buffers[Role.SMALL].plan(scheduler, 0, 1, 1e3 * start)
        planned = perf_counter()
        assert batch is not None
        draws = len(batch.draws)
        begin = perf_counter()
        scheduler.commit(0, ids_of[:draws], none[:draws], 1.0, 1e3 * begin)
        end = perf_counter()
        if batch.num_tokens == sequences == draws:
            plans.append(planned - start)
            commits.append(end - begin)
    return {"plan_us": 1e6 * median(plans), "commit_us": 1e6 * median(commits)}


def ticking(sequences: int, ticks: int, trace: str) -> dict[str, float]:
    """Medians in us of one engine tick under hand-off traffic: all of it, and the part spent in plan() and commit()."""
    traces = workload(trace, sequences)
    engine = _engine(sequences, positions_of(traces))
    watch = _Watch(engine)
    for number, one in enumerate(traces):
        engine.add(choice_of(one, number))
    for _ in range(40):  # prompts, the first hand-offs
        engine.tick()
    whole, inside, events = [], [], []
    for _ in range(ticks):
        watch.spent, watch.events = 0.0, 0
        start = perf_counter()
        engine.tick()
        whole.append(perf_counter() - start)
        inside.append(watch.spent)
        events.append(watch.events)
        if not engine.unfinished:
            break
    total, scheduler = sum(whole) / len(whole), sum(inside) / len(inside)
    return {
        "tick_us": 1e6 * median(whole),
        "mean_tick_us": 1e6 * total,
        "scheduler_us": 1e6 * scheduler,
        "python_share": 1 - scheduler / total,
        "events_per_tick": sum(events) / len(events),
    }


class _Watch:
    """Adds up the time inside plan() and commit()."""

    def __init__(self, engine: Engine) -> None:
        self.spent, self.events = 0.0, 0
        inner = engine.scheduler
        engine.scheduler = _Timed(inner, self)  # type: ignore[assignment]


class _Timed:
    def __init__(self, inner: Any, watch: _Watch) -> None:
        self._inner, self._watch = inner, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def plan(self, *arrays: Any, **options: Any) -> Any:
        start = perf_counter()
        found = self._inner.plan(*arrays, **options)
        self._watch.spent += perf_counter() - start
        return found

    def commit(self, *arguments: Any) -> Any:
        start = perf_counter()
        found = self._inner.commit(*arguments)
        self._watch.spent += perf_counter() - start
        self._watch.events += len(found)
        return found


def _engine(sequences: int, positions: int, tokens: int = 2048) -> Engine:
    pages = sequences * (-(-positions // PAGE) + 1)
    config = EngineConfig(
        page_size=PAGE, max_num_seqs=sequences, max_num_batched_tokens=max(tokens, 4 * sequences), depth=1,
        handoff_patience=0.0,
    )  # fmt: skip

    def free(load: Load) -> float:
        return 1.0

    return clock_engine(Pair(free, free), config, Pair(pages, pages), positions, Clock())


def best(runs: Sequence[dict[str, float]], key: str) -> dict[str, float]:
    """The run least disturbed by other work."""
    return min(runs, key=lambda run: run[key])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of sequences."""
    rows = []
    for count in args.sequences:
        steps = max(64, min(args.steps, 400_000 // count))
        plain = best([bare(count, steps, args.context) for _ in range(args.repeats)], "commit_us")
        total = plain["plan_us"] + plain["commit_us"]
        busy = best([ticking(count, min(steps, 200), args.trace) for _ in range(args.repeats)], "mean_tick_us")
        row = {"sequences": count, **plain, "step_us": total, "ns_per_sequence": 1e3 * total / count, **busy}
        rows.append({**row, "target_us": TARGETS.get(count)})
    return rows


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", default="1,64,256,1024,4096", help="default %(default)s")
    parser.add_argument("--steps", type=positive, default=400, help="steps per run, fewer of many sequences (400)")
    parser.add_argument("--context", type=positive, default=256, help="positions every sequence has cached (256)")
    parser.add_argument("--trace", choices=NAMES, default="math", help="hand-offs of the engine's ticks (math)")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--output-json", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; `argv` without the program's name."""
    args = arguments().parse_args(argv)
    try:
        args.sequences = [int(part) for part in args.sequences.split(",")]
    except ValueError:
        args.sequences = []
    if not args.sequences or min(args.sequences) < 1:
        print("scheduler.py: --sequences: expected numbers from 1 up, separated by commas", file=sys.stderr)
        return 2
    rows = measure(args)
    head = [
        "sequences",
        "plan us",
        "commit us",
        "step us",
        "target",
        "ns/sequence",
        "tick us",
        "of it Python",
        "events",
    ]
    show_table(
        f"host cost per step: {args.context} positions cached; ticks under '{args.trace}'",
        head,
        [
            [
                f"{r['sequences']}", f"{r['plan_us']:.1f}", f"{r['commit_us']:.1f}", f"{r['step_us']:.1f}",
                "" if r["target_us"] is None else f"{r['target_us']:g}", f"{r['ns_per_sequence']:.0f}",
                f"{r['mean_tick_us']:.0f}", f"{100 * r['python_share']:.0f} %", f"{r['events_per_tick']:.1f}",
            ]
            for r in rows
        ],
    )  # fmt: skip
    finish({"benchmark": "scheduler", "machine": machine(), "rows": rows}, args.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
