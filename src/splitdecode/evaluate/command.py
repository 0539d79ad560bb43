"""F7: `splitdecode eval`: policies over tasks, as JSON, Markdown and a plot.

splitdecode eval --families two-products,one-product --n 500 --policies small,large,split,random --output-dir out
splitdecode eval --small A --large B --data aime24=aime24.jsonl --samples 16
splitdecode eval --tasks my_task --include-path tasks          a task of lm-evaluation-harness
splitdecode eval --transfer a/results.json b/results.json      trained on x tested on
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from splitdecode.decoder import DTYPES
from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.evaluate import pareto, report, tables
from splitdecode.evaluate.pair import DEMO, DEMO_TRAINED_ON, PairSource
from splitdecode.evaluate.policies import Rate, Row, parse_rows
from splitdecode.evaluate.runs import Outcome, Settings, check_rate, random_last, rate_of, run_task
from splitdecode.evaluate.tasks import HUB, Task, family_task, file_task, hub_task
from splitdecode.families import FAMILIES
from splitdecode.plots import load_pyplot
from splitdecode.split.outputs import RequestMetrics

LM_EVAL = "lm_eval/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `splitdecode eval`."""
    what = parser.add_argument_group("what is asked")
    what.add_argument("--families", help=f"synthetic families, held-out problems: {', '.join(FAMILIES)}")
    what.add_argument("--tasks", help=f"{', '.join(HUB)} (from the hub); other names and {LM_EVAL}NAME are lm-eval's")
    what.add_argument("--data", action="append", default=[], metavar="NAME=FILE", help="questions as JSON lines")
    what.add_argument("--scorer", help="of --data: integer, math or aime (default: the known data set's, else math)")
    what.add_argument("--include-path", type=Path, help="a folder with task files of lm-eval")
    what.add_argument("--num-fewshot", type=int, help="worked examples before a question of lm-eval")
    what.add_argument("--apply-chat-template", action="store_true", help="questions of lm-eval as chats")
    what.add_argument("--n", type=int, help="questions per task (default: 100 of a family, else all)")
    what.add_argument("--samples", type=int, default=1, help="answers per question (default 1)")
    what.add_argument("--seed", type=int, default=0, help="which problems, which draws (default 0)")
    who = parser.add_argument_group("who answers")
    who.add_argument("--pair", choices=[DEMO], help="the embedded pair (the default)")
    for name, text in (("small", "small model"), ("large", "large model"), ("base", "small model before SFT")):
        who.add_argument(f"--{name}", help=f"directory or hub id of the {text}")
    who.add_argument("--trained-on", help="what the pair was trained on, for the transfer matrix")
    who.add_argument("--policies", help="rows: small, large, split, accept, reject, random, forced, small-base, ...")
    who.add_argument("--p", type=float, help="random: share of chunks (default: as measured in the split row)")
    who.add_argument("--chunk", type=int, help="random: tokens per chunk (default: as measured)")
    who.add_argument("--max-offload-fraction", type=float, help="a budget for the split row")
    who.add_argument("--score-with", choices=["small", "large"], help="lm-eval: whose likelihood a split row reports")
    who.add_argument("--think-end", help="lm-eval: what ends the thinking; only what follows is graded")
    how = parser.add_argument_group("how")
    how.add_argument("--temperature", type=float, help="default: 0 for families, 0.6 for questions")
    how.add_argument("--top-p", type=float, help="default: 1 for families, 0.95 for questions")
    how.add_argument("--max-tokens", type=int, help="of an answer (default: 400 for families, 16384 for questions)")
    how.add_argument("--max-num-seqs", type=int, default=64, help="answers abreast; 1 measures latency (default 64)")
    how.add_argument("--watch-seams", type=int, default=8, metavar="N", help="of so many answers with hand-offs, the "
                     "text of one is scored by both models once the row is timed; 0: none (default 8)")  # fmt: skip
    how.add_argument("--device", default="cpu")
    how.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    how.add_argument("--kv-cache-memory", default="256MiB", help="for both caches together (default 256MiB)")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--output-dir", type=Path, help="writes results.json, results.md and pareto.png there")
    out.add_argument("--no-plot", action="store_true", help="no pareto.png")
    out.add_argument("--log-samples", action="store_true", help="writes every answer to answers.jsonl as well")
    out.add_argument("--json", action="store_true", help="the document on standard output, instead of tables")
    out.add_argument("--transfer", type=Path, nargs="+", metavar="RESULTS", help="only puts results together")


def main(args: argparse.Namespace) -> int:
    """Runs the evaluation; 0 when it is done, whatever the figures say."""
    if args.transfer:
        cells = report.transfer([report.read(file) for file in args.transfer])
        print(json.dumps(cells) if args.json else "\n".join(tables.matrix(cells)))
        return 0
    if args.output_dir and not args.no_plot:
        load_pyplot(pareto.PURPOSE)  # what is missing is said before anything runs
    if args.log_samples and not args.output_dir:
        raise RequestError("--log-samples: found no --output-dir to write answers.jsonl to")
    source = _source(args)
    rows = parse_rows(args.policies or _usual_rows(source))
    for row in rows:
        source.check(row)
    settings = _settings(args)
    check_rate(rows, settings.rate)
    tasks, others = _tasks(args)
    if others and any(row.kind == "forced" for row in rows):
        raise RequestError(f"forced: {others[0]} is a task of lm-eval, which has no labels: expected other --policies")
    harness = load_lm_harness() if others else None
    manager = harness.find_tasks(others, args.include_path) if harness is not None else None
    if source.embedded:
        torch.set_num_threads(1)  # models this small only wait for each other's threads
    document = _document(args, source)
    _write(args, document)
    if args.log_samples:
        (args.output_dir / "answers.jsonl").unlink(missing_ok=True)
    for task in tasks:
        done: dict[Row, Outcome] = {}
        for outcome in run_task(task, rows, source.decoder, settings):
            done[outcome.row] = outcome
            ordered = [done[row] for row in rows if row in done]
            _put(document, task, ordered, settings.seed)
            _write(args, document)
            if args.log_samples:
                _log(args.output_dir / "answers.jsonl", outcome)
    if harness is not None:
        shape = {"manager": manager, "fewshot": args.num_fewshot, "chat": args.apply_chat_template, "limit": args.n}
        for found in _lm_eval(args, partial(harness.evaluate, **shape), others, rows, source, settings):
            document["lm_eval"] += found
            _write(args, document)
    if args.output_dir and not args.no_plot and document["rows"]:
        pareto.plot(document, args.output_dir / "pareto.png")
    print(json.dumps(document) if args.json else tables.markdown(document))
    return 0


def load_lm_harness() -> ModuleType:
    """evaluate/lm_harness.py. Raises MissingExtraError where lm_eval is absent."""
    try:
        from splitdecode.evaluate import lm_harness
    except ImportError as error:
        raise MissingExtraError("lm_eval", "eval", "running tasks of lm-evaluation-harness") from error
    return lm_harness


def _source(args: argparse.Namespace) -> PairSource:
    if args.pair and (args.small or args.large):
        raise RequestError(f"--pair: found {args.pair} beside --small and --large, expected one or the other")
    names = ("device", "kv_cache_memory", "max_num_seqs", "watch_seams")
    options = {name: getattr(args, name) for name in names}
    if args.dtype != "auto":
        options["dtype"] = args.dtype
    return PairSource(args.small, args.large, args.base, options)


def _usual_rows(source: PairSource) -> str:
    base = "small-base,random-base," if source.embedded or source.base else ""
    return f"{base}small,large,split,random,reject" + (",forced" if source.embedded else "")


def _settings(args: argparse.Namespace) -> Settings:
    if (args.p is None) != (args.chunk is None):
        raise RequestError("--p and --chunk: found one of them, expected both, or neither (as measured)")
    if args.n is not None and args.n < 1:
        raise RequestError(f"--n: found {args.n}, expected at least 1")
    return Settings(
        seed=args.seed,
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        budget=args.max_offload_fraction,
        rate=None if args.p is None else Rate(args.p, args.chunk),
        use_tqdm=sys.stderr.isatty(),
    )


def _tasks(args: argparse.Namespace) -> tuple[list[Task], list[str]]:
    """Our own tasks, and names of lm-eval's."""
    files: dict[str, Path] = {}
    for text in args.data:
        name, mark, file = text.partition("=")
        if not (name and mark and file):
            raise RequestError(f"--data: found {text!r}, expected NAME=FILE")
        if name in files:
            raise RequestError(f"--data: found {name!r} twice, expected each name once")
        files[name] = Path(file)
    families, asked = _names(args.families), _names(args.tasks)
    for name in files:
        if name in families or name in asked:
            raise RequestError(f"--data: found {name!r}, which --{'families' if name in families else 'tasks'} asks "
                               "for too, expected each name once")  # fmt: skip
    if not (families or asked or files):
        families = [DEMO_TRAINED_ON]
    tasks: list[Task] = []
    others: list[str] = []
    for name in dict.fromkeys([*families, *asked, *files]):
        if name in files:
            tasks.append(file_task(name, files[name], args.n, args.scorer))
        elif name in FAMILIES or name in families:
            tasks.append(family_task(name, args.n or 100, args.seed))
        elif name in HUB:
            tasks.append(hub_task(name, args.n))
        else:
            others.append(name.removeprefix(LM_EVAL))
    return tasks, others


def _names(text: str | None) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def _lm_eval(
    args: argparse.Namespace,
    evaluate: Callable[..., tuple[list[dict[str, Any]], list[RequestMetrics]]],
    names: Sequence[str],
    rows: Sequence[Row],
    source: PairSource,
    settings: Settings,
) -> Iterator[list[dict[str, Any]]]:
    """Each row's figures on each of lm-eval's tasks, and what an answer cost; of likelihoods no cost is known."""
    for name in names:
        rate = settings.rate
        for row in random_last(rows):
            options = {"score_with": args.score_with, "think_end_token": args.think_end, "seed": settings.seed}
            if rate is not None:
                options |= {"p": rate.share, "chunk": rate.chunk}
            found, metrics = evaluate(name, row, source.decoder(row), **options)
            if row.kind == "split" and rate is None:
                rate = rate_of(metrics, sum(m.handoffs for m in metrics))
            tokens = sum(m.tokens for m in metrics)
            cost = {
                "offload": sum(m.large.tokens for m in metrics) / tokens if tokens else None,
                "ms_per_answer": sum(m.small.ms + m.large.ms for m in metrics) / len(metrics) if metrics else None,
            }
            yield [{**one, **cost} for one in found]


def _document(args: argparse.Namespace, source: PairSource) -> dict[str, Any]:
    names = ("n", "samples", "seed", "temperature", "top_p", "max_tokens", "max_num_seqs", "max_offload_fraction",
             "watch_seams")  # fmt: skip
    return {
        "kind": report.KIND,
        "version": 1,
        "command": report.command_line(args.argv),
        "provenance": report.provenance(),
        "pair": {"name": source.name, "trained_on": args.trained_on or source.trained_on},
        "settings": {name: getattr(args, name) for name in names},
        "rows": [],
        "paired": [],
        "lm_eval": [],
    }


def _put(document: dict[str, Any], task: Task, outcomes: Sequence[Outcome], seed: int) -> None:
    for key, found in (
        ("rows", [report.figures(outcome, seed) for outcome in outcomes]),
        ("paired", report.comparisons(outcomes, seed)),
    ):
        document[key] = [row for row in document[key] if row["task"] != task.name] + found


def _write(args: argparse.Namespace, document: dict[str, Any]) -> None:
    if args.output_dir is None:
        return
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "results.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        (args.output_dir / "results.md").write_text(tables.markdown(document), "utf-8")
    except OSError as error:
        raise RequestError(f"--output-dir: {args.output_dir} cannot be written to ({error.strerror})") from None


def _log(file: Path, outcome: Outcome) -> None:
    with file.open("a", encoding="utf-8") as out:
        for answer in outcome.answers:
            item = outcome.task.items[answer.item]
            line = {
                "task": outcome.task.name,
                "policy": outcome.row.name,
                "id": item.id,
                "prompt": item.prompt,
                "answer": item.answer,
                "right": answer.right,
                "finish_reason": answer.output.finish_reason,
                "raw_text": answer.output.raw_text,
                "spans": [[span.model, span.start, span.end] for span in answer.output.spans],
            }
            out.write(json.dumps(line) + "\n")
