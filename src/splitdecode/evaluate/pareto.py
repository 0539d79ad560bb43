"""F7: accuracy over what it costs: a point per policy, a line along those that no other one beats.

A column per task; above over ms per answer (both models' own), below over the share of tokens by the large model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitdecode.plots import load_pyplot

PURPOSE = "a plot (--no-plot does without)"
AXES = (("ms per answer (both models)", "ms_per_answer", 1.0), ("tokens by the large model (%)", "offload", 100.0))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, gain) points no other one beats (costs no more, gains no less, and is not equal), cheapest first.

    Of equal points the first stands.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    out: list[int] = []
    for index in order:
        if not out or points[index][1] > points[out[-1]][1]:
            out.append(index)
    return out


def plot(document: dict[str, Any], file: Path) -> None:
    """Draws a results document into a PNG. Raises MissingExtraError without matplotlib."""
    pyplot = load_pyplot(PURPOSE)
    tasks = list(dict.fromkeys(row["task"] for row in document["rows"]))
    figure, grid = pyplot.subplots(
        len(AXES), len(tasks), figsize=(1 + 4.5 * len(tasks), 7.5), layout="constrained", sharey="col", squeeze=False
    )
    names = list(dict.fromkeys(row["policy"] for row in document["rows"]))
    for column, task in enumerate(tasks):
        rows = [row for row in document["rows"] if row["task"] == task]
        for axes, (label, key, scale) in zip(grid[:, column], AXES, strict=True):
            _panel(axes, rows, names, key, scale)
            axes.set_xlabel(label)
        grid[0, column].set_title(task, fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("right answers (%)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _panel(axes: Any, rows: Sequence[dict[str, Any]], names: Sequence[str], key: str, scale: float) -> None:
    points = [(scale * row[key], 100 * row["accuracy"]["value"]) for row in rows]
    for row, (x, y) in zip(rows, points, strict=True):
        number = names.index(row["policy"])
        bounds = [[y - 100 * row["accuracy"]["low"]], [100 * row["accuracy"]["high"] - y]]
        mark, colour = "os^Dv<>PX*"[number % 10], f"C{number % 10}"
        axes.errorbar([x], [y], yerr=bounds, fmt=mark, mfc="none", capsize=3, color=colour, label=row["policy"])
    best = [points[index] for index in front(points)]
    axes.step([x for x, _ in best], [y for _, y in best], where="post", color="0.7", linewidth=1, zorder=0)
    axes.set_ylim(-4, 104)
    axes.margins(x=0.08)
