"""Two caches in one memory: whose bytes are whose, how long a sequence may be, how the memory is divided at first.

The twin is the memory itself: every page of every layer is written with a number of its own and read back, and bytes
are counted by address.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch

from splitdecode.config import EngineConfig
from splitdecode.errors import CapacityError
from splitdecode.runtime.kvcache import KVCache, Memory, kv_token_bytes, make_cache, make_memory

PAGE = 4


@dataclass
class Config:
    """What a cache asks of a ModelConfig."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass
class Model:
    """What a cache asks of a Transformer."""

    config: Config
    dtype: torch.dtype = torch.float32
    device: Any = field(default_factory=lambda: torch.device("cpu"))

    def new_cache(self, num_pages: int, page_size: int) -> torch.Tensor:
        c = self.config
        shape = (c.num_layers, num_pages, page_size, 2, c.num_kv_heads, c.head_dim)
        return torch.zeros(shape, dtype=self.dtype)


GEOMETRIES = {
    "alike": (Model(Config(2, 2, 4)), Model(Config(2, 2, 4))),
    "deeper": (Model(Config(2, 2, 4)), Model(Config(5, 1, 8))),
    "other dtype": (Model(Config(3, 1, 8), torch.bfloat16), Model(Config(4, 2, 4), torch.float64)),
    "no common size": (Model(Config(3, 3, 2), torch.bfloat16), Model(Config(2, 5, 2))),
}
PAIRS = pytest.mark.parametrize("models", GEOMETRIES.values(), ids=GEOMETRIES)


def memory_of(models: tuple[Model, Model], budget: int, longest: tuple[int, int] = (4096, 4096), **more: int) -> Memory:
    config = EngineConfig(page_size=PAGE, kv_cache_memory=budget, **more)  # type: ignore[arg-type]
    return make_memory(list(models), config, list(longest))  # type: ignore[arg-type]


def page_bytes(model: Model) -> int:
    return PAGE * kv_token_bytes(model.config, model.dtype.itemsize)  # type: ignore[arg-type]


def some_extents(models: tuple[Model, Model], count: float) -> int:
    """A budget for that many of the smallest extents: whole pages of both."""
    least, low = 1, max(map(page_bytes, models))
    while True:
        try:
            memory_of(models, least)
        except CapacityError as error:
            least = int(str(error).split("at least ")[1].split()[0])
            continue
        assert least >= 2 * low
        return int(count * least / 2)


def take_all(memory: Memory, number: int) -> list[int]:
    """Every page the cache can have: all it holds, and all it can claim."""
    pages, pool = [], memory.caches[number].pool
    while (page := pool.allocate()) >= 0 or memory.arena.claim(number, 0):
        pages += [page] * (page >= 0)
    return pages


def places(cache: KVCache, page: int) -> set[int]:
    """Bytes of a page in all layers, as offsets into the memory."""
    begin, out = cache.kv.data_ptr(), set[int]()
    for layer in cache.kv[:, page]:
        assert layer.is_contiguous()
        at = layer.data_ptr() - begin
        out |= set(range(at, at + layer.numel() * layer.element_size()))
    return out


@PAIRS
def test_pages_are_disjoint_bytes_of_their_extent(models: tuple[Model, Model]) -> None:
    """Brute force: every extent in either cache's hands, every page, every layer."""
    memory = memory_of(models, some_extents(models, 7))
    count = len(memory.arena.owners)
    assert count == 7
    size = memory.caches[0].kv.untyped_storage().nbytes() // (count + 1)
    for number, cache in enumerate(memory.caches):
        pages = take_all(memory, number)
        assert memory.arena.owners == [number] * count
        assert len(set(pages)) == len(pages) == cache.pool.num_pages == cache.pool.present
        seen: set[int] = set()
        per_extent = len(pages) // count
        for index, page in enumerate(sorted(pages)):
            own = places(cache, page)
            assert len(own) == page_bytes(models[number])
            assert not seen & own
            seen |= own
            extent = index // per_extent
            assert min(own) >= extent * size
            assert max(own) < (extent + 1) * size
        for page in pages:
            cache.pool.release(page)


@PAIRS
def test_writes_of_one_cache_never_touch_the_other(models: tuple[Model, Model]) -> None:
    """Extents change hands at random; whatever is written to an owned page stays there until it is released."""
    rng = random.Random(0)
    memory = memory_of(models, some_extents(models, 9))
    held: dict[tuple[int, int], int] = {}
    for turn in range(600):
        number = rng.randrange(2)
        cache = memory.caches[number]
        if rng.random() < 0.45 and held:
            gone = rng.choice(sorted(held))
            assert memory.caches[gone[0]].pool.owners(gone[1]) == 1
            memory.caches[gone[0]].pool.release(gone[1])
            del held[gone]
            continue
        page = cache.pool.allocate()
        if page < 0 and memory.arena.claim(number, 0):
            page = cache.pool.allocate()
        if page >= 0:
            held[number, page] = turn % 200 + 1  # exact in bfloat16
            cache.kv[:, page] = held[number, page]
        for (owner, own), value in held.items():
            assert bool((memory.caches[owner].kv[:, own] == value).all())
    memory.arena.check_invariants()
    assert memory.arena.moved > 5
    assert {number for number, _ in held} == {0, 1}


@PAIRS
def test_the_spare_last_page_is_nobodys(models: tuple[Model, Model]) -> None:
    memory = memory_of(models, some_extents(models, 6))
    spare = [places(cache, cache.kv.shape[1] - 1) for cache in memory.caches]
    end = memory.caches[0].kv.untyped_storage().nbytes()
    for number, cache in enumerate(memory.caches):
        pages = take_all(memory, number)
        assert cache.kv.shape[1] - 1 not in pages
        lent = set().union(*(places(cache, page) for page in pages))
        assert not lent & (spare[0] | spare[1])
        assert max(spare[number]) < end
        for page in pages:
            cache.pool.release(page)
    own = make_cache(models[0], 5, PAGE, True)  # type: ignore[arg-type]
    assert own.kv.shape[1] == 6
    assert [own.pool.allocate() for _ in range(6)][-1] == -1


def holds(memory: Memory, lengths: tuple[int, int]) -> bool:
    """Whether both caches can hold so many positions at once, claiming what they lack; everything is released."""
    taken: list[tuple[int, int]] = []
    good = True
    for number, length in enumerate(lengths):
        pool = memory.caches[number].pool
        while good and sum(n == number for n, _ in taken) * PAGE < length:
            page = pool.allocate()
            if page >= 0:
                taken.append((number, page))
            else:
                good = memory.arena.claim(number, 0)
    for number, page in taken:
        memory.caches[number].pool.release(page)
    return good


@PAIRS
@pytest.mark.parametrize("longest", [(400, 400), (20, 400), (400, 36)])
def test_all_caches_can_hold_max_len_at_once_and_no_more(models: tuple[Model, Model], longest: tuple[int, int]) -> None:
    found = set()
    for extents in (2, 3, 5, 8, 13.5, 40, 300):
        memory = memory_of(models, some_extents(models, extents), longest, max_num_seqs=1)
        most = memory.max_len
        found.add(most)
        assert 1 <= most <= max(longest)
        assert holds(memory, (min(most, longest[0]), min(most, longest[1])))
        if most < max(longest):
            assert not holds(memory, (min(most + 1, longest[0]), min(most + 1, longest[1])))
    assert len(found) > 3
    assert max(found) == max(longest), "with enough memory nothing but the models limits a sequence"


@PAIRS
def test_the_memory_is_divided_for_equally_many_tokens(models: tuple[Model, Model]) -> None:
    least = some_extents(models, 2)
    for budget in (least, least + least // 2, 5 * least, 300 * least, 3000 * least + 77):
        memory = memory_of(models, budget)
        owners = memory.arena.owners
        extents = [owners.count(number) for number in range(2)]
        assert sum(extents) == len(owners), "none is idle at first"
        assert min(extents) >= 1
        assert owners == sorted(owners)
        pools = [cache.pool for cache in memory.caches]
        per_extent = [pool.num_pages // len(owners) for pool in pools]
        assert [pool.present for pool in pools] == [n * p for n, p in zip(extents, per_extent, strict=True)]
        assert abs(pools[0].present - pools[1].present) <= 2 * max(per_extent)
        used = memory.caches[0].kv.untyped_storage().nbytes() * len(owners) // (len(owners) + 1)
        assert used <= budget


def test_no_more_memory_is_taken_than_can_be_used() -> None:
    models = GEOMETRIES["deeper"]
    memory = memory_of(models, 1 << 26, (40, 40), max_num_seqs=3)
    for cache in memory.caches:
        assert cache.pool.num_pages * PAGE >= 3 * 40
    assert memory.caches[0].kv.untyped_storage().nbytes() < 1 << 21
    assert memory.max_len == 40


@PAIRS
def test_too_little_memory_is_refused_with_sizes(models: tuple[Model, Model]) -> None:
    least = some_extents(models, 2)
    with pytest.raises(CapacityError) as refused:
        memory_of(models, least - 1)
    assert str(refused.value) == (
        f"kv_cache_memory: found {least - 1} bytes, expected at least {least} (an extent of {least // 2} bytes for "
        f"each cache, with pages of {PAGE} tokens)"
    )
    assert memory_of(models, least).max_len >= 1


@pytest.mark.parametrize(("dtype", "page_size"), [*product((torch.float32, torch.bfloat16), (1, 16))])
def test_bytes_of_a_position(dtype: torch.dtype, page_size: int) -> None:
    model = Model(Config(3, 2, 8), dtype)
    kv = model.new_cache(4, page_size)
    assert kv_token_bytes(model.config, dtype.itemsize) * 4 * page_size == kv.nbytes  # type: ignore[arg-type]
