"""F3: the transformer as a step over static memory: what a captured graph replays, and what runs eagerly beside it.

    tokens, positions, slots, tiles  ->  embed -> layers -> x [T, d]      nothing is allocated, nothing is read back

    T = 1                  five launches a layer: norm + qkv + rope + write | attend | o + residual | norm + gate_up
                           + swiglu | down + residual
    T > 1, or q/k norms    the same in nine: norms, products and rope apart; products are `skinny` up to 64 tokens,
                           the library's beyond

Weights are taken as [out, in]: on a GPU their storage, on a CPU a view. Which ops run is the caller's: launchers, torch
references, or a tape that records them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitdecode.models.rope import rope_table
from splitdecode.models.transformer import Transformer
from splitdecode.models.weights import LayerWeights
from splitdecode.ops import StepOps

SKINNY = 64  # tokens up to which a product is bound by its weights


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a graph is captured for: so many tokens, tiles of at most `queries` tokens, logits rows, steps in a row.

    full: some row wants more than greedy or plain Gumbel sampling.  split: attention splits the keys of a tile.
    """

    tokens: int
    tiles: int
    draws: int
    queries: int
    steps: int = 1
    full: bool = False
    split: bool = True


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Where a step reads what it runs (int32, triton_kernels/README.md): tokens, positions, slots, left [T];
    tiles [C, 2]; draws [N, 6]. `left`: steps each row still takes, of a graph that takes several."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    left: Tensor
    tiles: Tensor
    draws: Tensor

    @staticmethod
    def sizes(shape: StepShape) -> list[int]:
        """Words of each part, in order; parts start at multiples of 16 bytes."""
        return [_round4(n) for n in (*[shape.tokens] * 4, 2 * shape.tiles, 6 * shape.draws)]

    @staticmethod
    def of(base: Tensor, shape: StepShape) -> StepInputs:
        """The parts of `base` [>= sum of sizes] int32."""
        sizes = StepInputs.sizes(shape)
        parts = torch.split(base[: sum(sizes)], sizes)
        tokens, positions, slots, left = (part[: shape.tokens] for part in parts[:4])
        tiles = parts[4][: 2 * shape.tiles].view(-1, 2)
        return StepInputs(tokens, positions, slots, left, tiles, parts[5][: 6 * shape.draws].view(-1, 6))


class StepModel:
    """One model's weights, cache and the static memory its steps work in."""

    def __init__(
        self, model: Transformer, kv: Tensor, table: Tensor, last: Tensor, max_tokens: int, *, prefetch: bool = False
    ) -> None:
        """kv [L, pages + 1, page_size, 2, Hkv, D]: the last page is the null page.  table [S, P], last [S] int32.

        prefetch: while attention leaves the memory idle, request the next weights into the L2.
        """
        c, dtype, device = model.config, model.dtype, model.device
        self.config, self.weights, self.dtype, self.device = c, model.weights, dtype, device
        self.kv, self.table, self.last, self.prefetch = kv, table, last, prefetch
        positions = min(c.max_positions, table.shape[1] * kv.shape[2])
        wide = torch.complex128 if dtype == torch.float64 else torch.complex64
        self.cis = torch.view_as_real(rope_table(c.rope, c.head_dim, positions, wide)).contiguous().to(device)
        self._groups = c.num_heads // c.num_kv_heads

        def room(*shape: int) -> Tensor:
            return torch.zeros(max_tokens, *shape, dtype=dtype, device=device)

        self.x, self.h = room(c.hidden_size), room(c.hidden_size)
        self.qkv, self.q = room(c.qkv_size), room(self._groups, c.num_kv_heads, c.head_dim)
        self.attended, self.act = room(c.q_size), room(c.intermediate_size)
        self.gate_up = room(2 * c.intermediate_size)
        self._scratch: dict[tuple[int, int], object] = {}
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)

    def prepare(self, ops: StepOps, shape: StepShape) -> None:
        """Takes the scratch memory steps of this shape need; before capture."""
        heads, key = self.config.num_kv_heads, (shape.tiles, shape.queries)
        if shape.split and key not in self._scratch:
            splits = ops.splits_for(shape.tiles, heads)
            rows = shape.queries * self._groups
            self._scratch[key] = ops.attend_scratch(shape.tiles, heads, splits, rows, self.config.head_dim, self.device)

    def counter_count(self, shape: StepShape) -> int:
        """Words of counters that must be zero when a step starts: one per layer, tile and kv head."""
        return self.config.num_layers * shape.tiles * self.config.num_kv_heads if shape.split else 0

    def run(self, ops: StepOps, shape: StepShape, inputs: StepInputs, counters: Tensor) -> Tensor:
        """Embeds, runs all layers, writes k and v; x [T, d] is returned before the final norm.

        counters: int32, zeroed here: the layers' (counter_count) first, the caller's own behind them.
        """
        x, eps = self.x[: shape.tokens], self.config.rms_eps
        ops.embed(inputs.tokens, self.last, self.weights.embed, x, counters)
        each = shape.tiles * self.config.num_kv_heads
        single = shape.tokens == 1 and shape.split and not self.config.qk_norm
        for i, w in enumerate(self.weights.layers):
            cache, own = self.kv[i], counters[i * each : (i + 1) * each]
            if single:
                q = self.q[:1]
                places = (self.cis, inputs.positions, inputs.slots, self.table, cache)
                ops.qkv(x, w.attn_norm, eps, w.qkv.t(), w.qkv_bias, *places, q)
                self._attend(ops, shape, inputs, cache, own, w.o.t() if self.prefetch else None)
                then = {"prefetch": w.gate_up.t()} if self.prefetch else {}
                ops.linear(self.attended[:1], w.o.t(), w.o_bias, x, **then)
                ops.gate_up(x, w.mlp_norm, eps, w.gate_up.t(), w.gate_up_bias, self.act[:1])
                ops.linear(self.act[:1], w.down.t(), w.down_bias, x)
            else:
                self._layer(ops, shape, inputs, w, cache, own)
        return x

    def _layer(
        self, ops: StepOps, shape: StepShape, inputs: StepInputs, w: LayerWeights, cache: Tensor, own: Tensor
    ) -> None:
        count, eps = shape.tokens, self.config.rms_eps
        x, h, qkv, q = self.x[:count], self.h[:count], self.qkv[:count], self.q[:count]
        ops.rmsnorm(x, w.attn_norm, eps, h)
        self.product(ops, h, w.qkv, w.qkv_bias, qkv)
        places = (self.cis, inputs.positions, inputs.slots, self.table, cache)
        ops.rope_write(qkv, w.q_norm, w.k_norm, eps, *places, q)
        self._attend(ops, shape, inputs, cache, own)
        self.product(ops, self.attended[:count], w.o, w.o_bias, x, add=True)
        ops.rmsnorm(x, w.mlp_norm, eps, h)
        self.product(ops, h, w.gate_up, w.gate_up_bias, self.gate_up[:count])
        ops.swiglu(self.gate_up[:count], self.act[:count])
        self.product(ops, self.act[:count], w.down, w.down_bias, x, add=True)

    def _attend(
        self,
        ops: StepOps,
        shape: StepShape,
        inputs: StepInputs,
        cache: Tensor,
        own: Tensor,
        prefetch: Tensor | None = None,
    ) -> None:
        q, out = self.q[: shape.tokens], self.attended[: shape.tokens]
        places = (q, cache, self.table, inputs.tiles, inputs.positions, inputs.slots)
        if shape.split:
            scratch = self._scratch[shape.tiles, shape.queries]
            ops.attend(*places, scratch, own, out, queries=shape.queries, prefetch=prefetch)
        else:
            ops.extend(*places, out, queries=shape.queries)

    @staticmethod
    def product(
        ops: StepOps, a: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor, *, add: bool = False
    ) -> None:
        """out (+)= a @ matrix + bias; matrix [in, out]."""
        many = a.shape[0] > SKINNY
        (ops.gemm if many else ops.skinny)(a, matrix.t(), bias, out, add=add)


def _round4(count: int) -> int:
    return -(-count // 4) * 4
