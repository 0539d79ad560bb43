"""F7: results as one JSON document.

document   {kind, version, command, provenance, pair, settings, rows, paired, lm_eval}
row        one policy on one task; per answer: tokens, spans, ms of each model; see `figures`
transfer   documents of pairs trained on different families -> trained on x tested on
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from splitdecode.errors import RequestError
from splitdecode.evaluate.decisions import Decisions
from splitdecode.evaluate.intervals import accuracy, paired
from splitdecode.evaluate.runs import Outcome
from splitdecode.split.roles import Role

KIND = "splitdecode evaluation"
PACKAGES = ("splitdecode", "torch", "numpy", "tokenizers", "math-verify", "lm_eval", "datasets")


def figures(outcome: Outcome, seed: int) -> dict[str, Any]:
    """One row. Shares are 0 to 1; "ms" are the models' own, "wall" and "cpu" of the whole run, over its answers."""
    answers, count = outcome.answers, len(outcome.answers)
    metrics = [answer.metrics for answer in answers]
    tokens = sum(m.tokens for m in metrics)
    spans = sum(answer.spans for answer in answers)
    ms = sum(m.models[role].ms for m in metrics for role in Role)
    return {
        "task": outcome.task.name,
        "policy": outcome.row.name,
        "checkpoint": outcome.row.checkpoint,
        "n": len(outcome.task.items),
        "samples": outcome.samples,
        "accuracy": asdict(accuracy(outcome.scores, seed)),
        "offload": sum(m.large.tokens for m in metrics) / max(1, tokens),
        "offload_mean": fmean(m.offload_fraction for m in metrics),
        "spans": spans / count,
        "span_tokens": sum(m.large.tokens for m in metrics) / spans if spans else None,
        "tokens": {str(role): sum(m.models[role].tokens for m in metrics) / count for role in Role},
        "ms": {str(role): sum(m.models[role].ms for m in metrics) / count for role in Role},
        "ms_per_answer": ms / count,
        "ms_per_token": ms / max(1, tokens),
        "wall_ms_per_answer": 1e3 * outcome.wall / count,
        "cpu_ms_per_answer": 1e3 * outcome.cpu / count,
        "finish": {
            reason: sum(a.output.finish_reason == reason for a in answers)
            for reason in sorted({str(a.output.finish_reason) for a in answers})
        },
        "rejected_openings": sum(m.rejected_openings for m in metrics) / count,
        "decisions": _decisions(outcome),
        "kept": _kept(outcome),
        "rate": None if outcome.rate is None else asdict(outcome.rate),
        "health": outcome.health,
        "alarms": list(outcome.alarms),
    }


def comparisons(outcomes: Sequence[Outcome], seed: int) -> list[dict[str, Any]]:
    """Accuracy of the split row (without one, the first) minus that of every other row of the same task."""
    against = next((outcome for outcome in outcomes if outcome.row.kind == "split"), outcomes[0])
    return [
        {
            "task": other.task.name,
            "policy": against.row.name,
            "minus": other.row.name,
            "accuracy": asdict(paired(against.scores, other.scores, seed)),
        }
        for other in outcomes
        if other is not against
    ]


def provenance(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What the figures were measured on and with: models and versions, no names and no paths."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def command_line(argv: Sequence[str]) -> str:
    """The command as one would type it again; of files and folders only their names."""
    return shlex.join(["splitdecode", *(re.sub(r"(^|=|^file:)/(?:[^/]*/)*", r"\1", a) for a in argv)])


def read(file: Path) -> dict[str, Any]:
    """A document from a file. Raises RequestError where it is none."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: found no results ({type(error).__name__}), expected a results.json") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise RequestError(f"{file}: found other JSON, expected the results.json of `splitdecode eval`")
    return found


def transfer(documents: Sequence[dict[str, Any]], policy: str = "split") -> list[dict[str, Any]]:
    """One cell per pair and task: what the pair was trained on, what it was tested on, and how its `policy` row did.

    Each document says what its pair was trained on; the rows of all its tasks are cells.
    """
    return [
        {
            "trained_on": document["pair"]["trained_on"],
            "task": row["task"],
            "accuracy": row["accuracy"],
            "offload": row["offload"],
            "f1": (row["decisions"] or {}).get("f1"),
        }
        for document in documents
        for row in document["rows"]
        if row["policy"] == policy
    ]


def _decisions(outcome: Outcome) -> dict[str, Any] | None:
    total, compared, whole = Decisions(), 0, 0
    known = [answer for answer in outcome.answers if answer.decisions is not None]
    for answer in known:
        assert answer.decisions is not None
        total.add(answer.decisions)
        compared, whole = compared + answer.compared[0], whole + answer.compared[1]
    return {**total.figures(), "coverage": compared / whole if whole else 1.0} if known else None


def _kept(outcome: Outcome) -> dict[str, int] | None:
    pairs = [answer.kept for answer in outcome.answers if answer.kept is not None]
    if not pairs:
        return None
    return {"on_reference": sum(kept for kept, _ in pairs), "spans": sum(spans for _, spans in pairs)}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
