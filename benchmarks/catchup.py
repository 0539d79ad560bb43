"""When should the large model run what the small one wrote: at the hand-off, or before? Stalls against wasted tokens.

    PYTHONPATH=src python benchmarks/catchup.py --traces own                  the embedded pair, its own tags
    ... catchup.py --small random-5m --large random-100m --drawn              a pair whose catch-up costs something
    ... catchup.py --small random-5m --large random-100m --drawn --alarm-every 20

    lazy       at the hand-off, all at once
    eager      before it: in the room steps of the large model have (weight-bound tokens), or when a chunk has gathered
    adaptive   in that room, or at once when an opening tag becomes likely

Adaptive goes by the small model's probabilities. Those tell nothing of forced hand-offs (neither own nor drawn): under
random weights it is lazy there, but for the room. A tag of one token is seen coming in the draw that completes it.

A stall is the time from the opening tag to the first token behind it. "Ahead" counts tokens of the large model beyond
those of lazy: what it ran for answers that never asked it again. "Steps" are those of the large model. Batch sizes and
traces are runs of their own, all settings in turns. The last line is one JSON document. Exit code 2: wrong input, or
the pair does not fit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import finish, show_table
from sweep import OWN, Load, Ran, Sweep, add_pair_arguments, describe_settings, figures, share_that_differs
from traces import NAMES

from splitdecode.errors import RequestError, SplitDecodeError
from splitdecode.split.roles import Role

MODES = ("lazy", "eager", "adaptive")


def settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """EngineConfig's fields of every setting, by name; lazy knows neither chunk nor room, adaptive no chunk."""
    modes = args.modes.split(",")
    if modes[0] != "lazy" or not set(modes) <= set(MODES):
        raise RequestError(f"--modes: found {args.modes!r}, expected lazy and some of {','.join(MODES[1:])}")
    chunks, rooms = (_numbers(getattr(args, name), name) for name in ("chunks", "rooms"))
    out: dict[str, dict[str, Any]] = {"lazy": {"catch_up": "lazy"}}
    for mode in modes[1:]:
        for chunk in chunks if mode == "eager" else [None]:
            for room in rooms:
                fields: dict[str, Any] = {"catch_up": mode, "weight_bound_tokens": room}
                if chunk is not None:
                    fields["catch_up_chunk"] = chunk
                out[f"{mode}{'' if chunk is None else f', chunk {chunk}'}, room {room}"] = fields
    return out


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every setting under every load."""
    fields = settings(args)
    known = (*NAMES, OWN)
    if not set(args.traces.split(",")) <= set(known):
        raise RequestError(f"--traces: found {args.traces!r}, expected some of {','.join(known)}")
    loads = [
        Load(trace, max(args.requests, size), size, args.drawn and trace != OWN, args.alarm_every)
        for trace in args.traces.split(",")
        for size in _numbers(args.concurrency, "concurrency")
    ]
    sweep = Sweep(args, loads)
    rows = []
    for load in loads:
        works = {name: (sweep.decoder(load.concurrency, **engine), load) for name, engine in fields.items()}
        took, runs = sweep.race(works)
        lazy = runs["lazy"][-1]
        for name, engine in fields.items():
            rows.append(
                {
                    "trace": load.trace,
                    "concurrency": load.concurrency,
                    "requests": load.requests,
                    "hand_offs": "own" if load.trace == OWN else "drawn" if load.drawn else "forced",
                    "setting": name,
                    **engine,
                    **figures(took[name], runs[name]),
                    "ahead": _ahead(runs[name], lazy),
                    "large_steps": runs[name][-1].watch.loads[Role.LARGE].forwards,
                    "tokens_that_differ": max(share_that_differs(run.answers, lazy.answers) for run in runs[name]),
                }
            )
    return {**describe_settings(args, sweep), "machine": sweep.machine, "runs": rows}


def _ahead(runs: list[Ran], lazy: Ran) -> int:
    """Tokens the large model ran beyond lazy's: the median over the runs."""
    found = sorted(run.tokens_run[Role.LARGE] - lazy.tokens_run[Role.LARGE] for run in runs)
    return found[len(found) // 2]


def _numbers(text: str, name: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < (0 if name == "rooms" else 1):
        raise RequestError(f"--{name}: found {text!r}, expected whole numbers separated by commas")
    return numbers


def show(document: dict[str, Any]) -> None:
    """A table for people."""
    pair = document["pair"]
    head = ["trace", "at a time", "setting", "stall ms p50", "p99", "seams", "ahead", "steps"]
    head += ["tokens/s CPU", "quartiles"]
    rows = []
    for run in document["runs"]:
        stall, speed, cpu = run["seam_stall_ms"], run["tokens_per_second"]["cpu"], run["cpu_ms"]
        rows.append(
            [
                run["trace"],
                f"{run['concurrency']}",
                run["setting"],
                *(f"{stall[share]:.3g}" if stall["count"] else "" for share in ("p50", "p99")),
                f"{stall['count']}",
                f"{run['ahead']}",
                f"{run['large_steps']}",
                f"{speed:.1f}",
                f"{speed * cpu.median / cpu.high:.1f}-{speed * cpu.median / cpu.low:.1f}",
            ]
        )
    show_table(f"{pair['small']} + {pair['large']}: when to catch up", head, rows)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser, 128)
    add = parser.add_argument
    add("--traces", default="math,minimal", help=f"of {','.join((*NAMES, OWN))} (default %(default)s)")
    add("--drawn", action="store_true", help="the small model writes the traces' tags, in pieces (random weights)")
    add("--alarm-every", type=int, default=0, help="--drawn: tokens of the small model to a false alarm (0: none)")
    add("--concurrency", default="1,16", help="requests at a time (default %(default)s)")
    add("--requests", type=int, default=4, help="requests of a run, at least as many as run at a time (4)")
    add("--modes", default=",".join(MODES), help="default %(default)s")
    add("--chunks", default="8,32,128", help="catch_up_chunk (default %(default)s)")
    add("--rooms", default="0,16", help="weight_bound_tokens (default %(default)s)")
    add("--output-json", type=Path, help="also write the document here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; `argv` without the program's name."""
    args = arguments().parse_args(argv)
    try:
        document = {"benchmark": "catchup", **measure(args)}
    except SplitDecodeError as error:
        print(f"catchup.py: {error}", file=sys.stderr)
        return 2
    show(document)
    finish(document, args.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
