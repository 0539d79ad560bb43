"""F4: paged keys and values of one model, and one memory for the caches of several.

A cache is [L, pages, page_size, 2, Hkv, D] in its model's dtype. Caches that share a memory hold extents of it, and an
extent holds the same pages of every layer, so that it can change hands:

    memory   | extent 0             | extent 1             | extent 2 ...        bytes; all extents are equal
    as A     | l0 p0 p1 | l1 p0 p1  | not A's: absent      | l0 p8 p9 | l1 ...   A: 2 layers, 2 pages in an extent
    as B     | absent               | l0 p0 | l1 p0 | l2 ..| absent              B: larger pages, more layers

Page numbers count pages of one layer through the whole memory, and layer l of page p lies l x (pages of an extent)
further on: a view with overlapping strides is the plain [L, pages, ...] tensor that every kernel knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitdecode._C import Arena, PagePool
from splitdecode.config import EngineConfig
from splitdecode.errors import CapacityError
from splitdecode.models import ModelConfig, Transformer
from splitdecode.runtime.shelf import Shelf, make_shelf

EXTENTS = 256  # what a memory is divided into at least, where its pages are small enough


@dataclass(slots=True)
class KVCache:
    """One model's paged keys and values.

    kv: [L, pages, page_size, 2, Hkv, D] in the model's dtype; layout: triton_kernels/README.md. Its last page is never
    lent: rows that do nothing write there. pool lends the others; shelf keeps what idle lanes held, or is None.
    """

    kv: Tensor
    pool: PagePool
    shelf: Shelf | None = None

    @property
    def shelf_pool(self) -> PagePool | None:
        """The shelf's pages, for the scheduler to lend."""
        return None if self.shelf is None else self.shelf.pool

    def transfer(self, moves: Tensor) -> None:
        """Copies pages to the shelf and back, in order. moves: int32 [n, 3] of page, shelf page, to the shelf."""
        assert self.shelf is not None
        self.shelf.transfer(self.kv, moves)


@dataclass(frozen=True, slots=True)
class Memory:
    """The caches of several models in one memory.

    max_len: positions a sequence may have if all of them hold it, each up to the longest it may have.
    """

    caches: list[KVCache]
    arena: Arena
    max_len: int


def kv_token_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of keys and values of one position."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * itemsize


def make_cache(model: Transformer, num_pages: int, page_size: int, prefix_caching: bool) -> KVCache:
    """A cache with a memory of its own."""
    return KVCache(model.new_cache(num_pages + 1, page_size), PagePool(num_pages, page_size, prefix_caching))


def make_memory(models: Sequence[Transformer], config: EngineConfig, longest: Sequence[int]) -> Memory:
    """Divides config.kv_cache_memory among the models, at first for equally many tokens.

    longest: positions each may have. Raises CapacityError when not one page fits into every cache.
    """
    plan = _plan(models, config, longest)
    device = models[0].device
    memory = torch.zeros((plan.extents + 1) * plan.bytes, dtype=torch.uint8, device=device)  # one more: nobody's
    caches = []
    for model, layer_page, pages in zip(models, plan.layer_pages, plan.pages, strict=True):
        pool = PagePool(
            plan.extents * pages, config.page_size, config.enable_prefix_caching, pages, plan.bytes // layer_page
        )
        kv = _view(memory, model, config.page_size, plan.bytes // layer_page, pages, plan.extents)
        caches.append(KVCache(kv, pool, make_shelf(model, config, kv)))
    arena = Arena(tuple(cache.pool for cache in caches), plan.shares)
    return Memory(caches, arena, plan.max_len)


@dataclass(frozen=True, slots=True)
class _Plan:
    """bytes, extents: of the memory.  layer_pages: bytes of a page in one layer.  pages: in an extent, by model."""

    bytes: int
    extents: int
    layer_pages: list[int]
    pages: list[int]
    shares: list[int]
    max_len: int


def _plan(models: Sequence[Transformer], config: EngineConfig, longest: Sequence[int]) -> _Plan:
    size, budget = config.page_size, config.kv_cache_bytes
    layers = [m.config.num_layers for m in models]
    page_bytes = [size * kv_token_bytes(m.config, m.dtype.itemsize) for m in models]
    layer_pages = [total // count for total, count in zip(page_bytes, layers, strict=True)]
    unit = math.lcm(*layer_pages)
    least = _ceil(max(page_bytes), unit) * unit
    extent = max(least, budget // EXTENTS // unit * unit)
    pages = [extent // layer // count for layer, count in zip(layer_pages, layers, strict=True)]
    extents = budget // extent
    if extents < len(models):
        raise CapacityError(
            f"kv_cache_memory: found {budget} bytes, expected at least {len(models) * least} "
            f"(an extent of {least} bytes for each cache, with pages of {size} tokens)"
        )

    def needed(tokens: int) -> list[int]:
        """Extents of each model for so many tokens, or for as many as it may have."""
        return [_ceil(_ceil(min(tokens, most), size), p) for p, most in zip(pages, longest, strict=True)]

    useful = sum(_ceil(_ceil(most, size) * config.max_num_seqs, p) for most, p in zip(longest, pages, strict=True))
    extents = min(extents, useful)
    low, high = 0, max(longest)
    while low < high:  # the most tokens that fit into all caches at once
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(needed(middle)) <= extents else (low, middle - 1)
    shares = _shares(extents, pages)
    return _Plan(extent, extents, layer_pages, pages, shares, low)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _shares(extents: int, pages: Sequence[int]) -> list[int]:
    """Extents by model, for equally many pages; every model gets one."""
    weights = [1 / p for p in pages]
    shares = [max(1, int(extents * w / sum(weights))) for w in weights]
    while sum(shares) > extents:
        shares[shares.index(max(shares))] -= 1
    shares[pages.index(min(pages))] += extents - sum(shares)
    return shares


def _view(memory: Tensor, model: Transformer, page_size: int, stride: int, pages: int, extents: int) -> Tensor:
    """[L, pages, page_size, 2, Hkv, D]: layer l is the memory from its first page on, l x `pages` pages in."""
    c = model.config
    one = (page_size, 2, c.num_kv_heads, c.head_dim)
    elements = math.prod(one)
    whole = memory.view(model.dtype)
    steps = [math.prod(one[i + 1 :]) for i in range(len(one))]
    return whole.as_strided((c.num_layers, extents * stride + 1, *one), (pages * elements, elements, *steps))
