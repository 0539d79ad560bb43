"""What single operations cost, each beside the alternatives it was chosen over: on the CPU, and kernels on a GPU.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/kernels.py --what ops        one token through each op
    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/kernels.py --what sampler    one step of the host sampler
    ... kernels.py --what rows                                        many rows through each op (row_ops.py)
    ... kernels.py --what ops --only attention --num-iters 300                      some of them, longer
    ... kernels.py --what gpu                                         every kernel of a step (device_kernels.py)

On the CPU alternatives run in turns, in bundles of calls that last --bundle-ms each; a figure is process CPU time per
call, median and quartiles over --num-iters bundles, one Python call included. What should give the same is compared
beforehand.

Bytes are what an op has to move at least: weights, what it reads, what it writes. Calls repeat on the same buffers, so
`resident` names the smallest cache that holds them; a model larger than that cache finds its weights further away. The
bandwidth a share is taken of is that of reading as many bytes again and again, at least 256 KiB of them (a smaller
probe would time its own call); a product may beat that probe. A share near zero is call overhead, not traffic.

The last line is one JSON document. Exit code 2: wrong input.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Spread, finish, machine, race, read_bandwidth, show_table, use_threads
from torch import Tensor

from splitdecode import ops
from splitdecode.config import SamplingParams, Stream, request_key
from splitdecode.runtime.sampler import Sampler

Work = Callable[[], Any]
_read_gbps = functools.cache(read_bandwidth)
EPS = 1e-6
WEIGHTS = ((256, 8000), (128, 768), (768, 32000), (2048, 768))  # in, out
TINY, MIDDLE = (4, 2, 32), (12, 4, 64)  # heads, kv heads, dim: the embedded large model and random-100m
ATTENTION = ((TINY, 64), (TINY, 256), (MIDDLE, 64), (MIDDLE, 512), (MIDDLE, 2048))
VOCABULARIES, ROWS = (152, 151_936), (1, 8)
SPREADS = {"flat": 1.0, "peaked": 4.0}  # standard deviation of the normal logits
METHODS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.6),
    "top_p": SamplingParams(temperature=0.6, top_p=0.95),
    "top_k, top_p": SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
    "min_p": SamplingParams(temperature=0.6, min_p=0.05),
}


@dataclass(frozen=True, slots=True)
class Contest:
    """Alternatives for one op at one shape, the one in use first; the first `alike` of them must give the same."""

    op: str
    shape: str
    bytes: int
    works: Mapping[str, Work]
    alike: int = 0


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--what", choices=["ops", "rows", "sampler", "gpu"], default="ops", help="default %(default)s")
    add("--only", default="", help="only what has this in its name, such as attention or '152 ids'")
    add("--num-iters", type=_positive, default=100, help="counted bundles (100)")
    add("--num-iters-warmup", type=_positive, default=5, help="bundles before them (5)")
    add("--bundle-ms", type=_positive, default=2, help="how long a bundle of calls lasts (2)")
    add("--threads", type=_positive, default=1, help="threads torch computes with (1)")
    add("--output-json", type=Path, help="also write the document here")
    add("--resume", action="store_true", help=argparse.SUPPRESS)  # go on behind the rows of --output-json
    return parser


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; `argv` without the program's name."""
    args = arguments().parse_args(argv)
    use_threads(args.threads)
    torch.manual_seed(0)
    if args.what == "gpu":
        return _on_device(args)
    found = [
        _measured(contest, args) for contest in contests(args.what) if args.only in f"{contest.op} {contest.shape}"
    ]
    if not found:
        return _nothing(args.only)
    document = {
        "benchmark": "kernels",
        "what": args.what,
        "machine": {**machine(), "caches": caches()},
        "settings": {"iterations": args.num_iters, "bundle_ms": args.bundle_ms, "trusted_clock": "cpu"},
        "contests": found,
    }
    _show(document)
    finish(document, args.output_json)
    return 0


def _on_device(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("kernels.py: --what gpu: no CUDA device here", file=sys.stderr)
        return 2
    import device_kernels

    rows: list[dict[str, Any]] = []
    if args.resume and args.output_json:
        rows = json.loads(args.output_json.read_text("utf-8"))["contests"]
    document: dict[str, Any] = {"benchmark": "kernels", "what": "gpu", "machine": machine("cuda"), "contests": rows}

    def keep(found: list[dict[str, Any]]) -> None:
        document["contests"] = found
        if args.output_json:
            finish(document, args.output_json, quietly=True)

    sound, rows = device_kernels.run(args.only, keep, rows), document["contests"]
    if not rows:
        return _nothing(args.only)
    if not sound and args.output_json:  # an error such as an illegal address: another process goes on behind it
        flags = [flag for flag in sys.argv if flag != "--resume"]
        os.execv(sys.executable, [sys.executable, *flags, "--resume"])
    head = ["kernel", "model", "shape", "us", "GB/s", "share", "peers, us"]
    show_table("kernels in captured graphs, cold weights", head, device_kernels.table(rows))
    finish(document, args.output_json)
    return int(any("error" in row for row in rows))


def _nothing(only: str) -> int:
    print(f"kernels.py: --only: found {only!r}, expected a part of an op's name or shape", file=sys.stderr)
    return 2


def check(contest: Contest) -> None:
    """Raises AssertionError when alternatives that should give the same do not."""
    same = [work().clone() for work in itertools.islice(contest.works.values(), contest.alike)]
    for other in same[1:]:
        torch.testing.assert_close(other, same[0], rtol=2e-2, atol=2e-2 if other.itemsize < 4 else 1e-3)


def _measured(contest: Contest, args: argparse.Namespace) -> dict[str, Any]:
    check(contest)
    counts = {name: _bundle(work, args.bundle_ms) for name, work in contest.works.items()}
    bundles = {name: functools.partial(_repeat, work, counts[name]) for name, work in contest.works.items()}
    timed = race(bundles, args.num_iters, args.num_iters_warmup)
    read = _read_gbps(max(contest.bytes, 1 << 18)) if contest.bytes else None
    out: dict[str, Any] = {"op": contest.op, "shape": contest.shape}
    if read is not None:
        level = next((name for name, limit in caches().items() if contest.bytes <= limit), "memory")
        out |= {"bytes": contest.bytes, "resident": level, "read_gbps": round(read, 2)}
    out["alternatives"] = {}
    for name, one in timed.items():
        us = one.cpu.scaled(1e3 / counts[name])
        found = out["alternatives"][name] = {"us": us, "calls": counts[name]}
        if read is not None:
            gbps = contest.bytes / us.median / 1e3
            found |= {"gbps": round(gbps, 3), "share": round(gbps / read, 4)}
    return out


def _repeat(work: Work, count: int) -> None:
    for _ in itertools.repeat(None, count):
        work()


def _bundle(work: Work, milliseconds: int) -> int:
    """Calls that fit: by the fast ones of five."""
    return max(1, round(milliseconds / race({"": work}, 5, 0)[""].wall.low))


def caches() -> dict[str, int]:
    """Bytes of the first core's data caches by level, innermost first; empty where the system does not say."""
    out = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = ((folder / name).read_text("ascii").strip() for name in ("type", "level", "size"))
        if kind != "Instruction" and size.endswith("K"):
            out[f"L{level}"] = int(size[:-1]) << 10
    return out


def contests(what: str) -> Iterator[Contest]:
    """Those of `--what`."""
    if what == "rows":
        import row_ops

        return row_ops.all_rows()
    return all_ops() if what == "ops" else all_samplers()


def all_ops() -> Iterator[Contest]:
    """Every contest at one token; buffers of one are dropped before the next is made."""
    yield from itertools.starmap(norm_contest, ((128, 256), (768, 1280)))
    yield from itertools.starmap(weight_contest, WEIGHTS)
    yield from itertools.starmap(rope_contest, (TINY, MIDDLE))
    yield from itertools.starmap(write_contest, (TINY[1:], MIDDLE[1:]))
    for dtype, (sizes, length) in itertools.product((torch.float32, torch.bfloat16), ATTENTION):
        yield attention_contest(*sizes, length, dtype)
    yield from map(swiglu_contest, (384, 2048))


def norm_contest(width: int, count: int) -> Contest:
    """A norm in front of a matrix with a bias. Without gain: as if folded into the matrix. All read the same one."""
    x, gain, matrix = torch.randn(1, width), torch.rand(width) + 0.5, torch.randn(width, count) / width**0.5
    bias, out = torch.randn(count), torch.empty(1, count)

    def by_dot() -> Tensor:
        row = x[0]
        alpha = (torch.dot(row, row).item() / width + EPS) ** -0.5
        return torch.addmm(bias, x * gain, matrix, alpha=alpha, out=out)

    works: dict[str, Work] = {
        "norm_linear": lambda: ops.norm_linear(x, gain, EPS, matrix, bias, out),
        "rms_norm + addmm": lambda: torch.addmm(bias, F.rms_norm(x, (width,), gain, EPS), matrix, out=out),
        "dot for vector_norm": by_dot,
        "without gain": lambda: ops.norm_linear(x, None, EPS, matrix, bias, out),
        "addmm, no norm": lambda: torch.addmm(bias, x, matrix, out=out),
    }
    return Contest("rmsnorm + linear", f"{width}x{count}", 4 * (matrix.numel() + 2 * (width + count)), works, alike=3)


def weight_contest(width: int, count: int) -> Contest:
    """One row through a matrix that lies [in, out] or [out, in]; each alternative finds its own copy equally cold."""
    x, kept, out = torch.randn(1, width), torch.randn(width, count) / width**0.5, torch.empty(1, count)
    (turned, other), row = (kept.t().contiguous() for _ in range(2)), x[0]
    works: dict[str, Work] = {
        "mm [in, out]": lambda: torch.mm(x, kept, out=out),
        "linear [out, in]": lambda: F.linear(x, turned),
        "mv [out, in]": lambda: torch.mv(other, row)[None],
    }
    return Contest("weights", f"{width}x{count}", 4 * (kept.numel() + width + count), works, alike=3)


def rope_contest(heads: int, kv_heads: int, dim: int) -> Contest:
    """Queries and keys of one token, rotated; the two lie in different orders."""
    qk = torch.randn(1, heads + kv_heads, dim)
    pairs = torch.view_as_complex(qk.clone().view(1, -1, dim // 2, 2))
    angle = torch.rand(1, 1, dim // 2)
    cis = torch.polar(torch.ones_like(angle), angle)
    cos, sin = (f(angle).repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    half = dim // 2
    works: dict[str, Work] = {
        "complex multiply": lambda: ops.rope(pairs, cis),
        "rotate-half": lambda: qk * cos + torch.cat((-qk[..., half:], qk[..., :half]), -1) * sin,
    }
    return Contest("rope", f"{heads + kv_heads} heads of {dim}", 8 * (qk.numel() + half), works)


def write_contest(kv_heads: int, dim: int) -> Contest:
    """k and v of one token into a cache: side by side, by index, and as two caches."""
    kv, slots, flat = torch.randn(1, 2, kv_heads, dim), torch.tensor([77]), torch.zeros(256, 2, kv_heads, dim)
    cache, plan = ops.LayerCache(flat, flat[77:78], None, None), ops.AttentionPlan([], [], slots, (77, 1))
    (k, v), (k_at, v_at) = kv.unbind(1), (torch.zeros(256, kv_heads, dim)[77:78] for _ in range(2))
    works: dict[str, Work] = {
        "one copy": lambda: ops.write(kv, cache, plan.slots),
        "index_copy": lambda: flat.index_copy_(0, slots, kv),
        "two copies": lambda: (k_at.copy_(k), v_at.copy_(v)),
    }
    return Contest("kv write", f"{kv_heads} kv heads of {dim}", 8 * kv.numel(), works)


def attention_contest(heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype) -> Contest:
    """One query row against `length` positions of a token-major cache: C++, in half precision SDPA on its views."""
    groups = heads // kv_heads
    q, flat = torch.randn(1, groups, kv_heads, dim).to(dtype), torch.randn(length, 2, kv_heads, dim).to(dtype)
    rows, (k, v) = q[0].transpose(0, 1), flat.permute(1, 2, 0, 3)
    last, one, ends = (torch.tensor(at, dtype=torch.int32) for at in ([length - 1], [0, 1], [0, 1]))
    batch = ops.PagedBatch(last, last, last, one, last + 1, ends, one[:1], length)
    plan = ops.plan_attention(batch, q)
    (cache,) = ops.bind_cache(plan, flat[None, None])

    def by_bmm() -> Tensor:
        score = torch.bmm(rows, k.mT).mul_(dim**-0.5).softmax(-1)
        return torch.bmm(score, v).transpose(0, 1).reshape(1, -1)

    def by_sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k[None], v[None]).transpose(1, 2).reshape(1, -1)

    works: dict[str, Work] = {"in use": lambda: ops.attention(q, cache, plan), "SDPA": by_sdpa}
    works["bmm, softmax, bmm"] = by_bmm
    name = f"{kv_heads}x{groups} heads of {dim}, {length} keys, {str(dtype).removeprefix('torch.')}"
    return Contest("attention", name, dtype.itemsize * (flat.numel() + 2 * q.numel()), works, alike=3)


def swiglu_contest(inner: int) -> Contest:
    """The activation of one token over the two halves of a product."""
    gate, up = torch.randn(1, 2 * inner).split(inner, 1)
    out = torch.empty(1, inner)
    works: dict[str, Work] = {
        "mul(silu) into out": lambda: ops.swiglu(gate, up, out),
        "silu * up": lambda: F.silu(gate) * up,
    }
    return Contest("swiglu", f"{inner}", 12 * inner, works, alike=2)


def all_samplers() -> Iterator[Contest]:
    """Every vocabulary, spread of logits and number of rows; the methods are told side by side, none is chosen."""
    for vocab, (name, spread), rows in itertools.product(VOCABULARIES, SPREADS.items(), ROWS):
        logits = [spread * torch.randn(rows, vocab) for _ in range(4)]
        works = {method: sampler_step(params, logits) for method, params in METHODS.items()}
        yield Contest("sample", f"{vocab} ids, {name}, rows: {rows}", 0, works)


def sampler_step(params: SamplingParams, logits: Sequence[Tensor]) -> Work:
    """One step of some rows. Positions move on from call to call: a run fills its noise ahead, 16 positions at once."""
    rows, vocab = logits[0].shape
    sampler = Sampler(vocab, rows)
    for slot in range(rows):
        sampler.set(slot, params, request_key(7, slot))
    slots, zero = np.arange(rows), np.zeros(rows, dtype=np.int64)
    streams, positions = np.full(rows, Stream.WRITE0.word()), np.zeros(rows, dtype=np.int64)
    turn = itertools.cycle(logits)

    def step() -> Any:
        positions[:] += 1
        return sampler.sample(next(turn), slots, positions, streams, zero, zero)

    return step


def _show(document: dict[str, Any]) -> None:
    host = document["machine"]
    print(f"{host['cpu']}, {host['threads']} thread(s); caches {host['caches']}; CPU us per call, median and quartiles")
    rows = []
    for one in document["contests"]:
        for index, (name, found) in enumerate(one["alternatives"].items()):
            us: Spread = found["us"]
            what = f"{one['op']} {one['shape']}" if index == 0 else ""
            row = [what, name, f"{us.median:.2f}", f"{us.low:.2f}-{us.high:.2f}"]
            if "bytes" in one:
                row += [f"{one['bytes']:,} {one['resident']}", f"{found['gbps']:.2f}", f"{100 * found['share']:.0f} %"]
            rows.append(row)
    head = ["op", "alternative", "us", "quartiles", "bytes, resident", "GB/s", "of read"]
    show_table("one call", head[: len(rows[0])], rows)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
