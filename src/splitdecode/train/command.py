"""F7: `splitdecode train`: teaching a small model when to hand over.

splitdecode train sft --model M --data traces.jsonl --output out --preset paper
splitdecode train sft --model M --families two-products,one-product --n 2000 --output out --preset toy --epochs 4
splitdecode train grpo --small S --large L --data questions.jsonl --output out --preset paper
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from splitdecode.errors import RequestError
from splitdecode.families import FAMILIES
from splitdecode.train import grpo_run, sft
from splitdecode.train.settings import PRESETS, Settings, preset
from splitdecode.train.traces import Trace, family_traces, read_traces

_NUMBERS = {
    "epochs": (float, "passes over the traces"),
    "max_steps": (int, "optimiser steps, instead of epochs"),
    "learning_rate": (float, "its peak"),
    "matrix_rate": (float, "above 0: hidden matrices by Muon at this peak rate (default 0: AdamW for all)"),
    "min_lr_ratio": (float, "where the cosine ends, as a share of the peak"),
    "warmup_ratio": (float, "share of the steps in which the rate rises"),
    "global_batch": (int, "rows a step, over all processes"),
    "micro_batch": (int, "rows a forward of one process"),
    "max_length": (int, "tokens a row; longer traces are left out"),
    "tag_weight": (float, "of the loss at tokens of tags (default 1)"),
    "lora_rank": (int, "train low-rank adapters, merged at the end (default 0: all weights)"),
    "lora_alpha": (float, "scale of the adapters (default 32)"),
    "save_steps": (int, "steps between checkpoints"),
    "seed": (int, "order of the traces, of --families also which (default 0)"),
}
_FLAGS = {
    "packing": "fill rows with several traces",
    "bf16": "train and save in bfloat16",
    "gradient_checkpointing": "spend time to save memory",
    "added_tokens": "make the tags tokens of their own (default: plain text)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `splitdecode train sft` and `splitdecode train grpo`."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="way")
    one = ways.add_parser("sft", help="supervised fine-tuning on tagged traces")
    one.add_argument("--model", required=True, help="directory or hub id of the model to tune")
    one.add_argument("--revision", help="its hub revision")
    one.add_argument("--output", required=True, type=Path, help="a new directory, or one of a run to go on with")
    one.add_argument("--data", type=Path, metavar="FILE", help='JSON lines with "prompt" and "tagged"')
    one.add_argument("--families", help=f"or synthetic families, training problems: {', '.join(FAMILIES)}")
    one.add_argument("--n", type=int, default=1000, help="problems per family (default 1000)")
    one.add_argument("--preset", default="paper", choices=PRESETS, help="where the numbers below come from")
    one.add_argument("--json", action="store_true", help="the report as one JSON object")
    numbers = one.add_argument_group("settings (default: the preset's)")
    for name, (kind, text) in _NUMBERS.items():
        numbers.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    for name, text in _FLAGS.items():
        numbers.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=text)

    other = ways.add_parser("grpo", help="reinforcement, with the large model at work in the rollouts")
    other.add_argument("--small", required=True, help="directory or hub id of the model to tune")
    other.add_argument("--large", required=True, help="directory or hub id of the model it hands over to")
    other.add_argument("--output", required=True, type=Path, help="a new directory, or one of a run to go on with")
    other.add_argument("--data", type=Path, metavar="FILE", help='JSON lines with "prompt" and "answer"')
    other.add_argument("--families", help=f"or synthetic families, training problems: {', '.join(FAMILIES)}")
    other.add_argument("--n", type=int, default=1000, help="problems per family (default 1000)")
    other.add_argument("--preset", default="paper", choices=PRESETS, help="where the numbers below come from")
    group = other.add_argument_group("settings (default: the preset's)")
    for field in fields(grpo_run.GrpoSettings):
        kind = type(field.default)
        group.add_argument(f"--{field.name.replace('_', '-')}", type=kind, metavar=kind.__name__)


def main(args: argparse.Namespace) -> int:
    """Trains; 0 when the tuned model is saved."""
    return reinforce(args) if args.way == "grpo" else tune(args)


def reinforce(args: argparse.Namespace) -> int:
    """`splitdecode train grpo`."""
    given = {field.name: getattr(args, field.name) for field in fields(grpo_run.GrpoSettings)}
    settings = grpo_run.preset(args.preset, **{name: value for name, value in given.items() if value is not None})
    if (args.data is None) == (args.families is None):
        raise RequestError("--data and --families: expected one of them")
    names = [] if args.families is None else [part.strip() for part in args.families.split(",")]
    questions = (
        grpo_run.read_questions(args.data) if args.data else grpo_run.family_questions(names, args.n, settings.seed)
    )
    steps = grpo_run.train(args.small, args.large, questions, args.output, settings)
    for when, line in (("first step", steps[:1]), ("last step", steps[-1:])):
        for figures in line:
            print(f"{when}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    print(f"saved to {args.output}")
    return 0


def tune(args: argparse.Namespace) -> int:
    """`splitdecode train sft`."""
    settings = settings_of(args)
    sft.require_extra(settings)
    traces = _traces(args, settings)
    report = sft.train(args.model, traces, args.output, settings, revision=args.revision, on_step=_say)
    if args.json:
        print(json.dumps({"output": str(args.output), **asdict(report)}))
        return 0
    left = f", {report.left_out} left out as longer than {settings.max_length} tokens" if report.left_out else ""
    went = f", from step {report.resumed_from} on" if report.resumed_from else ""
    print(f"{report.steps} steps{went} on {report.traces} traces{left}; {report.seconds:.0f} s")
    if report.losses:
        print(f"loss {report.losses[0]:.3f} -> {report.losses[-1]:.3f}")
    print(f"saved to {args.output}")
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """The preset with the flags that were given over it. Raises RequestError for what cannot be used."""
    given: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(Settings)}
    return preset(args.preset, **{name: value for name, value in given.items() if value is not None})


def _traces(args: argparse.Namespace, settings: Settings) -> list[Trace]:
    if (args.data is None) == (args.families is None):
        raise RequestError("--data and --families: found "
                           + ("neither" if args.data is None else "both") + ", expected one of them")  # fmt: skip
    if args.data is not None:
        return read_traces(args.data)
    names = list(dict.fromkeys(part.strip() for part in args.families.split(",") if part.strip()))
    return family_traces(names, args.n, settings.seed)


def _say(step: int, steps: int, loss: float | None) -> None:
    if sys.stderr.isatty():
        said = "" if loss is None else f"  loss {loss:.3f}"
        print(f"\rstep {step}/{steps}{said}", end="\n" if step == steps else "", file=sys.stderr, flush=True)
