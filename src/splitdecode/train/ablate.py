"""F7: the grid annotation x SFT x RL: every product made once and shared, every cell asked the same questions.

    output/  annotations/<source>.jsonl .json          one per source
             sft/<source>_<sft>_s0/  .json             a model per source, SFT and seed
             rl/<source>_<sft>_<rl>_s0/  .json         a model per source, SFT, RL and seed
             eval/<cell>.json  baselines.json          what the models and the baselines answered
             results.json  results.md  results.png

The .json beside a product is its record: figures and CPU seconds. It is written last, so a stage that has one is not
run again; one that was cut short goes on by its own means (annotate/run.py, sft.py, grpo_run.py).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from splitdecode.annotate import run as annotation
from splitdecode.annotate.gap import GapAnnotator
from splitdecode.annotate.records import Tagged
from splitdecode.annotate.report import agreement, statistics
from splitdecode.annotate.rules import RuleAnnotator
from splitdecode.annotate.spans import parse
from splitdecode.annotate.traces import Trace as Untagged
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.evaluate import report
from splitdecode.evaluate.policies import Rate, Row
from splitdecode.evaluate.runs import NO_SPAN, run_task
from splitdecode.split.roles import Pair
from splitdecode.train import grpo_run, sft
from splitdecode.train.ablate_plan import NONE, Plan, folders
from splitdecode.train.output import claim
from splitdecode.train.traces import Trace, read_traces

Record = dict[str, Any]
Cell = tuple[str, str, str, int]  # source, SFT, RL, seed
Say = Callable[[str], None]
BASELINES = (Row("small", base=True), Row("large"), Row("random", base=True))
_LAST = 10  # the loss of a run is the mean over the last tenth of its steps


@dataclass
class Records:
    """What every stage left behind; a model without RL is the cell whose RL is "none"."""

    annotations: dict[str, Record] = field(default_factory=dict)
    sft: dict[tuple[str, str, int], Record] = field(default_factory=dict)
    rl: dict[Cell, Record] = field(default_factory=dict)
    answers: dict[Cell, Record] = field(default_factory=dict)
    baselines: Record = field(default_factory=dict)


def run(plan: Plan, say: Say = lambda _: None) -> Records:
    """Runs what is left of an ablation. say: is told of every stage before it begins.

    Raises RequestError for an output of another run and for traces no annotator can do; CheckpointError for a model
    that cannot be used.
    """
    output, found = plan.output, Records()
    claim(output, plan.identity, begun=(output / "annotations").exists())
    for source in plan.sources:
        say(f"annotation: {source}")
        found.annotations[source] = _annotated(plan, source)
    for source, tuned, seed in product(plan.sources, plan.sft, plan.seeds):
        say(f"SFT: {source}, {tuned}, seed {seed}")
        found.sft[source, tuned, seed] = _tuned(plan, source, tuned, seed)
    for source, tuned, seed in product(plan.sources, plan.sft, plan.seeds):
        for name in dict.fromkeys([NONE, *plan.rl]):
            cell = (source, tuned, name, seed)
            if name != NONE:
                say(f"RL: {', '.join(cell[:3])}, seed {seed}")
                found.rl[cell] = _reinforced(plan, cell)
            say(f"evaluation: {', '.join(cell[:3])}, seed {seed}")
            found.answers[cell] = _asked(plan, cell)
    say("evaluation: baselines")
    found.baselines = _baselines(plan, [found.answers[cell] for cell in cells_of(plan)])
    return found


def cells_of(plan: Plan) -> list[Cell]:
    """The cells of the grid, seeds of a cell beside each other."""
    return list(product(plan.sources, plan.sft, plan.rl, plan.seeds))


def model_of(plan: Plan, cell: Cell) -> Path:
    """Where the small model of a cell is."""
    source, tuned, name, seed = cell
    parts = [folders(list(plan.sources))[source], folders(list(plan.sft))[tuned]]
    if name == NONE:
        return plan.output / "sft" / f"{'_'.join(parts)}_s{seed}"
    return plan.output / "rl" / f"{'_'.join([*parts, folders(list(plan.rl))[name]])}_s{seed}"


def once(file: Path, make: Callable[[], Record], made: Path | None = None) -> Record:
    """The record in `file`; where it or the product `made` is missing, the stage is run, timed and recorded."""
    if not file.is_file() or not (made is None or made.exists()):
        began = time.process_time()
        found = {**make(), "cpu_s": time.process_time() - began}
        part = file.with_name(file.name + ".part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(found) + "\n", "utf-8")
            os.replace(part, file)
        except OSError as error:
            raise RequestError(f"--output: {file} cannot be written ({error.strerror})") from None
    record: Record = json.loads(file.read_text("utf-8"))
    return record


def _file(plan: Plan, source: str) -> Path:
    path = plan.sources[source]
    return (
        path if isinstance(path, Path) else plan.output / "annotations" / f"{folders(list(plan.sources))[source]}.jsonl"
    )


def _annotated(plan: Plan, source: str) -> Record:
    """The record of an annotation: share inside spans, spans, and how far it agrees with the families' own labels."""

    def make() -> Record:
        recipe, failed = plan.sources[source], 0
        if recipe is None:
            failed = _annotate(plan, source, RuleAnnotator())
        elif not isinstance(recipe, Path):
            with SplitDecoder.from_pretrained(plan.base, plan.large, **plan.options) as decoder:
                failed = _annotate(plan, source, GapAnnotator(decoder, Pair(plan.base, plan.large), recipe))
        tagged = list(_tagged(read_traces(_file(plan, source), "--sources")))
        found = statistics(tagged)
        known = any(trace.id in plan.labels for trace in tagged)
        return {
            "traces": found["traces"],
            "failed": failed,
            "share": found["share"],
            "spans": found["spans_per_trace"]["mean"],
            "agreement": agreement(tagged, plan.labels) if known else None,
        }

    name = folders(list(plan.sources))[source]
    return once(plan.output / "annotations" / f"{name}.json", make, _file(plan, source))


def _annotate(plan: Plan, source: str, annotator: GapAnnotator | RuleAnnotator) -> int:
    """Writes the tagged file of a source; returns how many traces it cannot annotate."""
    summary = annotation.annotate(plan.traces, annotator, _file(plan, source), total=len(plan.traces))
    failed = [*summary.left_out, *summary.failed]
    if not summary.annotated + summary.already:
        raise RequestError(f"--sources: {source}: found {len(failed)} of {len(plan.traces)} traces it cannot annotate "
                           f"({failed[0]}), expected traces it can")  # fmt: skip
    return len(failed)


def _tagged(traces: Iterable[Trace]) -> Iterable[Tagged]:
    """Traces of training as an annotation, named by what they hold."""
    for trace in traces:
        text, spans = parse(trace.tagged)
        if text:
            yield Tagged(Untagged("", trace.prompt, text).digest, text, spans, {})


def _tuned(plan: Plan, source: str, tuned: str, seed: int) -> Record:
    target = model_of(plan, (source, tuned, NONE, seed))

    def make() -> Record:
        settings = replace(plan.sft[tuned], seed=seed)
        made = sft.train(plan.base, read_traces(_file(plan, source), "--sources"), target, settings)
        losses = made.losses
        return {
            "steps": made.steps,
            "traces": made.traces,
            "left_out": made.left_out,
            "resumed_from": made.resumed_from,
            "loss_first": losses[0] if losses else None,
            "loss": fmean(losses[-max(1, len(losses) // _LAST) :]) if losses else None,
        }

    return once(target.with_name(target.name + ".json"), make, target / "config.json")


def _reinforced(plan: Plan, cell: Cell) -> Record:
    source, tuned, name, seed = cell
    target, settings = model_of(plan, cell), plan.rl[name]
    assert settings is not None

    def make() -> Record:
        small = model_of(plan, (source, tuned, NONE, seed))
        made = grpo_run.train(
            small, plan.large, plan.questions, target, replace(settings, seed=seed), large_prompts=plan.large_prompts
        )
        log = [json.loads(text) for text in (target / "log.jsonl").read_text("utf-8").splitlines()]
        return {"steps": len(log), "resumed_from": len(log) - len(made), "first": log[0], "last": log[-1]}

    return once(target.with_name(target.name + ".json"), make, target / "config.json")


def _asked(plan: Plan, cell: Cell) -> Record:
    """What the pair of a cell answered to all tasks: figures and, question by question, right or wrong."""
    small = model_of(plan, cell)

    def make() -> Record:
        with SplitDecoder.from_pretrained(small, plan.large, **plan.options, max_num_seqs=64) as decoder:
            return _answers(plan, [Row("split")], decoder, dict.fromkeys(task.name for task in plan.tasks))

    return once(plan.output / "eval" / f"{small.parent.name}_{small.name}.json", make)


def _baselines(plan: Plan, asked: list[Record]) -> Record:
    """The small model before SFT, the large one, and a random switch at the mean rate of all cells; once for all."""

    def make() -> Record:
        rates: dict[str, Rate | None] = {}
        for task in plan.tasks:
            rows = [row for record in asked for row in record["rows"] if row["task"] == task.name]
            spans = [row["span_tokens"] for row in rows if row["span_tokens"] is not None]
            share = fmean(row["offload"] for row in rows)
            rates[task.name] = Rate(share, max(1, round(fmean(spans))) if spans else NO_SPAN)
        with SplitDecoder.from_pretrained(plan.base, plan.large, **plan.options, max_num_seqs=64) as decoder:
            return _answers(plan, BASELINES, decoder, rates)

    return once(plan.output / "eval" / "baselines.json", make)


def _answers(plan: Plan, rows: Iterable[Row], decoder: SplitDecoder, rates: dict[str, Rate | None]) -> Record:
    outcomes = [
        outcome
        for task in plan.tasks
        for outcome in run_task(task, list(rows), lambda _: decoder, replace(plan.asking, rate=rates[task.name]))
    ]
    return {
        "rows": [report.figures(outcome, plan.asking.seed) for outcome in outcomes],
        "scores": {outcome.task.name: outcome.scores for outcome in outcomes},
    }
