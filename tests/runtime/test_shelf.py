"""Pages put away and taken back: to the bit from host memory, within the stated bound from a byte per value."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from splitdecode.config import EngineConfig
from splitdecode.runtime.kvcache import KVCache
from splitdecode.runtime.shelf import FP8, Fp8Shelf, HostShelf, Shelf, make_shelf

SHAPE = (3, 9, 4, 2, 2, 8)  # layers, pages, page_size, key and value, heads, dim
BOTH = pytest.mark.parametrize("kind", [HostShelf, Fp8Shelf])


def random_cache(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Magnitudes from 2^-12 to 2^6, some zeros, some heads all zero."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(SHAPE, generator=draw) * 2.0 ** torch.randint(-12, 7, SHAPE, generator=draw)
    values[torch.rand(SHAPE, generator=draw) < 0.05] = 0.0
    values[:, 2, 1] = 0.0
    return values.to(dtype)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def moves(*rows: tuple[int, int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_swap_is_exact_to_the_bit_in_any_order(dtype: torch.dtype) -> None:
    """Random interleavings of put and take, against copies kept beside; NaN and infinities among the values."""
    rng = random.Random(3)
    kv = random_cache(dtype)
    kv[0, 0, 0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0], dtype=dtype)
    twin, shelf = kv.clone(), HostShelf(6, kv)
    kept: dict[int, Tensor] = {}
    taken = 0
    for turn in range(200):
        count = rng.randint(1, 4)
        pages, places = rng.sample(range(SHAPE[1]), count), rng.sample(range(6), count)
        if rng.random() < 0.5:
            shelf.put(kv, torch.tensor(pages), torch.tensor(places))
            kept |= {place: twin[:, page].clone() for page, place in zip(pages, places, strict=True)}
        elif known := [(page, place) for page, place in zip(pages, places, strict=True) if place in kept]:
            shelf.take(kv, torch.tensor([page for page, _ in known]), torch.tensor([place for _, place in known]))
            for page, place in known:
                twin[:, page] = kept[place]
                taken += 1
        kv[:, turn % SHAPE[1], 1] = twin[:, turn % SHAPE[1], 1] = float(turn)  # the model goes on writing
        assert torch.equal(bits(kv), bits(twin))
    assert taken > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_errs_within_its_bound(dtype: torch.dtype) -> None:
    """max(|x| / 16, largest of the head x 2^-10 / 448), and the rounding to the cache's dtype; both ends are met."""
    kv = random_cache(dtype)
    before, shelf = kv.clone(), Fp8Shelf(SHAPE[1], kv)
    every = torch.arange(SHAPE[1])
    shelf.put(kv, every, every.flip(0))
    kv.zero_()
    shelf.take(kv, every, every.flip(0))
    x, error = before.double(), (kv.double() - before.double()).abs()
    largest = x.abs().amax(-1, keepdim=True)
    rounding = kv.double().abs() * torch.finfo(dtype).eps + x.abs() * 4 * torch.finfo(torch.float32).eps
    bound = torch.maximum(x.abs() / 16, largest * 2.0**-10 / 448)
    assert bool((error <= bound + rounding).all())
    normal = x.abs() >= largest * 2.0**-6 / 448
    relative = (error / x.abs())[normal & (x != 0)].max()
    assert relative > 1 / 20, "a bound that is far from met would be the wrong one"
    assert (error / largest)[~normal].max() > 0.5 * 2.0**-10 / 448
    assert bool((kv[:, 2, 1] == 0).all())
    assert bool(torch.isfinite(kv).all())


def test_what_lies_in_unwritten_slots_spoils_no_other() -> None:
    """The slots behind a lane's last position hold bytes of another cache: NaN, infinities, huge values."""
    kv = random_cache(torch.float32)
    clean, shelf = kv.clone(), Fp8Shelf(SHAPE[1], kv)
    kv[:, :, 2] = float("nan")
    kv[:, :, 3] = float("inf")
    kv[:, 5:, 3] = 3e38
    every = torch.arange(SHAPE[1])
    for cache in (kv, clean):
        shelf.put(cache, every, every)
        cache[:, :, :2] = -1.0
        shelf.take(cache, every, every)
    assert torch.equal(kv[:, :, :2], clean[:, :, :2])


@BOTH
def test_moves_in_mixed_order_are_applied_in_order(kind: type[Shelf]) -> None:
    """A page is put away, another taken into it, that one put away under the same place again, and so on."""
    kv = torch.zeros(SHAPE)
    for page in range(SHAPE[1]):
        kv[:, page] = 2.0**page  # one value a head: exact in either kind
    cache = KVCache(kv, None, kind(4, kv))  # type: ignore[arg-type]
    cache.transfer(moves((0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0)))  # 0 and 1 change places
    assert kv[0, :3, 0, 0, 0, 0].tolist() == [2.0, 1.0, 4.0]
    cache.transfer(moves((2, 2, 1), (3, 2, 1), (4, 2, 0), (5, 1, 0), (5, 2, 0)))  # the later of two counts
    assert kv[0, 2:6, 0, 0, 0, 0].tolist() == [4.0, 8.0, 8.0, 8.0]
    cache.transfer(moves((6, 0, 1), (7, 0, 0), (7, 3, 1), (8, 3, 0)))
    assert kv[0, 6:, 0, 0, 0, 0].tolist() == [64.0, 64.0, 64.0]
    cache.transfer(torch.zeros((0, 3), dtype=torch.int32))
    assert bool((kv[:, 6:] == 64.0).all())


@BOTH
def test_random_moves_equal_one_at_a_time(kind: type[Shelf]) -> None:
    """However many moves are given at once, and however their directions alternate."""
    rng = random.Random(5)
    first = random_cache(torch.float32)
    second = first.clone()
    shelves = [kind(5, first), kind(5, second)]
    ready: set[int] = set()
    ways = set()
    for _ in range(60):
        rows = []
        for _ in range(rng.randint(1, 9)):
            place, out = rng.randrange(5), rng.random() < 0.5
            if out or place in ready:
                rows.append((rng.randrange(SHAPE[1]), place, int(out)))
                ready |= {place} if out else set()
        if not rows:
            continue
        ways.add(len({way for *_, way in rows}))
        shelves[0].transfer(first, moves(*rows))
        for row in rows:
            shelves[1].transfer(second, moves(row))
        assert torch.equal(bits(first), bits(second))
    assert ways == {1, 2}


@pytest.mark.parametrize(("idle_cache", "kind"), [("swap", HostShelf), ("fp8", Fp8Shelf)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shelf_stays_within_its_memory(idle_cache: str, kind: type[Shelf], dtype: torch.dtype) -> None:
    kv = random_cache(dtype)
    model: Any = SimpleNamespace()
    for budget in (10_000, 123_456):
        shelf = make_shelf(model, EngineConfig(idle_cache=idle_cache, idle_cache_memory=budget), kv)
        assert type(shelf) is kind
        each = shelf.bytes // shelf.pool.num_pages
        assert shelf.bytes == each * shelf.pool.num_pages <= budget
        assert budget < shelf.bytes + each, "no page less than fits"
        assert shelf.pool.page_size == SHAPE[2]
        values = kv[:, 0].numel()
        assert each == (values + values // SHAPE[-1] * 4 if kind is Fp8Shelf else values * kv.element_size())
    smallest = make_shelf(model, EngineConfig(idle_cache=idle_cache, idle_cache_memory=1), kv)
    assert smallest is not None
    assert smallest.pool.num_pages == 1
    assert make_shelf(model, EngineConfig(), kv) is None


def test_a_cache_without_a_shelf_lends_none() -> None:
    kv = random_cache(torch.float32)
    assert KVCache(kv, None).shelf_pool is None  # type: ignore[arg-type]
    shelf = HostShelf(3, kv)
    assert KVCache(kv, None, shelf).shelf_pool is shelf.pool  # type: ignore[arg-type]
    assert torch.finfo(FP8).max == 448.0
