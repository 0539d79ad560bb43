"""The stages of gpu_first.py, one function each; the predictions are those made before any of it was measured.

Triton is imported when a stage first needs a kernel: importing this file does not import it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import DEVICE, Log, Replay, check, half
from torch import Tensor

PEAK = 4300.0  # GB/s a copy moves on an H200: what the predictions were made with
ROTATION = 512e6  # bytes that pass between two uses of the same weights; the L2 holds 60e6
LAYERS = {"1.5B": 28, "32B": 64}
SHAPES = {  # model: matrix: N, K, predicted floor in us
    "1.5B": {
        "qkv": (2048, 1536, 1.46),
        "o": (1536, 1536, 1.10),
        "gate_up": (17920, 1536, 12.8),
        "down": (1536, 8960, 6.4),
        "lm_head": (151936, 1536, 108.5),
    },
    "32B": {
        "qkv": (7168, 5120, 17.1),
        "o": (5120, 5120, 12.2),
        "gate_up": (55296, 5120, 131.7),
        "down": (5120, 27648, 65.8),
        "lm_head": (152064, 5120, 362.0),
    },
}
HEADS = {"1.5B": (12, 2), "32B": (40, 8)}  # query heads, kv heads
CONTEXTS = (1024, 4096, 16384, 32768)
FA3_US = {1024: (12.3, 14.8), 4096: (15.9, 16.5), 16384: (25.0, 26.0)}  # published, H100, 20 and 4 heads
NODES, SQUARE = 1000, 8192
WINDOW = 24 << 20  # numbers: 96 MiB


def bandwidth(log: Log) -> None:
    kernels = import_module("gpu_kernels")
    big = torch.rand(64 * WINDOW, device=DEVICE)
    total = big.sum(dtype=torch.float64)
    cases = {
        "read 6 GiB": [big],
        "read 96 MiB, cold": list(big.split(WINDOW)),
        "read 96 MiB, again": [big[:WINDOW]] * 64,
    }
    for name, parts in cases.items():
        best: tuple[float, str] = (0.0, "")
        for how in kernels.READS:
            with log.guard(f"{name} {how}"):
                block, warps, steps = how
                sums = [torch.full((x.numel() // (block * steps),), torch.nan, device=DEVICE) for x in parts]
                replay = Replay(
                    lambda p=parts, s=sums, h=how: [kernels.read(x, y, *h) for x, y in zip(p, s, strict=True)]
                )
                wanted = 64 * parts[0].sum(dtype=torch.float64) if "again" in name else total
                check(sum(y.sum(dtype=torch.float64) for y in sums), wanted, 0.0, 1e-4)
                rate = 4e-3 * sum(x.numel() for x in parts) / replay.us()
                best = max(best, (rate, f"block {block}, {warps} warps, {steps} steps"))
        predicted = None if "again" in name else (PEAK, PEAK)
        if best[1]:
            log.add(name, best[0], "GB/s", predicted, note=best[1], headline=True)
    with log.guard("copy"):
        one, two = big.chunk(2)
        rate = 4e-3 * big.numel() / Replay(lambda: one.copy_(two)).us()
        log.add("copy 3 GiB, read + written", rate, "GB/s", (PEAK, PEAK), headline=True)
    with log.guard("product"):
        a, b = half(SQUARE, SQUARE), half(SQUARE, SQUARE)
        rate = 2e-6 * SQUARE**3 / Replay(lambda: a @ b).us()
        log.add(f"bf16 {SQUARE}^3", rate, "TFLOP/s", (769.0, 798.0), headline=True)


def ticks(log: Log, kernels: Any, width: int, pdl: bool) -> None:
    """NODES dependent kernels of `width` one-number programs."""
    rows = torch.full((NODES + 1, 256), torch.nan, device=DEVICE)
    steps = [row[:width] for row in rows.unbind()]
    steps[0].zero_()

    def work() -> None:
        for x, y in pairwise(steps):
            kernels.tick(x, y, pdl)

    replay = Replay(work)
    rows[1:].fill_(torch.nan)
    replay.once()
    check(steps[-1], torch.full_like(steps[-1], NODES), 0.0, 0.0)
    label = f"{width} program{'s' * (width > 1)}" + (", PDL" if pdl else "")
    log.add(f"node, {label}", replay.us(NODES), "us", (1.17, 1.26) if pdl else (1.3, 1.3), headline=True)
    if width == 1:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        us = 1e6 * (time.perf_counter() - begin) / NODES
        log.add(f"eager launch, {label}", us, "us", None if pdl else (2.1, 5.0))


def gap(log: Log) -> None:
    kernels = import_module("gpu_kernels")
    for width in (1, 132):
        for pdl in (False, True):
            with log.guard(f"node, {width}, PDL {pdl}"):
                ticks(log, kernels, width, pdl)
    count = math.ceil(ROTATION / (2 * kernels.LINK**2))
    weights = (half(count, kernels.LINK, kernels.LINK) / math.sqrt(kernels.LINK)).unbind()
    states = half(count + 1, kernels.LINK)
    rows, ends = states.unbind(), {}
    wanted = rows[0].float()
    for w in weights:
        wanted = (w.float() @ wanted).bfloat16().float()
    for pdl in (False, True):
        name = "o_proj chain, one tile" + (", weights before the wait (PDL)" if pdl else "")
        with log.guard(name):

            def work(pdl: bool = pdl) -> None:
                for i, w in enumerate(weights):
                    kernels.link(rows[i], w, rows[i + 1], pdl)

            replay = Replay(work)
            states[1:].fill_(torch.nan)
            replay.once()
            check(rows[-1], wanted, 0.1 * float(wanted.abs().max()))
            ends[pdl] = rows[-1].clone()
            log.add(name, replay.us(count), "us", (2.16, 2.33) if pdl else (2.4, 2.4), note="floor 1.10", headline=True)
    if len(ends) == 2:
        log.add("chains equal in every bit", float(torch.equal(ends[False], ends[True])), "yes = 1", (1.0, 1.0))


def race(log: Log, name: str, shape: tuple[int, int, float]) -> dict[str, float]:
    """{"triton" or "cublas": best us} of one matrix, its copies rotating."""
    kernels, (n, k, floor) = import_module("gpu_kernels"), shape
    size = 2.0 * n * k
    count = max(2, math.ceil(ROTATION / size))
    w, x = half(count, n, k), half(k)
    mats, row, ends = w.unbind(), x[None], (0, count - 1)
    wanted = torch.stack([mats[i].float() @ x.float() for i in ends])
    rounds = max(1, 8 // count)
    y = torch.empty(count, n, dtype=torch.bfloat16, device=DEVICE)
    outs, won = y.unbind(), {}

    def linear() -> None:  # what F.linear calls, into a place that can be poisoned
        for m, out in zip(mats, outs, strict=True):
            torch.mm(row, m.t(), out=out[None])

    def tile(how: Any) -> None:
        for m, out in zip(mats, outs, strict=True):
            kernels.gemv(x, m, out, how)

    works = {"cuBLAS": linear, **{str(how): partial(tile, how) for how in kernels.GEMVS}}
    for label, work in works.items():
        with log.guard(f"{name} {label}"):
            replay = Replay(lambda one=work: [one() for _ in range(rounds)])
            y.fill_(torch.nan)
            replay.once()
            check(y[list(ends)], wanted, 2e-3 * math.sqrt(k))
            if not bool(y.isfinite().all()):
                raise ArithmeticError("outputs were left unwritten")
            us, side = replay.us(count * rounds), "cublas" if work is linear else "triton"
            won[side] = min(won.get(side, (math.inf, "")), (us, label))
            log.add(f"{name} {label}", us, "us", None, note=f"{size / us / 1e3:.0f} GB/s")
    for side, (us, label) in won.items():
        rate = size / us / 1e3
        note = f"{label}: {rate:.0f} GB/s, {rate / log.ceiling:.0%} of the read ceiling"
        span = (floor, floor) if side == "triton" else (size / 3.9e6, size / 3.2e6)
        log.add(f"{name} best {side}", us, "us", span, note=note, headline=True)
    return {side: us for side, (us, _) in won.items()}


def gemv(log: Log) -> None:
    for model, shapes in SHAPES.items():
        found: dict[str, dict[str, float]] = {}
        for name, shape in shapes.items():
            with log.guard(f"{model} {name}"):
                found[name] = race(log, f"{model} {name}", shape)
            torch.cuda.empty_cache()
        if len(found) < len(shapes):
            continue
        floor = sum(us * (1 if name == "lm_head" else LAYERS[model]) for name, (*_, us) in shapes.items()) / 1e3
        for label, sides in {"Triton": ("triton",), "cuBLAS": ("cublas",), "the better": ("triton", "cublas")}.items():
            us = {name: min(best.get(side, math.inf) for side in sides) for name, best in found.items()}
            ms = sum(t * (1 if name == "lm_head" else LAYERS[model]) for name, t in us.items()) / 1e3
            log.add(f"{model} linears of a token, {label}", ms, "ms", (floor, floor), note="the floor", headline=True)


def paged(heads: int, kv: int, context: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """q, rotating caches (unused slots NaN), the shuffled page table, the length, wanted outputs of first and last."""
    kernels = import_module("gpu_kernels")
    used = context // kernels.PAGE
    length = context - 5
    copies = min(256, max(2, math.ceil(ROTATION / (context * kv * kernels.HEAD * 4))))
    cache = half(copies, used + 1, kernels.PAGE, 2, kv, kernels.HEAD)
    table = torch.randperm(used + 1, device=DEVICE)[:used].int()
    spare = torch.ones(used + 1, dtype=torch.bool, device=DEVICE).index_fill(0, table.long(), False)
    cache[:, spare] = torch.nan
    cache[:, table[-1].item(), length % kernels.PAGE :] = torch.nan
    q = half(heads, kernels.HEAD)
    wanted = []
    for i in (0, copies - 1):
        k, v = cache[i][table.long()].flatten(0, 1)[:length].float().unbind(1)
        score = torch.einsum("ghd,thd->ght", q.float().view(-1, kv, kernels.HEAD), k) / math.sqrt(kernels.HEAD)
        wanted.append(torch.einsum("ght,thd->ghd", score.softmax(-1), v).reshape(heads, kernels.HEAD))
    return q, cache, table, torch.tensor([length], dtype=torch.int32, device=DEVICE), wanted


def splits(log: Log, name: str, model: str, context: int, bytes_read: float) -> None:
    """Every number of splits and every configuration at one context."""
    kernels, (heads, kv) = import_module("gpu_kernels"), HEADS[model]
    q, cache, table, length, wanted = paged(heads, kv, context)
    caches, best = cache.unbind(), (math.inf, "")
    y = torch.empty(len(caches), heads, kernels.HEAD, dtype=torch.bfloat16, device=DEVICE)
    outs = y.unbind()
    for count in kernels.SPLITS:
        for how in kernels.ATTENDS:
            with log.guard(f"{name} S{count} {how}"):
                scratch = kernels.Partials.of(count, heads, DEVICE)

                def work(scratch: Any = scratch, how: Any = how) -> None:
                    for one, out in zip(caches, outs, strict=True):
                        kernels.attend(q, one, table, length, scratch, out, how)

                replay = Replay(work)
                y.fill_(torch.nan)
                replay.once()
                check(y[[0, -1]], torch.stack(wanted), 0.02 * float(wanted[0].abs().max()))
                us = replay.us(len(caches))
                best = min(best, (us, f"S{count} {how}"))
                log.add(f"{name} S{count} {how}", us, "us", None, note=f"{bytes_read / us / 1e3:.0f} GB/s")
    floor = bytes_read / PEAK / 1e3
    span = (5.0, 6.0) if (model, context) == ("1.5B", 4096) else None
    log.add(f"{name} best split", best[0], "us", span, note=f"{best[1]}, floor {floor:.2f}", headline=True)


def peers(log: Log, name: str, model: str, context: int) -> None:
    heads, kv = HEADS[model]
    copies = min(256, max(2, math.ceil(ROTATION / (context * kv * 512))))
    q, cache = half(1, heads, 1, 128), half(copies, 2, 1, kv, context, 128)
    pairs = [one.unbind() for one in cache.unbind()]
    with log.guard(f"{name} SDPA"):
        attend = F.scaled_dot_product_attention
        replay = Replay(lambda: [attend(q, k, v, enable_gqa=True) for k, v in pairs])
        log.add(f"{name} SDPA", replay.us(copies), "us", FA3_US.get(context), note="contiguous cache", headline=True)
    try:
        decode = import_module("flashinfer").single_decode_with_kv_cache
    except ImportError:
        return
    with log.guard(f"{name} FlashInfer"):
        replay = Replay(lambda: [decode(q[0, :, 0], k[0], v[0], kv_layout="HND") for k, v in pairs])
        log.add(f"{name} FlashInfer", replay.us(copies), "us", FA3_US.get(context), headline=True)


def attention(log: Log) -> None:
    for model, (_, kv) in HEADS.items():
        for context in CONTEXTS:
            name = f"{model} {context // 1024}k"
            with log.guard(name):
                splits(log, name, model, context, context * kv * 128 * 4.0)
            peers(log, name, model, context)
            torch.cuda.empty_cache()


def plain_step(context: int) -> tuple[Callable[[], Tensor], Tensor]:
    """A torch-only step of 1.5B geometry with random weights, and the logits it writes."""
    (heads, kv), dim = HEADS["1.5B"], 128
    shapes = {name: (n, k) for name, (n, k, _) in SHAPES["1.5B"].items()}
    wide, size = shapes["qkv"]
    layers = [
        {name: half(*shape) / math.sqrt(shape[1]) for name, shape in shapes.items() if name != "lm_head"}
        for _ in range(LAYERS["1.5B"])
    ]
    caches = [half(2, 1, kv, context, dim) for _ in layers]
    norm, bias = torch.ones(size, dtype=torch.bfloat16, device=DEVICE), half(wide)
    embedding, cos, sin = half(*shapes["lm_head"]) / math.sqrt(size), half(dim), half(dim)
    token, logits = torch.zeros(1, dtype=torch.int64, device=DEVICE), half(1, shapes["lm_head"][0])

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def step() -> Tensor:
        x = F.embedding(token, embedding)
        for w, cache in zip(layers, caches, strict=True):
            q, k, v = F.linear(F.rms_norm(x, (size,), norm), w["qkv"], bias).split(
                (heads * dim, kv * dim, kv * dim), -1
            )
            cache[0, :, :, -1:].copy_(turn(k.view(1, kv, 1, dim)))
            cache[1, :, :, -1:].copy_(v.view(1, kv, 1, dim))
            mixed = F.scaled_dot_product_attention(turn(q.view(1, heads, 1, dim)), cache[0], cache[1], enable_gqa=True)
            x = x + F.linear(mixed.reshape(1, heads * dim), w["o"])
            gate, up = F.linear(F.rms_norm(x, (size,), norm), w["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w["down"])
        logits.copy_(F.linear(F.rms_norm(x, (size,), norm), embedding))
        return logits.argmax(-1)

    return step, logits


def anchor(log: Log) -> None:
    with torch.inference_mode():
        step, logits = plain_step(4096)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        log.add("eager step at 4k", statistics.median(times), "ms", (8.0, 16.0), note="floor 0.745", headline=True)
        wanted = logits.clone()
        replay = Replay(step)
        logits.fill_(torch.nan)
        replay.once()
        check(logits, wanted, 0.02 * float(wanted.abs().max()))
        log.add("captured step at 4k", replay.us() / 1e3, "ms", (2.7, 3.3), note="floor 0.745", headline=True)
