"""Benchmarks: clocks, the machine they ran on, and how figures are shown.

Two clocks run side by side. Wall time is what a user waits; on a shared machine it also counts the neighbours, so
process CPU time (of one thread) is the figure to trust there. On a GPU only wall time counts: the host waits.

Batch-1 decoding streams every weight once per token, so its floor is weight bytes / read bandwidth, with the bandwidth
measured here, by one thread, over a working set of that size: small models live in a cache, large ones in memory.

The last line on standard output is one JSON document; tables go before it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from splitdecode.plots import load_pyplot

_MOST = 128 << 20  # bytes of a buffer whose bandwidth is measured: beyond the caches of most hosts
_MOST_CUDA = 4 << 30


@dataclass(slots=True)
class Elapsed:
    """Milliseconds of process CPU time (all threads) and of wall time."""

    cpu_ms: float = 0.0
    wall_ms: float = 0.0


@contextmanager
def clock() -> Iterator[Elapsed]:
    """Times its block; the figures are there once it has ended."""
    out = Elapsed()
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        yield out
    finally:
        out.cpu_ms = 1e3 * (time.process_time() - cpu)
        out.wall_ms = 1e3 * (time.perf_counter() - wall)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of `count` figures."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """ValueError when there are none."""
        if len(values) < 2:
            (only,) = values
            return Spread(only, only, only, 1)
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(middle, low, high, len(values))

    def scaled(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.count)


@dataclass(frozen=True, slots=True)
class Timed:
    """The result of the last run, and the times of all counted ones in ms."""

    result: Any
    cpu: Spread
    wall: Spread


def race(
    works: Mapping[str, Callable[[], Any]], iterations: int, warm_up: int, settle: Callable[[], None] = lambda: None
) -> dict[str, Timed]:
    """Runs every work warm_up + iterations times, in turns, so that a noisy neighbour disturbs all of them alike.

    settle: called before a clock stops (a device must have finished).
    """
    results: dict[str, Any] = {}
    times: dict[str, list[Elapsed]] = {name: [] for name in works}
    for turn in range(warm_up + iterations):
        for name, work in works.items():
            with clock() as elapsed:
                results[name] = work()
                settle()
            if turn >= warm_up:
                times[name].append(elapsed)
    return {
        name: Timed(results[name], Spread.of([t.cpu_ms for t in found]), Spread.of([t.wall_ms for t in found]))
        for name, found in times.items()
    }


def use_threads(count: int) -> None:
    """How many threads torch computes with; 0 leaves it alone."""
    if count:
        torch.set_num_threads(count)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value `share` of the way up (nearest rank); None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


# ---- the machine


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure was measured on: models and versions, no names and no paths."""
    out: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory("MemTotal") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
    }
    if device.startswith("cuda"):
        out["gpu"] = torch.cuda.get_device_name(device)
    return out


def free_memory(device: str) -> int:
    """Bytes that can still be taken on that device."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_memory("MemAvailable"), _cgroup_room())


def _memory(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def _cgroup_room() -> int:
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii").strip() for name in ("max", "current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no such controller, or "max"
        return 1 << 62


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


# ---- bandwidth


def bandwidths(device: str = "cpu", size: int = 0) -> dict[str, float]:
    """GB/s of copy (read + written), triad (two read, one written) and read, the best of several passes."""
    size = size or (_MOST_CUDA if device.startswith("cuda") else _MOST)
    count = size // 4
    a, b, c = (torch.full((count,), 0.5, device=device) for _ in range(3))
    return {
        "copy": 8 * count / _best(lambda: c.copy_(a), device) / 1e9,
        "triad": 12 * count / _best(lambda: torch.add(a, b, alpha=3.0, out=c), device) / 1e9,
        "read": read_bandwidth(size, device),
    }


def read_bandwidth(size: int, device: str = "cpu") -> float:
    """GB/s of reading `size` bytes again and again (at most 128 MiB): what streaming weights of that size can reach.

    On a GPU weights never stay in the cache, whatever their size: 4 GiB are read.
    """
    if device.startswith("cuda"):
        return _device_read_bandwidth()
    count = max(1024, min(size, _MOST) // 4)
    a = torch.full((count,), 0.5, device=device)
    return 4 * count / min(_best(a.sum, device), _best(lambda: torch.dot(a, a), device)) / 1e9


@cache
def _device_read_bandwidth() -> float:
    """The best of gpu_kernels.read's configurations, in a captured graph."""
    import gpu_kernels
    from gpu_timing import DEVICE, Replay

    x = torch.full((_MOST_CUDA // 4,), 0.5, device=DEVICE)
    times = []
    for block, warps, steps in gpu_kernels.READS:
        sums = torch.empty(x.numel() // (block * steps), device=DEVICE)
        times.append(Replay(lambda s=sums, how=(block, warps, steps): gpu_kernels.read(x, s, *how)).us())
    return 4e-3 * x.numel() / min(times)


def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """GFLOP/s of one product of 512 x 512 matrices (on a GPU 8192 x 8192): what arithmetic can reach."""
    size = 8192 if device.startswith("cuda") else 512
    a, b = (torch.full((size, size), 0.5, dtype=dtype, device=device) for _ in range(2))
    return 2e-9 * size**3 / _best(lambda: torch.mm(a, b), device)


def _best(work: Callable[[], Any], device: str, seconds: float = 0.25) -> float:
    """Seconds of the fastest of as many passes as fit; passes shorter than 1 ms are timed in bundles."""

    def once(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once(2)
    bundle = max(1, int(1e-3 / max(once(1), 1e-7)))
    fastest, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop or fastest == float("inf"):
        fastest = min(fastest, once(bundle) / bundle)
    return fastest


# ---- showing


def show_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people, on standard output."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, width=130)
    console.print(table)


def finish(document: dict[str, Any], file: Path | None, *, quietly: bool = False) -> None:
    """Writes the document to `file`, indented, and prints it as the last line, unless `quietly`."""
    text = json.dumps(document, default=_plain)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, default=_plain, indent=1) + "\n", "utf-8")
    if not quietly:
        print(text, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return {name: round(number, 4) for name, number in asdict(value).items()}
    raise TypeError(f"{type(value).__name__} does not belong in a result")


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its group, its label, a height with quartiles, and the floor under it (None: not drawn)."""

    group: str
    label: str
    height: Spread
    floor: float | None


def bar_plot(bars: Sequence[Bar], title: str, unit: str, file: Path) -> None:
    """Bars by group, a black line at each one's floor. Raises MissingExtraError without matplotlib."""
    pyplot = load_pyplot()
    groups = list(dict.fromkeys(bar.group for bar in bars))
    labels = list(dict.fromkeys(bar.label for bar in bars))
    width = 0.8 / len(labels)
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(bars) ** 0.9, 4.5), layout="constrained")
    for bar in bars:
        members = [b.label for b in bars if b.group == bar.group]
        x = groups.index(bar.group) + (members.index(bar.label) - (len(members) - 1) / 2) * width
        h = bar.height
        error = [[h.median - h.low], [h.high - h.median]]
        axes.bar(x, h.median, 0.92 * width, yerr=error, capsize=3, color=f"C{labels.index(bar.label)}")
        axes.annotate(f"{h.median:.3g}", (x, h.high), ha="center", va="bottom", fontsize=9)
        if bar.floor is not None:
            axes.hlines(bar.floor, x - width / 2, x + width / 2, color="black", linewidth=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)
    keys = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(labels))]
    if any(bar.floor is not None for bar in bars):
        keys.append(pyplot.Line2D([], [], color="black", linewidth=2))
        labels.append("floor: weight bytes / measured bandwidth")
    axes.legend(keys, labels, fontsize=8)
    axes.margins(y=0.12)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
