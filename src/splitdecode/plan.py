"""F7: the memory and speed of a pair on a GPU, from geometry alone: no model is loaded, no GPU is needed.

    a share p of the tokens is the large model's, in segments of s; what the small one writes meanwhile is caught up

      small writes n = s(1-p)/p       large catches up n, which also yields its first token      large writes s
    |------ n x step(small) ------|------ max(step(large), n x flops / FLOP/s) ------|----- (s-1) x step(large) -----|

    ms per token = (1-p) step(small) + p step(large) + p/s (catch_up(n) - step(large))

A floor takes the GPU's reachable bandwidth and FLOP/s; what is expected divides it by the shares of them that a tuned
system reaches (an estimate). Units: bytes, tokens, milliseconds; GB is 1e9 bytes, GiB is 2**30.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from splitdecode.models import geometry
from splitdecode.models.config import ModelConfig

GIB = 1 << 30
# CUDA contexts, captured graphs, activations and the caching allocator's slack: no weights or pages go here.
RESERVE_BYTES = 6 * GIB
CONTEXTS = (4096, 16384, 32768)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device: reachable `bandwidth` in bytes/s, reachable dense bf16 `flops` per second, `memory` in bytes."""

    label: str
    bandwidth: float
    flops: float
    memory: float
    source: str


def _from_datasheet(label: str, terabytes: float, teraflops: float, gigabytes: float) -> Gpu:
    """Reachable rates as the same fractions of the datasheet's as on the H200: 4.3 of 4.8 TB/s, 700 of 989 TFLOP/s."""
    source = f"datasheet: {terabytes} TB/s x 0.90, {teraflops:g} TFLOP/s dense bf16 x 0.71, {gigabytes:g} GB"
    return Gpu(label, terabytes * 1e12 * 4.3 / 4.8, teraflops * 1e12 * 700 / 989, gigabytes * 1e9, source)


GPUS = {
    "h200": Gpu("H200", 4.3e12, 700e12, 150.7e9, "reachable: 4.3 of 4.8 TB/s, 700 of 989 TFLOP/s dense bf16, 150.7 GB"),
    "h100": _from_datasheet("H100 SXM", 3.35, 989, 80),
    "a100-80": _from_datasheet("A100 SXM 80 GB", 2.039, 312, 80),
    "b200": _from_datasheet("B200", 8.0, 2250, 180),
    "l40s": _from_datasheet("L40S", 0.864, 362, 48),
    "rtx4090": _from_datasheet("RTX 4090", 1.008, 165.2, 24),
}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the floors that are reached (1 = all of it), and a fixed cost per hand-over in milliseconds."""

    small: float
    large: float
    catch_up: float
    switch_ms: float


FLOOR = Efficiency(1.0, 1.0, 1.0, 0.0)
EXPECTED = Efficiency(0.72, 0.88, 0.80, 0.2)  # a short step keeps less of its floor than a long one; an estimate


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model: sizes in bytes, `weights_ms` per pass over its weights, `step_ms` and `catch_up_ms` per token."""

    name: str
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    weights_ms: float
    step_ms: float
    catch_up_ms: float


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the device. `left` is what pages may take, negative when the weights alone do not fit.

    `sequences` counts whole sequences, cached by both models, per context length in tokens.
    """

    device: float
    reserve: float
    weights: float
    left: float
    second_cache: float
    sequences: dict[int, int]

    @property
    def fits(self) -> bool:
        """Whether weights and reserve fit; a plan that fits may still hold no sequence of a long context."""
        return self.left >= 0


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """What a share of offloaded tokens costs: ms per output token, speed-up over the large model alone on equal terms,
    and the stall of one hand-over that catches up `caught_up` tokens at once."""

    share: float
    caught_up: float
    stall_ms: float
    floor_ms: float
    floor_speedup: float
    expected_ms: float
    expected_speedup: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The pair on a GPU at one context length. Some `free_tokens` are caught up at the cost of a decode step."""

    gpu: Gpu
    context: int
    segment: float
    small: ModelPlan
    large: ModelPlan
    memory: MemoryPlan
    free_tokens: float
    offloads: tuple[OffloadPlan, ...]


def resident_bytes(config: ModelConfig) -> int:
    """Weights held in memory, in bf16: also the embedding, which a decode step does not stream."""
    return 2 * geometry.parameters(config)


def step_ms(config: ModelConfig, gpu: Gpu, context: int) -> float:
    """One decode step of one sequence: every weight and `context` tokens of KV are read once."""
    read = geometry.weight_bytes(config) + context * geometry.kv_bytes(config)
    return read / gpu.bandwidth * 1e3


def compute_ms(config: ModelConfig, gpu: Gpu, tokens: float, prefix: int) -> float:
    """The arithmetic of `tokens` new tokens after `prefix` cached ones; logits of the last one only."""
    linear = tokens * geometry.linear_flops(config) + geometry.head_flops(config)
    attention = tokens * (prefix + tokens / 2) * geometry.attention_flops(config, 1)
    return (linear + attention) / gpu.flops * 1e3


def catch_up_ms(
    config: ModelConfig, gpu: Gpu, tokens: float, prefix: int, decode_share: float = 1.0, compute_share: float = 1.0
) -> float:
    """One pass over `tokens` pending tokens, bound by reading or by computing; the shares are those of Efficiency."""
    reading = step_ms(config, gpu, prefix) / decode_share
    return max(reading, compute_ms(config, gpu, tokens, prefix) / compute_share)


def split_ms(
    small: ModelConfig, large: ModelConfig, gpu: Gpu, share: float, segment: float, context: int, reached: Efficiency
) -> float:
    """Milliseconds per output token when the large model writes `share` of them in segments of `segment`.

    Its catch-up replaces the first decode step of a segment; so does the small model's, which is one pass at any length
    a segment has. ValueError unless 0 <= share <= 1 and segment >= 1.
    """
    if not 0 <= share <= 1 or segment < 1:
        raise ValueError(f"share must lie in 0..1 and segment be at least 1, are {share} and {segment}")
    writing = step_ms(small, gpu, context) / reached.small
    if share == 0:
        return writing
    large_step = step_ms(large, gpu, context) / reached.large
    if share == 1:
        return large_step
    tokens = segment * (1 - share) / share
    caught = catch_up_ms(large, gpu, tokens, context, reached.large, reached.catch_up)
    per_switch = caught - large_step + reached.switch_ms
    return (1 - share) * writing + share * large_step + share / segment * per_switch


def plan_memory(small: ModelConfig, large: ModelConfig, gpu: Gpu, contexts: tuple[int, ...]) -> MemoryPlan:
    """Weights of both in bf16, RESERVE_BYTES, and how many sequences of each context fit into the rest."""
    weights = resident_bytes(small) + resident_bytes(large)
    left = gpu.memory - RESERVE_BYTES - weights
    per_token = geometry.kv_bytes(small) + geometry.kv_bytes(large)
    sequences = {context: max(0, int(left // (per_token * context))) for context in sorted(set(contexts))}
    second = geometry.kv_bytes(small) / geometry.kv_bytes(large)
    return MemoryPlan(gpu.memory, RESERVE_BYTES, weights, left, second, sequences)


def plan_model(name: str, gpu: Gpu, context: int) -> ModelPlan:
    """One preset of models/geometry.py at `context` tokens."""
    config = geometry.preset(name)
    kv = geometry.kv_bytes(config)
    return ModelPlan(
        name=name,
        parameters=geometry.parameters(config),
        weight_bytes=resident_bytes(config),
        kv_bytes_per_token=kv,
        kv_bytes=kv * context,
        weights_ms=step_ms(config, gpu, 0),
        step_ms=step_ms(config, gpu, context),
        catch_up_ms=compute_ms(config, gpu, 1000, context) / 1000,
    )


def plan_pair(small: str, large: str, gpu: Gpu, context: int, shares: tuple[float, ...], segment: float) -> Plan:
    """The whole plan of two presets. ValueError as for split_ms or when context < 1, CheckpointError for a name."""
    if context < 1:
        raise ValueError(f"context must be at least 1 token, is {context}")
    first, second = geometry.preset(small), geometry.preset(large)
    offloads = []
    for share in shares:
        floor = split_ms(first, second, gpu, share, segment, context, FLOOR)
        expected = split_ms(first, second, gpu, share, segment, context, EXPECTED)
        alone = step_ms(second, gpu, context)
        tokens = segment * (1 - share) / share if share > 0 else 0.0
        stall = catch_up_ms(second, gpu, tokens, context)
        speedups = alone / floor, alone / EXPECTED.large / expected
        offloads.append(OffloadPlan(share, tokens, stall, floor, speedups[0], expected, speedups[1]))
    models = plan_model(small, gpu, context), plan_model(large, gpu, context)
    memory = plan_memory(first, second, gpu, (*CONTEXTS, context))
    return Plan(gpu, context, segment, *models, memory, gpu.flops / gpu.bandwidth, tuple(offloads))


def verdict(plan: Plan) -> str:
    """One sentence: whether the pair fits, with the sizes."""
    memory = plan.memory
    sizes = f"{plan.large.name} {_gb(plan.large.weight_bytes)} + {plan.small.name} {_gb(plan.small.weight_bytes)}"
    room = f"{_gb(memory.reserve)} reserve, of {_gb(memory.device)} on the {plan.gpu.label}"
    if not memory.fits:
        return f"Does not fit: weights {sizes} and {room}: {_gb(-memory.left)} too much."
    count = memory.sequences[plan.context]
    if count == 0:
        need = (plan.small.kv_bytes_per_token + plan.large.kv_bytes_per_token) * plan.context
        return (
            f"The weights fit, but no sequence of {plan.context} tokens ({_gb(need)}) in the {_gb(memory.left)} left."
        )
    return (
        f"Fits: weights {sizes} and {room}: {_gb(memory.left)} for pages, {count} sequences of {plan.context} tokens."
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def render(plan: Plan, console: Console) -> None:
    """Prints the plan as three tables and the verdict."""
    console.print(f"[bold]{plan.small.name} + {plan.large.name} on one {plan.gpu.label}[/], bf16, batch 1")
    console.print(f"{plan.gpu.source}\n", highlight=False)
    models = Table(title=f"floors at {plan.context} tokens of context", title_justify="left")
    for heading in ("", "weights", "KV/token", f"KV @{plan.context}", "weights only", "decode", "caught-up token"):
        models.add_column(heading, justify="right")
    for model in (plan.small, plan.large):
        kv = f"{model.kv_bytes_per_token / 1024:g} KiB", f"{model.kv_bytes / GIB:.3f} GiB"
        times = f"{model.weights_ms:.3f} ms", f"{model.step_ms:.3f} ms", f"{model.catch_up_ms:.4f} ms"
        models.add_row(model.name, _gb(model.weight_bytes), *kv, *times)
    console.print(models)
    console.print(f"Catching up some {plan.free_tokens:.0f} tokens costs no more than a decode step.\n")
    split = Table(title=f"the split, large segments of {plan.segment:g} tokens", title_justify="left")
    for heading in ("offloaded", "caught up/switch", "stall", "floor", "speed-up", "expected", "speed-up"):
        split.add_column(heading, justify="right")
    for row in plan.offloads:
        stall = f"{row.caught_up:.0f}", f"{row.stall_ms:.0f} ms"
        floor = f"{row.floor_ms:.3f} ms", f"{row.floor_speedup:.1f}x"
        split.add_row(f"{row.share:.2%}", *stall, *floor, f"{row.expected_ms:.2f} ms", f"{row.expected_speedup:.1f}x")
    console.print(split)
    console.print(
        "ms per output token; speed-up over the large model alone, on the same terms. Expected: an estimate.\n"
    )
    counts = ", ".join(f"{count} of {context}" for context, count in plan.memory.sequences.items())
    console.print(
        f"The second cache adds {plan.memory.second_cache:.1%} to the large one. Sequences (tokens): {counts}."
    )
    console.print(f"[bold]{verdict(plan)}[/]", highlight=False)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, with `memory.fits` and `verdict`."""
    data = asdict(plan)
    data["memory"]["fits"] = plan.memory.fits
    data["verdict"] = verdict(plan)
    return data


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"expected shares in 0..1 separated by commas, found {text!r}")
    return shares


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of tokens, at least 1, found {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `splitdecode plan`."""
    presets = sorted(geometry.preset_names())
    parser.add_argument("--small", default="1.5b", choices=presets, help="geometry of the small model (default 1.5b)")
    parser.add_argument("--large", default="32b", choices=presets, help="geometry of the large model (default 32b)")
    parser.add_argument("--gpu", default="h200", choices=list(GPUS), help="the device (default h200)")
    parser.add_argument("--context", default=4096, type=_count, help="tokens of context (default 4096)")
    parser.add_argument(
        "--offload", default="0.0135,0.05,0.2", type=_shares, help="shares of tokens written by --large"
    )
    parser.add_argument("--segment", default=32, type=_count, help="tokens per large segment (default 32)")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Prints the plan; 0 when the pair fits, else 1."""
    plan = plan_pair(args.small, args.large, GPUS[args.gpu], args.context, args.offload, args.segment)
    if args.json:
        print(json.dumps(as_json(plan)))
    else:
        render(plan, Console())
    return 0 if plan.memory.fits else 1
