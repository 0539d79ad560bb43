"""The graph-mode runner on a CPU: the same step program over torch references, replayed from tapes."""

from __future__ import annotations

from typing import Any

import torch
from oracles.tiny import Biased
from torch import Tensor

from splitdecode.config import EngineConfig
from splitdecode.runtime.device import DeviceRunner
from splitdecode.runtime.kvcache import KVCache
from splitdecode.runtime.slots import DeviceSlots


def tape_runner(
    model: Any, num_pages: int, config: EngineConfig, max_len: int, vocab_limit: int, **ids: Any
) -> DeviceRunner:
    """Stands in for runtime.runners.make_runner; everything is captured unless config.enforce_eager."""
    cache = KVCache(model, num_pages, config.page_size, config.enable_prefix_caching, null_page=True)
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
    runner = DeviceRunner(inner, cache, slots, config, max_len, adjust=adjust)
    if not config.enforce_eager:
        runner.warm_up()
    return runner
