"""A simulator that shares the scheduler: the compiled scheduler and the engine on models that only cost time.

    PYTHONPATH=src python benchmarks/simulate.py              1.5b + 32b on an H200: hand-off batching, by streams
    ... simulate.py --check                                   against the real engine on this CPU, same run
    ... simulate.py --fleet --streams 1000,100000,1000000     pools of small and large GPUs, by mean values

Costs on a GPU are a roofline (clockwork.py) at the shares of the floor that plan.py expects: predictions. --check fits
costs to the steps of a real run (clockwork.Fitted: medians of alike steps), drives the same scheduler by them, and
compares tokens per second for three traces and four batch sizes: the error of the simulator, scheduling included.

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arrivals import closed_loop
from clockwork import choice_of, clock_engine, positions_of, roofline_pair
from fleet import Stream, best_fleet, capacity
from harness import finish, machine, show_table
from latency import positive
from recorded import check
from serving import Watch
from traces import NAMES, Trace, workload

from splitdecode.config import EngineConfig
from splitdecode.errors import SplitDecodeError
from splitdecode.models import geometry
from splitdecode.plan import GPUS, RESERVE_BYTES, Gpu
from splitdecode.plots import load_pyplot
from splitdecode.split.policies import HandoffPolicy, LargeOnly, SmallOnly
from splitdecode.split.roles import Pair

PAGE = 64


def simulate(
    names: tuple[str, str],
    gpu: Gpu,
    traces: Sequence[Trace],
    streams: int,
    policy: HandoffPolicy | None = None,
    **knobs: Any,
) -> dict[str, Any]:
    """One run, `streams` at a time: tokens/s, latencies, occupancy. knobs: EngineConfig's."""
    config = EngineConfig(
        **{
            "page_size": PAGE, "max_num_seqs": streams, "max_num_batched_tokens": 2048, "depth": 1,
            "weight_bound_tokens": 160, "enable_prefix_caching": False, **knobs,
        }
    )  # fmt: skip
    configs = [geometry.preset(name) for name in names]
    left = gpu.memory - RESERVE_BYTES - sum(2 * geometry.parameters(c) for c in configs)
    pages = int(left // (PAGE * sum(geometry.kv_bytes(c) for c in configs)))
    engine = clock_engine(roofline_pair(names, gpu), config, Pair(pages, pages), positions_of(traces))
    with Watch(engine) as watch:
        closed_loop(engine, [choice_of(t, n, policy) for n, t in enumerate(traces)], streams, watch.look)
    seconds = engine.clock()
    work = watch.work()
    found = {"tokens_per_second": work["tokens"] / seconds, "seconds": seconds, **work, **watch.latencies()}
    return {**found, "idle_evictions": engine.scheduler.idle_evictions}


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Latency first against throughput first, and each model alone, by streams."""
    names, gpu, rows = (args.small, args.large), GPUS[args.gpu], []
    for streams in args.streams:
        traces = [replace(t, seed=n) for n, t in enumerate(_traces(args, 2 * streams))]
        for label, policy, knobs in (
            ("latency first", None, {"handoff_patience": 0.0}),
            ("patience 0.25", None, {"handoff_patience": 0.25}),
            ("default", None, {}),
            ("no wait bound", None, {"handoff_max_wait_ms": 1e9}),
            ("small alone", SmallOnly(), {}),
            ("large alone", LargeOnly(), {}),
        ):
            found = simulate(names, gpu, traces, streams, policy, **knobs)
            rows.append({"streams": streams, "mode": label, **found})
    return rows


def _traces(args: argparse.Namespace, count: int) -> list[Trace]:
    return [trace.scaled(args.max_tokens) for trace in workload(args.trace, count, args.seed)]


def show_sweep(rows: Sequence[dict[str, Any]], title: str) -> None:
    """One line per run."""
    head = ["streams", "hand-offs", "tokens/s", "ITL small p50/p99", "ITL large p50/p99", "stall p50/p99", "rows s/l"]

    def pair(values: dict[str, Any]) -> str:
        return "" if values["p50"] is None else f"{values['p50']:.1f} / {values['p99']:.1f}"

    def mean_rows(row: dict[str, Any]) -> str:
        return " / ".join(f"{row['occupancy'][r]['rows_per_forward'] or 0:.1f}" for r in ("small", "large"))

    show_table(
        title,
        head,
        [
            [
                str(r["streams"]), r["mode"], f"{r['tokens_per_second']:.0f}", pair(r["itl_ms"]["small"]),
                pair(r["itl_ms"]["large"]), pair(r["seam_stall_ms"]), mean_rows(r),
            ]
            for r in rows
        ],
    )  # fmt: skip


def fleets(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The fewest GPUs for so many streams at so many ms per token, for traces of 1.35, 5 and 20 % offload."""
    names, gpu, out = (args.small, args.large), GPUS[args.gpu], []
    costs = roofline_pair(names, gpu)
    most = Pair(capacity(names[0], gpu, args.context), capacity(names[1], gpu, args.context))
    for streams in args.streams:
        for share in (0.0135, 0.05, 0.20):
            stream = Stream(args.segment * (1 - share) / share, args.segment, args.context)
            fleet = best_fleet(costs, stream, streams, most, args.limit_ms)
            row: dict[str, Any] = {"streams": streams, "offload": share, "limit_ms": args.limit_ms}
            out.append({**row, **({} if fleet is None else fleet.describe())})
    return out


def show_fleets(rows: Sequence[dict[str, Any]], title: str) -> None:
    """One line per fleet."""
    table = []
    for r in rows:
        name = [f"{r['streams']}", f"{100 * r['offload']:g} %"]
        if "gpus" not in r:
            table.append([*name, "none is enough", "", "", "", "", ""])
            continue
        gpus, batch = r["gpus"], r["batch"]
        table.append([
            *name, f"{gpus['small']} + {gpus['large']}", f"{gpus['small'] / gpus['large']:.2f}",
            f"{batch['small']:.0f} / {batch['large']:.0f}", f"{r['token_ms']:.2f}", f"{r['stall_ms']:.0f}",
            f"{r['tokens_per_second_per_gpu']:.0f}",
        ])  # fmt: skip
    head = ["streams", "offload", "GPUs small + large", "ratio", "batch s / l", "ms/token", "stall ms", "tokens/s/GPU"]
    show_table(title, head, table)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Tokens per second and seam stall by streams, a line per mode."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        streams = [row["streams"] for row in mine]
        axes[0].plot(streams, [row["tokens_per_second"] for row in mine], marker="o", label=mode)
        if all(row["seam_stall_ms"]["p50"] is not None for row in mine):
            axes[1].plot(streams, [row["seam_stall_ms"]["p50"] for row in mine], marker="o", label=f"{mode}, p50")
            axes[1].plot(streams, [row["seam_stall_ms"]["p99"] for row in mine], ls=":", label=f"{mode}, p99")
    axes[0].set(xlabel="streams", ylabel="tokens per second", xscale="log", yscale="log")
    axes[1].set(xlabel="streams", ylabel="seam stall, ms", xscale="log", yscale="log")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--check", action="store_true", help="against the real engine, on this CPU")
    kind.add_argument("--fleet", action="store_true", help="pools of GPUs, by mean values")
    add("--small", default="1.5b", choices=geometry.preset_names())
    add("--large", default="32b", choices=geometry.preset_names())
    add("--gpu", default="h200", choices=list(GPUS))
    add("--trace", default="math", choices=NAMES)
    add("--max-tokens", type=positive, default=2800, help="answers are scaled to this (2800)")
    add("--streams", help="at a time (16,64,256; with --fleet 1000,100000,1000000)")
    add("--seed", type=int, default=0)
    add("--context", type=positive, default=4096, help="--fleet: positions a stream has cached (4096)")
    add("--segment", type=positive, default=97, help="--fleet: tokens the large model writes at a time (97)")
    add("--limit-ms", type=float, default=10.0, help="--fleet: ms per token a stream may take (10)")
    add("--batches", default="1,4,16,64", help="--check: requests at a time (default %(default)s)")
    add("--iters", type=positive, default=3, help="--check: runs of each (3)")
    add("--output-json", type=Path)
    add("--plot", type=Path, help="draw the sweep into this PNG")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the simulator; `argv` without the program's name."""
    args = arguments().parse_args(argv)
    try:
        args.streams = _numbers(args.streams or ("1000,100000,1000000" if args.fleet else "16,64,256"))
        args.batches = _numbers(args.batches)
        if args.plot:
            load_pyplot()
        document: dict[str, Any] = {"benchmark": "simulate", "machine": machine()}
        where = f"{args.small} + {args.large} on {GPUS[args.gpu].label}"
        if args.check:
            document |= check(args.batches, args.iters, args.seed)
        elif args.fleet:
            document |= {"prediction": True, "fleets": fleets(args)}
            show_fleets(document["fleets"], f"{where}: fewest GPUs, {args.limit_ms:g} ms per token (predicted)")
        else:
            document |= {"prediction": True, "runs": sweep(args)}
            show_sweep(document["runs"], f"{where}, trace {args.trace} (predicted); latencies in ms")
            if args.plot:
                plot(document["runs"], args.plot)
    except SplitDecodeError as error:
        print(f"simulate.py: {error}", file=sys.stderr)
        return 2
    finish(document, args.output_json)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise SplitDecodeError(f"--streams, --batches: found {text!r}, expected numbers from 1 up, with commas")
    return found


if __name__ == "__main__":
    sys.exit(main())
