"""Attention and what surrounds it: launches at the shapes of the 1.5B and the 32B to compile; paged steps to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from oracles.compiled import Case, dependent
from torch import Tensor

from splitdecode.kernels.attend import AttendScratch, attend, splits_for
from splitdecode.kernels.extend import extend
from splitdecode.kernels.rope_write import rope_write
from splitdecode.kernels.swiglu import swiglu

PAGES, PAGE, WIDTH, SLOTS, DIM = 4096, 64, 512, 8, 128
SHAPES = {"1.5B": (6, 2, 8960), "32B": (5, 8, 27648)}  # G, Hkv, I


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def attends(groups: int, heads: int, queries: int) -> None:
    scratch = AttendScratch.new(1, heads, splits_for(1, heads), queries * groups, DIM, "meta")
    q, out = meta(queries, groups, heads, DIM), meta(queries, groups * heads * DIM)
    cache, table = meta(PAGES + 1, PAGE, 2, heads, DIM), ints(SLOTS, WIDTH)
    args = (q, cache, table, ints(1, 2), ints(queries), ints(queries), scratch, ints(heads), out)
    attend(*args, queries=queries, pdl=dependent(), prefetch=meta(17920, 1536))


def extends(groups: int, heads: int) -> None:
    tokens, queries = 1024, 128 // groups
    q, out = meta(tokens, groups, heads, DIM), meta(tokens, groups * heads * DIM)
    cache, table = meta(PAGES + 1, PAGE, 2, heads, DIM), ints(SLOTS, WIDTH)
    args = (q, cache, table, ints(-(-tokens // queries), 2), ints(tokens), ints(tokens), out)
    extend(*args, queries=queries, pdl=dependent())


def rotates(groups: int, heads: int, norm: bool) -> None:
    gain = meta(DIM) if norm else None
    cache, table = meta(PAGES + 1, PAGE, 2, heads, DIM), ints(SLOTS, WIDTH)
    cis, qkv = meta(32768, DIM // 2, 2, dtype=torch.float32), meta(8, (groups + 2) * heads * DIM)
    places = (ints(8), ints(8), table, cache, meta(8, groups, heads, DIM))
    rope_write(qkv, gain, gain, 1e-6, cis, *places, pdl=dependent())


def cases() -> Iterator[Case]:
    """Three decode programs fit one multiprocessor of sm_90, two that verify, one that extends."""
    for name, (groups, heads, inner) in SHAPES.items():
        one, many = partial(attends, groups, heads, 1), partial(attends, groups, heads, 8)
        yield Case(f"attend {name}", one, regs=168, smem=75 << 10, mma=True)
        yield Case(f"attend {name}, 8 tokens", many, regs=255, smem=113 << 10, mma=True)
        yield Case(f"extend {name}", partial(extends, groups, heads), regs=255, smem=130 << 10, mma=True)
        yield Case(f"rope_write {name}", partial(rotates, groups, heads, name == "32B"), regs=64, smem=2 << 10)
        yield Case(f"swiglu {name}", partial(swiglu, meta(8, 2 * inner), meta(8, inner)), regs=64, smem=0)


@dataclass(frozen=True)
class Step:
    """A step of some sequences, on the CPU in float64: the arguments attend and extend share."""

    q: Tensor
    cache: Tensor
    table: Tensor
    tiles: Tensor
    positions: Tensor
    slots: Tensor

    @staticmethod
    def of(
        runs: list[tuple[int, int]], groups: int, heads: int, dim: int, page: int, queries: int = 16, padding: int = 2
    ) -> Step:
        """runs: (keys before, tokens) of one sequence each, cut into tiles of at most `queries`; no tokens: one empty
        tile. Pages are shuffled. NaN fills what must not be used: the cache's other slots, the queries of padding,
        which comes last. Page ids past a sequence's last lead to NaN, the first token of an empty tile to nowhere."""
        rng = np.random.default_rng(len(runs) + 7 * groups + 31 * dim + page)
        need = [-(-(past + count) // page) for past, count in runs]
        pool = rng.permutation(sum(need) + 2)
        table = np.full((len(runs), max(need) + 2), len(pool))
        cache = torch.full((len(pool) + 1, page, 2, heads, dim), torch.nan, dtype=torch.float64)
        tiles: list[tuple[int, int]] = []
        positions: list[int] = []
        slots: list[int] = []
        for slot, (past, count) in enumerate(runs):
            own, pool = pool[: need[slot]], pool[need[slot] :]
            table[slot, : len(own)] = own
            at = np.arange(past + count)
            cache[own[at // page], at % page] = torch.from_numpy(rng.standard_normal((len(at), 2, heads, dim)))
            tiles += [(len(positions) + i, min(queries, count - i)) for i in range(0, count, queries)] or [(1 << 20, 0)]
            positions += range(past, past + count)
            slots += [slot] * count
        q = torch.full((len(positions) + padding, groups, heads, dim), torch.nan, dtype=torch.float64)
        q[: len(positions)] = torch.from_numpy(rng.standard_normal((len(positions), groups, heads, dim)))
        return Step(
            q,
            cache,
            torch.tensor(table, dtype=torch.int32),
            torch.tensor(tiles, dtype=torch.int32),
            torch.tensor(positions + [-1] * padding, dtype=torch.int32),
            torch.tensor(slots + [0] * padding, dtype=torch.int32),
        )

    def to(self, dtype: torch.dtype, device: torch.device) -> Step:
        rest = (one.to(device) for one in (self.table, self.tiles, self.positions, self.slots))
        return Step(self.q.to(device, dtype), self.cache.to(device, dtype), *rest)

    def wide(self) -> Step:
        """The same numbers on the CPU in float64."""
        return self.to(torch.float64, torch.device("cpu"))

    def args(self) -> tuple[Tensor, ...]:
        return self.q, self.cache, self.table, self.tiles, self.positions, self.slots

    def plainly(self) -> Tensor:
        """out [T, G * Hkv * D]: one token at a time, by torch; zeros for padding."""
        out = torch.zeros_like(self.q)
        page = self.cache.shape[1]
        for t, (position, slot) in enumerate(zip(self.positions.tolist(), self.slots.tolist(), strict=True)):
            if position >= 0:
                at = torch.arange(position + 1)
                keys, values = self.cache[self.table[slot, at // page].long(), at % page].permute(1, 2, 0, 3)
                out[t] = F.scaled_dot_product_attention(self.q[t].transpose(0, 1), keys, values).transpose(0, 1)
        return out.flatten(1)
