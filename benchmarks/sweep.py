"""Benchmarks: one pair under many settings: models are loaded once, an engine is made for each, all take turns.

Every run serves the same requests with the same hand-offs, greedy, from empty caches: what differs between two runs is
what the settings did. Work is counted in tokens that went through a model; time by process CPU time and by wall time.
On a CPU the engine's own clock is CPU time too: waits and stalls are those of a machine that does nothing else.

    forced   hand-offs of a trace, put there by position           any pair
    drawn    hand-offs of a trace, by tags the small model writes  random weights; drawn.py
    own      hand-offs the embedded pair wants, on its own problems
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from time import process_time
from typing import Any

import torch
from arrivals import closed_loop
from drawn import Scribe
from harness import Timed, machine, race, use_threads
from pairs import build, check_fits, resolve
from serving import Watch, percentiles
from traces import Trace, make_trace, workload

from splitdecode.config import EngineConfig, SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.demo import problems
from splitdecode.errors import RequestError
from splitdecode.models.geometry import kv_bytes
from splitdecode.split.engine import Choice
from splitdecode.split.outputs import RequestMetrics
from splitdecode.split.policies import ControlTags
from splitdecode.split.prompts import prompt_ids
from splitdecode.split.roles import Pair, Role

OWN = "own"  # in place of a trace's name: the embedded pair's problems and tags
_ANSWER = 192  # tokens its answers stay under


@dataclass(slots=True)
class Ran:
    """One run: what was watched, what the scheduler counted, the ids of every answer; stuck: it was given up."""

    watch: Watch
    counts: dict[str, int]
    answers: list[list[int]]
    stuck: bool = False

    @property
    def tokens_run(self) -> Pair[int]:
        """Tokens that went through each model."""
        return Pair.of(lambda r: self.watch.loads[r].tokens)


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests of a trace (or OWN), so many of them at a time. drawn: the small model writes its tags itself,
    with a false alarm every so many of its tokens (0: none)."""

    trace: str
    requests: int
    concurrency: int
    drawn: bool = False
    alarm_every: int = 0


class Sweep:
    """A pair, loaded once."""

    def __init__(self, args: argparse.Namespace, loads: list[Load]) -> None:
        """args: small, large, dtype, device, page_size, seed, max_tokens, threads, num_iters, num_iters_warmup."""
        self.args = args
        self.sources = Pair.of(lambda r: resolve(args.large if r else args.small, r, args.dtype))
        self._check(loads)
        self.traces = {load: self._traces(load) for load in loads if load.trace != OWN}
        every = [trace for traces in self.traces.values() for trace in traces]
        lengths = [t.prompt_tokens + t.total_tokens + 8 * len(t.spans) + 8 for t in every]
        own = min(source.config.max_positions for source in self.sources)
        self.length = max(lengths + [own] * any(load.trace == OWN for load in loads))
        most = max(load.concurrency for load in loads)
        check_fits(self.sources, self.length, args.device, lanes=most)
        use_threads(args.threads)
        self.machine = machine(args.device)
        split = {load.drawn or make_trace(load.trace).split_tags for load in self.traces}
        if len(split) > 1:
            raise RequestError("--trace: whole tags and tags in pieces need vocabularies of their own; run them apart")
        self._loaded = build(
            self.sources,
            self.length,
            device=args.device,
            page_size=args.page_size,
            read_interval=4,
            split_tags=True in split,
            lanes=1,
        )

    @property
    def sequence_bytes(self) -> int:
        """Keys and values of one sequence of full length, in both caches, in whole pages."""
        pages = -(-self.length // self.args.page_size)
        return pages * self.args.page_size * sum(kv_bytes(source.config, source.itemsize) for source in self.sources)

    def decoder(self, concurrency: int, sequences: float = 0.0, **engine: Any) -> SplitDecoder:
        """An engine of its own over the same weights, with room for that many sequences (0: plenty)."""
        budget = int((sequences or 2.0 * concurrency) * self.sequence_bytes)
        config = EngineConfig(
            page_size=self.args.page_size,
            kv_cache_memory=budget,
            max_num_seqs=concurrency,
            max_model_len=self.length,
            **engine,
        )
        one = self._loaded
        ends = one.tokenizers.map(lambda t: () if t.eos_id is None else (t.eos_id,))
        made = SplitDecoder(one.models, one.tokenizers, eos_ids=ends, config=config)
        if self.args.device == "cpu":
            made.engine.clock = process_time
            for runner in made.engine.runners:
                runner.clock = process_time  # type: ignore[union-attr]
        if min(made.max_len) < self.length:
            raise RequestError(f"{budget} bytes of cache hold {min(made.max_len)} positions, expected {self.length}")
        return made

    def race(self, works: Mapping[str, tuple[SplitDecoder, Load]]) -> tuple[dict[str, Timed], dict[str, list[Ran]]]:
        """All of them in turns: their times, and what each counted run did."""
        kept: dict[str, list[Ran]] = {name: [] for name in works}

        def serve(name: str) -> None:
            decoder, load = works[name]
            kept[name].append(self._serve(decoder, load))

        args = self.args
        took = race({name: partial(serve, name) for name in works}, args.num_iters, args.num_iters_warmup, self._settle)
        return took, {name: runs[args.num_iters_warmup :] for name, runs in kept.items()}

    def _serve(self, decoder: SplitDecoder, load: Load) -> Ran:
        engine = decoder.engine
        for runner in engine.runners:
            runner.cache.pool.clear_cache()
        choices = self._choices(decoder, load)
        before = _counts(decoder)
        drawn = dict(zip(choices, self.traces[load], strict=True)) if load.drawn else {}
        with Scribe(decoder, drawn, load.alarm_every) if drawn else nullcontext(), Watch(engine) as watch:
            guard = _Guard(watch, choices)
            closed_loop(engine, choices, load.concurrency, guard.look)
        counts = {name: count - before[name] for name, count in _counts(decoder).items()}
        return Ran(watch, counts, [list(c.output.token_ids) for c in choices if c.output is not None], guard.stuck)

    def _traces(self, load: Load) -> list[Trace]:
        found = (trace.scaled(self.args.max_tokens) for trace in workload(load.trace, load.requests, self.args.seed))
        return [replace(trace, seed=self.args.seed + index) for index, trace in enumerate(found)]

    def _choices(self, decoder: SplitDecoder, load: Load) -> list[Choice]:
        limits = decoder.vocab_limits
        if load.trace == OWN:
            asked = problems(load.requests, self.args.seed + 7)
            prompts = [prompt_ids(decoder.tokens, problem.prompt, None, limits) for problem in asked]
            params = SamplingParams(temperature=0.0, max_tokens=_ANSWER)
            return [Choice(prompt, params, ControlTags().bind(0), 0, 0, RequestMetrics()) for prompt in prompts]
        words = min(limits) - 8 * load.drawn  # tags in pieces come last; a prompt that spells one is none
        choices = []
        for trace in self.traces[load]:
            policy = ControlTags() if load.drawn else trace.policy()
            params = SamplingParams(temperature=0.0, max_tokens=trace.total_tokens, ignore_eos=True)
            prompt = prompt_ids(decoder.tokens, trace.prompt_ids(words), None, limits)
            choices.append(Choice(prompt, params, policy.bind(0), 0, 0, RequestMetrics()))
        return choices

    def _check(self, loads: list[Load]) -> None:
        kinds = {source.kind for source in self.sources}
        if any(load.trace == OWN for load in loads) and kinds != {"demo"}:
            raise RequestError(f"--traces: {OWN!r} needs the embedded pair")
        if any(load.drawn for load in loads) and kinds - {"random", "preset"}:
            raise RequestError("--drawn: needs random weights, others write what they write")

    def _settle(self) -> None:
        if self.args.device.startswith("cuda"):
            torch.cuda.synchronize()


class _Guard:
    """Ends a run in which no answer grows any more: a benchmark reports that instead of never ending."""

    patience = 600  # ticks

    def __init__(self, watch: Watch, choices: list[Choice]) -> None:
        self.watch, self.choices = watch, choices
        self.stuck = False
        self._size = self._since = 0

    def look(self) -> None:
        """Behind every tick."""
        self.watch.look()
        size = sum(track.growth[-1][1] for track in self.watch.tracks.values() if track.growth)
        if size != self._size:
            self._size, self._since = size, self.watch.ticks
        if self.stuck or self.watch.ticks - self._since > self.patience:
            self.stuck = True
            for choice in [*self.watch.engine.running.values(), *self.watch.engine.waiting]:
                self.watch.engine.abort(choice)


def _counts(decoder: SplitDecoder) -> dict[str, int]:
    scheduler, arena = decoder.engine.scheduler, decoder.memory.arena
    return {
        "idle_evictions": scheduler.idle_evictions,
        "evicted_tokens": scheduler.evicted_tokens,
        "preemptions": scheduler.preemptions,
        "extents_moved": arena.moved,
    }


def figures(took: Timed, runs: list[Ran]) -> dict[str, Any]:
    """What every sweep reports of one setting; counts are those of the last run."""
    last = runs[-1]
    tokens = sum(map(len, last.answers))
    return {
        "tokens": tokens,
        "stuck": any(run.stuck for run in runs),
        "tokens_per_second": {"cpu": 1e3 * tokens / took.cpu.median, "wall": 1e3 * tokens / took.wall.median},
        "cpu_ms": took.cpu,
        "wall_ms": took.wall,
        "tokens_run": {str(role): last.tokens_run[role] for role in Role},
        "found_in_prefix_cache": last.watch.work()["prefix_cache"]["tokens"],
        **last.counts,
        "seam_stall_ms": percentiles(stall for run in runs for stall in run.watch.stalls),
    }


def share_that_differs(answers: list[list[int]], exact: list[list[int]]) -> float:
    """Of the tokens of `exact`, those that are others, or missing, in `answers`."""
    total = sum(map(len, exact))
    same = sum(a == b for mine, theirs in zip(answers, exact, strict=True) for a, b in zip(mine, theirs, strict=False))
    return 1 - same / total


def add_pair_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """The options every sweep has."""
    add = parser.add_argument
    add("--small", default="demo", help="demo, random-5m, a preset (1.5b) or a checkpoint directory (default demo)")
    add("--large", default="demo", help="the same for the large model: random-100m, 32b, ...")
    add("--seed", type=int, default=0, help="which requests (default 0)")
    add("--max-tokens", type=int, default=max_tokens, help=f"tokens of an answer ({max_tokens})")
    add("--num-iters", type=int, default=3, help="counted runs (3)")
    add("--num-iters-warmup", type=int, default=1, help="runs before them (1)")
    add("--threads", type=int, default=1, help="threads torch computes with, 0: its own choice (1)")
    add("--dtype", default="auto", help="auto: the file's; presets bfloat16, else float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--page-size", type=int, default=16, help="positions per cache page (16)")


def describe_settings(args: argparse.Namespace, sweep: Sweep) -> dict[str, Any]:
    """For the document."""
    names = ("device", "page_size", "seed", "max_tokens", "num_iters", "num_iters_warmup")
    pair = {str(role): sweep.sources[role].name for role in Role}
    return {"pair": pair, "settings": {**{name: getattr(args, name) for name in names}, "length": sweep.length}}
