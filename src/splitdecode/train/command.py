"""F7: `splitdecode train`: teaching a small model when to hand over.

splitdecode train sft --model M --data traces.jsonl --output out --preset paper
splitdecode train sft --model M --families two-products,one-product --n 2000 --output out --preset toy --epochs 4
splitdecode train grpo --small S --large L --data questions.jsonl --output out --preset paper
splitdecode train plot out other --output log.png
splitdecode train ablate --base B --large L --families two-products --sources rules gap:share=0.05,window=5,merge=1 \
                         --sft toy toy:tag_weight=2 --rl none grpo-toy grpo-toy:latency=coverage --output grid
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from splitdecode.decoder import DTYPES
from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.families import FAMILIES
from splitdecode.split.roles import Pair
from splitdecode.train import ablate, ablate_plan, ablate_report, grpo_run, grpo_settings, log_plot, sft
from splitdecode.train.grpo_settings import GrpoSettings
from splitdecode.train.questions import asked, read_questions
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
    "tags_apart": (float, "share of tags encoded by themselves, as forced hand-offs put them (default 0)"),
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

_GRPO = {
    "learning_rate": "constant",
    "temperature": "of the rollouts",
    "max_tokens": "of an answer",
    "max_prompt": "tokens; questions with longer prompts are left out",
    "generations": "answers to each prompt of a step",
    "prompts": "of a step",
    "steps": "optimiser steps",
    "stop_after": "end when the mean reward of so many steps is no more than that of those before (default 0: never)",
    "rewards": "term=weight,... of accuracy, format, tag_count, latency",
    "latency": "measured, modelled or coverage",
    "scoring": "of answers: integer, math or aime",
    "cost": "a cost model, as cost.json of another run has it, instead of one fitted here",
    "scale_rewards": "divide rewards less their group's mean by none, the spread of the group or of the batch",
    "device": "of both models: cpu, cuda or auto",
    "dtype": "of the pair in the rollouts: float32, bfloat16 or float16",
    "kv_cache_memory": "of the pair, as in 16GiB",
    "micro_batch": "answers a forward of the loss; the gradient stays that of the step (default 0: all)",
    "gradient_checkpointing": "spend time to save memory",
    "bf16": "autocast of the policy, whose weights stay float32",
    "save_steps": "steps between checkpoints",
    "seed": "of draws and order, of --families also which problems",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `splitdecode train sft`, `grpo`, `plot` and `ablate`."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="way")
    one = ways.add_parser("sft", help="supervised fine-tuning on tagged traces")
    one.add_argument("--model", required=True, help="directory or hub id of the model to tune")
    one.add_argument("--revision", help="its hub revision")
    one.add_argument("--output", required=True, type=Path, help="a new directory, or one of a run to go on with")
    one.add_argument("--data", type=Path, metavar="FILE", help='JSON lines with "question" (or "prompt"), "tagged"')
    one.add_argument("--families", help=f"or synthetic families, training problems: {', '.join(FAMILIES)}")
    one.add_argument("--n", type=int, default=1000, help="problems per family (default 1000)")
    _add_preset(one)
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
    other.add_argument("--data", type=Path, metavar="FILE", help='JSON lines with "question" (or "prompt"), "answer"')
    other.add_argument("--families", help=f"or synthetic families, training problems: {', '.join(FAMILIES)}")
    other.add_argument("--n", type=int, default=1000, help="problems per family (default 1000)")
    _add_preset(other)
    group = other.add_argument_group("settings (default: the preset's)")
    for field in fields(GrpoSettings):
        kind, name, text = type(field.default), f"--{field.name.replace('_', '-')}", _GRPO[field.name]
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(name, type=kind, metavar=kind.__name__, help=text)

    drawn = ways.add_parser("plot", help="the logs of GRPO runs as one picture")
    drawn.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="outputs of `splitdecode train grpo`")
    drawn.add_argument("--output", required=True, type=Path, metavar="FILE", help="the picture, such as log.png")
    _add_ablate(ways.add_parser("ablate", help="the grid annotation x SFT x RL, with a report"))


def _add_preset(parser: argparse.ArgumentParser) -> None:
    names = f"{' or '.join(PRESETS)}, or a .toml file with any of the settings below (default paper)"
    parser.add_argument("--preset", default="paper", metavar="NAME", help=f"where the numbers below come from: {names}")


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="directory or hub id of the small model before SFT")
    parser.add_argument("--large", required=True, help="directory or hub id of the model it hands over to")
    parser.add_argument("--output", required=True, type=Path, help="a new directory, or one of a run to go on with")
    axes = parser.add_argument_group("axes (each takes several, separated by spaces; key=value,... are options)")
    axes.add_argument("--sources", nargs="+", required=True, metavar="SOURCE",
                      help="who annotates: rules, gap[:share=0.05,window=5,merge=1], file:TAGGED")  # fmt: skip
    axes.add_argument("--sft", nargs="+", required=True, metavar="VARIANT",
                      help="paper, toy or a .toml file, settings of `train sft` over it: toy:tag_weight=2")  # fmt: skip
    axes.add_argument("--rl", nargs="+", default=["none"], metavar="VARIANT",
                      help="none, grpo-paper, grpo-toy or a .toml file, with any setting of `train grpo` over it: "
                      "grpo-toy:latency=coverage,rewards=accuracy=1+latency=1 (default none)")  # fmt: skip
    axes.add_argument("--seeds", default="0", help="of the trainings, separated by commas (default 0)")
    what = parser.add_argument_group("what is trained on and asked")
    what.add_argument("--families", help=f"training problems; held-out ones are asked: {', '.join(FAMILIES)}")
    what.add_argument("--data", type=Path, metavar="FILE", help='or JSON lines with "question", "trace" and "answer"')
    what.add_argument("--eval-data", type=Path, metavar="FILE", help='with --data: lines with "question" and "answer"')
    what.add_argument("--n", type=int, help="traces (default: 1000 per family, else all)")
    what.add_argument("--eval-n", type=int, help="questions (default: 100 per family, else all)")
    what.add_argument("--data-seed", type=int, default=0, help="which problems, which draws of answers (default 0)")
    what.add_argument("--scorer", help="of --eval-data and RL: integer, math or aime")
    what.add_argument("--temperature", type=float, help="of the evaluation (default: 0 for families, 0.6)")
    what.add_argument("--max-tokens", type=int, help="of an answer (default: 400 for families, 16384)")
    parser.add_argument("--device", default="cpu", help="of gap and evaluation (default cpu)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], help="there (default: float32 on cpu, else the file's)")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Trains, or draws; 0 when what was asked for is there."""
    return {"sft": tune, "grpo": reinforce, "plot": draw, "ablate": compare}[args.way](args)


def compare(args: argparse.Namespace) -> int:
    """`splitdecode train ablate`."""
    plan = ablate_plan.plan_of(args)
    found = ablate.run(plan, _note)
    document = ablate_report.document(plan, found, args.argv)
    ablate_report.write(document, args.output)
    print(json.dumps(document) if args.json else ablate_report.markdown(document))
    return 0


def draw(args: argparse.Namespace) -> int:
    """`splitdecode train plot`."""
    log_plot.plot(args.runs, args.output)
    print(f"saved to {args.output}")
    return 0


def reinforce(args: argparse.Namespace) -> int:
    """`splitdecode train grpo`."""
    given = {field.name: getattr(args, field.name) for field in fields(GrpoSettings)}
    settings = grpo_settings.preset(args.preset, **{name: value for name, value in given.items() if value is not None})
    if (args.data is None) == (args.families is None):
        raise RequestError("--data and --families: expected one of them")
    names = [] if args.families is None else [part.strip() for part in args.families.split(",")]
    if args.data is not None:
        questions, others = asked(read_questions(args.data), Pair(args.small, args.large))
    else:
        questions, others = grpo_run.family_questions(names, args.n, settings.seed), {}
    steps = grpo_run.train(args.small, args.large, questions, args.output, settings, large_prompts=others, say=_note)
    for when, line in (("first step", steps[:1]), ("last step", steps[-1:])):
        for figures in line:
            print(f"{when}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    with suppress(MissingExtraError):
        log_plot.plot([args.output], args.output / "log.png")
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


def _note(text: str) -> None:
    print(f"splitdecode train: {text}", file=sys.stderr, flush=True)


def _say(step: int, steps: int, loss: float | None) -> None:
    if sys.stderr.isatty():
        said = "" if loss is None else f"  loss {loss:.3f}"
        print(f"\rstep {step}/{steps}{said}", end="\n" if step == steps else "", file=sys.stderr, flush=True)
