"""F7: a results document as Markdown, a table per task."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from splitdecode.evaluate.report import transfer
from splitdecode.split.health import BOUNDS
from splitdecode.split.roles import Role

LEGEND = (
    "Accuracy: 95 % intervals, Wilson's for one answer a question (and where all answers or none are right), else a "
    "bootstrap over questions; differences: a paired bootstrap over the same questions, and where it is the same for "
    "all of them Wilson's bound on the share of others. Offload: the large model's share of all tokens. Spans: runs of "
    "its tokens in an answer. ms: of both models, each step shared out by "
    "tokens among the answers it served (the host's own work is not in it); CPU, wall: of the whole run, over its "
    "answers. Signs, over all answers of a row whose hand-offs the control tags decide, beside the bound of a healthy "
    "pair: offload, share of answers whose tags do not pair up, share of spans not taken back, time that writing alone "
    "would take over the time spent, the large model's time alone over the time spent, nats by which a model likes the "
    "other one's text less than its own (on a sample, once the row is timed). P, R, F1, IoU, kappa: characters the "
    "large model wrote against labelled ones; hit: labelled spans of which it wrote at least half. "
    '"-": not defined.',
)


def markdown(document: dict[str, Any]) -> str:
    """The whole document for people."""
    place, settings = document["provenance"], document["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    lines = [
        "# Evaluation",
        "",
        f"`{document['command']}`",
        "",
        f"{place['date']}, {place['gpu'] or place['cpu']}, {place['cores']} cores, {place['threads']} thread(s), "
        f"Python {place['python']}; {versions}. Seed {settings['seed']}, {settings['samples']} answer(s) a question.",
    ]
    for task in dict.fromkeys(row["task"] for row in document["rows"]):
        lines += ["", f"## {task}", "", *_task(document, task)]
    if cells := transfer([document]):
        lines += ["", "## Trained on x tested on", "", *matrix(cells)]
    if document["lm_eval"]:
        lines += ["", "## lm-evaluation-harness", "", *_lm_eval(document["lm_eval"])]
    lines += ["", *LEGEND, ""]
    return "\n".join(lines)


def matrix(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The cells of `transfer` as a Markdown table: accuracy, offload, F1. A second result of the same pair on the same
    task stands in a second line."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    out = head(["trained on", *tasks])
    for trained in dict.fromkeys(cell["trained_on"] for cell in cells):
        mine = {task: [c for c in cells if (c["trained_on"], c["task"]) == (trained, task)] for task in tasks}
        for places in zip_longest(*mine.values()):
            out.append(line([trained, *("-" if cell is None else _cell(cell) for cell in places)]))
    return out


def _cell(cell: dict[str, Any]) -> str:
    f1 = "" if cell["f1"] is None else f", F1 {cell['f1']:.2f}"
    return f"{interval(cell['accuracy'])} at {100 * cell['offload']:.1f} %{f1}"


def _task(document: dict[str, Any], task: str) -> list[str]:
    rows = [row for row in document["rows"] if row["task"] == task]
    out = head(["policy", "accuracy %", "offload %", "spans", "tokens small / large", "ms per answer", "ms per token",
                 "CPU ms", "wall ms", "truncated"])  # fmt: skip
    out += [line(_row(row)) for row in rows]
    out += _signs(rows)
    if labelled := [row for row in rows if row["decisions"]]:
        out += ["", *head(["hand-offs", "P", "R", "F1", "IoU", "kappa", "hit", "spans labelled / handed"])]
        names = ("precision", "recall", "f1", "iou", "kappa", "hit_rate")
        for row in labelled:
            found = row["decisions"]
            counts = f"{found['labelled']} / {found['handed']}"
            out.append(line([row["policy"], *(number(found[name], ".3f") for name in names), counts]))
        out += _footnotes(labelled)
    pairs = [pair for pair in document["paired"] if pair["task"] == task]
    if pairs:
        shown = [f"{pair['policy']} - {pair['minus']}: {interval(pair['accuracy'], sign='+')}" for pair in pairs]
        out += ["", "Differences of accuracy, paired: " + "; ".join(shown) + "."]
    return out


def _row(row: dict[str, Any]) -> list[str]:
    tokens = row["tokens"]
    truncated = row["finish"].get("length", 0) / sum(row["finish"].values())
    return [
        row["policy"],
        interval(row["accuracy"]),
        f"{100 * row['offload']:.2f}",
        f"{row['spans']:.2f}",
        f"{tokens[str(Role.SMALL)]:.1f} / {tokens[str(Role.LARGE)]:.1f}",
        f"{row['ms_per_answer']:.2f}",
        f"{row['ms_per_token']:.4f}",
        f"{row['cpu_ms_per_answer']:.2f}",
        f"{row['wall_ms_per_answer']:.2f}",
        f"{100 * truncated:.1f} %",
    ]


def _footnotes(rows: Sequence[dict[str, Any]]) -> list[str]:
    out = []
    for row in rows:
        if row["kept"] is not None:
            out += ["", f"{row['policy']}: {row['kept']['on_reference']} of {row['kept']['spans']} forced spans began "
                    "on the labelled solution as it is up to there."]  # fmt: skip
        share = row["decisions"]["coverage"]
        if share < 1:
            out += ["", f"{row['policy']}: answers were compared as far as they agree with the labelled solutions, "
                    f"{100 * share:.1f} % of their characters."]  # fmt: skip
    return out


def _lm_eval(rows: Sequence[dict[str, Any]]) -> list[str]:
    out = head(["task", "policy", "metrics", "offload %", "ms per answer"])
    for row in rows:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items() if value is not None)
        out.append(line([row["task"], row["policy"], metrics, number(row["offload"], ".2f", 100),
                          number(row["ms_per_answer"], ".2f")]))  # fmt: skip
    return out + _signs(rows)


def _signs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How the two models got on, where control tags decided, and what is alarming in it."""
    out: list[str] = []
    if seen := [row for row in rows if row.get("health")]:
        several = len({row["task"] for row in seen}) > 1
        out += ["", *head(["signs", *(f"{name} {'<=' if over else '>='} {bound:g}" for name, (bound, over, _) in
                           BOUNDS.items())])]  # fmt: skip
        for row in seen:
            name = f"{row['task']}, {row['policy']}" if several else row["policy"]
            out.append(line([name, *(number(row["health"].get(sign), ".3f") for sign in BOUNDS)]))
    alarms = dict.fromkeys(f"Alarm, {row['policy']}: {alarm}." for row in rows for alarm in row.get("alarms", ()))
    return out + [said for alarm in alarms for said in ("", alarm)]


def interval(found: dict[str, Any], sign: str = "") -> str:
    """A share and its bounds, in per cent."""
    return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*(100 * found[k] for k in ("value", "low", "high")), s=sign)


def number(value: float | None, form: str, scale: float = 1) -> str:
    """A figure, or "-" where it is not defined."""
    return "-" if value is None else format(scale * value, form)


def head(names: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(names), line(["---", *["---:"] * (len(names) - 1)])]


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"
