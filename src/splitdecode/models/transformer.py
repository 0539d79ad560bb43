"""F3: the transformer: Qwen2, Qwen3 and Llama as one class; what differs is data in its config and weights.

One forward runs all pending tokens of any rows (prefill, decode, catch-up, probe) against a paged cache:

    kv [L, num_pages, page_size, 2, Hkv, D], token-major: k and v of a token are adjacent, so a token costs one write
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from splitdecode import ops
from splitdecode.models.config import ModelConfig
from splitdecode.models.rope import rope_table
from splitdecode.models.weights import LayerWeights, ModelWeights, given_weights

_KEPT = 256  # buffers of steps this small are kept for the next step of the same size


class Transformer:
    """A model ready to run: config, weights, a rotary table that grows as positions ask for it, and scratch buffers.

    One forward at a time: two threads that run one model share its buffers.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embed.device
        self.dtype = weights.embed.dtype
        self._cis = self._table(min(config.max_positions, 2048))
        self._buffers: _Buffers | None = None

    @torch.inference_mode()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes new weights, under Hugging Face names, into the memory of the old ones; all of them or, where one of
        them is missing or wrong (CheckpointError), none."""
        new = given_weights(self.config, tensors, self.dtype, self.device)
        old = self.weights
        pairs = [(old.embed, new.embed), (old.norm, new.norm), (old.head, new.head)]
        for mine, theirs in zip(old.layers, new.layers, strict=True):
            pairs += [(getattr(mine, f.name), getattr(theirs, f.name)) for f in fields(LayerWeights)]
        for kept, given in pairs:
            if kept is not None and given is not None:
                kept.copy_(given)

    def new_cache(self, num_pages: int, page_size: int) -> Tensor:
        """A zeroed paged cache [L, num_pages, page_size, 2, Hkv, D] in the model's dtype, on its device."""
        c = self.config
        shape = (c.num_layers, num_pages, page_size, 2, c.num_kv_heads, c.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, batch: ops.PagedBatch, kv: Tensor, rows: Tensor | None = None) -> Tensor:
        """Runs all tokens of `batch`, writes their k and v into `kv`, returns logits of the tokens `rows`.

        kv: [L, num_pages, page_size, 2, Hkv, D], model dtype.  rows: [N] token indices, rising (None: all T).
        Returns [N, V]: the model's dtype, float32 for bf16 and fp16 models.
        """
        w, config = self.weights, self.config
        x = w.embed.index_select(0, batch.tokens.to(self.device))
        count = x.shape[0]  # len() of a tensor costs five times as much
        buffers, cis = self._scratch(count), self._angles(batch.positions)
        plan = ops.plan_attention(batch, buffers.q)
        for layer, cache in zip(w.layers, ops.bind_cache(plan, kv), strict=True):
            self._layer(layer, x, buffers, cis, cache, plan)
        if rows is not None and rows.shape[0] != count:
            x = x.index_select(0, rows.to(self.device))
        logits = x.new_empty(x.shape[0], config.vocab_size)
        if x.shape[0]:
            ops.norm_linear(x, w.norm, config.rms_eps, w.head, None, logits)
        return logits if self.dtype.itemsize >= 4 else logits.float()

    def _layer(
        self,
        w: LayerWeights,
        x: Tensor,
        b: _Buffers,
        cis: Tensor,
        cache: ops.LayerCache,
        plan: ops.AttentionPlan,
    ) -> None:
        """One layer over the residual stream x [T, d], in place."""
        eps = self.config.rms_eps
        ops.norm_linear(x, w.attn_norm, eps, w.qkv, w.qkv_bias, b.qkv)
        if w.q_norm is not None and w.k_norm is not None:
            ops.qk_norm(b.qk, self.config.num_kv_heads, w.q_norm, w.k_norm, eps)
        ops.rope(b.turned, cis)
        ops.write(b.kv, cache, plan.slots)
        ops.add_product(ops.attention(b.q, cache, plan), w.o, x)
        if w.o_bias is not None:
            x.add_(w.o_bias)
        ops.norm_linear(x, w.mlp_norm, eps, w.gate_up, w.gate_up_bias, b.gate_up)
        ops.add_product(ops.swiglu(b.gate, b.up, b.act), w.down, x)
        if w.down_bias is not None:
            x.add_(w.down_bias)

    def _scratch(self, count: int) -> _Buffers:
        kept = self._buffers
        if kept is not None and kept.count == count:
            return kept
        made = _Buffers(self.config, count, self.dtype, self.device)
        if count <= _KEPT:
            self._buffers = made
        return made

    def _angles(self, positions: Tensor) -> Tensor:
        """Rotations [T, 1, D / 2] of `positions`."""
        host = positions.numpy()
        last = int(host[0]) if len(host) == 1 else int(host.max(initial=0))
        if last >= self._cis.shape[0]:
            self._cis = self._table(2 * (last + 1))
        if len(host) == 1:
            return self._cis.narrow(0, last, 1)
        return self._cis.index_select(0, positions.to(self.device))

    def _table(self, length: int) -> Tensor:
        wide = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        return rope_table(self.config.rope, self.config.head_dim, length, wide).unsqueeze(1).to(self.device)


class _Buffers:
    """Scratch all layers of a forward over `count` tokens share, and the views they see it through.

    qkv [T, (H + 2 Hkv) * D] is seen as q [T, G, Hkv, D], qk [T, H + Hkv, D] and kv [T, 2, Hkv, D];
    gate_up [T, 2 I] as gate and up [T, I]; act [T, I].
    """

    def __init__(self, config: ModelConfig, count: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, dim, inner = config.num_kv_heads, config.head_dim, config.intermediate_size
        self.count = count
        self.qkv = torch.empty(count, config.qkv_size, dtype=dtype, device=device)
        self.q = self.qkv[:, : config.q_size].view(count, config.num_heads // heads, heads, dim)
        self.qk = self.qkv[:, : config.q_size + config.kv_size].view(count, config.num_heads + heads, dim)
        self.kv = self.qkv[:, config.q_size :].view(count, 2, heads, dim)
        half = dtype.itemsize < 4  # complex numbers start at float32: the halves are widened by the op
        self.turned = self.qk if half else torch.view_as_complex(self.qk.view(*self.qk.shape[:2], dim // 2, 2))
        self.gate_up = torch.empty(count, 2 * inner, dtype=dtype, device=device)
        self.gate, self.up = self.gate_up[:, :inner], self.gate_up[:, inner:]
        self.act = torch.empty(count, inner, dtype=dtype, device=device)
