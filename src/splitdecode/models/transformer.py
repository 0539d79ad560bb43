"""F3: the transformer: Qwen2, Qwen3 and Llama as one class; what differs is data in its config and weights.

One forward runs all pending tokens of any rows (prefill, decode, catch-up, probe) against a paged cache:

    kv [L, num_pages, page_size, 2, Hkv, D], token-major: k and v of a token are adjacent, so a token costs one write
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from splitdecode import ops
from splitdecode.models.config import ModelConfig
from splitdecode.models.rope import rope_table
from splitdecode.models.weights import LayerWeights, ModelWeights


class Transformer:
    """A model ready to run: config, weights, and the rotary table it grows as positions ask for it."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embed.device
        self.dtype = weights.embed.dtype
        self._cis = self._table(min(config.max_positions, 2048))

    def new_cache(self, num_pages: int, page_size: int) -> Tensor:
        """A zeroed paged cache [L, num_pages, page_size, 2, Hkv, D] in the model's dtype, on its device."""
        c = self.config
        shape = (c.num_layers, num_pages, page_size, 2, c.num_kv_heads, c.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, batch: ops.PagedBatch, kv: Tensor, rows: Tensor | None = None) -> Tensor:
        """Runs all tokens of `batch`, writes their k and v into `kv`, returns logits of the tokens `rows`.

        kv: [L, num_pages, page_size, 2, Hkv, D], model dtype.  rows: [N] int64 token indices (None: all T).
        Returns [N, V]: the model's dtype, float32 for bf16 and fp16 models.
        """
        w, config = self.weights, self.config
        x = w.embed.index_select(0, batch.tokens.to(self.device))
        step = _Step(batch, kv, x, config, self._angles(batch))
        for index, layer in enumerate(w.layers):
            self._layer(layer, x, step, index)
        if rows is not None:
            x = x.index_select(0, rows.to(self.device)) if len(rows) else x[:0]
        logits = x.new_empty(x.shape[0], config.vocab_size)
        if len(logits):
            ops.norm_linear(x, w.norm, config.rms_eps, w.head, None, logits)
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()

    def _layer(self, w: LayerWeights, x: Tensor, step: _Step, index: int) -> None:
        """One layer over the residual stream x [T, d], in place."""
        eps = self.config.rms_eps
        ops.norm_linear(x, w.attn_norm, eps, w.qkv, w.qkv_bias, step.qkv)
        if w.q_norm is not None and w.k_norm is not None:
            ops.qk_norm(step.qk, self.config.num_kv_heads, w.q_norm, w.k_norm, eps)
        ops.rope(step.qk, step.cis)
        ops.write(step.kv, step.caches[index], step.slots)
        x.addmm_(ops.attention(step.q, step.caches[index], step.plan), w.o)
        if w.o_bias is not None:
            x.add_(w.o_bias)
        ops.norm_linear(x, w.mlp_norm, eps, w.gate_up, w.gate_up_bias, step.gate_up)
        x.addmm_(ops.swiglu(step.gate, step.up, step.act), w.down)
        if w.down_bias is not None:
            x.add_(w.down_bias)

    def _angles(self, batch: ops.PagedBatch) -> Tensor:
        positions = batch.positions.numpy()
        last = int(np.max(positions, initial=0))
        if last >= len(self._cis):
            self._cis = self._table(2 * (last + 1))
        return self._cis.index_select(0, batch.positions.to(self.device)).unsqueeze(1)

    def _table(self, length: int) -> Tensor:
        wide = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        return rope_table(self.config.rope, self.config.head_dim, length, wide).to(self.device)


class _Step:
    """Buffers and views one forward shares across its layers.

    qkv [T, (H + 2 Hkv) * D] is seen as q [T, G, Hkv, D], qk [T, H + Hkv, D] and kv [T, 2, Hkv, D];
    gate_up [T, 2 I] as gate and up [T, I]; act [T, I].
    """

    def __init__(self, batch: ops.PagedBatch, kv: Tensor, x: Tensor, config: ModelConfig, cis: Tensor) -> None:
        count, heads, dim, inner = x.shape[0], config.num_kv_heads, config.head_dim, config.intermediate_size
        self.cis = cis
        self.plan = ops.plan_attention(batch, x.device)
        self.slots = batch.slots.to(device=x.device, dtype=torch.int64)
        self.caches = kv.flatten(1, 2).unbind(0)
        self.qkv = x.new_empty(count, config.qkv_size)
        self.q = self.qkv[:, : config.q_size].view(count, -1, heads, dim)
        self.qk = self.qkv[:, : config.q_size + config.kv_size].view(count, -1, dim)
        self.kv = self.qkv[:, config.q_size :].view(count, 2, heads, dim)
        self.gate_up = x.new_empty(count, 2 * inner)
        self.gate, self.up = self.gate_up[:, :inner], self.gate_up[:, inner:]
        self.act = x.new_empty(count, inner)
