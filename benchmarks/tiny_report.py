"""The report on the embedded pair: what it is for, whether it does it, how it was made, every family by every policy.

benchmarks/tiny_pair.py writes it, from what a run leaves: <name>.jsonl of the base models, tuned/log.jsonl of GRPO and
eval/results.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_base import FACTS, MIX, RECIPES

from splitdecode.evaluate import tables
from splitdecode.families import FAMILIES
from splitdecode.plots import load_pyplot

FAMILY = "two-products"
_SHOWN = ("small-base", "small", "large", "split", "random-base", "forced-base")


@dataclass(frozen=True, slots=True)
class Target:
    """What the pair is for: a figure of the report and the range, ends included, it must lie in."""

    name: str
    low: float
    high: float
    value: float

    @property
    def met(self) -> bool:
        """Whether it does."""
        return self.low <= self.value <= self.high


def targets(document: Mapping[str, Any]) -> list[Target]:
    """Of the family the pair was trained on, in per cent and points."""
    rows = {row["policy"]: row for row in document["rows"] if row["task"] == FAMILY}
    points = {name: 100 * row["accuracy"]["value"] for name, row in rows.items()}
    return [
        Target("small-base alone, right %", 0, 60, points["small-base"]),
        Target("large alone, right %", 95, 100, points["large"]),
        Target("large less split, points", -100, 3, points["large"] - points["split"]),
        Target("split, tokens by the large model %", 0, 8, 100 * rows["split"]["offload"]),
        Target("split over random switching at its rate, points", 30, 100, points["split"] - points["random-base"]),
    ]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def markdown(work: Path, commands: Mapping[str, str], seconds: Mapping[str, float], wall: float) -> str:
    """The report. seconds: of each stage; wall: of the whole, in which stages ran side by side."""
    document = json.loads((work / "eval" / "results.json").read_text("utf-8"))
    place = document["provenance"]
    lines = [
        "# The embedded pair",
        "",
        "Two models that solve arithmetic step by step, made from nothing by `make tiny-pair` "
        "(`benchmarks/tiny_pair.py`), which wrote this page.",
        f"{place['date']}, {place['cpu']}, {place['cores']} cores, a thread a process; "
        f"{wall / 60:.0f} minutes in all, large beside small-base, traces and sft.",
        "",
        "![accuracy against offload; learning curves](tiny-pair.png)",
        "",
        f"## What it is for: {FAMILY}, {document['rows'][0]['n']} held-out problems, greedy",
        "",
        *_table(["", "wanted", "found", ""], [_target(one) for one in targets(document)]),
        "",
        *_made(work, commands, seconds),
        "",
        "## Every family",
        "",
        f"The base models were taught all of them ({', '.join(f'{100 * v:.0f} % {k}' for k, v in MIX.items())}); "
        f"where to hand over, the small one was taught on `{FAMILY}` alone: the others show what carries over. "
        "`small-base`, `random-base`, `forced-base`: the small model before SFT; `forced`: at the labelled products. "
        "All policies, hand-offs against labels, paired differences: [tiny-pair-eval.md](tiny-pair-eval.md).",
        "",
        *_table(["family", "policy", "right % [95 %]", "offloaded %", "spans"], _figures(document)),
        "",
        "## Trained on x tested on",
        "",
        *tables.matrix(tables.transfer([document])),
        "",
    ]
    return "\n".join(lines)


def plot(work: Path, file: Path) -> None:
    """Accuracy against offload of the family trained on; the base models' learning; GRPO's."""
    pyplot = load_pyplot("the report's plot")
    document = json.loads((work / "eval" / "results.json").read_text("utf-8"))
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for number, row in enumerate(row for row in document["rows"] if row["task"] == FAMILY and row["policy"] in _SHOWN):
        value, low, high = (100 * row["accuracy"][name] for name in ("value", "low", "high"))
        left.errorbar([100 * row["offload"]], [value], [[value - low], [high - value]], fmt="os^Dv<"[number],
                      mfc="none", capsize=3, label=row["policy"])  # fmt: skip
    left.set(xlabel="tokens by the large model (%)", ylabel="right answers (%)", title=f"{FAMILY}, held out")
    left.set_xscale("symlog", linthresh=1)
    left.legend(fontsize=8)
    for name, style in zip(RECIPES, ("-", "--"), strict=True):
        rows = read_lines(work / f"{name}.jsonl")
        for number, family in enumerate(FAMILIES):
            middle.plot([row["cpu_s"] for row in rows], [100 * row[family] for row in rows], style, color=f"C{number}",
                        label=f"{name}, {family}")  # fmt: skip
    middle.set(xlabel="CPU seconds", ylabel="whole solutions right (%)", title="base models, held out")
    middle.legend(fontsize=6)
    rows = read_lines(work / "tuned" / "log.jsonl")
    for key, scale, label in (
        ("reward/accuracy", 100.0, "right, % (T = 1)"),
        ("offload_fraction", 1000.0, "offloaded, per mille"),
    ):
        right.plot([scale * row[key] for row in rows], label=label)
    right.set(xlabel="GRPO step", title="GRPO, training problems")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _made(work: Path, commands: Mapping[str, str], seconds: Mapping[str, float]) -> list[str]:
    rows = []
    for name, recipe in RECIPES.items():
        last = read_lines(work / f"{name}.jsonl")[-1]
        shape = recipe.shape
        phases = "; then ".join(
            f"{phase.steps:,} steps of {phase.drills} lists of products, {phase.groups} x {phase.rows} solved problems "
            f"(Muon {phase.matrix_rate:g}, AdamW {phase.rate:g})"
            for phase in recipe.phases
        )
        what = (
            f"{shape.layers} layers, d {shape.hidden}, {shape.heads} heads, {shape.kv_heads} of K/V; "
            f"{phases}; {last['cpu_s']:,.0f} CPU s"
        )
        rows.append([name, what, f"{seconds[name]:.0f}"])
    for stage, command in commands.items():
        rows.append([stage, f"`splitdecode {command}`", f"{seconds[stage]:.0f}"])
    return [
        "## How it was made",
        "",
        f"{len(FACTS):,} products are to be known: a list of them is a drill. All problems are of the "
        "training part, none is seen twice by the base models. Weights are kept in float16; `small` is "
        "`tuned` so rounded. Made again on one machine, all up to `sft` is equal bit by bit; what GRPO adds is not, "
        "since its costs are fitted to measured times: of that the targets above hold.",
        "",
        *_table(["stage", "what", "seconds"], rows),
    ]


def _target(one: Target) -> list[str]:
    wanted = f"at most {one.high:g}" if one.high < 100 else f"at least {one.low:g}"
    return [one.name, wanted, f"{one.value:.1f}", "met" if one.met else "**missed**"]


def _figures(document: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["task"],
            row["policy"],
            "{value:.1f} [{low:.1f}, {high:.1f}]".format(
                **{k: 100 * row["accuracy"][k] for k in ("value", "low", "high")}
            ),
            f"{100 * row['offload']:.2f}",
            f"{row['spans']:.2f}",
        ]
        for row in document["rows"]
        if row["policy"] in _SHOWN
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
