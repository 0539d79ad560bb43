"""Benchmarks: the runtime's own engine and scheduler on models that only cost time: no weights, no device, a clock.

    Engine --plan--> ClockRunner: clock += cost(rows, tokens, context, draws) --commit--> Engine

Scheduling, hand-offs, pages, preemption and reading along are the compiled ones; a runner answers every draw with one
plain token, and policies by position (traces.py) decide who writes. Costs come from a roofline or from measured steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from traces import Trace

from splitdecode._C import PagePool
from splitdecode.config import EngineConfig, SamplingParams
from splitdecode.models import geometry
from splitdecode.models.config import ModelConfig
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.plan import EXPECTED, Gpu, compute_ms
from splitdecode.runtime.batch import Batch
from splitdecode.runtime.kvcache import KVCache
from splitdecode.runtime.runner import Flight
from splitdecode.split.engine import Choice, Engine
from splitdecode.split.outputs import RequestMetrics
from splitdecode.split.policies import HandoffPolicy
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import PairTokens

CATCH_UP_SHARE = 0.8  # of the reachable matrix rate, for steps of many tokens


@dataclass(frozen=True, slots=True)
class Load:
    """What one step runs. context: positions its rows attend to, summed over rows."""

    rows: int
    tokens: int
    context: int
    draws: int


Cost = Callable[[Load], float]  # milliseconds


class Clock:
    """Seconds, moved by whoever spends them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ClockRunner:
    """Stands in for a ModelRunner: a step takes what `cost` says, and every draw gives `token`."""

    steps = 1

    def __init__(self, pool: PagePool, cost: Cost, clock: Clock, token: int, rows: int) -> None:
        self.cache = KVCache(torch.empty(0), pool)
        self.sampler = _NoSampler()
        self._cost, self._clock = cost, clock
        self._ids = np.full(rows, token, dtype=np.int32)
        self._nothing = np.full(rows, np.nan, dtype=np.float32)

    def launch(self, batch: Batch, counts: Sequence[Any] = ()) -> Flight:
        draws = len(batch.draws)
        ms = self._cost(load_of(batch))
        self._clock.now += ms / 1e3
        return Flight(self._ids[:draws], self._nothing[:draws], None, None, batch.num_tokens, ms)


class _NoSampler:
    def set(self, slot: int, params: SamplingParams, key: int) -> None:
        pass

    def clear(self, slot: int) -> None:
        pass

    def needs_counts(self, slot: int) -> bool:
        return False


def load_of(batch: Batch) -> Load:
    """What a planned step will run."""
    return Load(len(batch.seqs), batch.num_tokens, int(batch.paged.kv_len.sum()), len(batch.draws))


def clock_engine(
    costs: Pair[Cost], config: EngineConfig, pages: Pair[int], max_len: int, clock: Clock | None = None
) -> Engine:
    """An engine whose models cost `costs` and hold `pages` pages each; config.depth is 1."""
    pair = Path(str(files("splitdecode"))) / "data" / "tiny-pair"
    tokens = PairTokens(Pair.of(lambda r: Tokenizer.from_directory(pair / "large")))
    plain = tokens.tokenizers[Role.SMALL].encode("1")[-1]
    clock = clock or Clock()
    runners: Any = Pair.of(
        lambda r: ClockRunner(
            PagePool(pages[r], config.page_size, config.enable_prefix_caching), costs[r], clock, plain, config.max_draws
        )
    )
    return Engine(runners, tokens, config, Pair([], []), Pair(max_len, max_len), clock=clock)


def choice_of(trace: Trace, number: int, policy: HandoffPolicy | None = None) -> Choice:
    """A request with a prompt of its own that follows the trace."""
    ids = [1 + (number * 7919 + k * 104729) % 97 for k in range(trace.prompt_tokens)]
    params = SamplingParams(temperature=0.0, max_tokens=trace.total_tokens, ignore_eos=True)
    return Choice(Pair(ids, ids), params, policy or trace.policy(), number, 0, RequestMetrics())


def positions_of(traces: Sequence[Trace]) -> int:
    """Positions the longest of them may need: prompt, answer, tags, a block beyond."""
    return max(t.prompt_tokens + t.total_tokens + 4 * len(t.spans) + 16 for t in traces)


def roofline(name: str, gpu: Gpu, reached: float) -> Cost:
    """A preset on a GPU: the longer of its bytes at `reached` of the bandwidth and its products."""
    config: ModelConfig = geometry.preset(name)
    weights = 1e3 * geometry.weight_bytes(config) / gpu.bandwidth / reached
    per_position = 1e3 * geometry.kv_bytes(config) / gpu.bandwidth / reached
    per_token = compute_ms(config, gpu, 1, 0) / CATCH_UP_SHARE
    return lambda load: max(weights + per_position * load.context, per_token * load.tokens)


def roofline_pair(names: tuple[str, str], gpu: Gpu) -> Pair[Cost]:
    """Both models, at the shares of the floor plan.py expects of them."""
    return Pair(roofline(names[0], gpu, EXPECTED.small), roofline(names[1], gpu, EXPECTED.large))


@dataclass(frozen=True, slots=True)
class Fitted:
    """ms = step + row x rows + token x tokens + key x context + draw x draws, none below 0; of measured steps."""

    step: float
    row: float
    token: float
    key: float
    draw: float

    def __call__(self, load: Load) -> float:
        return (
            self.step
            + self.row * load.rows
            + self.token * load.tokens
            + self.key * load.context
            + self.draw * load.draws
        )

    @staticmethod
    def of(loads: Sequence[Load], ms: Sequence[float]) -> Fitted:
        """Least squares over the medians of alike steps, so that a hiccup of the machine does not count."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, load in enumerate(loads):
            key = (load.rows, load.tokens, load.draws, load.context // 256)
            groups.setdefault(key, []).append(i)
        columns = ("rows", "tokens", "context", "draws")
        rows, wanted, weights = [], [], []
        for members in groups.values():
            rows.append([1.0, *(float(np.mean([getattr(loads[i], c) for i in members])) for c in columns)])
            wanted.append(float(np.median([ms[i] for i in members])))
            weights.append(len(members) ** 0.5)
        return Fitted(*_least_squares(np.array(rows), np.array(wanted), np.array(weights)))


def _least_squares(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> list[float]:
    """Non-negative: the most negative column is dropped until none is."""
    use = list(range(a.shape[1]))
    while True:
        found = np.linalg.lstsq(a[:, use] * weights[:, None], b * weights, rcond=None)[0]
        if found.min() >= 0 or len(use) == 1:
            break
        use.pop(int(found.argmin()))
    out = [0.0] * a.shape[1]
    for column, value in zip(use, found, strict=True):
        out[column] = max(0.0, float(value))
    return out
