"""The graph-mode runner on a CPU: the same step program over torch references, replayed from tapes."""

from __future__ import annotations

from typing import Any

import torch
from oracles.tiny import Biased
from torch import Tensor

from splitdecode.config import EngineConfig
from splitdecode.models import Transformer
from splitdecode.models.weights import LayerWeights, ModelWeights
from splitdecode.ops import step_ops
from splitdecode.runtime.device import DeviceRunner
from splitdecode.runtime.kvcache import KVCache
from splitdecode.runtime.slots import DeviceSlots


def by_rows(model: Transformer) -> Transformer:
    """The same model with its matrices stored [out, in], as a GPU has them and launchers want them."""

    def turned(matrix: Tensor) -> Tensor:
        return matrix.t().contiguous().t()

    layers = []
    for w in model.weights.layers:
        fields = {name: getattr(w, name) for name in LayerWeights.__slots__}
        turns = {name: turned(fields[name]) for name in ("qkv", "o", "gate_up", "down")}
        layers.append(LayerWeights(**fields | turns))
    head, embed = turned(model.weights.head), model.weights.embed.contiguous()
    return Transformer(model.config, ModelWeights(embed, tuple(layers), model.weights.norm, head))


def kernel_runner(model: Any, *args: Any, **ids: Any) -> DeviceRunner:
    """The same over Triton's launchers: in the interpreter, seconds a step."""
    return tape_runner(by_rows(model), *args, launchers=True, **ids)


def tape_runner(
    model: Any,
    cache: KVCache,
    config: EngineConfig,
    max_len: int,
    vocab_limit: int,
    *,
    launchers: bool = False,
    **ids: Any,
) -> DeviceRunner:
    """Stands in for runtime.runners.make_runner; everything is captured unless config.enforce_eager."""
    real = torch.float64 if model.dtype == torch.float64 else torch.float32
    slots = DeviceSlots(vocab_limit, config.max_num_seqs, torch.device("cpu"), real, **ids)
    inner = model.inner if isinstance(model, Biased) else model

    def add_bigram(logits: Tensor, tokens: Tensor, draws: Tensor) -> None:
        for row, at in enumerate(draws[:, 0].tolist()):
            if at >= 0:
                token = int(tokens[at])
                token = token if token >= 0 else int(runner.model.last[-1 - token])
                logits[row] += model.table[token].to(logits.dtype)

    adjust = add_bigram if isinstance(model, Biased) else None
    ops = step_ops(torch.device("cpu"), launchers=launchers)
    runner = DeviceRunner(inner, cache, slots, config, max_len, ops=ops, adjust=adjust)
    if not config.enforce_eager:
        runner.warm_up()
    return runner
