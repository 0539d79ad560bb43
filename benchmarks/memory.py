"""What should happen to the idle model's cache when memory runs out? Tokens per second, for less and less memory.

    PYTHONPATH=src python benchmarks/memory.py                              the embedded pair, 16 requests at a time
    ... memory.py --small random-5m --large random-100m --requests 8 --max-tokens 48
    ... memory.py --plot out.png --output-json out.json

    recompute   pages are lent on; what nobody took is found again in the prefix cache, the rest is run again
    drop        the same without a prefix cache: all of it is run again
    swap        pages are copied to host memory and back, to the bit
    fp8         pages are kept in a byte per value where the cache is; not exact

Memory is given in sequences: how many of full length both caches could hold at once. All settings serve the same
requests in turns. "Run again" counts tokens that went through a model beyond those of the run with plenty of memory.
The second table is a prediction from geometry: what one idle sequence takes, and how long it takes to have it back.

The last line is one JSON document. Exit code 2: wrong input, or the pair does not fit (one line on standard error).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Spread, finish, show_table
from sweep import Load, Ran, Sweep, add_pair_arguments, describe_settings, figures, share_that_differs
from traces import NAMES

from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError, SplitDecodeError
from splitdecode.models import geometry
from splitdecode.plan import EXPECTED, GPUS, compute_ms, step_ms
from splitdecode.plots import load_pyplot

POLICIES: dict[str, dict[str, Any]] = {
    "recompute": {"idle_cache": "recompute"},
    "drop": {"idle_cache": "recompute", "enable_prefix_caching": False},
    "swap": {"idle_cache": "swap"},
    "fp8": {"idle_cache": "fp8"},
}
CONTEXTS = (1024, 4096, 16384, 32768)
BUS = 55e9  # bytes/s that copies over PCIe 5 x16 reach
FREE_TOKENS = 160  # ride along with a step that is taken anyway


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every policy at every size."""
    policies = _names(args.policies, POLICIES, "--policies")
    held = sorted({_number(text) for text in args.sequences.split(",")}, reverse=True)
    load = Load(args.trace, args.requests, args.concurrency or args.requests)
    sweep = Sweep(args, [load])
    plenty = 2.0 * load.concurrency
    works = {"plenty": (sweep.decoder(load.concurrency, plenty), load)}
    for count in held:
        for policy in policies:
            shelf = {"idle_cache_memory": max(1, int(load.concurrency * sweep.sequence_bytes))}
            engine = sweep.decoder(load.concurrency, count, **shelf, **POLICIES[policy])
            works[f"{policy}, {count:g}"] = (engine, load)
    took, runs = sweep.race(works)
    exact = runs["plenty"][-1]
    base = {"policy": "plenty", "sequences": plenty, **_figures(works["plenty"][0], took["plenty"], runs["plenty"])}
    found = [base]
    for name in list(works)[1:]:
        policy, count = name.split(", ")
        row = {"policy": policy, "sequences": float(count), **_figures(works[name][0], took[name], runs[name])}
        found.append(row | _against(runs[name], exact))
    return {
        **describe_settings(args, sweep),
        "machine": sweep.machine,
        "load": {"trace": load.trace, "requests": load.requests, "concurrency": load.concurrency},
        "sequence_bytes": sweep.sequence_bytes,
        "runs": found,
    }


def _figures(decoder: SplitDecoder, took: Any, runs: list[Ran]) -> dict[str, Any]:
    shelves = [runner.cache.shelf for runner in decoder.engine.runners]
    return {
        **figures(took, runs),
        "cache_bytes": decoder.memory.caches[0].kv.untyped_storage().nbytes(),
        "shelf_bytes": sum(shelf.bytes for shelf in shelves if shelf is not None),
    }


def _against(runs: list[Ran], exact: Ran) -> dict[str, Any]:
    """What it took beyond the run with plenty of memory, and whether the answers are the same."""
    again = [sum(run.tokens_run) - sum(exact.tokens_run) for run in runs]
    return {
        "run_again": sorted(again)[len(again) // 2],
        "tokens_that_differ": max(share_that_differs(run.answers, exact.answers) for run in runs),
    }


def predict(small: str, large: str, gpu_name: str) -> dict[str, Any]:
    """By geometry: bytes of one idle sequence of the large model, and milliseconds to have its positions back."""
    gpu, config = GPUS[gpu_name], geometry.preset(large)
    per_token, values = geometry.kv_bytes(config), geometry.kv_bytes(config) // 2
    byte_each = values + values // config.head_dim * 4  # a byte per value, a scale per head
    rows = []
    for context in CONTEXTS:
        weights = step_ms(config, gpu, 0)
        again = max(weights, compute_ms(config, gpu, context, 0) / EXPECTED.catch_up) if context > FREE_TOKENS else 0.0
        rows.append(
            {
                "context": context,
                "cache_bytes": context * per_token,
                "fp8_bytes": context * byte_each,
                "small_cache_bytes": context * geometry.kv_bytes(geometry.preset(small)),
                "recompute_ms": again,
                "swap_ms": 1e3 * context * per_token / BUS,
                "fp8_ms": 1e3 * context * (per_token + byte_each) / gpu.bandwidth,
            }
        )
    return {"prediction": True, "small": small, "large": large, "gpu": gpu.label, "source": gpu.source, "rows": rows}


def _names(text: str, known: dict[str, Any], option: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(known):
        raise RequestError(f"{option}: found {text!r}, expected some of {','.join(known)}")
    return names


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number >= 1.0:
        raise RequestError(f"--sequences: found {text!r}, expected numbers from 1 up, separated by commas")
    return number


def show(document: dict[str, Any]) -> None:
    """Tables for people."""
    load, pair = document["load"], document["pair"]
    title = f"{pair['small']} + {pair['large']}, {load['trace']}, {load['concurrency']} at a time"
    head = ["policy", "sequences", "tokens/s CPU", "quartiles", "run again", "evicted", "preempted", "stall ms p50/p99"]
    head += ["caches MB", "shelf MB", "differ"]
    show_table(title, head, [_row(run) for run in document["runs"]])
    found = document["predicted"]
    rows = [
        [
            f"{row['context']}",
            f"{row['cache_bytes'] / 1e9:.2f}",
            f"{row['fp8_bytes'] / 1e9:.2f}",
            f"{row['recompute_ms']:.0f}",
            f"{row['swap_ms']:.1f}",
            f"{row['fp8_ms']:.2f}",
        ]
        for row in found["rows"]
    ]
    head = ["positions", "cache GB", "fp8 GB", "recompute ms", "swap ms", "fp8 ms"]
    show_table(f"predicted: one idle sequence of {found['large']} on {found['gpu']}", head, rows)


def _row(run: dict[str, Any]) -> list[str]:
    cpu: Spread = run["cpu_ms"]
    stall, speed = run["seam_stall_ms"], run["tokens_per_second"]["cpu"]
    if run["stuck"]:
        return [run["policy"], f"{run['sequences']:g}", "stuck", *[""] * 8]
    return [
        run["policy"],
        f"{run['sequences']:g}",
        f"{speed:.0f}",
        f"{speed * cpu.median / cpu.high:.0f}-{speed * cpu.median / cpu.low:.0f}",
        f"{run.get('run_again', 0)}",
        f"{run['idle_evictions']}",
        f"{run['preemptions']}",
        f"{stall['p50']:.3g} / {stall['p99']:.3g}" if stall["count"] else "",
        f"{run['cache_bytes'] / 1e6:.2f}",
        f"{run['shelf_bytes'] / 1e6:.2f}",
        f"{100 * run.get('tokens_that_differ', 0.0):.1f} %",
    ]


def plot(document: dict[str, Any], file: Path) -> None:
    """Measured: tokens per second over memory. Predicted: milliseconds to have a sequence back over its length."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for policy in POLICIES:
        runs = [run for run in document["runs"] if run["policy"] == policy and not run["stuck"]]
        if runs:
            left.plot(
                [r["sequences"] for r in runs], [r["tokens_per_second"]["cpu"] for r in runs], marker="o", label=policy
            )
    left.axhline(
        document["runs"][0]["tokens_per_second"]["cpu"], color="black", linestyle=":", label="plenty of memory"
    )
    left.set_xscale("log")
    left.minorticks_off()
    counts = sorted({run["sequences"] for run in document["runs"][1:]})
    left.set_xticks(counts, [f"{count:g}" for count in counts])
    left.set_xlabel("memory, in sequences of full length")
    left.set_ylabel("output tokens per second (CPU time)")
    pair, host, load = document["pair"], document["machine"], document["load"]
    left.set_title(
        f"{pair['small']} + {pair['large']}, {load['concurrency']} at a time\n{host.get('gpu') or host['cpu']}, "
        f"{host['threads']} thread(s), {host['date']}",
        fontsize=9,
    )
    rows = document["predicted"]["rows"]
    for policy in ("recompute", "swap", "fp8"):
        right.plot([r["context"] for r in rows], [r[f"{policy}_ms"] for r in rows], marker="o", label=policy)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("positions of the idle sequence")
    right.set_ylabel("ms until they are back")
    found = document["predicted"]
    right.set_title(f"predicted: {found['large']} on {found['gpu']}, bf16", fontsize=9)
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser, 160)
    add = parser.add_argument
    add("--trace", choices=NAMES, default="math", help="hand-offs (default %(default)s)")
    add("--requests", type=int, default=16, help="requests of a run (16)")
    add("--concurrency", type=int, default=0, help="of them at a time (0: all)")
    add("--policies", default=",".join(POLICIES), help="default %(default)s")
    add("--sequences", default="12,8,5,3,2,1.3", help="memory of the runs, in sequences (default %(default)s)")
    add("--predict", default="1.5b,32b,h200", help="small and large preset and GPU (default %(default)s)")
    add("--output-json", type=Path, help="also write the document here")
    add("--plot", type=Path, help="draw the figures into this PNG")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; `argv` without the program's name."""
    args = arguments().parse_args(argv)
    try:
        if args.plot:
            load_pyplot()  # a missing package is told before minutes of measuring
        names = args.predict.split(",")
        if len(names) != 3 or names[2] not in GPUS:
            raise RequestError(f"--predict: found {args.predict!r}, expected two presets and one of {','.join(GPUS)}")
        predicted = predict(*names)
        document = {"benchmark": "memory", **measure(args), "predicted": predicted}
    except SplitDecodeError as error:
        print(f"memory.py: {error}", file=sys.stderr)
        return 2
    show(document)
    if args.plot:
        plot(document, args.plot)
    finish(document, args.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
