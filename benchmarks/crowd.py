"""Benchmarks: one throughput measurement: a pair, its requests, every mode of ours under every load, a peer beside it.

Every run starts with empty prefix caches, and all runs are taken in turns. What each request waited for is seen in a
run of its own, which is not timed. One model alone writes as many tokens for each request, EOS ignored; so does the
peer, in static batches of as many prompts as we run at once. Answers by the pair's own tags end where they end.

Two floors: streaming the weights once per forward, and the products of every token at the rate of one large product.
Which of them is the higher is added up by model; attention, sampling and scheduling are overhead by that measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from arrivals import closed_loop, open_loop, poisson, sleeper
from harness import Timed, bandwidths, machine, product_rate, race, use_threads
from measure import describe_pair, floor_ms, modes_of
from pairs import build, check_fits, resolve
from peers import TransformersPeer, peer_of, versions
from runs import Job
from serving import Watch
from traces import make_trace, workload

from splitdecode.config import SamplingParams
from splitdecode.errors import RequestError
from splitdecode.families import problems
from splitdecode.split.engine import Choice
from splitdecode.split.outputs import RequestMetrics
from splitdecode.split.policies import ControlTags
from splitdecode.split.prompts import prompt_ids
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tracing import traced

_ANSWER = 192  # tokens the embedded pair's answers stay under
_ALONE = {"small": Role.SMALL, "large": Role.LARGE}


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests arrive: `value` at a time, or `value` a second."""

    closed: bool
    value: float
    requests: int

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.value:g} at a time" if self.closed else f"{self.value:g} per second"

    def describe(self) -> dict[str, Any]:
        """For the document."""
        kind = {"concurrency": int(self.value)} if self.closed else {"request_rate": f"{self.value:g}"}
        return {"load": self.label, **kind}


class Crowd:
    """One command: a pair, its traffic, and what each mode and the peer took."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Everything that can be refused is refused here, before any model is loaded."""
        self.args = args
        self.modes = modes_of(args.modes)
        self.traffics = _traffics(args)
        self.sources = Pair.of(lambda r: resolve(args.large if r else args.small, r, args.dtype))
        self.by_tags = args.trace is None and all(source.kind == "demo" for source in self.sources)
        self.name = "the pair's own tags" if self.by_tags else args.trace or "math"
        self.most = max(int(t.value) if t.closed else args.max_num_seqs for t in self.traffics)
        lanes = args.lanes or self.most
        peer = versions() if args.compare else {}
        split_tags = not self.by_tags and make_trace(self.name, args.seed).split_tags
        length = self._length(split_tags)
        check_fits(self.sources, length, args.device, copies=2 if args.compare else 1, lanes=lanes)
        use_threads(args.threads)
        self.machine = {**machine(args.device), **peer, "bandwidth_gbps": bandwidths(args.device)}
        self.floors = self.sources.map(lambda source: floor_ms(source, args.device))
        self.decoder = build(
            self.sources,
            length,
            device=args.device,
            page_size=args.page_size,
            read_interval=args.read_interval,
            split_tags=split_tags,
            prefix_caching=not args.no_prefix_caching,
            max_num_seqs=self.most,
            lanes=lanes,
        )
        dtypes = {model.dtype for model in self.decoder.models}
        self.rate = min(product_rate(dtype, args.device) for dtype in dtypes)
        self.machine["product_gflops"] = self.rate
        self.runs: list[dict[str, Any]] = []
        self.peers: list[dict[str, Any]] = []

    # ---- what runs

    def run(self) -> None:
        """Every mode and the peer under every load, in turns."""
        args = self.args
        works: dict[str, Callable[[], Any]] = {}
        peer = self._peer() if args.compare else None
        for traffic in self.traffics:
            for mode in self.modes:
                works[f"{mode}, {traffic.label}"] = partial(self._serve, mode, traffic)
                if peer is not None and mode in _ALONE:
                    works[f"peer: {mode}, {traffic.label}"] = self._batches(peer, mode, traffic)
        took = race(works, args.num_iters, args.num_iters_warmup, self._settle)
        for traffic in self.traffics:
            for mode in self.modes:
                with Watch(self.decoder.engine) as watch:
                    self._serve(mode, traffic, watch.look)
                name = f"{mode}, {traffic.label}"
                self.runs.append(self._figures(mode, traffic, took[name], watch))
                if f"peer: {name}" in took:
                    self.peers.append(self._beside(mode, traffic, took[f"peer: {name}"], watch))
        if args.chrome_trace is not None:
            with traced(self.decoder, args.chrome_trace):
                self._serve(self.modes[-1], self.traffics[-1])

    def _serve(self, mode: str, traffic: Traffic, after: Callable[[], None] = lambda: None) -> None:
        """One run; `after` is called behind every tick."""
        for runner in self.decoder.engine.runners:
            runner.cache.pool.clear_cache()
        self._drive(traffic, self._choices(mode, traffic), after)

    def _drive(self, traffic: Traffic, choices: list[Choice], after: Callable[[], None]) -> None:
        engine = self.decoder.engine
        if traffic.closed:
            closed_loop(engine, choices, int(traffic.value), after)
        else:
            arrivals = poisson(len(choices), traffic.value, self.args.seed)
            open_loop(engine, choices, arrivals, sleeper(engine.clock), after)

    def _batches(self, peer: TransformersPeer, mode: str, traffic: Traffic) -> Callable[[], list[list[int]]]:
        """The peer on the same prompts, as many at once."""
        jobs, size = self._jobs(mode, traffic), int(traffic.value)
        parts = [jobs[i : i + size] for i in range(0, len(jobs), size)]

        def work() -> list[list[int]]:
            return [
                answer[: job.tokens]
                for part in parts
                for job, answer in zip(
                    part,
                    peer.batched(_ALONE[mode], [job.prompt for job in part], max(job.tokens for job in part)),
                    strict=True,
                )
            ]

        return work

    def _peer(self) -> TransformersPeer:
        roles = [_ALONE[mode] for mode in self.modes if mode in _ALONE]
        return peer_of(self.decoder, self.sources, roles, self.args.device)

    # ---- what is asked

    def _length(self, split_tags: bool) -> int:
        """Positions a lane may need: prompt, answer, the tags of every span, a block beyond."""
        if self.by_tags:
            return min(source.config.max_positions for source in self.sources)
        tags = 8 if split_tags else 2
        traces = self._traces(max(traffic.requests for traffic in self.traffics))
        most = max(trace.prompt_tokens + trace.total_tokens + tags * len(trace.spans) for trace in traces)
        return most + self.args.read_interval + 2

    def _traces(self, count: int) -> list[Any]:
        """Scaled to --max-tokens; each with a prompt of its own."""
        args = self.args
        found = (trace.scaled(args.max_tokens) for trace in workload(self.name, count, args.seed))
        return [replace(trace, seed=args.seed + index) for index, trace in enumerate(found)]

    def _jobs(self, mode: str, traffic: Traffic) -> list[Job]:
        if not self.by_tags:
            limit = min(self.decoder.vocab_limits)
            traces = self._traces(traffic.requests)
            return [Job(t.prompt_ids(limit), t.total_tokens, t.policy()).mode(mode) for t in traces]
        encode = self.decoder.tokenizers[Role.SMALL].encode
        prompts = [encode(task.prompt) for task in problems(traffic.requests, self.args.seed + 7)]
        if mode == "split":
            return [Job(prompt, _ANSWER, ControlTags(), ends=True) for prompt in prompts]
        return [Job(prompt, self.args.max_tokens, ControlTags()).mode(mode) for prompt in prompts]

    def _choices(self, mode: str, traffic: Traffic) -> list[Choice]:
        return [self._choice(job) for job in self._jobs(mode, traffic)]

    def _choice(self, job: Job) -> Choice:
        params = SamplingParams(temperature=0.0, max_tokens=job.tokens, ignore_eos=not job.ends)
        prompts = prompt_ids(self.decoder.tokens, job.prompt, None, self.decoder.vocab_limits)
        return Choice(prompts, params, job.policy.bind(0), 0, 0, RequestMetrics())

    # ---- what it took

    def _settle(self) -> None:
        if self.args.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _trusted(self, took: Timed) -> float:
        """Milliseconds by the clock that counts: CPU time, on a GPU wall time."""
        return (took.wall if self.args.device.startswith("cuda") else took.cpu).median

    def _rates(self, took: Timed, tokens: int) -> dict[str, Any]:
        return {
            "tokens_per_second": {"cpu": 1e3 * tokens / took.cpu.median, "wall": 1e3 * tokens / took.wall.median},
            "cpu_ms": took.cpu,
            "wall_ms": took.wall,
        }

    def _figures(self, mode: str, traffic: Traffic, took: Timed, watch: Watch) -> dict[str, Any]:
        work, floors = watch.work(), self._floor(watch)
        return {
            "mode": mode,
            **traffic.describe(),
            **self._rates(took, work["tokens"]),
            "requests_per_second": 1e3 * work["requests"] / took.wall.median,
            **work,
            **watch.latencies(),
            "floor_ms": floors,
            "roofline_share": floors["either"] / self._trusted(took),
        }

    def _floor(self, watch: Watch) -> dict[str, float]:
        weights, arithmetic = self.floors.map(lambda _: 0.0), self.floors.map(lambda _: 0.0)
        for role in Role:
            load, source = watch.loads[role], self.sources[role]
            head = source.config.vocab_size * source.config.hidden_size
            inner = source.step_bytes / source.itemsize - head
            weights[role] = load.forwards * self.floors[role]
            arithmetic[role] = 2e-6 * (inner * load.tokens + head * load.draws) / self.rate
        return {
            "weights": sum(weights),
            "arithmetic": sum(arithmetic),
            "either": sum(max(weights[role], arithmetic[role]) for role in Role),
        }

    def _beside(self, mode: str, traffic: Traffic, took: Timed, watch: Watch) -> dict[str, Any]:
        """What the peer took for the tokens of that run. same_answers: how many it wrote alike, tags left out."""
        tags = {ids[0] for ids in self.decoder.tokens.tag_ids if len(ids) == 1}
        ours = [choice.output.token_ids for choice in watch.tracks if choice.output is not None]
        theirs = [[token for token in answer if token not in tags] for answer in took.result]
        same = sum(mine[: len(text)] == text for mine, text in zip(ours, theirs, strict=True))
        known = self.sources[_ALONE[mode]].directory is not None  # random weights are other random weights
        return {
            "mode": mode,
            **traffic.describe(),
            **self._rates(took, sum(map(len, took.result))),
            "requests": len(took.result),
            "same_answers": same if known else None,
        }

    # ---- what it comes to

    def _ratios(self) -> dict[str, dict[str, float]]:
        """Tokens per second by the trusted clock, over the same mode one at a time, and over the peer."""
        clock = "wall" if self.args.device.startswith("cuda") else "cpu"

        def rate(found: dict[str, Any]) -> float:
            return float(found["tokens_per_second"][clock])

        single = {run["mode"]: rate(run) for run in self.runs if run.get("concurrency") == 1}
        theirs = {(run["mode"], run["load"]): rate(run) for run in self.peers}
        name = "{mode}, {load}".format_map
        return {
            "one_at_a_time": {name(r): rate(r) / single[r["mode"]] for r in self.runs if r["mode"] in single},
            "peer": {
                name(r): rate(r) / theirs[r["mode"], r["load"]] for r in self.runs if (r["mode"], r["load"]) in theirs
            },
        }

    def document(self) -> dict[str, Any]:
        """Everything, for the last line."""
        args, config = self.args, self.decoder.config
        return {
            "benchmark": "throughput",
            "machine": self.machine,
            "pair": describe_pair(self.sources, self.decoder, self.floors),
            "settings": {
                "device": args.device,
                "page_size": config.page_size,
                "max_num_seqs": config.max_num_seqs,
                "max_num_batched_tokens": config.max_num_batched_tokens,
                "pages": {str(role): self.decoder.engine.runners[role].cache.pool.num_pages for role in Role},
                "prefix_caching": config.enable_prefix_caching,
                "read_interval": args.read_interval,
                "max_tokens": args.max_tokens,
                "seed": args.seed,
                "num_iters": args.num_iters,
                "num_iters_warmup": args.num_iters_warmup,
                "trusted_clock": "wall" if args.device.startswith("cuda") else "cpu",
            },
            "trace": {"name": self.name},
            "runs": self.runs,
            "peers": {args.compare: self.peers} if args.compare else {},
            "times_faster_than": self._ratios(),
        }


def _traffics(args: argparse.Namespace) -> list[Traffic]:
    """What --concurrency or --request-rate ask for."""
    if args.request_rate is not None:
        rates = _numbers(args.request_rate, "--request-rate", float)
        for rate in rates:
            poisson(0, rate, 0)  # says what is wrong with it
        if args.compare:
            raise RequestError("--compare: a static batch has no arrivals, use --concurrency")
        return [Traffic(False, rate, args.num_prompts or 64) for rate in rates]
    sizes = _numbers(args.concurrency, "--concurrency", int)
    if min(sizes) < 1:
        raise RequestError(f"--concurrency: found {min(sizes)}, expected at least 1")
    return [Traffic(True, size, args.num_prompts or max(4, 2 * size)) for size in sizes]


def _numbers(text: str, flag: str, kind: Callable[[str], float]) -> list[float]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{flag}: found {text!r}, expected numbers, separated by commas") from None
