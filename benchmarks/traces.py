"""Benchmarks: who writes what, for how long: traffic with the statistics of published SplitReason runs.

    prompt | small . . . . . | LARGE . . | small . . . . . . . . . | LARGE . | small . . . |
           0                 start       stop                                              total    content tokens

    math      2.8 k tokens, 4 or 5 segments: mathematics as the training data has it
    aime      13 k tokens on average, 69 % at the cap of 16,384; 4.6 % offloaded in the median, 3 % of requests none
    minimal   the same lengths, 1.2 % in the median, 24 % of requests without any offload
    stress    30 to 55 % offloaded, one segment of 576 tokens, a last tag never closed, tags spelled in several tokens

Segments are log-normal about a median of 90 tokens; the reported p90 of 156 and the log-spread of 0.60 need a longer
tail below than above (0.75 and 0.43). Gaps are log-normal (median 210, log-spread 1.23), scaled to fill the answer.
A trace is data: the same name, seed and index give the same trace.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from statistics import NormalDist

from splitdecode.split.policies import ForcedSpans

NAMES = ("math", "aime", "minimal", "stress")
_SEGMENT = (90.0, 0.75, 0.43)  # median, log-spread below and above it
_SEGMENT_MAX = 268
_OFFLOAD = {"aime": (0.0459, 1.12, 0.772), "minimal": (0.01886, 1.05, 1.05)}
_WITHOUT = {"aime": 0.03, "minimal": 0.24}
_CAP = 16384


@dataclass(frozen=True, slots=True)
class Trace:
    """One request: tokens of the prompt, content tokens of the answer, spans [start, stop) the large model writes."""

    name: str
    prompt_tokens: int
    total_tokens: int
    spans: tuple[tuple[int, int], ...]
    seed: int
    split_tags: bool = False  # tags spelled in several tokens

    @property
    def offload(self) -> float:
        """Share of the content tokens written by the large model, 0 to 1."""
        return sum(self.lengths) / self.total_tokens

    @property
    def lengths(self) -> list[int]:
        """Tokens per segment."""
        return [stop - start for start, stop in self.spans]

    def policy(self) -> ForcedSpans:
        """The hand-offs of this trace; they pay for tags and for reading along as real ones do."""
        return ForcedSpans(self.spans, tags=True, reads_along=True)

    def pieces(self) -> list[tuple[bool, int]]:
        """(by the large model, tokens), in order, covering the answer."""
        out, at = [], 0
        for start, stop in (*self.spans, (self.total_tokens, self.total_tokens)):
            out += [(False, start - at), (True, stop - start)]
            at = stop
        return [(large, count) for large, count in out if count]

    def prompt_ids(self, vocab: int) -> list[int]:
        """A prompt of ids below `vocab`."""
        rng = random.Random(f"{self.name}/{self.seed}/prompt")
        return [rng.randrange(vocab) for _ in range(self.prompt_tokens)]

    def scaled(self, max_tokens: int) -> Trace:
        """The same pattern with an answer of at most `max_tokens`: every length shrinks alike, no segment below one."""
        if max_tokens >= self.total_tokens:
            return self
        factor = max_tokens / self.total_tokens
        spans, edge = [], 0
        for start, stop in self.spans:
            begin = max(edge + 1, round(start * factor))
            end = min(max_tokens, max(begin + 1, round(stop * factor)))
            if begin < end:
                spans.append((begin, end))
                edge = end
        prompt = max(1, round(self.prompt_tokens * factor))
        return replace(self, prompt_tokens=prompt, total_tokens=max_tokens, spans=tuple(spans))


def make_trace(name: str, seed: int = 0, index: int = 0) -> Trace:
    """Request number `index` of the traffic `name`. ValueError for a name not in NAMES."""
    if name not in NAMES:
        raise ValueError(f"trace: found {name!r}, expected one of {', '.join(NAMES)}")
    rng = random.Random(f"{name}/{seed}/{index}")
    if name == "stress":
        return _stress(rng, seed)
    if name == "math":
        lengths = [_segment(rng) for _ in range(rng.choice((4, 5)))]
        return Trace(name, 200, 2800, _placed(rng, lengths, 2800), seed)
    capped = rng.random() < 0.69
    total = _CAP if capped else min(_CAP, max(1000, round(rng.lognormvariate(8.5, 0.5))))
    wanted = 0.0 if rng.random() < _WITHOUT[name] else min(0.56, _skewed(rng, *_OFFLOAD[name]))
    return Trace(name, 200, total, _placed(rng, _summing(rng, round(wanted * total)), total), seed)


def workload(name: str, count: int, seed: int = 0) -> list[Trace]:
    """The first `count` requests of that traffic."""
    return [make_trace(name, seed, index) for index in range(count)]


def _stress(rng: random.Random, seed: int) -> Trace:
    total = 2800
    lengths = [576, *_summing(rng, round(rng.uniform(0.30, 0.55) * total) - 576)]
    rng.shuffle(lengths)
    return Trace("stress", 200, total, _placed(rng, lengths, total, unclosed=True), seed, split_tags=True)


def _skewed(rng: random.Random, median: float, below: float, above: float) -> float:
    """Log-normal about `median`, with a log-spread of its own on either side."""
    z = NormalDist().inv_cdf(rng.uniform(1e-9, 1 - 1e-9))
    return median * math.exp(z * (below if z < 0 else above))


def _segment(rng: random.Random) -> int:
    return min(_SEGMENT_MAX, max(4, round(_skewed(rng, *_SEGMENT))))


def _summing(rng: random.Random, tokens: int) -> list[int]:
    """Segments of `tokens` together."""
    out: list[int] = []
    while tokens > 0:
        out.append(min(tokens, _segment(rng)))
        tokens -= out[-1]
    return out


def _placed(
    rng: random.Random, lengths: list[int], total: int, *, unclosed: bool = False
) -> tuple[tuple[int, int], ...]:
    """Segments with log-normal gaps before, between and (unless the last one stays open) behind them."""
    weights = [rng.lognormvariate(5.24, 1.25)] + [rng.lognormvariate(5.35, 1.23) for _ in lengths]
    if unclosed:
        weights[-1] = 0.0
    free = total - sum(lengths) - len(lengths)  # a token before every segment
    scale = free / sum(weights)
    spans, at = [], 0.0
    for gap, length in zip(weights, lengths, strict=False):
        start = at + gap * scale + 1
        spans.append((int(start), int(start) + length))
        at = start + length
    if unclosed and spans:
        spans[-1] = (spans[-1][0], total)
    return tuple(spans)
