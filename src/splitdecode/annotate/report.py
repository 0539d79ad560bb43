"""F7: what an annotated file holds, in figures, and how far two annotations of the same traces agree.

share      characters inside spans / all           positions   share of each tenth of a trace that is inside spans
agreement  characters inside both, one, neither: precision, recall, F1, IoU and Cohen's kappa of this file against
           another; F1 by chance is what spans of these shares, placed anywhere, would reach
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from splitdecode.annotate.records import Tagged, read_tagged
from splitdecode.annotate.spans import Span, covered
from splitdecode.errors import RequestError
from splitdecode.plots import load_pyplot

WANTED = 0.20  # the share of a trace that should be annotated at most
TENTHS = 10


def statistics(traces: Iterable[Tagged], count_tokens: Callable[[str], int] | None = None) -> dict[str, Any]:
    """Figures of annotated traces, as JSON can hold them; lengths in characters, and in tokens where they are counted.

    Raises RequestError when there is no trace.
    """
    shares: list[float] = []
    numbers: list[int] = []
    lengths: list[int] = []
    tokens: list[int] = []
    firsts: list[float] = []
    inside, total = np.zeros(TENTHS), np.zeros(TENTHS)
    characters = 0
    for trace in traces:
        size = len(trace.text)
        characters += size
        shares.append(covered(trace.spans) / size)
        numbers.append(len(trace.spans))
        lengths += [stop - start for start, stop in trace.spans]
        if count_tokens:
            tokens += [count_tokens(trace.text[start:stop]) for start, stop in trace.spans]
        firsts += [trace.spans[0][0] / size] if trace.spans else []
        mine, all_ = _by_tenth(trace.spans, size)
        inside += mine
        total += all_
    if not shares:
        raise RequestError("traces: found none, expected at least one annotated trace")
    return {
        "traces": len(shares),
        "characters": characters,
        "share": float(inside.sum() / total.sum()),
        "share_per_trace": spread(shares),
        "without_spans": sum(number == 0 for number in numbers) / len(numbers),
        "above_wanted_share": sum(share > WANTED for share in shares) / len(shares),
        "spans_per_trace": spread(numbers),
        "span_characters": spread(lengths),
        **({"span_tokens": spread(tokens)} if count_tokens else {}),
        "first_span_at": spread(firsts),
        "positions": [round(float(part), 6) for part in inside / np.maximum(total, 1e-9)],
        "histograms": {"shares": [round(share, 4) for share in shares], "lengths": lengths, "numbers": numbers},
    }


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean, deciles and extremes; None where there are no values."""
    found = np.array(list(values), float)
    if not len(found):
        return dict.fromkeys(("mean", "min", "p10", "median", "p90", "max"))
    low, middle, high = np.quantile(found, [0.1, 0.5, 0.9])
    figures = (found.mean(), found.min(), low, middle, high, found.max())
    return {n: float(v) for n, v in zip(("mean", "min", "p10", "median", "p90", "max"), figures, strict=True)}


def agreement(mine: Iterable[Tagged], others: Mapping[str, Tagged]) -> dict[str, Any]:
    """How far the spans of `mine` are those of `others`, by id, over the traces that both have.

    Precision is the share of my characters that are inside theirs too. Spans count as met when any character is shared.
    Raises RequestError when no id is in both, or a trace's text differs.
    """
    both = only = theirs = neither = 0
    per_trace: list[float] = []
    met, spans = [0, 0], [0, 0]
    alone = 0
    for trace in mine:
        other = others.get(trace.id)
        if other is None:
            alone += 1
            continue
        if other.text != trace.text:
            raise RequestError(f"trace {trace.id!r}: found different texts in the two files, expected the same trace")
        a, b = _mask(trace.spans, len(trace.text)), _mask(other.spans, len(trace.text))
        counts = int((a & b).sum()), int((a & ~b).sum()), int((b & ~a).sum())
        both, only, theirs = both + counts[0], only + counts[1], theirs + counts[2]
        neither += len(trace.text) - sum(counts)
        per_trace.append(counts[0] / sum(counts) if sum(counts) else 1.0)
        for side, (own, mask) in enumerate(((trace.spans, b), (other.spans, a))):
            spans[side] += len(own)
            met[side] += sum(bool(mask[start:stop].any()) for start, stop in own)
    if not per_trace:
        raise RequestError("--against: found no trace that is in both files, expected common ids")
    return {
        "traces": len(per_trace),
        "only_here": alone,
        "only_there": len(others) - len(per_trace),
        **_scores(both, only, theirs, neither),
        "iou_per_trace": spread(per_trace),
        "spans_met": met[0] / spans[0] if spans[0] else None,
        "their_spans_met": met[1] / spans[1] if spans[1] else None,
    }


def _scores(both: int, only: int, theirs: int, neither: int) -> dict[str, float | None]:
    total = both + only + theirs + neither
    a, b = (both + only) / total, (both + theirs) / total
    chance = a * b + (1 - a) * (1 - b)
    return {
        "share": a,
        "their_share": b,
        "precision": both / (both + only) if both + only else None,
        "recall": both / (both + theirs) if both + theirs else None,
        "f1": 2 * both / (2 * both + only + theirs) if both + only + theirs else 1.0,
        "f1_by_chance": 2 * a * b / (a + b) if a + b else 1.0,
        "iou": both / (both + only + theirs) if both + only + theirs else 1.0,
        "kappa": ((both + neither) / total - chance) / (1 - chance) if chance < 1 else None,
    }


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    stats = report["statistics"]
    lines = [f"# Annotation of {stats['traces']} traces", ""]
    lines += [f"{100 * stats['share']:.2f} % of {stats['characters']} characters are inside spans; "
              f"{100 * stats['without_spans']:.1f} % of the traces have no span, "
              f"{100 * stats['above_wanted_share']:.1f} % have more than {100 * WANTED:.0f} % inside. Traces that were "
              f"left out: {report.get('left_out', 0)}.", ""]  # fmt: skip
    lines += ["| | mean | min | p10 | median | p90 | max |", "|---|---|---|---|---|---|---|"]
    rows = {"share_per_trace": "share of a trace, %", "spans_per_trace": "spans per trace",
            "span_characters": "characters per span", "span_tokens": "tokens per span",
            "first_span_at": "where the first span begins, % of the trace"}  # fmt: skip
    for name, title in rows.items():
        if name in stats:
            scale = 100 if title.split(",")[-1].startswith(" %") else 1
            lines.append(f"| {title} | {' | '.join(_number(v, scale) for v in stats[name].values())} |")
    lines += ["", "| tenth of the trace | " + " | ".join(str(n + 1) for n in range(TENTHS)) + " |"]
    lines += ["|---" * (TENTHS + 1) + "|"]
    lines += ["| inside spans, % | " + " | ".join(f"{100 * part:.1f}" for part in stats["positions"]) + " |"]
    if "agreement" in report:
        found = report["agreement"]
        lines += ["", f"## Against {report['against']}", "", f"{found['traces']} traces in both files; "
                  f"{found['only_here']} only here, {found['only_there']} only there. By characters:", "",
                  "| share here | share there | precision | recall | F1 | F1 by chance | IoU | kappa |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        names = ("share", "their_share", "precision", "recall", "f1", "f1_by_chance", "iou", "kappa")
        lines += [f"| {' | '.join(_number(found[name]) for name in names)} |", ""]
        lines += [f"Spans here that meet one there: {_number(found['spans_met'], 100)} %; "
                  f"spans there that meet one here: {_number(found['their_spans_met'], 100)} %."]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(stats: Mapping[str, Any], file: Path) -> None:
    """Share, spans per trace, span length and positions as four panels. Raises MissingExtraError without matplotlib."""
    pyplot = load_pyplot()
    raw = stats["histograms"]
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    figure.suptitle(f"{stats['traces']} annotated traces, {100 * stats['share']:.1f} % of the characters", fontsize=11)
    panels = axes.ravel()
    panels[0].hist([100 * share for share in raw["shares"]], bins=25, range=(0, max(100 * max(raw["shares"]), 25)))
    panels[0].axvline(100 * WANTED, color="black", linestyle=":")
    panels[0].set(xlabel="share of a trace inside spans, %", ylabel="traces")
    numbers = np.bincount(raw["numbers"])
    panels[1].bar(range(len(numbers)), numbers)
    panels[1].set(xlabel="spans per trace", ylabel="traces")
    panels[2].hist(raw["lengths"], bins=_whole_bins(raw["lengths"]))
    panels[2].set(xlabel="characters per span", ylabel="spans")
    panels[3].bar(range(1, TENTHS + 1), [100 * part for part in stats["positions"]])
    panels[3].set(xlabel="tenth of the trace", ylabel="inside spans, %")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _whole_bins(lengths: list[int], most: int = 30) -> list[float]:
    """Edges of at most `most` bins that all hold equally many whole numbers."""
    low, high = min(lengths, default=0), max(lengths, default=0)
    width = -(-(high - low + 1) // most)
    return [edge - 0.5 for edge in range(low, high + width + 1, width)]


def index(path: Path) -> dict[str, Tagged]:
    """The annotated traces of a file, by id."""
    return {trace.id: trace for trace in read_tagged(path)}


def _mask(spans: Iterable[Span], size: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(size, np.bool_)
    for start, stop in spans:
        mask[start:stop] = True
    return mask


def _by_tenth(spans: Iterable[Span], size: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Characters inside spans, and all of them, in each tenth of a text."""
    tenth = np.arange(size) * TENTHS // size
    inside = np.bincount(tenth, weights=_mask(spans, size), minlength=TENTHS)
    return inside.astype(np.float64), np.bincount(tenth, minlength=TENTHS).astype(np.float64)


def _number(value: float | None, scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:.3g}" if abs(scale * value) < 1000 else f"{scale * value:.0f}"
