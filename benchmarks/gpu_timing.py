"""How gpu_first.py times, checks and keeps what it measures on a CUDA device."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"  # tests rehearse on the CPU
Span = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement; predicted: (low, high) expected beforehand, None where nothing was."""

    stage: str
    name: str
    value: float
    unit: str
    predicted: Span = None
    note: str = ""
    headline: bool = False

    def line(self) -> str:
        expected = "" if self.predicted is None else "-".join(f"{x:.4g}" for x in dict.fromkeys(self.predicted))
        tail = " ".join(part for part in (expected and f"(predicted {expected})", self.note) if part)
        return f"{self.stage:<10}{self.name:<38}{self.value:>10.2f} {self.unit:<8}{tail}".rstrip()


class Log:
    """Prints a stage's figures and failures and appends each to a file, a JSON document per line."""

    def __init__(self, stage: str, path: Path, seconds: float, ceiling: float) -> None:
        self.stage, self.path, self.end, self.ceiling = stage, path, time.monotonic() + seconds, ceiling

    def add(self, name: str, value: float, unit: str, predicted: Span = None, **more: Any) -> None:
        """TimeoutError, after keeping the figure, when the stage is past its time."""
        figure = Figure(self.stage, name, value, unit, predicted, **more)
        print(figure.line(), flush=True)
        self._append(asdict(figure))
        if time.monotonic() > self.end:
            raise TimeoutError("stopped at its time limit")

    def fail(self, name: str, error: BaseException) -> None:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{self.stage:<10}{name:<38} FAILED {text}", flush=True)
        self._append({"stage": self.stage, "name": name, "error": text})

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """An error of its block is a result like others; running out of time is not."""
        try:
            yield
        except TimeoutError:
            raise
        except Exception as error:
            self.fail(name, error)

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Replay:
    """`work` as one CUDA graph; it has run once before, so everything in it is compiled and loaded."""

    def __init__(self, work: Callable[[], Any]) -> None:
        work()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            work()

    def once(self) -> None:
        self._graph.replay()
        torch.cuda.synchronize()

    def us(self, parts: int = 1) -> float:
        """Microseconds per part of a replay: median of 7 blocks of 4 ms or more, each queued behind another replay."""
        self.once()
        count = 1
        times = []
        for block in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._graph.replay()
            begin.record()
            for _ in range(count):
                self._graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / count)
            if block == 0:
                count = max(1, min(400, math.ceil(4 / max(times.pop(), 1e-3))))
        return 1e3 * statistics.median(times) / parts


def half(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def check(found: Tensor, wanted: Tensor, tolerance: float, share: float = 0.01) -> None:
    """ArithmeticError unless `found` is within `share` of `wanted`, give or take `tolerance`; NaN never is."""
    error = (found.double() - wanted.double()).abs() - share * wanted.double().abs()
    if not bool((error <= tolerance).all()):
        raise ArithmeticError(f"wrong by {float(error.max()):.3g} where {tolerance:.3g} is allowed")
