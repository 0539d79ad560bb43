"""Benchmarks: every kernel of a step on a CUDA device, in captured graphs over rotated weights, beside its peers.

A contest is one kernel at one shape. Its weights (or cache) come in as many copies as pass ROTATION bytes, so that
every call finds the L2 cold; a captured graph calls all of them in turn, and a figure is the median over blocks of
replays, the gap to the next node included. Outputs are poisoned and compared with float32 torch on the same random
inputs before a time counts. `share` is bytes / time over the measured read bandwidth.

Peers run on the same rotated tensors, in graphs of their own: cuBLAS for products, SDPA for attention, torch.compile
for what is fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import DEVICE, Replay, check
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
EPS = 1e-6
Calls = Callable[[int], Any]  # on copy number i


@dataclass(frozen=True, slots=True)
class Contest:
    """`call(i)` runs the kernel on copy i and writes out[i]; wanted(i) is the truth in float32; peers likewise."""

    kernel: str
    model: str
    shape: str
    bytes: int
    copies: int
    call: Calls
    out: list[Tensor]
    wanted: Calls
    tolerance: float
    peers: Mapping[str, Calls] = field(default_factory=dict)


def half(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE) * scale


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
        self.cis = torch.view_as_real(rope_table(c.rope, c.head_dim, max(CONTEXTS) + 1, torch.complex64))
        self.cis = self.cis.contiguous().to(DEVICE)

    def contest(self, kernel: str, shape: str, size: int, copies: int, **rest: Any) -> Contest:
        return Contest(kernel, self.name, shape, size, copies, **rest)

    def weights(self, n: int, k: int) -> list[Tensor]:
        return list((half(copies_of(2 * n * k), n, k) / math.sqrt(k)).unbind())

    def linear(self, name: str, n: int, k: int) -> Contest:
        """o and down: x += a w^T."""
        w, a = self.weights(n, k), half(1, k)
        start = half(1, n)
        out = [start.clone() for _ in w]
        peers = {"cuBLAS": lambda i: F.linear(a, w[i])}
        return self.contest(
            f"linear ({name})",
            f"{n} x {k}",
            2 * n * k,
            len(w),
            call=lambda i: self.ops.linear(a, w[i], None, out[i]),
            out=out,
            wanted=lambda i: start.float() + a.float() @ w[i].float().t(),
            tolerance=0.1,
            peers=peers,
        )

    def qkv(self) -> Contest:
        c = self.config
        w, x, norm, bias = (
            self.weights(c.qkv_size, c.hidden_size),
            half(1, c.hidden_size),
            half(c.hidden_size),
            half(c.qkv_size),
        )
        cache = torch.zeros(3, PAGE, 2, c.num_kv_heads, c.head_dim, dtype=torch.bfloat16, device=DEVICE)
        at, slots, table = int32(PAGE + 1), int32(0), int32(0, 1).view(1, 2)
        out = [half(1, self.groups, c.num_kv_heads, c.head_dim) for _ in w]
        turn = self.cis[PAGE + 1]

        def wanted(i: int) -> Tensor:
            h = F.rms_norm(x.float(), (c.hidden_size,), norm.float(), EPS)
            q = (h @ w[i].float().t() + bias.float())[:, : c.q_size].view(-1, c.head_dim // 2, 2)
            return torch.view_as_real(torch.view_as_complex(q.contiguous()) * torch.view_as_complex(turn)).view_as(
                out[i]
            )

        return self.contest(
            "qkv",
            f"{c.qkv_size} x {c.hidden_size}",
            2 * c.qkv_size * c.hidden_size,
            len(w),
            call=lambda i: self.ops.qkv(x, norm, EPS, w[i], bias, self.cis, at, slots, table, cache, out[i]),
            out=out,
            wanted=wanted,
            tolerance=0.1,
            peers={"cuBLAS, product only": lambda i: F.linear(x, w[i], bias)},
        )

    def gate_up(self) -> Contest:
        c = self.config
        inner, d = c.intermediate_size, c.hidden_size
        w, x, norm = self.weights(2 * inner, d), half(1, d), half(d)
        out = [half(1, inner) for _ in w]

        def wanted(i: int) -> Tensor:
            gate, up = (F.rms_norm(x.float(), (d,), norm.float(), EPS) @ w[i].float().t()).chunk(2, -1)
            return F.silu(gate) * up

        def plain(i: int) -> Tensor:
            gate, up = F.linear(F.rms_norm(x, (d,), norm, EPS), w[i]).chunk(2, -1)
            return F.silu(gate) * up

        return self.contest(
            "gate_up",
            f"{2 * inner} x {d}",
            4 * inner * d,
            len(w),
            call=lambda i: self.ops.gate_up(x, norm, EPS, w[i], None, out[i]),
            out=out,
            wanted=wanted,
            tolerance=0.3,
            peers={"torch": plain, "torch.compile": compiled(plain)},
        )

    def skinny(self, rows: int) -> Contest:
        c = self.config
        n, k = 2 * c.intermediate_size, c.hidden_size
        w, a = self.weights(n, k), half(rows, k)
        out = [half(rows, n) for _ in w]
        return self.contest(
            "skinny",
            f"{rows}: {n} x {k}",
            2 * n * k,
            len(w),
            call=lambda i: self.ops.skinny(a, w[i], None, out[i]),
            out=out,
            wanted=lambda i: a.float() @ w[i].float().t(),
            tolerance=0.1,
            peers={"cuBLAS": lambda i: F.linear(a, w[i])},
        )

    def head(self) -> Contest:
        c = self.config
        w, x, norm = self.weights(c.vocab_size, c.hidden_size), half(1, c.hidden_size), half(c.hidden_size)
        state = ops.SamplingState.new(1, c.vocab_size, DEVICE)
        scratch, counters = self.ops.head_scratch(w[0]), torch.zeros(len(w), 1, dtype=torch.int32, device=DEVICE)
        logits = torch.zeros(1, c.vocab_size, device=DEVICE)
        out = [int32(-7) for _ in w]
        draws = int32(0, 0, 1, 0, 0, 0).view(1, 6)

        def call(i: int) -> None:
            counters[i].zero_()
            self.ops.head(x, norm, EPS, w[i], draws, state, logits, *scratch, counters[i], out[i])

        def wanted(i: int) -> Tensor:
            return (F.rms_norm(x.float(), (c.hidden_size,), norm.float(), EPS) @ w[i].float().t()).argmax(-1)

        def plain(i: int) -> Tensor:
            return F.linear(F.rms_norm(x, (c.hidden_size,), norm, EPS), w[i]).argmax(-1)

        size = 2 * c.vocab_size * c.hidden_size
        return self.contest(
            "head + draw",
            f"{c.vocab_size} x {c.hidden_size}",
            size,
            len(w),
            call=call,
            out=out,
            wanted=wanted,
            tolerance=0.0,
            peers={"cuBLAS + argmax": plain},
        )

    def attend(self, context: int, queries: int = 1) -> Contest:
        c = self.config
        heads, dim, pages = c.num_kv_heads, c.head_dim, -(-context // PAGE)
        size = 2 * context * heads * dim * 2
        count = copies_of(size)
        caches = list(half(count, pages + 1, PAGE, 2, heads, dim).unbind())
        table = torch.randperm(pages, device=DEVICE).to(torch.int32).view(1, -1)
        q = half(queries, self.groups, heads, dim)
        at = torch.arange(context - queries, context, dtype=torch.int32, device=DEVICE)
        slots, tiles = torch.zeros(queries, dtype=torch.int32, device=DEVICE), int32(0, queries).view(1, 2)
        splits = self.ops.splits_for(1, heads)
        scratch = self.ops.attend_scratch(1, heads, splits, (1 if queries == 1 else 8) * self.groups, dim, DEVICE)
        counters = torch.zeros(count, heads, dtype=torch.int32, device=DEVICE)
        out = [half(queries, self.groups * heads * dim) for _ in range(count)]

        def call(i: int) -> None:
            if i == 0:
                counters.zero_()
            tile = 1 if queries == 1 else 8
            self.ops.attend(q, caches[i], table, tiles, at, slots, scratch, counters[i], out[i], queries=tile)

        def keys(i: int) -> tuple[Tensor, Tensor]:
            flat = caches[i][table[0].long()].flatten(0, 1)[:context]
            k, v = flat.permute(1, 2, 0, 3).unbind(0)
            return k[None], v[None]

        mask = torch.arange(context, device=DEVICE) <= at[:, None]

        def wanted(i: int) -> Tensor:
            k, v = (x.float().repeat(1, self.groups, 1, 1) for x in keys(i))
            y = F.scaled_dot_product_attention(q.flatten(1, 2).transpose(0, 1)[None].float(), k, v, attn_mask=mask)
            return y[0].transpose(0, 1).reshape(out[i].shape)

        dense = [tuple(x.contiguous() for x in keys(i)) for i in range(count)]
        order = q.transpose(1, 2).reshape(queries, -1, dim).transpose(0, 1)[None].contiguous()

        def sdpa(i: int) -> Tensor:
            return F.scaled_dot_product_attention(order, *dense[i], attn_mask=mask, enable_gqa=True)

        return self.contest(
            "attend",
            f"{context}, {queries} token{'s' * (queries > 1)}",
            size,
            count,
            call=call,
            out=out,
            wanted=wanted,
            tolerance=0.02,
            peers={"SDPA, contiguous": sdpa},
        )

    def extend(self, tokens: int, prefix: int) -> Contest:
        """Catch-up: `tokens` behind `prefix`. bytes counts arithmetic instead: it is bound by it."""
        c = self.config
        heads, dim, context = c.num_kv_heads, c.head_dim, prefix + tokens
        pages = -(-context // PAGE)
        cache = half(pages + 1, PAGE, 2, heads, dim)
        table = torch.randperm(pages, device=DEVICE).to(torch.int32).view(1, -1)
        q = half(tokens, self.groups, heads, dim)
        at = torch.arange(prefix, context, dtype=torch.int32, device=DEVICE)
        slots = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
        queries = 128 // self.groups
        tiles = [(first, min(queries, tokens - first)) for first in range(0, tokens, queries)]
        cut = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
        out = [half(tokens, self.groups * heads * dim) for _ in range(2)]
        k, v = cache[table[0].long()].flatten(0, 1)[:context].permute(1, 2, 0, 3).contiguous().unbind(0)
        order = q.transpose(1, 2).reshape(tokens, -1, dim).transpose(0, 1)[None].contiguous()
        mask = torch.arange(context, device=DEVICE) <= at[:, None]

        def wanted(_: int) -> Tensor:
            keys, values = (x[None].float().repeat(1, self.groups, 1, 1) for x in (k, v))
            y = F.scaled_dot_product_attention(
                q.flatten(1, 2).transpose(0, 1)[None].float(), keys, values, attn_mask=mask
            )
            return y[0].transpose(0, 1).reshape(out[0].shape)

        def sdpa(_: int) -> Tensor:
            return F.scaled_dot_product_attention(order, k[None], v[None], attn_mask=mask, enable_gqa=True)

        return self.contest(
            "extend",
            f"{tokens} behind {prefix}",
            2 * context * heads * dim * 2,
            2,
            call=lambda i: self.ops.extend(q, cache, table, cut, at, slots, out[i], queries=queries),
            out=out,
            wanted=wanted,
            tolerance=0.02,
            peers={"SDPA, contiguous, masked": sdpa},
        )


def compiled(function: Calls) -> Calls:
    """torch.compile of a peer; what it cannot do shows as its error."""
    return torch.compile(function, dynamic=False)


def all_contests(device_ops: ops.StepOps) -> Iterator[Callable[[], Contest]]:
    """Thunks: a contest takes its memory when its turn comes."""
    for name in MODELS:
        shapes = Shapes(name, device_ops)
        c = shapes.config
        yield shapes.qkv
        for context in CONTEXTS:
            yield partial(shapes.attend, context)
        yield partial(shapes.attend, 4096, 5)
        yield partial(shapes.linear, "o", c.hidden_size, c.q_size)
        yield shapes.gate_up
        yield partial(shapes.linear, "down", c.hidden_size, c.intermediate_size)
        yield shapes.head
        for rows in (5, 64):
            yield partial(shapes.skinny, rows)
    yield partial(shapes.extend, 512, 4096)


def run(only: str, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Every contest whose kernel, model or shape has `only` in it; `keep` gets the rows after each."""
    device_ops, rows = ops.step_ops(torch.device(DEVICE)), []
    for make in all_contests(device_ops):
        name = " ".join(str(part) for part in (getattr(make, "args", ()), getattr(make, "func", make).__name__))
        try:
            contest = make()
            if only not in f"{contest.kernel} {contest.model} {contest.shape}":
                continue
            rows.append(measure(contest))
        except Exception as error:  # a kernel that fails is a result; the others still count
            rows.append({"kernel": name, "error": f"{type(error).__name__}: {error}"[:300]})
        keep(rows)
    return rows


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


def measure(contest: Contest) -> dict[str, Any]:
    """Checks, then times, the kernel and its peers: microseconds, GB/s, share of the read bandwidth."""
    for out in contest.out:
        if contest.kernel.startswith("linear"):
            continue  # the residual is an input
        out.fill_(-7 if out.dtype == torch.int32 else torch.nan)
    for i in (0, contest.copies - 1):
        truth = contest.wanted(i)
        contest.call(i)
        torch.cuda.synchronize()
        check(contest.out[i], truth, contest.tolerance, 0.02)
    read = read_bandwidth(0, "cuda")

    def rate(us: float) -> dict[str, float]:
        gbps = contest.bytes / us / 1e3
        return {"us": us, "gbps": gbps, "share": gbps / read}

    def timed(calls: Calls) -> float:
        return Replay(lambda: [calls(i) for i in range(contest.copies)]).us(contest.copies)

    found: dict[str, Any] = {"kernel": contest.kernel, "model": contest.model, "shape": contest.shape}
    found |= {"bytes": contest.bytes, **rate(timed(contest.call)), "peers": {}}
    for name, peer in contest.peers.items():
        try:
            found["peers"][name] = rate(timed(peer))
        except Exception as error:  # a peer that cannot run here is a line, not the end
            found["peers"][name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return found
