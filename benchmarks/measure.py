"""Benchmarks: one latency measurement: a pair, its requests, every mode of ours, the peer on the same tokens.

The tokens are fixed before anything is timed: those of the trace, or those the pair writes by its own tags. Every mode
and peer then writes as many. A floor is what streaming the weights of the very authors of these tokens would take;
catching up, reading along and prefilling are overhead by that measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Timed, bandwidths, machine, race, read_bandwidth, use_threads
from pairs import Source, build, check_fits, resolve
from peers import peer_of, versions
from runs import MODES, Job, describe, is_by_tags, observed, run
from traces import Trace, make_trace

from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import problems
from splitdecode.split.policies import ControlTags
from splitdecode.split.roles import Pair, Role

_ANSWER = 192  # tokens the embedded pair's answers stay under
_PROBING = "split, probing"
_ALONE = {"small": Role.SMALL, "large": Role.LARGE}


class Measurement:
    """One command: a pair, its jobs, and what each mode and peer took."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Everything that can be refused is refused here, before any model is loaded."""
        self.args = args
        self.modes = modes_of(args.modes)
        self.sources = Pair.of(lambda r: resolve(args.large if r else args.small, r, args.dtype))
        self.trace = self._trace()
        peer = versions() if args.compare else {}
        length = self._length()
        check_fits(self.sources, length, args.device, copies=2 if args.compare else 1)
        use_threads(args.threads)
        self.machine = {**machine(args.device), **peer, "bandwidth_gbps": bandwidths(args.device)}
        self.floors = self.sources.map(lambda source: floor_ms(source, args.device))
        self.decoder = build(
            self.sources,
            length,
            device=args.device,
            page_size=args.page_size,
            read_interval=args.read_interval,
            split_tags=self.trace is not None and self.trace.split_tags,
        )
        self.results: dict[str, dict[str, Any]] = {}  # by mode
        self.peers: dict[str, dict[str, Any]] = {}  # "small, alone" -> figures

    def run(self) -> None:
        """Every mode and every loop of the peer, in turns."""
        args, jobs = self.args, self._jobs()
        own = {mode: [job.mode(mode) for job in jobs] for mode in self.modes}
        loops = self._loops(jobs) if args.compare else {}
        works: dict[str, Callable[[], Any]] = {mode: partial(run, self.decoder, own[mode]) for mode in self.modes}
        took = race({**works, **loops}, args.num_iters, args.num_iters_warmup, self._settle)
        for mode in self.modes:
            outputs, observer = observed(self.decoder, own[mode])
            self.results[mode] = {**self._figures(took[mode], mode, jobs), **describe(outputs, observer)}
        for loop in loops:
            self.peers[loop] = self._figures(took[loop], loop.split(",")[0], jobs)
        if _PROBING in loops:
            answers = [output.outputs[0].token_ids for output in took["split"].result]
            self.peers[_PROBING]["same_tokens"] = took[_PROBING].result == answers

    # ---- what to write

    def _trace(self) -> Trace | None:
        """The forced hand-offs; None: the tags of the embedded pair decide."""
        args = self.args
        if args.trace is None and all(source.kind == "demo" for source in self.sources):
            return None
        trace = make_trace(args.trace or "math", args.seed)
        return trace.scaled(args.max_tokens) if args.max_tokens > 0 else trace

    def _length(self) -> int:
        """Positions a lane may need: prompt, answer, the tags of every span, a block beyond."""
        if self.trace is None:
            return min(source.config.max_positions for source in self.sources)
        prompt = self.args.input_len or self.trace.prompt_tokens
        tags = 8 if self.trace.split_tags else 2
        return prompt + self.trace.total_tokens + tags * len(self.trace.spans) + self.args.read_interval + 2

    def _jobs(self) -> list[Job]:
        """The requests of the split mode, each with the number of tokens it comes to."""
        if self.trace is None:
            encode = self.decoder.tokenizers[Role.SMALL].encode
            tasks = problems(self.args.problems, self.args.seed + 7)
            open_ended = [Job(encode(task.prompt), _ANSWER, ControlTags(), ends=True) for task in tasks]
            answers, _ = observed(self.decoder, open_ended)
            return [job.fixed(answer) for job, answer in zip(open_ended, answers, strict=True)]
        prompt = self.trace.prompt_ids(min(self.decoder.vocab_limits))
        if self.args.input_len:
            prompt = (prompt * (self.args.input_len // len(prompt) + 1))[: self.args.input_len]
        return [Job(prompt, self.trace.total_tokens, self.trace.policy(), tuple(self.trace.pieces()))]

    def _loops(self, jobs: list[Job]) -> dict[str, Callable[[], list[list[int]]]]:
        """The peer at the same work, by "mode, loop"."""
        roles = list(Role) if "split" in self.modes else [_ALONE[mode] for mode in self.modes]
        peer = peer_of(self.decoder, self.sources, roles, self.args.device)
        loops: dict[str, Callable[[], list[list[int]]]] = {}
        for mode, role in _ALONE.items():
            if mode in self.modes:
                loops[f"{mode}, alone"] = lambda r=role: [peer.alone(r, job.prompt, job.tokens) for job in jobs]
        if "split" in self.modes:
            loops["split, told"] = lambda: [peer.told(job.prompt, job.pieces) for job in jobs]
            if all(map(is_by_tags, jobs)):
                block = self.args.read_interval
                loops[_PROBING] = lambda: [peer.probing(job.prompt, job.tokens, block) for job in jobs]
            elif self.args.probe:
                loops["split, told and probing"] = lambda: [peer.told(j.prompt, j.pieces, probe=True) for j in jobs]
        return loops

    # ---- small words

    def _settle(self) -> None:
        if self.args.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _figures(self, took: Timed, mode: str, jobs: list[Job]) -> dict[str, Any]:
        """Times per token. The trusted clock is CPU time, on a GPU wall time."""
        pieces = [piece for job in jobs for piece in job.pieces]
        tokens = sum(number for _, number in pieces)
        authors = [(_ALONE.get(mode, Role(large)), number) for large, number in pieces]
        floor = sum(number * self.floors[role] for role, number in authors)
        trusted = (took.wall if self.args.device.startswith("cuda") else took.cpu).median
        return {
            "tokens": tokens,
            "cpu_ms_per_token": took.cpu.scaled(1 / tokens),
            "wall_ms_per_token": took.wall.scaled(1 / tokens),
            "tokens_per_second": 1e3 * tokens / trusted,
            "floor_ms_per_token": floor / tokens,
            "roofline_share": floor / trusted,
        }

    def ratios(self) -> dict[str, float]:
        """How many times longer the peer takes per token, by the trusted clock."""
        rates = {mode: result["tokens_per_second"] for mode, result in self.results.items()}
        return {name: rates[name.split(",")[0]] / peer["tokens_per_second"] for name, peer in self.peers.items()}

    def document(self) -> dict[str, Any]:
        """Everything, for the last line."""
        trace, args = self.trace, self.args
        return {
            "benchmark": "latency",
            "machine": self.machine,
            "pair": describe_pair(self.sources, self.decoder, self.floors),
            "settings": {
                "device": args.device,
                "page_size": args.page_size,
                "read_interval": args.read_interval,
                "num_iters": args.num_iters,
                "num_iters_warmup": args.num_iters_warmup,
                "trusted_clock": "wall" if args.device.startswith("cuda") else "cpu",
            },
            "trace": {"name": "the pair's own tags", "problems": args.problems}
            if trace is None
            else {
                "name": trace.name,
                "seed": trace.seed,
                "prompt_tokens": args.input_len or trace.prompt_tokens,
                "tokens": trace.total_tokens,
                "offload_fraction": trace.offload,
                "segments": trace.lengths,
            },
            "modes": self.results,
            "peers": {args.compare: self.peers} if args.compare else {},
            "times_faster_than_peer": self.ratios(),
        }


def floor_ms(source: Source, device: str) -> float:
    """Streaming a model's weights once, at the bandwidth measured for as many bytes."""
    return source.step_bytes / read_bandwidth(source.step_bytes, device) / 1e6


def describe_pair(sources: Pair[Source], decoder: SplitDecoder, floors: Pair[float]) -> dict[str, dict[str, Any]]:
    """Names, sizes and floors, by role. floors: ms to stream each model's weights once."""

    def one(role: Role) -> dict[str, Any]:
        source = sources[role]
        return {
            "name": source.name,
            "dtype": str(decoder.models[role].dtype).removeprefix("torch."),
            "weight_bytes_per_token": source.step_bytes,
            "floor_ms_per_token": floors[role],
            "read_gbps": source.step_bytes / floors[role] / 1e6,
        }

    return {str(role): one(role) for role in Role}


def modes_of(text: str) -> list[str]:
    """The modes a command line names, in their usual order. RequestError for any other."""
    modes = text.split(",")
    if not modes or not set(modes) <= set(MODES):
        raise RequestError(f"--modes: found {text!r}, expected some of {','.join(MODES)}")
    return [mode for mode in MODES if mode in modes]
