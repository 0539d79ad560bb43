"""F7: `splitdecode demo`: problems for the embedded pair, printed by author, then what it cost."""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table

from splitdecode.config import SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import boxed, problems
from splitdecode.split.outputs import Delta, ModelMetrics, RequestMetrics
from splitdecode.split.roles import Pair, Role
from splitdecode.terminal import coloured, legend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `splitdecode demo`."""
    parser.add_argument("--problems", type=int, default=4, help="how many problems to solve (default 4)")
    parser.add_argument("--seed", type=int, default=7, help="which problems (default 7)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of colours")


def main(args: argparse.Namespace) -> int:
    """Runs the demo. Exit code 0 when every answer was right."""
    if args.problems < 1:
        raise RequestError(f"--problems: found {args.problems}, expected at least 1")
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    console = Console(highlight=False)
    params = SamplingParams(temperature=0.0, max_tokens=400, skip_special_tokens=False)
    total = RequestMetrics()
    right, answers = 0, []
    if not args.json:
        console.print(legend())
    tasks = problems(args.problems, args.seed)
    with SplitDecoder.demo() as decoder:
        decoder.generate(tasks[0].prompt, params)  # the first forward of a process is slow: not part of the figures
        for problem in tasks:
            output = decoder.generate(problem.prompt, params)[0]
            answer = output.outputs[0]
            good = boxed(answer.text) == problem.answer
            right += good
            _add(total, output.metrics)
            answers.append({"prompt": problem.prompt, "raw_text": answer.raw_text, "right": good})
            if not args.json:
                words = {str(role): decoder.tokenizers[role] for role in Role}
                written = answer.token_ids[: -1 if answer.finish_reason == "stop" else None]  # without the EOS
                pieces = [Delta(words[s.model].decode(written[s.start : s.end]), s.model) for s in answer.spans]
                console.print(f"\n[bold]{problem.prompt.strip()}[/bold]", soft_wrap=True)
                console.print(coloured(pieces), soft_wrap=True)
                console.print("[green]right[/green]" if good else f"[red]wrong: {problem.answer} expected[/red]")
    if args.json:
        print(json.dumps({"answers": answers, "right": right, "summary": summary(total)}))
    else:
        console.print(_table(total, right, len(tasks)))
    return 0 if right == len(tasks) else 1


def _add(total: RequestMetrics, one: RequestMetrics) -> None:
    for role in Role:
        total.models[role].add(one.models[role])
    total.handoffs += one.handoffs


def summary(total: RequestMetrics) -> dict[str, float | int | dict[str, float]]:
    """Tokens by author, offload share, hand-offs, ms per token of each model, catch-up tokens per forward."""

    def per_token(m: ModelMetrics) -> float:
        return m.ms / m.tokens if m.tokens else 0.0

    def per_forward(m: ModelMetrics) -> float:
        return m.catch_up_tokens / m.catch_up_forwards if m.catch_up_forwards else 0.0

    return {
        "tokens": {str(role): total.models[role].tokens for role in Role},
        "offload_fraction": total.offload_fraction,
        "handoffs": total.handoffs,
        "ms_per_token": {str(role): per_token(total.models[role]) for role in Role},
        "catch_up_tokens_per_forward": {str(role): per_forward(total.models[role]) for role in Role},
        "read_tokens": total.small.read_tokens,
        "discarded_tokens": total.large.discarded_tokens,
    }


def _table(total: RequestMetrics, right: int, number: int) -> Table:
    values = Pair.of(lambda r: total.models[r])
    table = Table(title=f"{right} of {number} right")
    table.add_column("")
    for role in Role:
        table.add_column(f"{role} model", justify="right")
    table.add_row("tokens written", *(f"{m.tokens}" for m in values))
    table.add_row("forwards", *(f"{m.forwards}" for m in values))
    table.add_row("ms per token written", *(f"{m.ms / m.tokens:.2f}" if m.tokens else "-" for m in values))
    table.add_row("caught up: tokens / forwards", *(f"{m.catch_up_tokens} / {m.catch_up_forwards}" for m in values))
    table.add_row("read along: tokens", *(f"{m.read_tokens}" for m in values))
    table.add_row("provisional tokens dropped", *(f"{m.discarded_tokens}" for m in values))
    table.caption = f"offloaded {100 * total.offload_fraction:.1f} % of the tokens in {total.handoffs} hand-offs"
    return table
