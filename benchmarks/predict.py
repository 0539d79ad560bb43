"""What a token should cost on a GPU that is not here: every launch of a captured step, by the bytes it moves.

    PYTHONPATH=src python benchmarks/predict.py                                   1.5b + 32b at 4k on H200, H100, A100
    ... predict.py --gpu h200 --context 16384 --launches                          one GPU, with the launches of a layer
    ... predict.py --measured benchmarks/results/h200-first.json                  with ceilings that were measured

The steps are not assumed: the step program (runtime/program.py) is recorded on tensors without memory, and each
recorded launch costs

    gap  +  ramp  +  bytes / (share x bandwidth)          bytes: weights, KV, activations, partial sums

gap: a node of a replayed graph. ramp: what a dependent kernel waits before its first bytes arrive, and its end.
Programmatic dependent launch (PDL) hides most of both behind the kernel before. These figures are predictions: SPEED.md
holds them beside what was measured. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import finish, show_table
from torch import Tensor

from splitdecode.models import geometry
from splitdecode.models.config import ModelConfig
from splitdecode.models.step import StepInputs, StepModel, StepShape
from splitdecode.models.transformer import Transformer
from splitdecode.models.weights import shape_weights
from splitdecode.ops import StepOps, step_ops
from splitdecode.plan import GPUS, Gpu, compute_ms
from splitdecode.runtime.graphs import Tape
from splitdecode.runtime.program import Program
from splitdecode.runtime.slots import DeviceSlots

PAGE = 64
SHARES = (0.0135, 0.05, 0.20)
SEGMENT = 32  # tokens the large model writes at a time
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Costs:
    """What a launch costs beyond its bytes, in microseconds, and the share of the bandwidth it streams at.

    attention: a chain of dependent loads (length, block table, keys) and the merge of the splits.
    """

    gap: float
    ramp: float
    attention: float
    share: float
    catch_up_share: float


# A graph node on an H100: 1.3 us (Hazy Research, "No bubbles", 2025). The rest are estimates.
PLAIN = Costs(gap=1.3, ramp=1.0, attention=3.0, share=0.92, catch_up_share=0.80)
DEPENDENT = Costs(gap=0.5, ramp=0.3, attention=2.5, share=0.92, catch_up_share=0.80)


MODES = (("graph", PLAIN), ("graph + PDL", DEPENDENT))
WITHOUT_PDL = ("a100-80", "l40s", "rtx4090")  # programmatic dependent launch came with sm_90


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel of a step."""

    op: str
    bytes: int

    def us(self, gpu: Gpu, costs: Costs) -> float:
        fixed = costs.gap + (costs.attention if self.op == "attend" else costs.ramp)
        return fixed + 1e6 * self.bytes / (costs.share * gpu.bandwidth)


def record_step(config: ModelConfig, context: int, ops: StepOps | None = None) -> list[Launch]:
    """The launches of one decode step at batch 1, in order."""
    ops = ops or step_ops(META)
    model = Transformer.__new__(Transformer)
    model.config, model.weights = config, shape_weights(config, torch.bfloat16)
    model.device, model.dtype = META, torch.bfloat16
    pages = -(-context // PAGE)
    kv = torch.empty(
        config.num_layers, pages + 1, PAGE, 2, config.num_kv_heads, config.head_dim, dtype=torch.bfloat16, device=META
    )
    table, last = (torch.empty(size, dtype=torch.int32, device=META) for size in ((1, pages), (1,)))
    shape = StepShape(1, 1, 1, 1)
    slots = DeviceSlots.__new__(DeviceSlots)
    slots.vocab_limit = config.vocab_size
    slots.state = _State(config.vocab_size)  # type: ignore[assignment]
    slots.ends = torch.empty(1, 1, dtype=torch.int32, device=META)
    box = torch.empty(1, 1, 1, dtype=torch.int32, device=META)
    program = Program(StepModel(model, kv, table, last, 1), slots, box, box.float(), sum(StepInputs.sizes(shape)))
    program.prepare(ops, shape)
    tape = Tape(lambda recorder: program.run(recorder, shape), ops)
    names = {id(getattr(ops, name)): name for name in StepOps.__slots__}
    return [_launch(names[id(op)], arguments, config, context) for op, arguments, _ in tape.calls]


class _State:
    """A SamplingState nobody reads."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab


def _launch(op: str, arguments: tuple[Any, ...], config: ModelConfig, context: int) -> Launch:
    """Bytes of the tensors a launch touches; of a cache only the context, of tables only what one token reads."""
    if op == "attend":
        partials = sum(t.nbytes for t in _tensors(arguments[6]))
        return Launch(op, 2 * context * config.kv_size * 2 + 2 * partials)
    if op == "embed":
        return Launch(op, 2 * config.hidden_size * 2)
    whole = [a for a in arguments if isinstance(a, Tensor) and a.dim() <= 2 and a.dtype != torch.int32]
    return Launch(op, sum(t.nbytes for t in whole))


def _tensors(holder: object) -> list[Tensor]:
    names = getattr(type(holder), "__slots__", ())
    return [t for t in (getattr(holder, name) for name in names) if isinstance(t, Tensor)]


def step_ms(launches: Sequence[Launch], gpu: Gpu, costs: Costs) -> float:
    """Milliseconds of one decode step."""
    return sum(launch.us(gpu, costs) for launch in launches) / 1e3


def split_ms(steps: Sequence[float], large: ModelConfig, gpu: Gpu, share: float, context: int, costs: Costs) -> float:
    """Milliseconds per token when the second model writes `share` of them, SEGMENT at a time; catch-up included."""
    tokens = SEGMENT * (1 - share) / share
    caught = max(steps[1], compute_ms(large, gpu, tokens, context) / costs.catch_up_share)
    return (1 - share) * steps[0] + share * steps[1] + share / SEGMENT * (caught - steps[1])


def measured_gpu(gpu: Gpu, costs: Costs, file: Path) -> tuple[Gpu, Costs]:
    """Bandwidth and gap as gpu_first.py found them on that device; what it did not measure stays."""
    found = {row["name"]: row["value"] for row in json.loads(file.read_text("utf-8"))["figures"] if "value" in row}
    bandwidth = found.get("read 6 GiB")
    gap = found.get("node, 132 programs, PDL" if costs is DEPENDENT else "node, 132 programs")
    if bandwidth is not None:
        gpu = replace(gpu, bandwidth=bandwidth * 1e9, source=f"measured: {file.name}")
    return gpu, costs if gap is None else replace(costs, gap=gap)


def predict(
    names: Sequence[str], gpu: Gpu, context: int, costs: Costs, steps: Sequence[list[Launch]]
) -> dict[str, Any]:
    """The whole prediction of one GPU."""
    configs = [geometry.preset(name) for name in names]
    times = [step_ms(launches, gpu, costs) for launches in steps]
    out: dict[str, Any] = {"gpu": gpu.label, "source": gpu.source, "context": context, "prediction": True}
    for name, config, launches, ms in zip(names, configs, steps, times, strict=True):
        floor = 1e3 * (geometry.weight_bytes(config) + context * geometry.kv_bytes(config)) / gpu.bandwidth
        attend = [launch.us(gpu, costs) for launch in launches if launch.op == "attend"]
        out[name] = {
            "ms": ms,
            "floor_ms": floor,
            "share_of_floor": floor / ms,
            "launches": len(launches),
            "attention_us": sum(attend) / len(attend),
            "bytes": sum(launch.bytes for launch in launches),
        }
    for share in SHARES:
        ms = split_ms(times, configs[1], gpu, share, context, costs)
        out[f"split {100 * share:g} %"] = {"ms": ms, "speedup": times[1] / ms}
    thousand = compute_ms(configs[1], gpu, 1000, context)
    out["catch-up of 1000 tokens"] = {"ms": max(times[1], thousand / costs.catch_up_share), "floor_ms": thousand}
    return out


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", default="1.5b", choices=geometry.preset_names())
    parser.add_argument("--large", default="32b", choices=geometry.preset_names())
    parser.add_argument("--gpu", default="h200,h100,a100-80", help=f"of {', '.join(GPUS)} (default %(default)s)")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--measured", type=Path, help="a document of gpu_first.py: its ceilings instead of assumptions")
    parser.add_argument("--launches", action="store_true", help="show how often each kernel runs, and its time")
    parser.add_argument("--output-json", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    wanted = args.gpu.split(",")
    if not set(wanted) <= set(GPUS):
        print(f"predict.py: --gpu: found {args.gpu!r}, expected some of {', '.join(GPUS)}", file=sys.stderr)
        return 2
    names = (args.small, args.large)
    steps = [record_step(geometry.preset(name), args.context) for name in names]
    rows: list[list[str]] = []
    document: dict[str, Any] = {"benchmark": "predict", "predictions": []}
    for key in wanted:
        for label, costs in MODES[: 1 if key in WITHOUT_PDL else 2]:
            gpu = GPUS[key]
            if args.measured:
                gpu, costs = measured_gpu(gpu, costs, args.measured)
            found = predict(names, gpu, args.context, costs, steps)
            document["predictions"].append({"mode": label, **found})
            cells = [f"{found[name]['ms']:.3f} ({100 * found[name]['share_of_floor']:.0f} %)" for name in names]
            splits = [
                f"{found[f'split {100 * s:g} %']['ms']:.3f}, {found[f'split {100 * s:g} %']['speedup']:.1f}x"
                for s in SHARES
            ]
            rows.append([gpu.label, label, *cells, *splits, f"{found['catch-up of 1000 tokens']['ms']:.0f}"])
    head = [
        "GPU",
        "mode",
        *(f"{n}: ms (of floor)" for n in names),
        *(f"split {100 * s:g} %" for s in SHARES),
        "catch-up 1000",
    ]
    show_table(f"predicted ms per token at {args.context} tokens, bf16, batch 1", head, rows)
    if args.launches:
        show_launches(names, steps, GPUS[wanted[0]])
    finish(document, args.output_json)
    return 0


def show_launches(names: Sequence[str], steps: Sequence[list[Launch]], gpu: Gpu) -> None:
    """One row per kernel of each model."""
    for name, launches in zip(names, steps, strict=True):
        counts = Counter((launch.op, launch.bytes) for launch in launches)
        rows = [
            [
                op,
                f"{count}",
                f"{size / 1e6:.3f}",
                f"{1e6 * size / gpu.bandwidth:.2f}",
                f"{Launch(op, size).us(gpu, PLAIN):.2f}",
            ]
            for (op, size), count in counts.items()
        ]
        show_table(f"{name}: {len(launches)} launches", ["kernel", "times", "MB", f"floor us, {gpu.label}", "us"], rows)


if __name__ == "__main__":
    sys.exit(main())
