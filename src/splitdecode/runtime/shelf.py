"""F4: where the cache of a lane that is not needed now may wait: in host memory, or in a byte per value.

    swap   pages as they are, in host memory (pinned where there is a GPU): exact, costs a copy each way
    fp8    e4m3 with a scale per position, layer, key or value, and head, on the model's device: no copy over a bus,
           but lossy: a value x comes back, rounded to the cache's dtype, off by at most |x| / 16 or by 2^-10 / 448 of
           the largest in its head, whichever is more

A scale belongs to one position: the slots behind a lane's last one hold whatever was in that memory before.
Copies run in stream order with the steps around them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitdecode._C import PagePool
from splitdecode.config import EngineConfig
from splitdecode.models import Transformer

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


class Shelf:
    """Pages put away. pool: which of its pages are taken; they hold as many positions as the cache's."""

    def __init__(self, num_pages: int, kv: Tensor) -> None:
        """kv: the cache it serves, [L, pages, page_size, 2, Hkv, D]."""
        self.pool = PagePool(num_pages, kv.shape[2], False)
        self.page_shape = (kv.shape[0], *kv.shape[2:])

    def transfer(self, kv: Tensor, moves: Tensor) -> None:
        """Moves pages in order. moves: int32 [n, 3] of page of kv, page of the shelf, 1 = to the shelf."""
        start = 0
        ways = moves[:, 2].tolist()
        for end in range(1, len(ways) + 1):
            if end < len(ways) and ways[end] == ways[start]:
                continue
            pages, kept = moves[start:end, :2].long().unbind(1)
            (self.put if ways[start] else self.take)(kv, pages.to(kv.device), kept)
            start = end

    def put(self, kv: Tensor, pages: Tensor, kept: Tensor) -> None:
        """Pages of kv -> pages of the shelf."""
        raise NotImplementedError

    def take(self, kv: Tensor, pages: Tensor, kept: Tensor) -> None:
        """Pages of the shelf -> pages of kv."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """What the shelf occupies."""
        raise NotImplementedError


class HostShelf(Shelf):
    """Pages as they are, in host memory."""

    def __init__(self, num_pages: int, kv: Tensor) -> None:
        super().__init__(num_pages, kv)
        self._pages = torch.empty((num_pages, *self.page_shape), dtype=kv.dtype, pin_memory=kv.is_cuda)

    def put(self, kv: Tensor, pages: Tensor, kept: Tensor) -> None:
        fetched = kv.index_select(1, pages)
        for n, place in enumerate(kept.tolist()):
            self._pages[place].copy_(fetched[:, n], non_blocking=True)

    def take(self, kv: Tensor, pages: Tensor, kept: Tensor) -> None:
        for page, place in zip(pages.tolist(), kept.tolist(), strict=True):
            kv[:, page].copy_(self._pages[place], non_blocking=True)

    @property
    def bytes(self) -> int:
        return self._pages.nbytes


class Fp8Shelf(Shelf):
    """Pages as e4m3 with scales, on the device of the cache."""

    def __init__(self, num_pages: int, kv: Tensor) -> None:
        super().__init__(num_pages, kv)
        self._pages = torch.empty((num_pages, *self.page_shape), dtype=FP8, device=kv.device)
        self._scales = torch.empty((num_pages, *self.page_shape[:-1], 1), dtype=torch.float32, device=kv.device)

    def put(self, kv: Tensor, pages: Tensor, kept: Tensor) -> None:
        fetched = kv.index_select(1, pages).transpose(0, 1).float()  # [n, L, page_size, 2, Hkv, D]
        scales = fetched.abs().amax(-1, keepdim=True).clamp_min(1e-30) / _LARGEST
        values = (fetched / scales).to(FP8)
        for n, place in enumerate(kept.tolist()):  # one by one: a place may be taken twice in a run, the last counts
            self._scales[place].copy_(scales[n])
            self._pages[place].copy_(values[n])

    def take(self, kv: Tensor, pages: Tensor, kept: Tensor) -> None:
        where = kept.to(kv.device)
        values = self._pages.view(torch.uint8)[where].view(FP8).float() * self._scales[where]
        for n, page in enumerate(pages.tolist()):
            kv[:, page].copy_(values[n])

    @property
    def bytes(self) -> int:
        return self._pages.nbytes + self._scales.nbytes


def make_shelf(model: Transformer, config: EngineConfig, kv: Tensor) -> Shelf | None:
    """The shelf config.idle_cache asks for, within config.idle_cache_memory; None where idle caches are recomputed."""
    if config.idle_cache == "recompute":
        return None
    values = kv[:, 0].numel()
    per_page = values + values // kv.shape[-1] * 4 if config.idle_cache == "fp8" else values * kv.element_size()
    pages = max(1, config.idle_cache_bytes // per_page)
    return (Fp8Shelf if config.idle_cache == "fp8" else HostShelf)(pages, kv)
