"""PagePool against a brute-force twin, and the chain of page hashes against hashlib."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitdecode._C import PagePool, chain_digest, root_digest


def digest(n: int) -> bytes:
    return hashlib.sha256(str(n).encode()).digest()


class Twin:
    """What PagePool means: `owners` of owned pages, `cached` pages oldest first, `names` of published pages."""

    def __init__(self, num_pages: int, caching: bool) -> None:
        self.num_pages, self.caching = num_pages, caching
        self.owners: dict[int, int] = {}
        self.cached: list[int] = []
        self.names: dict[int, bytes] = {}

    def free(self) -> set[int]:
        return set(range(self.num_pages)) - set(self.owners) - set(self.cached)

    def allowed(self, after: int) -> set[int]:
        if after >= 0 and after + 1 in self.free():
            return {after + 1}
        return self.free() or set(self.cached[:1]) or {-1}

    def allocated(self, page: int) -> None:
        if page in self.cached:
            self.cached.remove(page)
            del self.names[page]
        if page >= 0:
            self.owners[page] = 1

    def release(self, page: int) -> None:
        self.owners[page] -= 1
        if self.owners[page] == 0:
            del self.owners[page]
            if page in self.names:
                self.cached.append(page)

    def publish(self, page: int, name: bytes) -> None:
        if self.caching and name not in self.names.values():
            self.names[page] = name

    def lookup(self, name: bytes) -> int:
        for page, known in self.names.items():
            if known == name:
                if page in self.cached:
                    self.cached.remove(page)
                self.owners[page] = self.owners.get(page, 0) + 1
                return page
        return -1


class PagePoolMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(1, 9), caching=st.sampled_from([True, True, True, False]))
    def build(self, num_pages: int, caching: bool) -> None:
        self.pool, self.twin = PagePool(num_pages, 16, caching), Twin(num_pages, caching)
        self.lookups = self.found = self.evicted = 0

    def owned(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.twin.owners)))

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        after = data.draw(st.integers(-1, self.twin.num_pages - 1))
        page = self.pool.allocate(after)
        assert page in self.twin.allowed(after)
        self.evicted += page in self.twin.cached
        self.twin.allocated(page)

    @precondition(lambda self: self.twin.owners)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        page = self.owned(data)
        self.pool.retain(page)
        self.twin.owners[page] += 1

    @precondition(lambda self: self.twin.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = self.owned(data)
        self.pool.release(page)
        self.twin.release(page)

    @precondition(lambda self: set(self.twin.owners) - set(self.twin.names))
    @rule(data=st.data(), n=st.integers(0, 11))
    def publish(self, data: st.DataObject, n: int) -> None:
        page = data.draw(st.sampled_from(sorted(set(self.twin.owners) - set(self.twin.names))))
        self.pool.publish(page, digest(n))
        self.twin.publish(page, digest(n))

    @rule(n=st.integers(0, 11))
    def lookup(self, n: int) -> None:
        page = self.pool.lookup(digest(n))
        assert page == self.twin.lookup(digest(n))
        self.lookups += self.twin.caching
        self.found += page >= 0

    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()
        self.twin.cached.clear()
        self.twin.names.clear()

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        page = data.draw(st.integers(0, self.twin.num_pages - 1))
        if page not in self.twin.owners:
            for act in (self.pool.release, self.pool.retain, lambda p: self.pool.publish(p, digest(0))):
                with pytest.raises(RuntimeError, match="nobody owns"):
                    act(page)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_invariants()
        owners = self.twin.owners
        assert [self.pool.owners(p) for p in range(self.twin.num_pages)] == [
            owners.get(p, 0) for p in range(self.twin.num_pages)
        ]
        assert [self.pool.immutable(p) for p in range(self.twin.num_pages)] == [
            p in self.twin.names or owners.get(p, 0) > 1 for p in range(self.twin.num_pages)
        ]
        assert self.pool.in_use == len(owners)
        assert self.pool.available == self.twin.num_pages - len(owners)
        assert (self.pool.queries, self.pool.hits, self.pool.evictions) == (self.lookups, self.found, self.evicted)


PagePoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPagePoolAgainstTwin = PagePoolMachine.TestCase


@given(salt=st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_root_is_sha256(salt: bytes) -> None:
    assert root_digest(salt) == hashlib.sha256(salt).digest()


@given(tokens=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=70), salt=st.binary(max_size=8))
@settings(max_examples=60, deadline=None)
def test_chain_is_sha256_of_parent_and_tokens(tokens: list[int], salt: bytes) -> None:
    parent, array = root_digest(salt), np.array(tokens, dtype=np.int32)
    assert chain_digest(parent, array) == hashlib.sha256(parent + array.astype("<i4").tobytes()).digest()


@pytest.mark.parametrize("size", [55, 56, 63, 64, 65, 119, 120, 128, 100_000])
def test_sha256_at_block_edges(size: int) -> None:
    assert root_digest(b"\xa5" * size) == hashlib.sha256(b"\xa5" * size).digest()


def test_digest_contracts() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        chain_digest(b"short", np.zeros(4, np.int32))
    with pytest.raises(TypeError):
        chain_digest(root_digest(b""), np.zeros(4, np.int64))
    read_only = np.arange(4, dtype=np.int32)
    read_only.flags.writeable = False
    assert len(chain_digest(root_digest(b""), read_only)) == 32


def test_a_lane_grows_in_one_run() -> None:
    pool = PagePool(8, 16, True)
    pages = [pool.allocate()]
    for _ in range(7):
        pages.append(pool.allocate(pages[-1]))
    assert pages == list(range(8))
    assert pool.allocate(7) == -1


def test_two_lanes_grow_side_by_side() -> None:
    """A second run starts in the middle of the widest gap, so neither cuts the other off at once."""
    pool = PagePool(32, 16, True)
    one, two = [pool.allocate()], [pool.allocate()]
    for _ in range(11):
        one.append(pool.allocate(one[-1]))
        two.append(pool.allocate(two[-1]))
    assert one == list(range(one[0], one[0] + 12))
    assert two == list(range(two[0], two[0] + 12))


def test_freed_pages_join_into_one_gap() -> None:
    pool = PagePool(6, 16, False)
    for after in range(-1, 5):
        pool.allocate(after)
    for page in (1, 3, 2):
        pool.release(page)
        pool.check_invariants()
    assert pool.allocate(0) == 1
    assert pool.allocate(1) == 2


def test_least_recently_released_is_evicted_first() -> None:
    pool = PagePool(3, 16, True)
    for n in range(3):
        pool.publish(pool.allocate(n - 1), digest(n))
    for page in (1, 0, 2):
        pool.release(page)
    assert (pool.available, pool.in_use) == (3, 0)
    assert pool.lookup(digest(1)) == 1
    pool.release(1)
    assert [pool.allocate() for _ in range(4)] == [0, 2, 1, -1]
    assert pool.evictions == 3
    assert pool.lookup(digest(0)) == -1


def test_free_pages_are_taken_before_cached_ones() -> None:
    pool = PagePool(2, 16, True)
    kept = pool.allocate()
    pool.publish(kept, digest(0))
    pool.release(kept)
    assert pool.allocate() != kept
    assert pool.evictions == 0
    assert pool.lookup(digest(0)) == kept


def test_a_duplicate_stays_unpublished() -> None:
    pool = PagePool(4, 16, True)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, digest(0))
    pool.publish(second, digest(0))
    assert (pool.immutable(first), pool.immutable(second)) == (True, False)
    pool.release(second)
    assert pool.available == 3
    assert pool.lookup(digest(0)) == first


def test_publishing_twice() -> None:
    pool = PagePool(2, 16, True)
    page = pool.allocate()
    pool.publish(page, digest(0))
    pool.publish(page, digest(0))
    with pytest.raises(RuntimeError, match="another hash"):
        pool.publish(page, digest(1))


def test_clear_cache_unpublishes_owned_pages() -> None:
    pool = PagePool(2, 16, True)
    page = pool.allocate()
    pool.publish(page, digest(0))
    pool.clear_cache()
    assert not pool.immutable(page)
    assert pool.lookup(digest(0)) == -1
    pool.release(page)
    pool.check_invariants()


def test_without_prefix_caching_nothing_is_kept() -> None:
    pool = PagePool(2, 16, False)
    page = pool.allocate()
    pool.publish(page, digest(0))
    assert not pool.immutable(page)
    pool.release(page)
    assert (pool.lookup(digest(0)), pool.queries, pool.available) == (-1, 0, 2)


@pytest.mark.parametrize(("pages", "size"), [(0, 16), (-1, 16), (4, 0)])
def test_bad_sizes(pages: int, size: int) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        PagePool(pages, size, True)


def test_pages_out_of_range() -> None:
    pool = PagePool(4, 16, True)
    for act in (pool.release, pool.retain, pool.owners, pool.immutable, pool.allocate):
        for page in (-2, 4):
            with pytest.raises(RuntimeError, match="no page"):
                act(page)
    with pytest.raises(ValueError, match="32 bytes"):
        pool.lookup(b"short")
