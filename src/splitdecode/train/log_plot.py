"""F7: the logs of GRPO runs as small multiples: a panel per figure, a colour per run, a dot per step, a smooth line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitdecode.annotate.gap import moving_average
from splitdecode.errors import RequestError
from splitdecode.plots import load_pyplot

LOG = "log.jsonl"
COLUMNS = 3
_SHARE = 8  # the smooth line is the mean over so small a part of the steps
_FIRST, _LAST = "reward", ("offload_fraction", "spans", "tokens", "ms", "unbalanced", "unreturned")
_SHARES = ("offload_fraction", "unbalanced", "unreturned")
_TITLES = {
    "reward": "reward, weighted sum",
    "offload_fraction": "tokens by the large model (%)",
    "spans": "spans an answer",
    "tokens": "tokens an answer",
    "ms": "ms an answer (both models)",
    "unbalanced": "answers with unpaired tags (%)",
    "unreturned": "spans not taken back (%)",
}


def read_log(run: Path) -> list[dict[str, float]]:
    """The steps of a run's log; a last line without its end, of a run that is writing it, is left out.

    Raises RequestError naming the run or the line.
    """
    file = run / LOG
    try:
        lines = file.read_text("utf-8").split("\n")[:-1]
    except (OSError, UnicodeError):
        raise RequestError(f"{run}: found no {LOG} to read, expected the output of `splitdecode train grpo`") from None
    steps = []
    for number, text in enumerate(lines, 1):
        try:
            step = {str(name): float(value) for name, value in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError):
            raise RequestError(f"{file}:{number}: found {text[:60]!r}, expected an object of numbers") from None
        if "step" not in step:
            raise RequestError(f"{file}:{number}: found no 'step', expected one")
        steps.append(step)
    if not steps:
        raise RequestError(f"{file}: found no steps, expected at least one")
    return steps


def plot(runs: Sequence[Path], file: Path) -> None:
    """Draws the logs of some runs into one picture. Raises RequestError for a log or an output that cannot be used,
    MissingExtraError without matplotlib."""
    pyplot = load_pyplot("a plot of a run's log")
    logs = dict(zip(_labels(runs), map(read_log, runs), strict=True))
    names = panels([step for steps in logs.values() for step in steps])
    rows = math.ceil(len(names) / COLUMNS)
    figure, grid = pyplot.subplots(
        rows, COLUMNS, figsize=(3.6 * COLUMNS, 0.6 + 2.4 * rows + 0.15 * len(logs)), layout="constrained", squeeze=False
    )
    if file.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        pyplot.close(figure)
        raise RequestError(f"--output: found {file}, expected a file such as log.png")
    for axes, name in zip(grid.flat, names, strict=False):
        for number, (label, steps) in enumerate(logs.items()):
            _draw(axes, [step for step in steps if name in step], name, f"C{number % 10}", label)
        axes.set_title(_TITLES.get(name, name), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in list(grid.flat)[len(names) :]:
        axes.axis("off")
    for axes in list(grid.flat)[max(0, len(names) - COLUMNS) : len(names)]:
        axes.set_xlabel("step", fontsize=8)
    if len(logs) > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise RequestError(f"--output: {file} cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)


def panels(steps: Sequence[dict[str, float]]) -> list[str]:
    """Names of the figures in these steps: the reward, its terms, then what the answers took."""
    found = dict.fromkeys(name for step in steps for name in step if name != "step")
    terms = [name for name in found if name not in (_FIRST, *_LAST)]
    return [name for name in (_FIRST, *terms, *_LAST) if name in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """The centred moving average over an odd number of steps, about an eighth of them."""
    window = len(values) // _SHARE
    return [float(value) for value in moving_average(np.array(values, np.float64), window + 1 - window % 2)]


def _draw(axes: Any, steps: Sequence[dict[str, float]], name: str, colour: str, label: str) -> None:
    scale = 100.0 if name in _SHARES else 1.0
    at, values = [step["step"] for step in steps], [scale * step[name] for step in steps]
    axes.plot(at, values, ".", color=colour, alpha=0.3, markersize=4)
    axes.plot(at, smoothed(values) if values else [], color=colour, linewidth=1.5, label=label)


def _labels(runs: Sequence[Path]) -> list[str]:
    """A name for each run: its directory's, with as many of those above as it takes to tell them apart."""
    parts = [path.resolve().parts for path in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise RequestError(f"runs: found {runs[0]} twice, expected different ones")
