"""F4: which runner a model gets: captured steps on a GPU, eager ones on a CPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from splitdecode.config import EngineConfig
from splitdecode.models import Transformer
from splitdecode.runtime.device import DeviceRunner
from splitdecode.runtime.kvcache import KVCache
from splitdecode.runtime.runner import ModelRunner
from splitdecode.runtime.sampler import Sampler
from splitdecode.runtime.slots import DeviceSlots

Runner = ModelRunner | DeviceRunner


def make_runner(
    model: Transformer,
    cache: KVCache,
    config: EngineConfig,
    max_len: int,
    vocab_limit: int,
    *,
    banned_ids: Iterable[int] = (),
    entering_ids: Iterable[int] = (),
    eos_ids: Iterable[int] = (),
) -> Runner:
    """The model, its cache and what draws from it; what the ids are for stands in Sampler."""
    cuda = model.device.type == "cuda"
    ids = {"banned_ids": banned_ids, "entering_ids": entering_ids, "eos_ids": eos_ids}
    if not cuda:
        sampler = Sampler(vocab_limit, config.max_num_seqs, **ids)
        return ModelRunner(model, cache, sampler, config.max_num_seqs)
    real = torch.float64 if model.dtype == torch.float64 else torch.float32
    slots = DeviceSlots(vocab_limit, config.max_num_seqs, model.device, real, **ids)
    return DeviceRunner(model, cache, slots, config, max_len)
