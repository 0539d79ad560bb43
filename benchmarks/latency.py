"""How long a token takes at batch 1: each model alone, both together, and the same on transformers.

    PYTHONPATH=src python benchmarks/latency.py                                      the embedded pair, its own tags
    ... latency.py --trace math --compare transformers --plot out.png                forced hand-offs, and a peer
    ... latency.py --small random-5m --large random-100m --trace math                random weights
    ... latency.py --small 1.5b --large 32b --device cuda --trace aime --max-tokens 0

Batch-1 decoding is bound by streaming weights: one token costs at least weight bytes / memory bandwidth. That floor is
measured on this machine and shown beside every figure, with the share of it that was reached (MBU). Times are end to
end, prompt included, prefix cache off, greedy. A trace puts hand-offs where traffic has them (traces.py), scaled to
--max-tokens; the split mode then pays for tags, for reading along and for large tokens written beyond a close.

The last line is one JSON document. Exit code 2: wrong input, or the pair does not fit (one line on standard error).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import (
    Bar,
    Spread,
    bandwidths,
    bar_plot,
    finish,
    load_pyplot,
    machine,
    read_bandwidth,
    repeat,
    show_table,
    use_threads,
)
from pairs import Source, build, check_fits, resolve
from peers import Pieces, TransformersPeer, versions
from runs import MODES, Job, count, describe, is_by_tags, observed, timed
from traces import NAMES, Trace, make_trace

from splitdecode.decoder import DTYPES, SplitDecoder
from splitdecode.demo import problems
from splitdecode.errors import RequestError, SplitDecodeError
from splitdecode.split.outputs import RequestOutput
from splitdecode.split.policies import ControlTags
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import HINT  # noqa: F401  (kept: the hint is the caller's business, no prompt here has it)

ANSWER = 192  # tokens the embedded pair's answers stay under


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--small", default="demo", help="demo, random-5m, a preset (1.5b) or a checkpoint directory (default demo)")
    add("--large", default="demo", help="the same for the large model (random-100m, 32b, ...)")
    add("--trace", choices=NAMES, help="forced hand-offs; default: the embedded pair's own tags, else math")
    add("--seed", type=int, default=0, help="which trace, and which problems (default 0)")
    add("--modes", default="small,large,split", help=f"some of {','.join(MODES)}")
    add("--compare", choices=["transformers"], help="the same work on another library")
    add("--probe", action="store_true", help="forced traces: the peer asks the small model at every large token")
    add("--max-tokens", "--output-len", type=int, default=256, help="scale the trace to this; 0: as it is (default 256)")
    add("--input-len", type=int, help="tokens of the prompt (default: the trace's, scaled)")
    add("--problems", type=int, default=4, help="problems of the embedded pair (default 4)")
    add("--num-iters", type=int, default=5, help="counted runs (default 5)")
    add("--num-iters-warmup", type=int, default=1, help="runs before them (default 1)")
    add("--threads", type=int, default=1, help="threads torch computes with; 0: its own choice (default 1)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="default: the file's; bfloat16 for presets")
    add("--device", default="cpu")
    add("--page-size", type=int, default=16, help="positions per cache page (default 16)")
    add("--read-interval", type=int, default=4, help="large tokens between two readings (default 4)")
    add("--output-json", type=Path, help="also write the document here")
    add("--plot", type=Path, help="draw the figures into this PNG")
    return parser


class Benchmark:
    """One command: a pair, its jobs, and what each mode and peer took."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Everything that can be refused is refused here, before any model is loaded."""
        self.args = args
        self.modes = _modes(args.modes)
        self.sources = Pair.of(lambda r: resolve(args.large if r else args.small, r, args.dtype))
        self.trace = self._trace()
        length = self._length()
        if args.plot:
            load_pyplot()
        peer = versions() if args.compare else {}
        check_fits(self.sources, length, args.device, copies=2 if args.compare else 1)
        use_threads(args.threads)
        self.machine = {**machine(args.device), **peer, "bandwidth_gbps": bandwidths(args.device)}
        self.ceilings = self.sources.map(lambda s: read_bandwidth(s.step_bytes, args.device))
        self.decoder = build(
            self.sources,
            length,
            device=args.device,
            page_size=args.page_size,
            read_interval=args.read_interval,
            split_tags=self.trace is not None and self.trace.split_tags,
        )
        self.results: dict[str, dict[str, Any]] = {}
        self.peers: dict[str, dict[str, Any]] = {}

    def _trace(self) -> Trace | None:
        """The forced hand-offs; None: the tags of the embedded pair decide."""
        args = self.args
        if args.trace is None and all(source.kind == "demo" for source in self.sources):
            return None
        trace = make_trace(args.trace or "math", args.seed)
        return trace.scaled(args.max_tokens) if args.max_tokens > 0 else trace

    def _length(self) -> int:
        """Positions a lane may need: prompt, answer, tags of every span, and a block beyond."""
        if self.trace is None:
            return min(source.config.max_positions for source in self.sources)
        prompt = self.args.input_len or self.trace.prompt_tokens
        tags = 8 if self.trace.split_tags else 2
        return prompt + self.trace.total_tokens + tags * len(self.trace.spans) + self.args.read_interval + 2

    def jobs(self) -> list[Job]:
        """The requests of the split mode; alone, a model writes as many tokens."""
        if self.trace is None:
            encode = self.decoder.tokenizers[Role.SMALL].encode
            tasks = problems(self.args.problems, self.args.seed + 7)
            return [Job(encode(task.prompt), ANSWER, ControlTags(), ends=True) for task in tasks]
        trace = self.trace
        limit = min(self.decoder.vocab_limits)
        prompt = trace.prompt_ids(limit)
        if self.args.input_len:
            prompt = (prompt * (self.args.input_len // len(prompt) + 1))[: self.args.input_len]
        return [Job(prompt, trace.total_tokens, trace.policy())]

    def run(self) -> None:
        """Every mode, then the peer on the same tokens."""
        args, jobs = self.args, self.jobs()
        written, observer = observed(self.decoder, jobs)
        jobs = [
            Job(job.prompt, output.metrics.tokens, job.policy, job.ends)
            for job, output in zip(jobs, written, strict=True)
        ]
        for mode in self.modes:
            own = [job.mode(mode) for job in jobs]
            took = timed(self.decoder, own, args.num_iters, args.num_iters_warmup, self._settle)
            outputs, observer = observed(self.decoder, own)
            figures = self._figures(took.cpu, took.wall, outputs)
            self.results[mode] = {**figures, **describe(outputs, observer)}
        if args.compare:
            self._compare(jobs, written)

    def _compare(self, jobs: list[Job], written: list[RequestOutput]) -> None:
        roles = {Role.SMALL: "small", Role.LARGE: "large"}
        needed = [r for r, mode in roles.items() if mode in self.modes or "split" in self.modes]
        peer = _peer(self.decoder, self.sources, needed, self.args.device)
        for role, mode in roles.items():
            if mode in self.modes:
                self._time_peer(mode, "alone", written, lambda j, o, r=role: peer.alone(r, j.prompt, j.tokens))
        if "split" in self.modes:
            probe = self.args.probe and self.trace is not None
            name = "probing, told" if probe else "told"
            self._time_peer("split", name, written, lambda j, o: peer.told(j.prompt, _pieces(o), probe), jobs)
            if all(map(is_by_tags, jobs)):
                block = self.args.read_interval
                call = lambda j, o: peer.probing(j.prompt, j.tokens, block)  # noqa: E731
                self._time_peer("split", "probing", written, call, jobs)

    def _time_peer(
        self,
        mode: str,
        loop: str,
        written: list[RequestOutput],
        call: Callable[[Job, RequestOutput], list[int]],
        jobs: list[Job] | None = None,
    ) -> None:
        args = self.args
        work = list(zip(jobs or self.jobs_as(written), written, strict=True))
        took = repeat(lambda: [call(j, o) for j, o in work], args.num_iters, args.num_iters_warmup, self._settle)
        figures = self._figures(took.cpu, took.wall, written)
        if jobs is not None:
            figures["same_tokens"] = took.result == [o.outputs[0].token_ids for o in written]
        self.peers.setdefault("transformers", {})[f"{mode}, {loop}"] = figures

    def jobs_as(self, written: list[RequestOutput]) -> list[Job]:
        """Jobs of as many tokens as were written."""
        return [Job(o.prompt_token_ids, o.metrics.tokens, ControlTags()) for o in written]

    def _settle(self) -> None:
        if self.args.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _figures(self, cpu: Spread, wall: Spread, outputs: list[RequestOutput]) -> dict[str, Any]:
        """Times per token; the floor of these very tokens, by author."""
        tokens = count(outputs)
        authors = Pair.of(lambda r: sum(o.metrics.models[r].tokens for o in outputs))
        floor = sum(authors[r] * self.floor_ms(r) for r in Role) / tokens
        trusted = (wall if self.args.device.startswith("cuda") else cpu).median / tokens
        return {
            "tokens": tokens,
            "cpu_ms_per_token": cpu.scaled(1 / tokens),
            "wall_ms_per_token": wall.scaled(1 / tokens),
            "tokens_per_second": 1e3 / trusted,
            "floor_ms_per_token": floor,
            "roofline_share": floor / trusted,
        }

    def floor_ms(self, role: Role) -> float:
        """Streaming that model's weights once, at the bandwidth measured for as many bytes."""
        return self.sources[role].step_bytes / self.ceilings[role] / 1e6
