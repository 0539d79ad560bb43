"""How long a token takes at batch 1: each model alone, both together, and the same work on transformers.

    PYTHONPATH=src python benchmarks/latency.py                                   the embedded pair, by its own tags
    ... latency.py --compare transformers --plot out.png                          and a peer, and a picture
    ... latency.py --small random-5m --large random-100m --trace math             random weights, forced hand-offs
    ... latency.py --small 1.5b --large 32b                                       on a GPU: the headline (headline.py)
    ... latency.py --small 1.5b --large 32b --device cuda --trace aime --max-tokens 0 --end-to-end

Batch-1 decoding is bound by streaming weights: a token costs at least weight bytes / memory bandwidth. That floor is
measured on this machine and shown beside every figure, with the share of it that was reached (MBU). Times are end to
end: greedy, prompt included, prefix cache off. A trace puts hand-offs where traffic has them (traces.py), scaled to
--max-tokens; the split mode then pays for tags, for reading along and for large tokens written beyond a close.

The last line is one JSON document. Exit code 2: wrong input, or the pair does not fit (one line on standard error).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import headline
import torch
from harness import Bar, Spread, bar_plot, finish, show_table
from measure import Measurement
from runs import MODES
from traces import NAMES

from splitdecode.decoder import DTYPES
from splitdecode.errors import SplitDecodeError
from splitdecode.plots import load_pyplot


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--small", default="demo", help="demo, random-5m, a preset (1.5b) or a checkpoint directory (default demo)")
    add("--large", default="demo", help="the same for the large model: random-100m, 32b, ...")
    add("--trace", choices=NAMES, help="forced hand-offs (default: the embedded pair's own tags; math for other pairs)")
    add("--seed", type=int, default=0, help="which trace, which problems (default 0)")
    add("--modes", default=",".join(MODES), help="default %(default)s")
    add("--compare", choices=["transformers"], help="the same work on another library")
    add("--probe", action="store_true", help="forced hand-offs: the peer asks the small model at every large token")
    add("--max-tokens", "--output-len", type=natural, default=256, help="scale the trace to this, 0: do not (256)")
    add("--input-len", type=natural, default=0, help="tokens of the prompt (default: the trace's, scaled)")
    add("--problems", type=positive, default=4, help="problems for the embedded pair's own tags (4)")
    add("--num-iters", type=positive, default=5, help="counted runs (5)")
    add("--num-iters-warmup", type=natural, default=1, help="runs before them (1)")
    add("--threads", type=natural, default=1, help="threads torch computes with, 0: its own choice (1)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: the file's; presets bfloat16, else float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--page-size", type=positive, help="positions per cache page (16; on a GPU 64)")
    add("--read-interval", type=positive, default=4, help="large tokens between two readings (4)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--headline", action="store_true", default=None, help="time per token at --context (on a GPU)")
    kind.add_argument("--end-to-end", dest="headline", action="store_false", help="whole requests (on a CPU)")
    add("--context", type=positive, default=4096, help="headline: positions before the middle of an answer (4096)")
    add("--offload", default="1.35,5,20", help="headline: percentages the large model writes (%(default)s)")
    add("--segment", type=positive, default=32, help="headline: tokens the large model writes at a time (32)")
    add("--catch-ups", default="64,128,256,512,1000,2048", help="headline: tokens caught up at once (%(default)s)")
    add("--steps-per-graph", type=positive, default=1, help="decode steps in one captured graph (1)")
    add("--enforce-eager", action="store_true", help="no captured graphs")
    add("--programmatic-launch", action="store_true", help="programmatic dependent launch")
    add("--l2-prefetch", action="store_true", help="next weights into the L2 during attention")
    add("--output-json", type=Path, help="also write the document here")
    add("--plot", type=Path, help="draw the figures into this PNG")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; `argv` without the program's name."""
    args = arguments().parse_args(argv)
    cuda = args.device.startswith("cuda")
    args.page_size = args.page_size or (64 if cuda else 16)
    try:
        if args.headline or (args.headline is None and cuda and args.small != "demo"):
            return headline.run(args)
        if args.plot:
            load_pyplot()  # a missing package is told before an hour of measuring
        measurement = Measurement(args)
        measurement.run()
    except SplitDecodeError as error:
        print(f"latency.py: {error}", file=sys.stderr)
        return 2
    document = measurement.document()
    show(document)
    if args.plot:
        plot(document, args.plot)
    finish(document, args.output_json)
    return 0


def show(document: dict[str, Any]) -> None:
    """Tables for people."""
    host, pair = document["machine"], document["pair"]
    speeds = ", ".join(f"{name} {value:.1f}" for name, value in host["bandwidth_gbps"].items())
    print(f"{host.get('gpu') or host['cpu']}, {host['threads']} thread(s); memory GB/s: {speeds}")
    for role, model in pair.items():
        print(
            f"{role}: {model['name']} {model['dtype']}, {model['weight_bytes_per_token'] / 1e6:.1f} MB a token at "
            f"{model['read_gbps']:.1f} GB/s: floor {model['floor_ms_per_token']:.3f} ms"
        )
    rows = [_row("splitdecode", mode, found) for mode, found in document["modes"].items()]
    ratios = document["times_faster_than_peer"]
    for peer, loops in document["peers"].items():
        rows += [_row(peer, loop, found, ratios[loop]) for loop, found in loops.items()]
    head = ["", "mode", "ms/token CPU", "quartiles", "wall", "tokens/s", "floor", "MBU", "x slower"]
    show_table("ms per token, end to end", head, rows)
    rows = [_work(mode, role, m) for mode, found in document["modes"].items() for role, m in found["models"].items()]
    head = ["mode", "model", "tokens", "ms/token", "forwards", "catch-up tokens/forwards", "ms", "read", "discarded"]
    show_table("work by model (wall)", head, [row for row in rows if row])
    if split := document["modes"].get("split"):
        stall = split["seam_stall_ms"]
        if stall["count"]:
            print(
                f"offload {100 * split['offload_fraction']:.1f} %, {split['handoffs']} hand-offs, "
                f"seam stall p50 {stall['p50']:.2f} ms, p95 {stall['p95']:.2f} ms"
            )


def _row(who: str, mode: str, found: dict[str, Any], ratio: float | None = None) -> list[str]:
    cpu, wall = found["cpu_ms_per_token"], found["wall_ms_per_token"]
    return [
        who,
        mode,
        f"{cpu.median:.3f}",
        f"{cpu.low:.3f}-{cpu.high:.3f}",
        f"{wall.median:.3f}",
        f"{found['tokens_per_second']:.1f}",
        f"{found['floor_ms_per_token']:.3f}",
        f"{100 * found['roofline_share']:.0f} %",
        "" if ratio is None else f"{ratio:.2f}",
    ]


def _work(mode: str, role: str, m: dict[str, Any]) -> list[str] | None:
    if not m["forwards"]:
        return None
    each = "-" if m["ms_per_token"] is None else f"{m['ms_per_token']:.3f}"
    caught = f"{m['catch_up_tokens']} / {m['catch_up_forwards']}"
    numbers = [f"{m['catch_up_ms']:.1f}", f"{m['read_tokens']}", f"{m['discarded_tokens']}"]
    return [mode, role, f"{m['tokens']}", each, f"{m['forwards']}", caught, *numbers]


def plot(document: dict[str, Any], file: Path) -> None:
    """Bars by mode and system, with the floor of each."""
    clock = document["settings"]["trusted_clock"]

    def bar(mode: str, label: str, found: dict[str, Any]) -> Bar:
        height: Spread = found[f"{clock}_ms_per_token"]
        return Bar(mode, label, height, found["floor_ms_per_token"])

    bars = [bar(mode, "splitdecode", found) for mode, found in document["modes"].items()]
    for peer, loops in document["peers"].items():
        for loop, found in loops.items():
            mode, kind = loop.split(", ", 1)
            bars.append(bar(mode, peer if kind == "alone" else f"{peer}: {kind}", found))
    pair, host = document["pair"], document["machine"]
    names = f"{pair['small']['name']} + {pair['large']['name']}, {document['trace']['name']}"
    where = f"{host.get('gpu') or host['cpu']}, {host['threads']} thread(s), {host['date']}"
    bar_plot(bars, f"{names}\n{where}", f"ms per token ({clock} time, quartiles)", file)


def natural(text: str) -> int:
    """A whole number of a command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if natural(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
