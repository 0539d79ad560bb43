"""The embedded pair from nothing: make tiny-pair, or

    PYTHONPATH=src python benchmarks/tiny_pair.py --work build/tiny-pair --install

    large         taught from random weights (benchmarks/tiny_base.py) on one core; on the other, meanwhile:
    small-base      the same,
    traces          solutions of the training part, tags around the values of their products, and
    sft             small-base learns from them where to hand over: splitdecode train sft
    tuned, small  and, by its own answers with the large model at work, where it pays: splitdecode train grpo
    eval          held-out problems of all families, every policy: splitdecode eval

What is there, by the recipe as it stands, is not made again: the same command goes on. --install puts the models into
the package and the report (benchmarks/tiny_report.py) into docs/, and only where the pair does what it is for. Seeds
are fixed: on one machine everything up to sft comes out equal, bit by bit. GRPO fits its costs to measured times, and
another kind of processor rounds sums otherwise: then the targets are what holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import use_threads
from tiny_base import RECIPES, base, texts
from tiny_report import FAMILY, markdown, plot, targets

import splitdecode
from splitdecode.evaluate.pair import PairSource
from splitdecode.train.export import write_tokenizer
from splitdecode.train.scratch import write_scratch

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"
OTHERS = "two-products-reworded,one-product,three-products"
MODELS = ("large", "small-base", "small")
POLICIES = "small-base,small,large,split,accept,reject,random-base,random,forced-base,forced"

NEEDS = {
    "large": (),
    "small-base": (),
    "traces": (),
    "sft": ("small-base", "traces"),
    "tuned": ("sft", "large"),
    "small": ("tuned",),
    "eval": ("small", "large", "small-base"),
}
SIDE_BY_SIDE = (("large",), ("small-base", "traces", "sft"))
THEN = ("tuned", "small", "eval")
COMMANDS = {  # run in the folder of the work
    "traces": f"annotate --family {FAMILY} --n 8000 --seed 1 --out traces.jsonl --by rules",
    "sft": "train sft --model small-base --data traces.jsonl --output sft --preset toy",
    "tuned": f"train grpo --small sft --large large --families {FAMILY} --n 4000 --output tuned --preset toy",
    "eval": f"eval --small small --large large --base small-base --trained-on {FAMILY} --families {FAMILY},{OTHERS} "
    f"--dtype float32 --n 500 --policies {POLICIES} --output-dir eval",
}


def make_base(work: Path, name: str) -> None:
    """One base model, in float16."""
    recipe = RECIPES[name]
    start = work / f"start-{name}"
    shutil.rmtree(start, ignore_errors=True)
    write_scratch(start, texts(), recipe.shape, seed=recipe.seed)
    began = time.process_time()
    with (work / f"{name}.jsonl").open("w") as log:

        def report(figures: dict[str, float]) -> None:
            log.write(json.dumps({**figures, "cpu_s": round(time.process_time() - began, 1)}) + "\n")
            log.flush()

        model = base(start, recipe, report)
    save(model, start, work / name)


def save(model: Any, words: Path, target: Path) -> None:
    """Writes a transformers model in float16 beside a checkpoint's tokenizer; complete, or not there."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_tokenizer(words, part, False)
    model.half().save_pretrained(part)
    shutil.rmtree(target, ignore_errors=True)  # of a run that was cut short behind this
    part.rename(target)


def make_small(work: Path) -> None:
    """The tuned model in float16."""
    from transformers import Qwen2ForCausalLM

    save(Qwen2ForCausalLM.from_pretrained(work / "tuned", dtype=torch.float32), work / "tuned", work / "small")


def run(work: Path, stage: str) -> None:
    """A stage in a process of its own: a command of the package, or this program's for a base model."""
    if stage in COMMANDS:
        print(f"splitdecode {COMMANDS[stage]}", flush=True)
        command = ["-m", "splitdecode", *COMMANDS[stage].split()]
    else:
        command = [str(Path(__file__).resolve()), "--work", str(work), "--base", stage]
    subprocess.run([sys.executable, *command], check=True, cwd=work, env=environment())


def environment() -> dict[str, str]:
    """One thread: models this small only wait for each other's. And this package, also where none is installed."""
    path = os.pathsep.join(p for p in (str(ROOT / "src"), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def recipe_of(stage: str) -> str:
    """A digest of all that a stage's result depends on: its own recipe and those of the stages it needs."""
    own = repr(RECIPES[stage]) if stage in RECIPES else COMMANDS.get(stage, "")
    return hashlib.sha256("\n".join([own, *map(recipe_of, NEEDS[stage])]).encode()).hexdigest()[:16]


def make(work: Path) -> dict[str, float]:
    """Everything that is missing, or was made by another recipe; seconds by stage. What ends beside a stage that fails
    is kept."""
    work.mkdir(parents=True, exist_ok=True)
    file, lock = work / "stages.json", threading.Lock()
    record = json.loads(file.read_text()) if file.is_file() else {}

    def build(stages: Sequence[str]) -> None:
        for stage in stages:
            wanted = recipe_of(stage)
            known = record.get(stage, {}).get("recipe")
            if known == wanted:
                continue
            if known is not None:
                remove(work, stage)
            began = time.monotonic()
            make_small(work) if stage == "small" else run(work, stage)
            with lock:
                record[stage] = {"seconds": round(time.monotonic() - began, 1), "recipe": wanted}
                part = file.with_suffix(".part")
                part.write_text(json.dumps(record) + "\n")
                part.replace(file)

    with ThreadPoolExecutor(len(SIDE_BY_SIDE)) as lanes:
        list(lanes.map(build, SIDE_BY_SIDE))
    build(THEN)
    return {stage: record[stage]["seconds"] for stage in NEEDS}


def remove(work: Path, stage: str) -> None:
    """What a stage left."""
    shutil.rmtree(work / stage, ignore_errors=True)
    for file in work.glob(f"{stage}.jsonl*"):
        file.unlink()


def wall(seconds: Mapping[str, float]) -> float:
    """Seconds of the whole, where none was interrupted."""
    return max(sum(seconds[stage] for stage in lane) for lane in SIDE_BY_SIDE) + sum(seconds[stage] for stage in THEN)


def install(work: Path, seconds: dict[str, float]) -> None:
    """Puts models and report where they belong."""
    for name in MODELS:
        part = INSTALLED / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(work / name, part)
        shutil.rmtree(INSTALLED / name, ignore_errors=True)
        part.rename(INSTALLED / name)
    docs = ROOT / "docs"
    (docs / "tiny-pair.md").write_text(markdown(work, COMMANDS, seconds, wall(seconds)), "utf-8")
    plot(work, docs / "tiny-pair.png")
    shutil.copyfile(work / "eval" / "results.md", docs / "tiny-pair-eval.md")
    document = json.loads((work / "eval" / "results.json").read_text("utf-8"))
    document["pair"]["name"] = PairSource().name  # from now on this is the embedded pair
    (INSTALLED.parent / "results" / "eval-demo.json").write_text(json.dumps(document) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the pair; 1 where it misses a target. `argv` without the program's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny-pair", help="default build/tiny-pair")
    parser.add_argument("--install", action="store_true", help="into the package and docs/, where targets are met")
    parser.add_argument("--base", choices=list(RECIPES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    use_threads(1)
    args.work = args.work.resolve()
    if args.base:
        make_base(args.work, args.base)
        return 0
    seconds = make(args.work)
    found = targets(json.loads((args.work / "eval" / "results.json").read_text()))
    for target in found:
        print(f"{'met ' if target.met else 'MISSED'} {target.name}: {target.value:.1f}")
    met = all(target.met for target in found)
    if args.install and met:
        install(args.work, seconds)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
