"""F0: what a caller may ask for. Frozen dataclasses, checked once, and the randomness that a seed stands for.

    SamplingParams   one request; vLLM's names and defaults
    EngineConfig     one engine; derived values are properties
    Stream           who draws: word 2 of every random counter is `stream | step << 8`
    request_key      (seed, choice) -> the 64-bit Philox key of one sequence
    philox_uniform   one host-side draw, in Python integers, for policies

Every bound is here, so that nothing below has to ask again. An argument out of bounds raises RequestError with the
parameter's name, what was found and what was expected.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from splitdecode.errors import RequestError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_POSITIONS = 2**31 - 1  # token counts and positions travel as int32
GREEDY_BELOW = 1e-5  # a temperature below this is greedy, as in vLLM: dividing by it would overflow float32


class Stream(IntEnum):
    """What a random number is for. Streams never share noise, so reading along cannot bias what was written."""

    WRITE0 = 0
    WRITE1 = 1
    CLOSE = 2
    CONFIRM = 3
    POLICY = 4

    def word(self, step: int = 0) -> int:
        """Word 2 of the counter: this stream at `step` (CONFIRM counts its steps; the others stay at 0)."""
        if not 0 <= step < 1 << 24:
            raise ValueError(f"step: found {step}, expected 0 to {(1 << 24) - 1}")
        return int(self) | step << 8


def request_key(seed: int, choice: int) -> int:
    """The 64-bit Philox key of choice number `choice` of a request: the first 8 bytes (big endian) of a SHA-256."""
    digest = hashlib.sha256(f"splitdecode/{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def philox_uniform(key: int, counter: tuple[int, int, int, int]) -> float:
    """One uniform in (0, 1): output word 0 of Philox4x32-10, as (x + 0.5) / 2**32.

    key: 64 bits, low word first; counter: four 32-bit words. The device's twin is splitdecode.kernels.host.sampling.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (word & mask for word in counter)
    k0, k1 = key & mask, key >> 32 & mask
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & mask, p0 >> 32 ^ c3 ^ k1, p0 & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return (c0 + 0.5) * 2.0**-32


def parse_bytes(value: int | str, name: str = "bytes") -> int:
    """Bytes from a positive int or a string such as "256MiB", "1.5 GiB", "64kB" or "4096" (units: B, kB..TB, KiB..TiB).

    Raises RequestError naming `name` when the text is no size, or the size is not between 1 byte and 2**62.
    """
    expected = 'a positive number of bytes, or a string such as "256MiB"'
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*(?:([kKMGT])(i?))?[bB]?\s*", value, re.ASCII)
        if match is None:
            raise _wrong(name, value, expected)
        number, unit, binary = match.groups()
        base = 1024 if binary else 1000
        value = int(float(number) * base ** " kMGT".index(unit.replace("K", "k"))) if unit else int(float(number))
    return _int(name, value, 1, 2**62, expected)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Names and defaults are vLLM's, except max_tokens=None (= up to the context).

    n                     choices, 1 to 128; each has its own random key
    temperature           >= 0; 0 (or below 1e-5) is greedy
    top_p, top_k, min_p   (0, 1]; 0 or -1 = off; [0, 1]
    presence_penalty, frequency_penalty, repetition_penalty   [-2, 2]; [-2, 2]; > 0 and at most 10
    max_tokens, min_tokens   counts of generated ids, whoever wrote them
    stop                  a string or at most 16; kept as a tuple
    stop_token_ids        ids that end the text as EOS does; checked against the vocabularies when a request is admitted
    seed                  None = the engine's; equal seeds give equal text
    logprobs              None = none, 0 = of the chosen token, k <= 20 = of the top k too; of the raw logits
    logit_bias            id -> -100..100
    rollout               keep what a trainer of the small model needs (split/rollout.py)

    Budgets, None = none: what an answer may take of the model it hands the pen to (docs/handoff.md, Budgets).

    max_large_tokens      that model's tokens in one answer; a span that reaches it is closed by force
    max_offloads          hand-offs to that model in one answer; 0 = it never writes
    max_offload_fraction  [0, 1]: that model's share of the tokens, mean over the answers that ask for this share
    deadline_ms           since arrival: no span that would end later is opened, one that runs into it is closed
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    skip_special_tokens: bool = True
    max_large_tokens: int | None = None
    max_offloads: int | None = None
    max_offload_fraction: float | None = None
    deadline_ms: float | None = None
    rollout: bool = False

    def __post_init__(self) -> None:
        _int("n", self.n, 1, MAX_CHOICES)
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _int("top_k", self.top_k, -1, MAX_POSITIONS)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above=True)
        _int("min_tokens", self.min_tokens, 0, MAX_POSITIONS)
        if self.max_tokens is not None:
            _int("max_tokens", self.max_tokens, 1, MAX_POSITIONS)
            _int("min_tokens", self.min_tokens, 0, self.max_tokens, f"at most max_tokens ({self.max_tokens})")
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "rollout"):
            _bool(name, getattr(self, name))
        if self.seed is not None:
            _int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_budgets(self)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """No randomness: the most likely token, the lowest id among equals."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, in the order given, without repeats."""
        return tuple(self.stop) if self.stop else ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The stop token ids, in the order given, without repeats."""
        return tuple(self.stop_token_ids) if self.stop_token_ids else ()

    @property
    def penalised(self) -> bool:
        """Whether the sampler needs this request's token counts."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How much room an engine has and how far it runs ahead.

    page_size                positions per cache page, a power of two
    kv_cache_memory          bytes of keys and values, or a string such as "1GiB"; kept as bytes
    max_num_batched_tokens   pending tokens packed into one forward
    max_num_seqs             sequences running at once
    max_model_len            positions per sequence; None = what the checkpoints allow
    enable_prefix_caching    reuse full pages of equal prefixes
    depth                    steps in flight per model; None = 1 on a CPU, 2 on a GPU
    steps_per_graph          decode steps in one captured graph, 1 to 8: fewer launches, more overshoot past a tag
    enforce_eager            launch every kernel by itself instead of replaying captured graphs (GPU)
    programmatic_launch      let a kernel start while the one before it ends (GPU, sm_90 and up)
    l2_prefetch              request the next weights into the L2 while attention runs (GPU)
    read_interval            tokens the writing model may be ahead of its reader
    max_span                 tokens of one span before it is closed by force
    handoff_patience         sequences that wait for a slower model are gathered into one step of it until they have
                             waited, summed up, this many times what the step makes the others wait; 0 = not at all
                             (least latency at a seam); 0.25 to 1 give most tokens per second (benchmarks/simulate.py)
    handoff_max_wait_ms      but no sequence waits longer than this
    catch_up                 when a model runs what the other wrote: "lazy" = when it gets the pen; "eager" = also
                             before, in steps that have room or when catch_up_chunk tokens have gathered; "adaptive" =
                             in steps that have room, or as soon as an opening tag is likely (a probability of 5 %).
                             With unequal tokenizers all are lazy
    catch_up_chunk           tokens worth a step of their own
    weight_bound_tokens      tokens a step takes for the price of one; None = 160 on a GPU, 0 on a CPU
    idle_cache               what becomes of an idle model's pages when memory runs out: "recompute", "swap" (host
                             memory) or "fp8" (a byte per value; not exact)
    idle_cache_memory        bytes for "swap" or "fp8", per model
    second_stream            each model's steps on a CUDA stream of its own (GPU)
    seed                     requests without their own draw theirs from it, one after another
    watch_seams              of so many answers with hand-offs, the text of one is scored by both models
                             (split/health.py); 0 = of none
    max_large_tokens, max_offloads, max_offload_fraction, deadline_ms   SamplingParams' budgets, for every answer; of
                             an engine's and a request's own the stricter one holds
    """

    page_size: int = 16
    kv_cache_memory: int | str = "256MiB"
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    depth: int | None = None
    steps_per_graph: int = 1
    enforce_eager: bool = False
    programmatic_launch: bool = False
    l2_prefetch: bool = False
    read_interval: int = 4
    max_span: int = 512
    handoff_patience: float = 0.25
    handoff_max_wait_ms: float = 100.0
    catch_up: str = "lazy"
    catch_up_chunk: int = 256
    weight_bound_tokens: int | None = None
    idle_cache: str = "recompute"
    idle_cache_memory: int | str = "256MiB"
    second_stream: bool = False
    seed: int = 0
    watch_seams: int = 0
    max_large_tokens: int | None = None
    max_offloads: int | None = None
    max_offload_fraction: float | None = None
    deadline_ms: float | None = None

    def __post_init__(self) -> None:
        _int("page_size", self.page_size, 1, 1024)
        if self.page_size & (self.page_size - 1):
            raise _wrong("page_size", self.page_size, "a power of two")
        object.__setattr__(self, "kv_cache_memory", parse_bytes(self.kv_cache_memory, "kv_cache_memory"))
        _int("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        _int("max_num_seqs", self.max_num_seqs, 1, 2**16)
        if self.max_model_len is not None:
            _int("max_model_len", self.max_model_len, 1, MAX_POSITIONS)
        _bool("enable_prefix_caching", self.enable_prefix_caching)
        if self.depth is not None:
            _int("depth", self.depth, 1, 64)
        _int("steps_per_graph", self.steps_per_graph, 1, 8)
        _bool("enforce_eager", self.enforce_eager)
        _bool("programmatic_launch", self.programmatic_launch)
        _bool("l2_prefetch", self.l2_prefetch)
        _int("read_interval", self.read_interval, 1, 2**16)
        _int("max_span", self.max_span, 1, MAX_POSITIONS)
        _number("handoff_patience", self.handoff_patience, 0.0, math.inf)
        _number("handoff_max_wait_ms", self.handoff_max_wait_ms, 0.0, math.inf)
        _one_of("catch_up", self.catch_up, ("lazy", "eager", "adaptive"))
        _int("catch_up_chunk", self.catch_up_chunk, 1, MAX_POSITIONS)
        if self.weight_bound_tokens is not None:
            _int("weight_bound_tokens", self.weight_bound_tokens, 0, MAX_POSITIONS)
        _one_of("idle_cache", self.idle_cache, ("recompute", "swap", "fp8"))
        object.__setattr__(self, "idle_cache_memory", parse_bytes(self.idle_cache_memory, "idle_cache_memory"))
        _bool("second_stream", self.second_stream)
        _int("seed", self.seed, -(2**63), 2**64 - 1)
        _int("watch_seams", self.watch_seams, 0, 2**31)
        _check_budgets(self)

    @property
    def max_draws(self) -> int:
        """Logits rows of the largest step."""
        return min(self.max_num_batched_tokens, max(64, self.max_num_seqs * (self.read_interval + 1)))

    def on(self, device: str) -> EngineConfig:
        """With what depends on the kind of device ("cpu", "cuda") filled in."""
        gpu = device == "cuda"
        room = self.weight_bound_tokens
        return replace(
            self,
            depth=self.depth or (2 if gpu else 1),
            weight_bound_tokens=room if room is not None else (160 if gpu else 0),
        )

    @property
    def kv_cache_bytes(self) -> int:
        """kv_cache_memory in bytes."""
        return int(self.kv_cache_memory)

    @property
    def idle_cache_bytes(self) -> int:
        """idle_cache_memory in bytes."""
        return int(self.idle_cache_memory)


def _wrong(name: str, found: object, expected: str) -> RequestError:
    shown = repr(found)
    return RequestError(f"{name}: found {shown if len(shown) <= 80 else shown[:77] + '...'}, expected {expected}")


def _int(name: str, value: object, low: int, high: int, expected: str = "") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(name, value, expected or f"an integer from {low} to {high}")
    return value


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """A finite int or float in [low, high], or in (low, high] when `above`."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if good:
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        good = math.isfinite(number) and low <= number <= high and not (above and number == low)
    if not good:
        bounds = f"{'above' if above else 'from'} {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
        raise _wrong(name, value, f"a finite number {bounds}")


def _check_budgets(limits: SamplingParams | EngineConfig) -> None:
    for name, value in (("max_large_tokens", limits.max_large_tokens), ("max_offloads", limits.max_offloads)):
        if value is not None:
            _int(name, value, 0, MAX_POSITIONS)
    if limits.max_offload_fraction is not None:
        _number("max_offload_fraction", limits.max_offload_fraction, 0.0, 1.0)
    if limits.deadline_ms is not None:
        _number("deadline_ms", limits.deadline_ms, 0.0, math.inf)


def _bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _wrong(name, value, "one of " + ", ".join(map(repr, choices)))


def _stop_strings(value: object) -> tuple[str, ...] | None:
    expected = f"None, a non-empty string, or a list of at most {MAX_STOP_STRINGS} of them"
    if value is None:
        return None
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or len(strings) > MAX_STOP_STRINGS:
        raise _wrong("stop", value, expected)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise _wrong("stop", value, expected)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _wrong("stop", value, "text that can be written as UTF-8 (no lone surrogates)")
    return tuple(dict.fromkeys(strings))


def _token_ids(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise _wrong("stop_token_ids", value, "None or a list of token ids")
    for token in value:
        _int("stop_token_ids", token, 0, MAX_POSITIONS)
    return tuple(dict.fromkeys(value))


def _bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _wrong("logit_bias", value, "None or a dict of token id to bias")
    for token, bias in value.items():
        _int("logit_bias", token, 0, MAX_POSITIONS, "token ids (integers from 0) as keys")
        _number(f"logit_bias[{token}]", bias, -100.0, 100.0)
    return {token: float(bias) for token, bias in value.items()}
