"""Benchmarks: every kernel of a step on a CUDA device, in captured graphs over rotated weights, beside its peers.

A contest is one kernel at one shape. Its weights (or cache) come in as many copies as pass ROTATION bytes, so that
every call finds the L2 cold; a captured graph calls all of them in turn, and a figure is the median over blocks of
replays, the gap to the next node included. Outputs are poisoned and compared with float32 torch on the same random
inputs before a time counts. `share` is bytes / time over the measured read bandwidth.

Peers run on the same rotated tensors, in graphs of their own: cuBLAS for products, SDPA (and FlashInfer, where
it can be imported) for attention, torch.compile for what is fused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import DEVICE, Replay, check, half
from harness import read_bandwidth
from torch import Tensor

from splitdecode import ops
from splitdecode.models import geometry
from splitdecode.models.config import ModelConfig
from splitdecode.models.rope import rope_table

ROTATION = 512e6
PAGE = 64
MODELS = ("1.5b", "32b")
CONTEXTS = (1024, 4096, 16384)
ROWS = (5, 64)  # of a skinny product: a verified draft, a batch
CATCH_UP = 512
EPS = 1e-6
# An output is rounded to bf16 once (2^-9 of itself); sums in another order and the rounded weights of attention add
# errors that go with the largest output, not with each.
OF_ITSELF, OF_LARGEST = 0.01, 0.005
Calls = Callable[[int], Any]  # on copy number i


@dataclass(frozen=True, slots=True)
class Contest:
    """`call(i)` runs the kernel on copy i and writes out[i]; wanted(i) is the truth in float32; peers likewise.

    residual: `out` is added to, so it is not poisoned.  flops: of one call, where arithmetic bounds it.
    """

    kernel: str
    model: str
    shape: str
    bytes: int
    call: Calls
    out: list[Tensor]
    wanted: Calls
    peers: Mapping[str, Calls] = field(default_factory=dict)
    residual: bool = False
    flops: float = 0.0


def copies_of(size: int) -> int:
    """How many copies pass ROTATION bytes."""
    return max(2, math.ceil(ROTATION / size))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Shapes:
    """The contests of one model."""

    def __init__(self, name: str, device_ops: ops.StepOps) -> None:
        self.name, self.ops = name, device_ops
        self.config: ModelConfig = geometry.preset(name)
        c = self.config
        self.groups = c.num_heads // c.num_kv_heads
        self.cis = torch.view_as_real(rope_table(c.rope, c.head_dim, PAGE + 2, torch.complex64)).contiguous().to(DEVICE)

    def weights(self, n: int, k: int) -> list[Tensor]:
        return list(half(copies_of(2 * n * k), n, k).div_(math.sqrt(k)).unbind())

    def linear(self, name: str, n: int, k: int) -> Contest:
        """o and down: x += a w^T."""
        w, a, start = self.weights(n, k), half(1, k), half(1, n)
        out = [start.clone() for _ in w]
        return Contest(
            f"linear ({name})",
            self.name,
            f"{n} x {k}",
            2 * n * k,
            call=lambda i: self.ops.linear(a, w[i], None, out[i]),
            out=out,
            wanted=lambda i: start.float() + a.float() @ w[i].float().t(),
            peers={"cuBLAS": lambda i: F.linear(a, w[i])},
            residual=True,
        )

    def qkv(self) -> Contest:
        c = self.config
        n, d = c.qkv_size, c.hidden_size
        w, x, norm, bias = self.weights(n, d), half(1, d), half(d), half(n)
        cache = half(3, PAGE, 2, c.num_kv_heads, c.head_dim)
        at, slots, table = int32(PAGE + 1), int32(0), int32(0, 1).view(1, 2)
        out = [half(1, self.groups, c.num_kv_heads, c.head_dim) for _ in w]
        turn = torch.view_as_complex(self.cis[PAGE + 1])

        def wanted(i: int) -> Tensor:
            h = F.rms_norm(x.float(), (d,), norm.float(), EPS)
            q = (h @ w[i].float().t() + bias.float())[:, : c.q_size].reshape(-1, c.head_dim // 2, 2)
            return torch.view_as_real(torch.view_as_complex(q) * turn).view_as(out[i])

        return Contest(
            "qkv",
            self.name,
            f"{n} x {d}",
            2 * n * d,
            call=lambda i: self.ops.qkv(x, norm, EPS, w[i], bias, self.cis, at, slots, table, cache, out[i]),
            out=out,
            wanted=wanted,
            peers={"cuBLAS, product only": lambda i: F.linear(x, w[i], bias)},
        )

    def gate_up(self) -> Contest:
        c = self.config
        inner, d = c.intermediate_size, c.hidden_size
        w, x, norm = self.weights(2 * inner, d), half(1, d), half(d)
        out = [half(1, inner) for _ in w]

        def plain(x: Tensor, norm: Tensor, w: Tensor) -> Tensor:
            gate, up = F.linear(F.rms_norm(x, (d,), norm, EPS), w).chunk(2, -1)
            return F.silu(gate) * up

        fused = compiled(plain)
        return Contest(
            "gate_up",
            self.name,
            f"{2 * inner} x {d}",
            4 * inner * d,
            call=lambda i: self.ops.gate_up(x, norm, EPS, w[i], None, out[i]),
            out=out,
            wanted=lambda i: plain(x.float(), norm.float(), w[i].float()),
            peers={"torch": lambda i: plain(x, norm, w[i]), "torch.compile": lambda i: fused(x, norm, w[i])},
        )

    def skinny(self, rows: int) -> Contest:
        n, k = 2 * self.config.intermediate_size, self.config.hidden_size
        w, a = self.weights(n, k), half(rows, k)
        out = [half(rows, n) for _ in w]
        return Contest(
            "skinny",
            self.name,
            f"{rows}: {n} x {k}",
            2 * n * k,
            call=lambda i: self.ops.skinny(a, w[i], None, out[i]),
            out=out,
            wanted=lambda i: a.float() @ w[i].float().t(),
            peers={"cuBLAS": lambda i: F.linear(a, w[i])},
        )

    def head(self) -> Contest:
        """The greedy id."""
        n, d = self.config.vocab_size, self.config.hidden_size
        w, x, norm = self.weights(n, d), half(1, d), half(d)
        state = ops.SamplingState.new(1, n, DEVICE)
        scratch, counters = self.ops.head_scratch(w[0]), int32(0)  # zero again after every call
        logits, draws = torch.zeros(1, n, device=DEVICE), int32(0, 0, 1, 0, 0, 0).view(1, 6)
        out = [int32(0) for _ in w]
        return Contest(
            "head",
            self.name,
            f"{n} x {d}",
            2 * n * d,
            call=lambda i: self.ops.head(x, norm, EPS, w[i], draws, state, logits, *scratch, counters, out[i]),
            out=out,
            wanted=lambda i: (F.rms_norm(x.float(), (d,), norm.float(), EPS) @ w[i].float().t()).argmax(-1),
            peers={"cuBLAS + argmax": lambda i: F.linear(F.rms_norm(x, (d,), norm, EPS), w[i]).argmax(-1)},
        )

    def attend(self, context: int, queries: int = 1) -> Contest:
        heads, dim, pages = self.config.num_kv_heads, self.config.head_dim, -(-context // PAGE)
        size = 4 * context * heads * dim
        caches = half(copies_of(size), pages + 1, PAGE, 2, heads, dim).unbind()
        table = torch.randperm(pages, device=DEVICE).to(torch.int32).view(1, -1)
        q, most = half(queries, self.groups, heads, dim), 1 if queries == 1 else 8
        at = torch.arange(context - queries, context, dtype=torch.int32, device=DEVICE)
        slots, tiles = torch.zeros(queries, dtype=torch.int32, device=DEVICE), int32(0, queries).view(1, 2)
        scratch = self.ops.attend_scratch(1, heads, self.ops.splits_for(1, heads), most * self.groups, dim, DEVICE)
        counters = torch.zeros(len(caches), heads, dtype=torch.int32, device=DEVICE)
        out = [half(queries, self.groups * heads * dim) for _ in caches]
        dense = [keys_of(cache, table, context) for cache in caches]

        def call(i: int) -> None:
            if i == 0:  # as a step's first launch does for all of its layers
                counters.zero_()
            self.ops.attend(q, caches[i], table, tiles, at, slots, scratch, counters[i], out[i], queries=most)

        return Contest(
            "attend",
            self.name,
            f"{context}, {queries} token{'s' * (queries > 1)}",
            size,
            call=call,
            out=out,
            wanted=lambda i: attention(q, *dense[i], at),
            peers={"SDPA, contiguous": sdpa(q, dense), **(flashinfer(q, dense) if queries == 1 else {})},
        )

    def extend(self, tokens: int, prefix: int) -> Contest:
        """Catch-up: `tokens` behind `prefix`; bound by arithmetic."""
        heads, dim, context = self.config.num_kv_heads, self.config.head_dim, prefix + tokens
        pages, queries = -(-context // PAGE), 128 // self.groups
        cache = half(pages + 1, PAGE, 2, heads, dim)
        table = torch.randperm(pages, device=DEVICE).to(torch.int32).view(1, -1)
        q = half(tokens, self.groups, heads, dim)
        at = torch.arange(prefix, context, dtype=torch.int32, device=DEVICE)
        slots = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
        cuts = [(first, min(queries, tokens - first)) for first in range(0, tokens, queries)]
        tiles = torch.tensor(cuts, dtype=torch.int32, device=DEVICE)
        out = [half(tokens, self.groups * heads * dim) for _ in range(2)]
        dense = [keys_of(cache, table, context)] * 2
        return Contest(
            "extend",
            self.name,
            f"{tokens} behind {prefix}",
            4 * context * heads * dim,
            call=lambda i: self.ops.extend(q, cache, table, tiles, at, slots, out[i], queries=queries),
            out=out,
            wanted=lambda i: attention(q, *dense[i], at),
            peers={"SDPA, contiguous": sdpa(q, dense)},
            flops=4.0 * self.groups * heads * dim * tokens * (prefix + (tokens + 1) / 2),
        )


def keys_of(cache: Tensor, table: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Keys and values [Hkv, context, D] of a slot, each contiguous."""
    k, v = cache[table[0].long()].flatten(0, 1)[:context].permute(1, 2, 0, 3).contiguous().unbind()
    return k, v


def attention(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    """Tokens q [T, G, Hkv, D] at positions `at` over keys and values [Hkv, n, D], in float32: [T, G * Hkv * D]."""
    score = torch.einsum("tghd,hnd->tghn", q.float(), k.float()) / math.sqrt(q.shape[-1])
    ahead = torch.arange(k.shape[1], device=q.device) > at[:, None]
    weights = score.masked_fill(ahead[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("tghn,hnd->tghd", weights, v.float()).flatten(1)


def flashinfer(q: Tensor, dense: list[tuple[Tensor, Tensor]]) -> dict[str, Calls]:
    """FlashInfer's decode on contiguous keys, where it can be imported."""
    try:
        decode = import_module("flashinfer").single_decode_with_kv_cache
    except ImportError:
        return {}
    heads = q[0].transpose(0, 1).reshape(-1, q.shape[-1]).contiguous()
    return {"FlashInfer, contiguous": lambda i: decode(heads, *dense[i], kv_layout="HND")}


def sdpa(q: Tensor, dense: list[tuple[Tensor, Tensor]]) -> Calls:
    """torch's own attention, on queries in its own order; causal by a kind of mask its fast kernels know."""
    tokens, dim, context = q.shape[0], q.shape[-1], dense[0][0].shape[1]
    order = q.transpose(1, 2).reshape(tokens, -1, dim).transpose(0, 1)[None].contiguous()
    mask = None
    if tokens > 1:
        from torch.nn.attention.bias import causal_lower_right  # takes seconds: it imports torch.compile

        mask = causal_lower_right(tokens, context)
    pairs = [(k[None], v[None]) for k, v in dense]
    return lambda i: F.scaled_dot_product_attention(order, *pairs[i], attn_mask=mask, enable_gqa=True)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of a peer; what it cannot do shows as its error."""
    return torch.compile(function, dynamic=False)


def all_contests(device_ops: ops.StepOps) -> Iterator[tuple[str, Callable[[], Contest]]]:
    """Labels and thunks: a contest takes its memory when its turn comes."""

    def named(shapes: Shapes, make: Callable[..., Contest], *sizes: Any) -> tuple[str, Callable[[], Contest]]:
        return " ".join(map(str, (shapes.name, make.__name__, *sizes))), partial(make, *sizes)

    for name in MODELS:
        shapes = Shapes(name, device_ops)
        c = shapes.config
        yield named(shapes, shapes.qkv)
        for context in CONTEXTS:
            yield named(shapes, shapes.attend, context)
        yield named(shapes, shapes.attend, CONTEXTS[1], 5)
        yield named(shapes, shapes.linear, "o", c.hidden_size, c.q_size)
        yield named(shapes, shapes.gate_up)
        yield named(shapes, shapes.linear, "down", c.hidden_size, c.intermediate_size)
        yield named(shapes, shapes.head)
        for rows in ROWS:
            yield named(shapes, shapes.skinny, rows)
    yield named(shapes, shapes.extend, CATCH_UP, CONTEXTS[1])


def run(only: str, keep: Callable[[list[dict[str, Any]]], None], done: Sequence[dict[str, Any]] = ()) -> bool:
    """Every contest whose label has `only` in it, but for those that gave the rows `done`; `keep` gets all rows after
    each. False: the device is broken and serves this process no more, the rest waits for another."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool starts more slowly than one kernel compiles
    rows = [*done]
    every = all_contests(ops.step_ops(torch.device(DEVICE), launchers=True))
    for label, make in [one for one in every if only in one[0]][len(rows) :]:
        try:
            rows.append(measure(make()))
        except Exception as error:  # a kernel that fails is a result; the others still count
            rows.append({"kernel": label, "error": f"{type(error).__name__}: {error}"[:300]})
        keep(rows)
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Cells: kernel, model, shape, us, GB/s, share, peers."""
    out = []
    for row in rows:
        if "error" in row:
            out.append([row["kernel"], "", "", row["error"][:60], "", "", ""])
            continue
        peers = ", ".join(
            f"{name} {peer['us']:.1f} ({peer['us'] / row['us']:.2f}x)" if "us" in peer else f"{name}: failed"
            for name, peer in row["peers"].items()
        )
        cells = [f"{row['us']:.2f}", f"{row['gbps']:.0f}", f"{100 * row['share']:.0f} %", peers]
        out.append([row["kernel"], row["model"], row["shape"], *cells])
    return out


def verify(contest: Contest) -> None:
    """Poisons what the kernel writes, runs it on the first and the last copy and compares; ids must be the same."""
    for out in contest.out:
        if not contest.residual:
            out.fill_(torch.nan if out.is_floating_point() else -7)
    for i in (0, len(contest.out) - 1):
        truth = contest.wanted(i)
        contest.call(i)
        torch.cuda.synchronize()
        if contest.out[i].is_floating_point():
            check(contest.out[i], truth, OF_LARGEST * float(truth.abs().max()), OF_ITSELF)
        else:
            check(contest.out[i], truth, 0.0, 0.0)


def measure(contest: Contest) -> dict[str, Any]:
    """Checks, then times, the kernel and its peers: microseconds, GB/s, share of the read bandwidth."""
    verify(contest)
    copies, read = len(contest.out), read_bandwidth(0, "cuda")

    def timed(calls: Calls) -> dict[str, float]:
        us = Replay(lambda: [calls(i) for i in range(copies)]).us(copies)
        gbps = contest.bytes / us / 1e3
        found = {"us": us, "gbps": gbps, "share": gbps / read}
        return found | ({"tflops": contest.flops / us / 1e6} if contest.flops else {})

    found: dict[str, Any] = {"kernel": contest.kernel, "model": contest.model, "shape": contest.shape}
    found |= {"bytes": contest.bytes, **timed(contest.call), "peers": {}}
    for name, peer in contest.peers.items():
        try:
            found["peers"][name] = timed(peer)
        except Exception as error:  # a peer that cannot run here is a line, not the end
            found["peers"][name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return found
