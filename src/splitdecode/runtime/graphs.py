"""F4: whole steps, captured once and replayed: CUDA graphs on a GPU, tapes elsewhere.

A capture runs a step's ops on static memory and keeps what was launched, with the arguments of that moment; a replay
launches the same again. What varies from step to step must therefore lie in device memory, never in Python. A Tape
keeps to that on a CPU: it holds the calls themselves, so a number baked in by mistake stays baked in there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, Protocol

import torch

from splitdecode.ops import StepOps

Run = Callable[[StepOps], object]

_MEMORY = {"attend_scratch", "splits_for", "head_scratch", "sample_scratch"}  # StepOps that are no launches


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Launches all of it again."""


class Tape:
    """The calls of one step, in order."""

    def __init__(self, run: Run, ops: StepOps) -> None:
        self.calls: list[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]] = []
        names = [field.name for field in fields(ops) if field.name not in _MEMORY]
        recorders: dict[str, Any] = {name: partial(self._record, getattr(ops, name)) for name in names}
        run(replace(ops, **recorders))

    def _record(self, op: Callable[..., None], *arguments: Any, **options: Any) -> None:
        self.calls.append((op, arguments, options))

    def replay(self) -> None:
        """Runs the calls again, on what their tensors hold now."""
        for op, arguments, options in self.calls:
            op(*arguments, **options)

    @property
    def launches(self) -> int:
        """How many ops a replay launches."""
        return len(self.calls)


class GraphPool:
    """Captures of one device, sharing memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def capture(self, run: Run, ops: StepOps) -> Graph:
        """Captures what `run` launches. It is run once or twice with whatever the static memory holds: padding."""
        if self.device.type != "cuda":
            return Tape(run, ops)
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(side):  # compiles kernels and opens libraries, which a capture must not
                run(ops)
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                run(ops)
            torch.cuda.synchronize()
        return graph
