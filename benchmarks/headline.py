"""Benchmarks: what a token costs at a given context, by who writes it; the table a GPU is bought for.

    context       |<------ prompt, cached by both ------>|<- N tokens, half of them before the context's length ->|
    small, large  one model writes all of them           time per token: from the first token to the last
    split p %     spans of --segment tokens, so far apart that the large model writes p % of all; tags, catching up and
                  reading along included
    catch-up n    n new tokens behind the context through the large model, up to its first token

Prompts lie in the prefix cache after the warm-up runs; what is written differs from run to run (temperature 1, a seed
each), so no run finds another's words cached. Joules are the device's own counter (NVML), where it has one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Spread, bandwidths, finish, free_memory, machine, read_bandwidth, show_table, use_threads
from pairs import Source, build, check_fits, resolve
from peers import peer_of
from runs import observed_once
from traces import Trace, make_trace

from splitdecode.config import SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.models.geometry import kv_bytes
from splitdecode.models.step import StepShape
from splitdecode.runtime.device import DeviceRunner
from splitdecode.runtime.graphs import Tape
from splitdecode.split.outputs import RequestOutput
from splitdecode.split.policies import HandoffPolicy, LargeOnly, SmallOnly
from splitdecode.split.roles import Pair, Role


@dataclass(frozen=True, slots=True)
class Run:
    """One line of the table: who writes, how many tokens behind how long a prompt."""

    name: str
    policy: HandoffPolicy
    prompt: int
    tokens: int
    share: float


def regular(share: float, segment: int, tokens: int) -> Trace:
    """Spans of `segment` tokens, `share` of an answer of at least `tokens` and two spans."""
    period = segment / share
    count = max(2, math.ceil(tokens / period))
    total = round(count * period)
    ends = [round((i + 1) * period) for i in range(count)]
    return Trace(f"{100 * share:g} %", 0, total, tuple((end - segment, end) for end in ends), 0)


class Headline:
    """One pair at one context length: every run, then the catch-ups."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Everything that can be refused is refused here, before any model is loaded."""
        self.args, self.cuda = args, args.device.startswith("cuda")
        self.catch_ups = _counts(args.catch_ups)
        if args.max_tokens == 1:
            raise RequestError("--max-tokens: found 1, expected at least 2: the time from the first token to the last")
        self.runs = self._runs(_shares(args.offload), _names(args.trace))
        self.sources = Pair.of(lambda r: resolve(args.large if r else args.small, r, args.dtype))
        self.length = max(run.prompt + run.tokens * 2 for run in self.runs)
        self.length = max(self.length, args.context + max(self.catch_ups, default=0)) + 64
        check_fits(self.sources, self.length, args.device, lanes=4)
        use_threads(args.threads)
        self.machine = {**machine(args.device), "bandwidth_gbps": bandwidths(args.device)}
        if self.cuda:  # what measuring took is no part of the pair's memory
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.decoder = self._build(self.length)
        self.meter = _energy_meter(args.device)
        self.results: dict[str, Any] = {}
        self.document: dict[str, Any] = {}

    def _build(self, length: int) -> SplitDecoder:
        args = self.args
        return build(
            self.sources,
            2 * length,
            device=args.device,
            page_size=args.page_size,
            read_interval=args.read_interval,
            split_tags=False,
            prefix_caching=True,
            max_num_seqs=1,
            max_num_batched_tokens=2048,
            steps_per_graph=args.steps_per_graph,
            enforce_eager=args.enforce_eager,
            programmatic_launch=args.programmatic_launch,
            l2_prefetch=args.l2_prefetch,
        )

    def _runs(self, shares: Sequence[float], names: Sequence[str]) -> list[Run]:
        args, tokens = self.args, self.args.max_tokens or 512
        out = [Run("small", SmallOnly(), 0, tokens, 0.0), Run("large", LargeOnly(), 0, tokens, 1.0)]
        traces = [(f"split {100 * s:g} %", regular(s, args.segment, tokens)) for s in shares]
        traces += [(f"split {n}", _handing_over(n, args.seed).scaled(max(tokens, 512))) for n in names]
        out += [Run(name, t.policy(), 0, t.total_tokens, t.offload) for name, t in traces]
        at = [max(args.page_size, args.context - run.tokens // 2) for run in out]
        return [Run(r.name, r.policy, prompt, r.tokens, r.share) for r, prompt in zip(out, at, strict=True)]

    # ---- measuring

    def measure(self, told: Callable[[dict[str, Any]], None]) -> None:
        """Every run; `told` gets the document after each."""
        for run in self.runs:
            self.results[run.name] = self._timed(run)
            told(self._document())
        caught = {n: self._catch_up(n) for n in self.catch_ups}
        self.document["catch_up_ms"] = {str(n): ms for n, ms in caught.items()}
        if self.args.compare:
            told(self._document())
            try:
                self.document["peer"] = self._peer()
            except Exception as error:  # a peer that cannot run here is a line, not the end
                self.document["peer"] = f"{type(error).__name__}: {error}"[:300]
        told(self._document())

    def _timed(self, run: Run) -> dict[str, Any]:
        prompt = self._ids(run.prompt)
        each, joules = [], []
        for turn in range(self.args.num_iters_warmup + self.args.num_iters):
            before = self.meter()
            output = self._generate(prompt, run.tokens, run.policy, seed=turn)
            after = self.meter()
            if turn < self.args.num_iters_warmup:
                continue
            metrics = output.metrics
            assert metrics.first_token_time is not None
            assert metrics.finished_time is not None
            each.append(1e3 * (metrics.finished_time - metrics.first_token_time) / (metrics.tokens - 1))
            if before is not None and after is not None:
                joules.append((after - before) / metrics.tokens)
        output, observer = observed_once(
            self.decoder, lambda: self._generate(prompt, run.tokens, run.policy, seed=10_000)
        )
        floor = self._floor(run)
        median = statistics.median(each)
        return {
            "prompt_tokens": run.prompt,
            "tokens": run.tokens,
            "ms_per_token": Spread.of(each),
            "floor_ms_per_token": floor,
            "roofline_share": floor / median,
            "offload_fraction": output.metrics.offload_fraction,
            "handoffs": output.metrics.handoffs,
            "seam_stall_ms": statistics.median(observer.stalls) if observer.stalls else None,
            "joules_per_token": statistics.median(joules) if joules else None,
            "discarded_tokens": output.metrics.small.discarded_tokens + output.metrics.large.discarded_tokens,
        }

    def _generate(self, prompt: list[int], tokens: int, policy: HandoffPolicy, seed: int) -> RequestOutput:
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, seed=seed)
        return self.decoder.generate({"prompt_token_ids": prompt}, params, handoff=policy)[0]

    def _catch_up(self, count: int) -> float:
        """Milliseconds until the large model's first token behind `count` new ones at the context."""
        prompt, rng, times = self._ids(self.args.context), random.Random(count), []
        for turn in range(2 + self.args.num_iters):
            fresh = [rng.randrange(min(self.decoder.vocab_limits)) for _ in range(count)]
            start = time.perf_counter()
            self._generate(prompt + fresh, 1, LargeOnly(), seed=turn)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[2:])

    def _peer(self) -> dict[str, Any]:
        """transformers, each model alone, where a second copy of it fits: time per token behind the same prompt."""
        found: dict[str, Any] = {}
        for role in Role:
            source, run = self.sources[role], self.runs[role]
            if source.resident_bytes * 1.1 > free_memory(self.args.device):
                found[str(role)] = "does not fit beside the pair"
                continue
            peer = peer_of(self.decoder, self.sources, [role], self.args.device)
            prompt, tokens = self._ids(run.prompt), min(run.tokens, 64)
            for count in (1, tokens, 1, tokens):
                start = time.perf_counter()
                peer.alone(role, prompt, count)
                self._settle()
                found[f"{role}, {count} tokens"] = 1e3 * (time.perf_counter() - start)
            whole, first = found.pop(f"{role}, {tokens} tokens"), found.pop(f"{role}, 1 tokens")
            found[str(role)] = (whole - first) / (tokens - 1)
            del peer
        return found

    def _ids(self, count: int) -> list[int]:
        rng = random.Random(f"prompt/{self.args.seed}")
        return [rng.randrange(min(self.decoder.vocab_limits)) for _ in range(count)]

    def _settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _floor(self, run: Run) -> float:
        """Milliseconds of streaming the authors' weights and the context's keys and values, at the read bandwidth."""
        return sum(
            part * self._step_floor(self.sources[role])
            for role, part in zip(Role, (1 - run.share, run.share), strict=True)
        )

    def _step_floor(self, source: Source) -> float:
        size = source.step_bytes + self.args.context * kv_bytes(source.config, source.itemsize)
        return size / read_bandwidth(1 << 40 if self.cuda else size, self.args.device) / 1e6

    # ---- telling

    def _document(self) -> dict[str, Any]:
        args = self.args
        self.document |= {
            "benchmark": "latency",
            "what": "headline",
            "machine": self.machine,
            "pair": {str(role): self.sources[role].name for role in Role},
            "settings": {
                name: getattr(args, name)
                for name in (
                    "device",
                    "context",
                    "segment",
                    "page_size",
                    "read_interval",
                    "steps_per_graph",
                    "programmatic_launch",
                    "l2_prefetch",
                    "num_iters",
                )
            },
            "launches_per_step": {str(role): launches_per_step(self.decoder, role) for role in Role},
            "memory_gib": torch.cuda.max_memory_reserved() / 2**30 if self.cuda else None,
            "runs": self.results,
        }
        return self.document


def launches_per_step(decoder: SplitDecoder, role: Role) -> int | None:
    """Kernels of one captured decode step at batch 1; None where steps are not captured."""
    runner = decoder.engine.runners[role]
    if not isinstance(runner, DeviceRunner):
        return None
    shape = StepShape(1, 1, 1, 1)
    runner.program.prepare(runner.ops, shape)
    return Tape(lambda ops: runner.program.run(ops, shape), runner.ops).launches


def show(document: dict[str, Any]) -> None:
    """The table."""
    large = document["runs"]["large"]["ms_per_token"].median
    rows = []
    for name, run in document["runs"].items():
        ms: Spread = run["ms_per_token"]
        stall, joules = run["seam_stall_ms"], run["joules_per_token"]
        rows.append(
            [
                name,
                f"{ms.median:.3f}",
                f"{ms.low:.3f}-{ms.high:.3f}",
                f"{run['floor_ms_per_token']:.3f}",
                f"{100 * run['roofline_share']:.0f} %",
                f"{large / ms.median:.2f}x",
                f"{100 * run['offload_fraction']:.1f} %",
                "" if stall is None else f"{stall:.1f}",
                "" if joules is None else f"{joules:.2f}",
            ]
        )
    head = ["", "ms/token", "quartiles", "floor", "of it", "over large", "offloaded", "stall ms", "J/token"]
    show_table(f"batch 1 at {document['settings']['context']} tokens of context", head, rows)
    caught = ", ".join(f"{n}: {ms:.1f}" for n, ms in document.get("catch_up_ms", {}).items())
    print(f"catch-up, ms by tokens: {caught}\nkernels per step: {document['launches_per_step']}")
    if "peer" in document:
        print(f"transformers, ms per token: {document['peer']}")


def run(args: argparse.Namespace) -> int:
    """The whole benchmark; the document is written after every line of the table."""
    headline = Headline(args)

    def told(document: dict[str, Any]) -> None:
        if args.output_json:
            finish(document, args.output_json, quietly=True)

    headline.measure(told)
    show(headline.document)
    finish(headline.document, args.output_json)
    return 0


def _energy_meter(device: str) -> Callable[[], float | None]:
    """Joules the device has used so far; None where it does not say."""
    if not device.startswith("cuda"):
        return lambda: None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.device(device).index or 0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # no package, no driver call, no counter: a figure less, not a benchmark less
        print(f"no energy counter: {error}")
        return lambda: None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) / 100 for part in text.split(",") if part]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share < 1 for share in shares):
        raise RequestError(f"--offload: found {text!r}, expected percentages between 0 and 100, such as 1.35,5,20")
    return shares


def _counts(text: str) -> list[int]:
    counts = [int(part) if part.isdecimal() else 0 for part in text.split(",") if part]
    if not all(counts):
        raise RequestError(f"--catch-ups: found {text!r}, expected numbers of tokens, such as 64,1000")
    return counts


def _names(trace: str | None) -> list[str]:
    return [trace] if trace else ["math", "aime"]


def _handing_over(name: str, seed: int) -> Trace:
    """The first request of that traffic in which the large model writes at all."""
    return next(trace for index in itertools.count() if (trace := make_trace(name, seed, index)).spans)
