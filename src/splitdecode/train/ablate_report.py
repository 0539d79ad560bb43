"""F7: an ablation as one JSON document, as Markdown and as a plot.

rows      one per cell, seed and task: figures of `splitdecode eval`, accuracy before RL, CPU seconds of each stage
cells     the same over all seeds       margins   each level of an axis over everything else, and minus the first level
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Any

from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.evaluate import report
from splitdecode.evaluate.intervals import accuracy, paired
from splitdecode.evaluate.tables import head, interval, line, number
from splitdecode.plots import load_pyplot
from splitdecode.train.ablate import Cell, Record, Records, cells_of
from splitdecode.train.ablate_plan import NONE, Plan

KIND = "splitdecode ablation"
PACKAGES = (*report.PACKAGES, "transformers", "trl", "peft", "accelerate")
AXES = ("source", "sft", "rl")
LEGEND = (
    "Accuracy: 95 % intervals, Wilson's for one seed (and where all answers or none are right), else a bootstrap over "
    "questions; differences: a paired bootstrap over the same questions (where it is the same for all: Wilson's bound "
    "on the share of others). Both are about questions: how far seeds differ is in the rows of each seed. "
    "Before: the same model before RL. Offload, spans, ms: as in `splitdecode eval`. P, R, F1: characters the large "
    "model wrote against labelled ones. Loss: mean over the last tenth of SFT. CPU s: of each stage, in the run that "
    "finished it, libraries that it loads included; means over the seeds.",
)


def document(plan: Plan, found: Records, argv: Sequence[str]) -> dict[str, Any]:
    """The whole report, as JSON can hold it."""
    tasks = [task.name for task in plan.tasks]
    return {
        "kind": KIND,
        "version": 1,
        "command": report.command_line(argv),
        "provenance": report.provenance(PACKAGES),
        "settings": {
            **{name: Path(plan.identity[name]).name for name in ("base", "large")},
            **{name: value for name, value in plan.identity.items() if name not in ("base", "large", "files")},
        },
        "annotations": [{"source": source, **record} for source, record in found.annotations.items()],
        "sft": [{**_named(key), **record} for key, record in found.sft.items()],
        "rl": [{**_named(key), **record} for key, record in found.rl.items()],
        "rows": [_row(found, cell, task) for task in tasks for cell in cells_of(plan)],
        "cells": [_cell(plan, found, levels, task) for task in tasks for levels in _levels(plan)],
        "margins": [one for task in tasks for axis in range(len(AXES)) for one in _margins(plan, found, axis, task)],
        "baselines": found.baselines["rows"],
    }


def _named(key: Sequence[str | int]) -> dict[str, str | int]:
    names = (*AXES, "seed") if len(key) == len(AXES) + 1 else ("source", "sft", "seed")
    return dict(zip(names, key, strict=True))


def _levels(plan: Plan) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys(cell[:3] for cell in cells_of(plan)))


def _figures(found: Records, cell: Cell, task: str) -> dict[str, Any]:
    return next(row for row in found.answers[cell]["rows"] if row["task"] == task)


def _row(found: Records, cell: Cell, task: str) -> dict[str, Any]:
    before = (*cell[:2], NONE, cell[3])
    return {
        **_named(cell),
        "before": None if cell == before else _figures(found, before, task)["accuracy"],
        **_figures(found, cell, task),
        "loss": found.sft[cell[0], cell[1], cell[3]]["loss"],
        "cpu_s": _seconds(found, cell),
    }


def _seconds(found: Records, cell: Cell) -> dict[str, float | None]:
    return {
        "annotation": found.annotations[cell[0]]["cpu_s"],
        "sft": found.sft[cell[0], cell[1], cell[3]]["cpu_s"],
        "rl": found.rl[cell]["cpu_s"] if cell in found.rl else None,
        "eval": found.answers[cell]["cpu_s"],
    }


def _cell(plan: Plan, found: Records, levels: tuple[str, str, str], task: str) -> dict[str, Any]:
    """A cell over its seeds."""
    mine: list[Cell] = [(*levels, seed) for seed in plan.seeds]
    rows = [_row(found, cell, task) for cell in mine]
    before: list[Cell] = [(*levels[:2], NONE, seed) for seed in plan.seeds]
    seconds = [_seconds(found, cell) for cell in mine]
    return {
        "task": task,
        **dict(zip(AXES, levels, strict=True)),
        "accuracy": asdict(accuracy(_scores(found, mine, task), plan.asking.seed)),
        "before": None if levels[2] == NONE else asdict(accuracy(_scores(found, before, task), plan.asking.seed)),
        **_means(rows),
        "loss": _mean([row["loss"] for row in rows]),
        "alarms": sorted({alarm.partition(":")[0] for row in rows for alarm in row["alarms"]}),
        "cpu_s": {name: _mean([one[name] for one in seconds]) for name in seconds[0]},
    }


def _margins(plan: Plan, found: Records, axis: int, task: str) -> list[dict[str, Any]]:
    """Each level of an axis over all cells that have it; of an axis with one level nothing."""
    names = list((plan.sources, plan.sft, plan.rl)[axis])
    chosen = [[cell for cell in cells_of(plan) if cell[axis] == name] for name in names] if len(names) > 1 else []
    scores = [_scores(found, cells, task) for cells in chosen]
    seed = plan.asking.seed
    return [
        {
            "task": task,
            "axis": AXES[axis],
            "level": name,
            "accuracy": asdict(accuracy(right, seed)),
            "minus_first": asdict(paired(right, scores[0], seed)) if name != names[0] else None,
            **_means([_figures(found, cell, task) for cell in cells]),
        }
        for name, cells, right in zip(names, chosen, scores, strict=False)
    ]


def _scores(found: Records, cells: Sequence[Cell], task: str) -> list[list[bool]]:
    """Right or wrong, per question over all the cells."""
    each = [found.answers[cell]["scores"][task] for cell in cells]
    return [[right for answers in question for right in answers] for question in zip(*each, strict=True)]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    decisions = [row["decisions"] or {} for row in rows]
    return {
        **{name: _mean([row[name] for row in rows]) for name in ("offload", "spans", "ms_per_answer")},
        **{name: _mean([one.get(name) for one in decisions]) for name in ("precision", "recall", "f1")},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def markdown(found: Mapping[str, Any]) -> str:
    """The document for people."""
    place, settings = found["provenance"], found["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    seeds = ", ".join(map(str, settings["seeds"]))
    lines = ["# Ablation: annotation x SFT x RL", "", f"`{found['command']}`", "",
             f"{place['date']}, {place['gpu'] or place['cpu']}, {place['cores']} cores, {place['threads']} thread(s), "
             f"Python {place['python']}; {versions}. Small {settings['base']}, large {settings['large']}, seed(s) "
             f"{seeds}.", "", "## Annotation", "", *_annotations(found["annotations"])]  # fmt: skip
    for task in dict.fromkeys(cell["task"] for cell in found["cells"]):
        lines += ["", f"## {task}", "", *_cells(found, task)]
        if margins := [one for one in found["margins"] if one["task"] == task]:
            lines += ["", f"### Each axis, {task}", "", *_axes(margins)]
        if len(settings["seeds"]) > 1:
            lines += ["", f"### Each seed, {task}", "", *_each_seed(found["rows"], task)]
    return "\n".join([*lines, "", *LEGEND, ""])


def _annotations(records: Sequence[Record]) -> list[str]:
    out = head(["source", "traces", "failed", "inside %", "spans", "P", "R", "F1 against labels", "CPU s"])
    for one in records:
        known = one["agreement"] or {}
        out.append(line([one["source"], str(one["traces"]), str(one["failed"]), f"{100 * one['share']:.2f}",
                         f"{one['spans']:.2f}", *(number(known.get(k), ".3f") for k in ("precision", "recall", "f1")),
                         f"{one['cpu_s']:.1f}"]))  # fmt: skip
    return out


def _cells(found: Mapping[str, Any], task: str) -> list[str]:
    out = head([*AXES, "accuracy %", "before RL %", "offload %", "spans", "ms per answer", "P / R / F1", "loss",
                "alarms", "CPU s: SFT / RL / eval"])  # fmt: skip
    for cell in found["cells"]:
        if cell["task"] == task:
            seconds = " / ".join(number(cell["cpu_s"][name], ".1f") for name in ("sft", "rl", "eval"))
            before = "" if cell["before"] is None else interval(cell["before"])
            out.append(line([*(cell[axis] for axis in AXES), interval(cell["accuracy"]), before, *_common(cell),
                             number(cell["loss"], ".3f"), ", ".join(cell["alarms"]), seconds]))  # fmt: skip
    for row in found["baselines"]:
        if row["task"] == task:
            out.append(line([row["policy"], "", "", interval(row["accuracy"]), "", *_common({**row, **_means([row])}),
                             "", "", ""]))  # fmt: skip
    return out


def _axes(margins: Sequence[Record]) -> list[str]:
    out = head(["axis", "level", "accuracy %", "minus the first", "offload %", "spans", "ms per answer", "P / R / F1"])
    for one in margins:
        difference = "" if one["minus_first"] is None else interval(one["minus_first"], sign="+")
        out.append(line([one["axis"], one["level"], interval(one["accuracy"]), difference, *_common(one)]))
    return out


def _each_seed(rows: Sequence[Record], task: str) -> list[str]:
    out = head([*AXES, "seed", "accuracy %", "before RL %", "offload %", "spans", "ms per answer", "P / R / F1"])
    for row in rows:
        if row["task"] == task:
            before = "" if row["before"] is None else interval(row["before"])
            out.append(line([*(row[axis] for axis in AXES), str(row["seed"]), interval(row["accuracy"]), before,
                             *_common({**row, **_means([row])})]))  # fmt: skip
    return out


def _common(one: Mapping[str, Any]) -> list[str]:
    decisions = " / ".join(number(one[name], ".2f") for name in ("precision", "recall", "f1"))
    return [number(one["offload"], ".2f", 100), number(one["spans"], ".2f"), number(one["ms_per_answer"], ".2f"),
            decisions]  # fmt: skip


def plot(found: Mapping[str, Any], file: Path) -> None:
    """Accuracy over the share of large tokens, a mark per cell, a panel per task: colours are sources, fillings SFT,
    shapes RL. Raises MissingExtraError without matplotlib."""
    pyplot = load_pyplot()
    tasks = list(dict.fromkeys(cell["task"] for cell in found["cells"]))
    levels = [found["settings"][name] for name in ("sources", "sft", "rl")]
    figure, grid = pyplot.subplots(
        1, len(tasks), figsize=(3 + 4.5 * len(tasks), 5 + 0.2 * sum(map(len, levels))), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, task in zip(grid[0], tasks, strict=True):
        for cell in found["cells"]:
            if cell["task"] == task:
                at = [names.index(cell[axis]) for axis, names in zip(AXES, levels, strict=True)]
                _mark(axes, cell, **_style(*at))
        for row in found["baselines"]:
            if row["task"] == task and row["policy"] == "large":
                axes.axhline(100 * row["accuracy"]["value"], color="0.6", linestyle=":", label="large alone")
            elif row["task"] == task:
                _mark(
                    axes,
                    row,
                    fmt="+" if row["policy"].startswith("random") else "x",
                    color="black",
                    label=row["policy"],
                )
        axes.set(title=task, xlabel="tokens by the large model (%)", ylim=(-4, 104))
        axes.margins(x=0.08)
    for axis, (name, names) in enumerate(zip(AXES, levels, strict=True)):
        for index, level in enumerate(names if len(names) > 1 else ()):
            style = _style(*(index if other == axis else 0 for other in range(len(AXES))))
            colour = style["color"] if axis == 0 else "0.4"
            grid[0, 0].plot([], [], linestyle="", marker=style["fmt"], color=colour, fillstyle=style["fillstyle"],
                            label=shorten(f"{name}: {level}", 90, placeholder="..."))  # fmt: skip
    grid[0, 0].set_ylabel("right answers (%)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _style(source: int, tuned: int, rl: int) -> dict[str, Any]:
    filling = ("full", "none", "left", "right", "top", "bottom")[tuned % 6]
    return {"color": f"C{source % 10}", "fillstyle": filling, "fmt": "os^Dv<>P"[rl % 8]}


def _mark(axes: Any, one: Mapping[str, Any], **style: Any) -> None:
    y, low, high = (100 * one["accuracy"][name] for name in ("value", "low", "high"))
    axes.errorbar([100 * one["offload"]], [y], yerr=[[y - low], [high - y]], capsize=3, **style)


def write(found: Mapping[str, Any], output: Path) -> None:
    """results.json, results.md and, where matplotlib is there, results.png. Raises RequestError for what cannot be
    written."""
    try:
        (output / "results.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (output / "results.md").write_text(markdown(found), "utf-8")
        plot(found, output / "results.png")
    except MissingExtraError:
        return
    except OSError as error:
        raise RequestError(f"--output: {output} cannot be written to ({error.strerror})") from None
