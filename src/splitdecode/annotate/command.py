"""F7: `splitdecode annotate`: traces to tagged traces, by one of three annotators, into a file that survives kill -9.

splitdecode annotate traces.jsonl --out tagged.jsonl --by endpoint --base-url http://localhost:8000/v1 --model M
splitdecode annotate traces.jsonl --out tagged.jsonl --by gap --small A --large B
splitdecode annotate --family two-products --n 200 --out tagged.jsonl --by rules
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from splitdecode.annotate import run
from splitdecode.annotate.align import MIN_RATIO, REFINE_BELOW
from splitdecode.annotate.client import Server, key_from, load_httpx
from splitdecode.annotate.endpoint import EndpointAnnotator, Recipe
from splitdecode.annotate.gap import GapAnnotator, GapRecipe
from splitdecode.annotate.records import Annotator
from splitdecode.annotate.rules import RuleAnnotator
from splitdecode.annotate.spans import MERGE
from splitdecode.annotate.traces import Fields, Trace, family_traces, read_traces
from splitdecode.decoder import DTYPES, SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import FAMILIES
from splitdecode.split.roles import Pair, Role

SHOWN = 10  # failures that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `splitdecode annotate`."""
    what = parser.add_argument_group("what is annotated")
    what.add_argument("traces", nargs="?", type=Path, help="JSON lines, or a directory saved by datasets")
    what.add_argument("--family", choices=list(FAMILIES), help="instead: worked solutions of a synthetic family")
    what.add_argument("--n", type=int, help="only so many traces (default: all; 100 of a family)")
    what.add_argument("--seed", type=int, default=0, help="which problems of a family (default 0)")
    what.add_argument("--split", help="of a directory with several")
    for name in ("id", "prompt", "trace", "question"):
        what.add_argument(f"--{name}-field", default=name, help=f"where a row keeps its {name} (default {name})")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; what is in it already is not done again")
    parser.add_argument("--by", required=True, choices=["endpoint", "gap", "rules"], help="who finds the hard parts")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object")
    _add_recipe(parser.add_argument_group("how much (endpoint, gap)"))
    _add_endpoint(parser.add_argument_group("endpoint: any OpenAI-compatible server"))
    gap = parser.add_argument_group("gap: the small model's loss over the large one's")
    for role in Role:
        gap.add_argument(f"--{role}", help=f"directory or hub id of the {role} model (default: the embedded pair)")
    gap.add_argument("--window", type=int, default=9, help="tokens of the moving average (default 9)")
    gap.add_argument("--min-gap", type=float, default=0.0, help="nats, smoothed; below it nothing is hard (default 0)")
    gap.add_argument("--min-length", type=int, default=1, help="characters of a span (default 1)")
    gap.add_argument("--chat", action="store_true", help="put prompts through each model's chat template")
    gap.add_argument("--device", default="cpu")
    gap.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--share", type=float, default=0.2, help="of a trace that is hard (default 0.2)")
    group.add_argument("--cap", type=float, help="never annotate more than this share of a trace (default: no cap)")
    group.add_argument("--merge", type=int, default=MERGE, help=f"join spans closer than this (default {MERGE})")


def _add_endpoint(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", help="up to and including /v1")
    group.add_argument("--model", help="its name there")
    group.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the key")
    group.add_argument("--temperatures", default="0,0.3,0.6", help="of the attempts (default 0,0.3,0.6)")
    group.add_argument("--min-snippets", type=int, default=3, help="found, or it is asked again (default 3)")
    group.add_argument("--min-ratio", type=float, default=MIN_RATIO, help=f"of a fuzzy match (default {MIN_RATIO})")
    group.add_argument("--concurrency", type=int, default=8, help="traces in work at once (default 8)")
    group.add_argument("--requests-per-minute", type=float)
    group.add_argument("--tokens-per-minute", type=float)
    group.add_argument("--retries", type=int, default=6, help="after 429, 5xx, timeouts (default 6)")
    group.add_argument("--timeout", type=float, default=300.0, help="seconds for an answer (default 300)")
    group.add_argument("--max-answer-tokens", type=int, default=4096, help="0: the server's own limit (default 4096)")
    group.add_argument("--price-in", type=float, default=0.0, help="dollars per million prompt tokens")
    group.add_argument("--price-out", type=float, default=0.0, help="dollars per million completion tokens")
    group.add_argument("--max-cost", type=float, help="dollars; no trace is begun beyond them")


def main(args: argparse.Namespace) -> int:
    """Runs the command. Exit code 1 when a trace failed, not all were begun, or none can be annotated."""
    source = _source(args)
    total = sum(1 for _ in source())  # every trace is checked before the first is paid for
    if not total:
        raise RequestError("traces: found none, expected at least one")
    with ExitStack() as stack:
        annotator = _annotator(args, stack)
        summary = run.annotate(source(), annotator, args.out, total=total, max_cost=args.max_cost)
    if args.json:
        print(json.dumps({**asdict(summary), "share": summary.share, "traces": total, "out": str(args.out)}))
    else:
        print(f"{summary.annotated} traces annotated, {summary.already} were already, {len(summary.failed)} failed, "
              f"{len(summary.left_out)} left out; {100 * summary.share:.2f} % inside spans, ${summary.cost:.4f}: "
              f"{args.out}")  # fmt: skip
    for what, lines in (("failed", summary.failed), ("left out", summary.left_out)):
        for line in lines[:SHOWN]:
            print(f"splitdecode annotate: {what}: {line}", file=sys.stderr)
        if len(lines) > SHOWN:
            print(f"splitdecode annotate: {len(lines) - SHOWN} more {what}", file=sys.stderr)
    if summary.stopped:
        print(f"splitdecode annotate: stopped: {summary.stopped}", file=sys.stderr)
    return 1 if summary.failed or summary.stopped or not summary.annotated + summary.already else 0


def _source(args: argparse.Namespace) -> Callable[[], Iterator[Trace]]:
    if (args.traces is None) == (args.family is None):
        raise RequestError(f"traces: found {args.traces} and --family {args.family}, expected one of them")
    if args.n is not None and args.n < 1:
        raise RequestError(f"--n: found {args.n}, expected at least 1")
    if args.family is not None:
        return lambda: family_traces(args.family, args.n or 100, args.seed)
    if args.out.exists() and args.out.samefile(args.traces):
        raise RequestError(f"--out: found {args.out}, the traces themselves, expected another file")
    fields = Fields(args.id_field, args.prompt_field, args.trace_field, args.question_field)
    return lambda: islice(read_traces(args.traces, fields, split=args.split), args.n)


def _annotator(args: argparse.Namespace, stack: ExitStack) -> Annotator:
    match args.by:
        case "rules":
            return RuleAnnotator()
        case "gap":
            return _gap(args, stack)
    return _endpoint(args)


def _gap(args: argparse.Namespace, stack: ExitStack) -> GapAnnotator:
    recipe = GapRecipe(args.share, args.window, args.min_gap, args.merge, args.min_length, args.cap)
    given = Pair.of(lambda r: getattr(args, str(r)))
    if all(name is None for name in given):
        options: dict[str, Any] = {} if args.dtype == "auto" else {"dtype": args.dtype}
        decoder = SplitDecoder.demo(small="small-base", device=args.device, **options)
        names = Pair("demo/small-base", "demo/large")
    elif any(name is None for name in given):
        raise RequestError("--small and --large: found one of them, expected both or (for the embedded pair) neither")
    else:
        decoder, names = SplitDecoder.from_pretrained(*given, device=args.device, dtype=args.dtype), given
    return GapAnnotator(stack.enter_context(decoder), names, recipe, chat=args.chat)


def _endpoint(args: argparse.Namespace) -> EndpointAnnotator:
    load_httpx()
    for name in ("base_url", "model"):
        if not getattr(args, name):
            raise RequestError(f"--by endpoint: found no --{name.replace('_', '-')}, expected one")
    for name in ("requests_per_minute", "tokens_per_minute", "max_cost", "timeout"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise RequestError(f"--{name.replace('_', '-')}: found {value}, expected more than 0")
    for name in ("price_in", "price_out", "retries", "max_answer_tokens"):
        if not getattr(args, name) >= 0:
            raise RequestError(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected at least 0")
    if args.max_cost is not None and not args.price_in + args.price_out:
        raise RequestError("--max-cost: found no price, expected --price-in and --price-out")
    try:
        temperatures = tuple(float(t) for t in args.temperatures.split(","))
    except ValueError:
        raise RequestError(f"--temperatures: found {args.temperatures!r}, expected numbers, as in 0,0.3,0.6") from None
    recipe = Recipe(
        args.share, args.min_snippets, temperatures, args.min_ratio, max(args.min_ratio, REFINE_BELOW), args.merge,
        args.cap,
    )  # fmt: skip
    server = Server(
        args.base_url, args.model, key_from(args.api_key_env), args.timeout, args.retries, args.requests_per_minute,
        args.tokens_per_minute, args.max_answer_tokens,
    )  # fmt: skip
    prices = (args.price_in, args.price_out)
    return EndpointAnnotator(server, recipe, concurrency=args.concurrency, prices=prices)
