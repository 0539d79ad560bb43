"""Benchmarks: more streams than one machine holds: pools of GPUs for each model, by mean values instead of steps.

    every stream, in turn:   g tokens by the small model ---> catch-up of g, s tokens by the large one ---> ...

    a small GPU with b streams steps in t0(b), a large one in t1(b); a cycle of one stream takes
        T = (g + s / k) t0(b0) + s t1(b1) + catch-up          (reading along: one small step per k large tokens)
    and by Little's law, of N streams on n0 and n1 GPUs,
        b0 = N (g + s / k) t0 / (T n0)        b1 = N (s t1 + catch-up) / (T n1)

A fixed point of these, found by iteration. A small GPU must hold the caches of all its streams, a large one those of
the streams it is writing; of the idle ones it keeps as many as fit, and runs the others again when they come back.
Source of the method: mean value analysis of closed queueing networks (Reiser and Lavenberg, 1980).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clockwork import Cost, Load

from splitdecode.models import geometry
from splitdecode.plan import RESERVE_BYTES, Gpu
from splitdecode.split.roles import Pair, Role


@dataclass(frozen=True, slots=True)
class Stream:
    """Mean traffic of one stream: tokens between and in segments, positions it has cached, tokens between readings."""

    gap: float
    segment: float
    context: int
    read_interval: int = 4

    @property
    def share(self) -> float:
        """Of the tokens, written by the large model."""
        return self.segment / (self.gap + self.segment)


@dataclass(frozen=True, slots=True)
class Fleet:
    """What n0 + n1 GPUs do for so many streams; times in ms, rates per second."""

    gpus: Pair[int]
    streams: int
    batch: Pair[float]
    token_ms: float
    stall_ms: float
    tokens_per_second: float

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        total = self.gpus.small + self.gpus.large
        return {**asdict(self), "tokens_per_second_per_gpu": self.tokens_per_second / total}


def capacity(name: str, gpu: Gpu, context: int) -> int:
    """Streams whose caches one GPU holds beside the weights of one model."""
    config = geometry.preset(name)
    left = gpu.memory - RESERVE_BYTES - geometry.parameters(config) * 2
    return max(0, int(left // (geometry.kv_bytes(config) * context)))


def settle(costs: Pair[Cost], stream: Stream, streams: int, gpus: Pair[int], most: Pair[int]) -> Fleet | None:
    """The fixed point; None where a pool cannot hold its streams."""
    small_steps = stream.gap + stream.segment / stream.read_interval
    batch = Pair(streams / gpus.small / 2, 1.0)
    held = most.large * gpus.large / streams  # share of the streams whose large cache is kept
    lost = stream.context * max(0.0, 1.0 - held)
    for _ in range(400):
        step = Pair(*(_step(costs[r], batch[r], stream.context) for r in Role))
        caught = _catch_up(costs[Role.LARGE], batch.large, stream, stream.gap + lost)
        cycle = small_steps * step.small + stream.segment * step.large + caught
        wanted = Pair(
            streams * small_steps * step.small / cycle / gpus.small,
            streams * (stream.segment * step.large + caught) / cycle / gpus.large,
        )
        moved = max(abs(wanted[r] / batch[r] - 1) for r in Role)
        batch = Pair(*(0.5 * batch[r] + 0.5 * wanted[r] for r in Role))
        if moved < 1e-4:
            break
    if streams / gpus.small > most.small or batch.large > most.large:
        return None
    tokens = stream.gap + stream.segment
    return Fleet(gpus, streams, batch, cycle / tokens, caught, 1e3 * streams * tokens / cycle)


def _step(cost: Cost, batch: float, context: int) -> float:
    rows = max(1.0, batch)
    return cost(Load(round(rows), round(rows), round(rows * context), round(rows)))


def _catch_up(cost: Cost, batch: float, stream: Stream, tokens: float) -> float:
    """Extra ms of a step that runs `tokens` more than its batch would have; half a step of waiting."""
    rows = max(1, round(batch))
    plain = cost(Load(rows, rows, rows * stream.context, rows))
    mixed = cost(Load(rows, rows + round(tokens), rows * stream.context, rows))
    return mixed - plain + plain / 2


def best_fleet(costs: Pair[Cost], stream: Stream, streams: int, most: Pair[int], limit_ms: float) -> Fleet | None:
    """The fewest GPUs (and the ratio of the pools) that write every stream at limit_ms per token or faster."""
    found: Fleet | None = None
    least = max(1, -(-streams // most.small)) if most.small else 0
    small = least
    while least and (found is None or small < found.gpus.small + found.gpus.large):
        fleet = _with_enough_large(costs, stream, streams, small, most, limit_ms)
        total = 0 if fleet is None else fleet.gpus.small + fleet.gpus.large
        if fleet is not None and (found is None or total < found.gpus.small + found.gpus.large):
            found = fleet
        elif fleet is not None and found is not None and fleet.gpus.small > 2 * found.gpus.small:
            break
        small = max(small + 1, round(small * 1.08))
        if small > streams:
            break
    return found


def _with_enough_large(
    costs: Pair[Cost], stream: Stream, streams: int, small: int, most: Pair[int], limit_ms: float
) -> Fleet | None:
    """The fewest large GPUs beside `small` small ones, by bisection; None when no number is enough."""
    low, high = 1, streams
    best = None
    while low <= high:
        middle = (low + high) // 2
        fleet = settle(costs, stream, streams, Pair(small, middle), most)
        if fleet is not None and fleet.token_ms <= limit_ms:
            best, high = fleet, middle - 1
        else:
            low = middle + 1
    return best
