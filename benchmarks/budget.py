"""What a budget for the large model costs in right answers: the embedded pair under targets for its share of tokens.

    PYTHONPATH=src python benchmarks/budget.py                                    targets 0 to 4 %, and no target
    ... budget.py --temperature 1 --max-num-seqs 4 --targets 2,4 --plot out.png

Each target is a run of its own: a fresh engine, the same problems, max_offload_fraction (docs/handoff.md, Budgets). The
share is the mean over answers; an answer is right when the number in its box is. Tokens per second count both models'
tokens against process CPU time and against wall time.

The last line is one JSON document. Exit code 2: wrong input (one line on standard error).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from harness import clock, finish, machine, show_table, use_threads

from splitdecode.config import SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError, SplitDecodeError
from splitdecode.families import Problem, boxed, problems
from splitdecode.plots import load_pyplot


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--targets", default="0,0.5,1,1.5,2,2.5,3,3.5,4,4.5", help="percentages, beside no target (%(default)s)")
    add("--problems", type=int, default=500, help="answers per target (500)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    add("--max-tokens", type=int, default=400, help="of an answer (400)")
    add("--max-num-seqs", type=int, default=64, help="answers abreast (64)")
    add("--seed", type=int, default=0, help="which problems, which draws (0)")
    add("--threads", type=int, default=1, help="threads torch computes with, 0: its own choice (1)")
    add("--output-json", type=Path, help="also write the document here")
    add("--plot", type=Path, help="draw rate and accuracy into this PNG")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; `argv` without the program's name."""
    args = arguments().parse_args(argv)
    use_threads(args.threads)
    try:
        if args.plot:
            load_pyplot()
        targets = percentages(args.targets)
        if args.problems < 1:
            raise RequestError(f"--problems: found {args.problems}, expected at least 1")
        tasks = problems(args.problems, args.seed)
        measure(args, tasks[: args.max_num_seqs], None)  # the first forwards of a process are slow
        runs = [measure(args, tasks, target) for target in targets]
    except SplitDecodeError as error:
        print(f"budget.py: {error}", file=sys.stderr)
        return 2
    names = ("problems", "temperature", "max_tokens", "max_num_seqs", "seed")
    document = {"machine": machine(), "settings": {name: getattr(args, name) for name in names}, "runs": runs}
    show(document)
    if args.plot:
        plot(document, args.plot)
    finish(document, args.output_json)
    return 0


def percentages(text: str) -> list[float | None]:
    """Shares from 0 to 1, without repeats and in order, then None: no target."""
    try:
        found = sorted({float(part) / 100 for part in text.split(",")})
    except ValueError:
        raise RequestError(f"--targets: found {text!r}, expected percentages, such as 1,2.5,4") from None
    return [*found, None]


def measure(args: argparse.Namespace, tasks: list[Problem], target: float | None) -> dict[str, Any]:
    """All problems under one target, on an engine of their own."""
    params = [
        SamplingParams(
            temperature=args.temperature,
            max_tokens=args.max_tokens,
            seed=args.seed * len(tasks) + index,
            max_offload_fraction=target,
        )
        for index in range(len(tasks))
    ]
    with SplitDecoder.demo(max_num_seqs=args.max_num_seqs) as decoder, clock() as elapsed:
        outputs = decoder.generate([task.prompt for task in tasks], params)
    metrics = [output.metrics for output in outputs]
    tokens = sum(m.tokens for m in metrics)
    reached = mean(m.offload_fraction for m in metrics)
    right = mean(boxed(output.outputs[0].text) == task.answer for output, task in zip(outputs, tasks, strict=True))
    return {
        "target": target,
        "reached": reached,
        "off_by": None if not target else reached / target - 1,
        "accuracy": right,
        "tokens": tokens,
        "handoffs": sum(m.handoffs for m in metrics),
        "rejected_openings": sum(m.rejected_openings for m in metrics),
        "budget_rejections": dict(sum((Counter(m.budget_rejections) for m in metrics), Counter())),
        "tokens_per_cpu_second": 1e3 * tokens / elapsed.cpu_ms,
        "tokens_per_second": 1e3 * tokens / elapsed.wall_ms,
    }


def show(document: dict[str, Any]) -> None:
    """A table for people."""
    settings, host = document["settings"], document["machine"]
    print(f"{host['cpu']}, {host['threads']} thread(s); {settings['problems']} answers a row, {abreast(settings)}")
    rows = [
        [
            "none" if run["target"] is None else f"{100 * run['target']:g} %",
            f"{100 * run['reached']:.3f} %",
            "" if run["off_by"] is None else f"{100 * run['off_by']:+.1f} %",
            f"{100 * run['accuracy']:.1f} %",
            f"{run['handoffs'] / settings['problems']:.2f}",
            f"{run['rejected_openings'] / settings['problems']:.2f}",
            f"{run['tokens'] / settings['problems']:.0f}",
            f"{run['tokens_per_cpu_second']:.0f}",
            f"{run['tokens_per_second']:.0f}",
        ]
        for run in document["runs"]
    ]
    head = ["target", "reached", "off by", "right", "hand-offs", "rejected", "tokens", "tokens/s CPU", "wall"]
    show_table("share of large tokens, per answer", head, rows)


def abreast(settings: dict[str, Any]) -> str:
    """How the answers were drawn and how many ran at once, in words."""
    kind = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    return f"{kind}, {settings['max_num_seqs']} abreast"


def plot(document: dict[str, Any], file: Path) -> None:
    """Right answers over the share that was reached, a thin line at each target."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    runs = sorted(document["runs"], key=lambda run: run["reached"])
    axes.plot([100 * run["reached"] for run in runs], [100 * run["accuracy"] for run in runs], "o-", color="C0")
    for run in runs:
        if run["target"] is None:
            axes.annotate("no target", (100 * run["reached"], 100 * run["accuracy"]), xytext=(-62, -4),
                          textcoords="offset points")  # fmt: skip
        else:
            axes.axvline(100 * run["target"], color="0.8", linewidth=1, zorder=0)
    axes.set_xlabel("share of tokens by the large model, mean over answers (%); grey: targets")
    axes.set_ylabel("right answers (%)")
    settings, host = document["settings"], document["machine"]
    axes.set_title(f"embedded pair, {settings['problems']} answers a point, {abreast(settings)}\n{host['date']}",
                   fontsize=10)  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
