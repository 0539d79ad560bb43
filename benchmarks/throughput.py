"""Many requests on one engine: tokens per second, and how long each request waits for them.

    PYTHONPATH=src python benchmarks/throughput.py                      the embedded pair; 1, 4, 16, 64 at a time
    ... throughput.py --compare transformers --plot out.png             and a peer, and a picture
    ... throughput.py --request-rate 8                                  Poisson arrivals, 8 requests a second
    ... throughput.py --small random-5m --large random-100m --trace math --max-tokens 64
    ... throughput.py --concurrency 16 --modes split --chrome-trace trace.json      every step, for ui.perfetto.dev

Three modes on one engine: the small model alone, the large one alone, both (split). Alone, every request writes
--max-tokens tokens; by the embedded pair's own tags an answer ends where it ends; a trace puts hand-offs where traffic
has them (traces.py), scaled to --max-tokens. The peer runs static batches of the same prompts and as many new tokens;
it cannot batch a split.

Tokens per second come by process CPU time and by wall time (of the whole run; with Poisson arrivals that includes
waiting for requests); latencies by the engine's clock, which is wall time.

The last line is one JSON document. Exit code 2: wrong input, or the pair does not fit (one line on standard error).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from crowd import Crowd
from harness import Bar, Spread, bar_plot, finish, show_table
from latency import natural, positive
from runs import MODES
from traces import NAMES

from splitdecode.decoder import DTYPES
from splitdecode.errors import SplitDecodeError
from splitdecode.plots import load_pyplot
from splitdecode.split.roles import Role


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--small", default="demo", help="demo, random-5m, a preset (1.5b) or a checkpoint directory (default demo)")
    add("--large", default="demo", help="the same for the large model: random-100m, 32b, ...")
    add("--trace", choices=NAMES, help="forced hand-offs (default: the embedded pair's own tags; math for other pairs)")
    add("--seed", type=int, default=0, help="which requests, which arrival times (default 0)")
    add("--modes", default=",".join(MODES), help="default %(default)s")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--concurrency", default="1,4,16,64", help="requests at a time (default %(default)s)")
    kind.add_argument("--request-rate", help="Poisson arrivals: requests per second, or inf: all at once")
    add("--num-prompts", type=positive, help="requests per run (twice as many as run at a time, at least 4; or 64)")
    add("--max-tokens", "--output-len", type=positive, default=160, help="tokens of an answer (160)")
    add("--max-num-seqs", type=positive, default=64, help="Poisson arrivals: requests that run at once (64)")
    add("--lanes", type=natural, default=0, help="answers of full length the caches hold (0: all that may run)")
    add("--no-prefix-caching", action="store_true", help="do not share equal prompts within a run")
    add("--compare", choices=["transformers"], help="the same prompts on another library, in static batches")
    add("--num-iters", type=positive, default=3, help="counted runs (3)")
    add("--num-iters-warmup", type=natural, default=1, help="runs before them (1)")
    add("--threads", type=natural, default=1, help="threads torch computes with, 0: its own choice (1)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: the file's; presets bfloat16, else float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--page-size", type=positive, help="positions per cache page (16; on a GPU 64)")
    add("--read-interval", type=positive, default=4, help="large tokens between two readings (4)")
    add("--chrome-trace", type=Path, metavar="FILE", help="record one more run of the last mode and load")
    add("--output-json", type=Path, help="also write the document here")
    add("--plot", type=Path, help="draw the figures into this PNG")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; `argv` without the program's name."""
    args = arguments().parse_args(argv)
    args.page_size = args.page_size or (64 if args.device.startswith("cuda") else 16)
    try:
        if args.plot:
            load_pyplot()  # a missing package is told before minutes of measuring
        crowd = Crowd(args)
        crowd.run()
    except SplitDecodeError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        return 2
    document = crowd.document()
    show(document)
    if args.plot:
        plot(document, args.plot)
    finish(document, args.output_json)
    return 0


def show(document: dict[str, Any]) -> None:
    """Tables for people."""
    host, ratios = document["machine"], document["times_faster_than"]
    print(
        f"{host.get('gpu') or host['cpu']}, {host['threads']} thread(s); read {host['bandwidth_gbps']['read']:.1f} "
        f"GB/s, products {host['product_gflops']:.0f} GFLOP/s"
    )
    for role, model in document["pair"].items():
        print(f"{role}: {model['name']} {model['dtype']}, weights {model['floor_ms_per_token']:.3f} ms a forward")
    rows = [_rate("splitdecode", run, ratios) for run in document["runs"]]
    for peer, runs in document["peers"].items():
        rows += [_rate(peer, run, {}) for run in runs]
    head = [
        "",
        "mode",
        "load",
        "requests",
        "tokens/s CPU",
        "quartiles",
        "wall",
        "requests/s",
        "x one",
        "x peer",
        "floor",
    ]
    show_table("output tokens per second", head, rows)
    head = ["mode", "load", "TTFT ms", "ITL small", "ITL large", "per token", "seam stall", "request"]
    show_table("p50 / p99 in ms, wall", head, [_waits(run) for run in document["runs"]])
    head = ["mode", "load", "rows small/large", "tokens", "share of steps", "offload", "seams", "preempted", "prefix"]
    show_table("per forward", head, [_fill(run) for run in document["runs"]])


def _rate(who: str, run: dict[str, Any], ratios: dict[str, dict[str, float]]) -> list[str]:
    cpu: Spread = run["cpu_ms"]
    speed = run["tokens_per_second"]
    name = f"{run['mode']}, {run['load']}"
    over = [ratios.get(kind, {}).get(name) for kind in ("one_at_a_time", "peer")]
    return [
        who,
        run["mode"],
        run["load"],
        f"{run['requests']}",
        f"{speed['cpu']:.0f}",
        f"{speed['cpu'] * cpu.median / cpu.high:.0f}-{speed['cpu'] * cpu.median / cpu.low:.0f}",
        f"{speed['wall']:.0f}",
        f"{run['requests_per_second']:.1f}" if "requests_per_second" in run else "",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in over),
        f"{100 * run['roofline_share']:.0f} %" if "roofline_share" in run else "",
    ]


def _waits(run: dict[str, Any]) -> list[str]:
    itl = run["itl_ms"]
    found = [run["ttft_ms"], *(itl[str(role)] for role in Role), run["tpot_ms"], run["seam_stall_ms"]]
    return [run["mode"], run["load"], *map(_shares, [*found, run["request_ms"]])]


def _shares(found: dict[str, Any]) -> str:
    if not found["count"]:
        return ""
    return " / ".join(f"{found[name]:.3g}" for name in ("p50", "p99"))


def _fill(run: dict[str, Any]) -> list[str]:
    both = [run["occupancy"][str(role)] for role in Role]

    def pair(name: str, factor: float = 1.0) -> str:
        return " / ".join("-" if one[name] is None else f"{factor * one[name]:.3g}" for one in both)

    prefix = run["prefix_cache"]
    return [
        run["mode"],
        run["load"],
        pair("rows_per_forward"),
        pair("tokens_per_forward"),
        pair("share_of_steps", 100.0) + " %",
        f"{100 * run['offload_fraction']:.1f} %",
        f"{run['handoffs']}",
        f"{run['preemptions']}",
        f"{prefix['pages_found']} of {prefix['pages_asked']}",
    ]


def plot(document: dict[str, Any], file: Path) -> None:
    """Bars by load and mode, the peer's beside ours."""
    clock = document["settings"]["trusted_clock"]

    def bar(label: str, run: dict[str, Any]) -> Bar:
        took: Spread = run[f"{clock}_ms"]
        tokens = run["tokens_per_second"][clock] * took.median
        return Bar(
            run["load"], label, Spread(*(tokens / ms for ms in (took.median, took.high, took.low)), took.count), None
        )

    bars = [bar(run["mode"], run) for run in document["runs"]]
    for peer, runs in document["peers"].items():
        bars += [bar(f"{peer}: {run['mode']}", run) for run in runs]
    pair, host = document["pair"], document["machine"]
    names = f"{pair['small']['name']} + {pair['large']['name']}, {document['trace']['name']}"
    where = f"{host.get('gpu') or host['cpu']}, {host['threads']} thread(s), {host['date']}"
    bar_plot(bars, f"{names}\n{where}", f"output tokens per second ({clock} time, quartiles)", file)


if __name__ == "__main__":
    sys.exit(main())
