"""Arena: one memory among page pools, against a twin that knows every page of every extent by itself."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitdecode._C import Arena, PagePool

SIZES = ((3, 3), (2, 7))  # pages per extent and stride, of two pools


def digest(n: int) -> bytes:
    return hashlib.sha256(str(n).encode()).digest()


def make(extents: int, shares: list[int], caching: bool = True) -> tuple[list[PagePool], Arena]:
    pools = [PagePool(extents * extent, 4, caching, extent, stride) for extent, stride in SIZES]
    return pools, Arena(tuple(pools), shares)


class TwinPool:
    """A pool's pages by number, without gaps, lists or counts."""

    def __init__(self, extents: int, extent: int, stride: int) -> None:
        self.extents, self.extent, self.stride = extents, extent, stride
        self.has: set[int] = set()  # extents
        self.owners: dict[int, int] = {}
        self.cached: list[int] = []  # oldest first
        self.names: dict[int, int] = {}

    def pages(self, extent: int) -> list[int]:
        return [extent * self.stride + n for n in range(self.extent)]

    @property
    def present(self) -> list[int]:
        return [page for extent in sorted(self.has) for page in self.pages(extent)]

    @property
    def free(self) -> list[int]:
        return [page for page in self.present if page not in self.owners and page not in self.cached]

    @property
    def available(self) -> int:
        return len(self.free) + len(self.cached)

    def after(self, page: int) -> int:
        """The page behind one, over the gap of the stride; -1: there is none."""
        every = [p for extent in range(self.extents) for p in self.pages(extent)]
        return every[every.index(page) + 1] if page != every[-1] else -1

    def expected(self, after: int) -> int:
        if after >= 0 and self.after(after) in self.free:
            return self.after(after)
        return (self.free or self.cached or [-1])[0]

    def owned(self, extent: int) -> bool:
        return any(page in self.owners for page in self.pages(extent))

    def forget(self, page: int) -> None:
        if page in self.cached:
            self.cached.remove(page)
            del self.names[page]


class ArenaMachine(RuleBasedStateMachine):
    """Two pools over one memory: allocations, releases, names, claims."""

    @initialize(extents=st.integers(2, 5), caching=st.sampled_from([True, True, False]), data=st.data())
    def build(self, extents: int, caching: bool, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, extents))
        shares = [first, data.draw(st.integers(0, extents - first))]
        self.pools, self.arena = make(extents, shares, caching)
        self.caching, self.count, self.moved = caching, extents, 0
        self.twins = [TwinPool(extents, *size) for size in SIZES]
        for extent in range(sum(shares)):
            self.twins[extent >= first].has.add(extent)

    def owned(self, data: st.DataObject) -> tuple[int, int]:
        return data.draw(st.sampled_from([(n, page) for n, twin in enumerate(self.twins) for page in twin.owners]))

    @rule(number=st.integers(0, 1), data=st.data())
    def allocate(self, number: int, data: st.DataObject) -> None:
        twin = self.twins[number]
        after = data.draw(st.sampled_from([-1, *(p for e in range(self.count) for p in twin.pages(e))]))
        page = self.pools[number].allocate(after)
        assert page == twin.expected(after)
        if page >= 0:
            twin.forget(page)
            twin.owners[page] = 1

    @precondition(lambda self: any(twin.owners for twin in self.twins))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number, page = self.owned(data)
        twin = self.twins[number]
        self.pools[number].release(page)
        twin.owners[page] -= 1
        if not twin.owners[page]:
            del twin.owners[page]
            if page in twin.names:
                twin.cached.append(page)

    @precondition(lambda self: any(twin.owners for twin in self.twins))
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        number, page = self.owned(data)
        self.pools[number].retain(page)
        self.twins[number].owners[page] += 1

    @precondition(lambda self: any(twin.owners for twin in self.twins))
    @rule(data=st.data(), name=st.integers(0, 6))
    def publish(self, data: st.DataObject, name: int) -> None:
        number, page = self.owned(data)
        twin = self.twins[number]
        if twin.names.get(page, name) != name:
            with pytest.raises(RuntimeError, match="already published"):
                self.pools[number].publish(page, digest(name))
            return
        self.pools[number].publish(page, digest(name))
        if self.caching and name not in twin.names.values():
            twin.names[page] = name

    @rule(number=st.integers(0, 1), name=st.integers(0, 6))
    def lookup(self, number: int, name: int) -> None:
        twin = self.twins[number]
        known = {found: page for page, found in twin.names.items()}
        page = self.pools[number].lookup(digest(name))
        assert page == known.get(name, -1)
        if page >= 0:
            twin.owners[page] = twin.owners.get(page, 0) + 1
            if page in twin.cached:
                twin.cached.remove(page)

    @rule(number=st.integers(0, 1), spare=st.integers(0, 4))
    def claim(self, number: int, spare: int) -> None:
        mine, other = self.twins[number], self.twins[1 - number]
        idle = set(range(self.count)) - mine.has - other.has
        lendable = {e for e in other.has if not other.owned(e) and other.available - other.extent >= spare}
        before = self.arena.owners
        got = self.arena.claim(number, spare)
        assert got == bool(idle or lendable)
        if not got:
            assert self.arena.owners == before
            return
        self.moved += 1
        (extent,) = (e for e in range(self.count) if self.arena.owners[e] != before[e])
        assert extent in (idle or lendable), "an idle extent goes first"
        if extent in other.has:
            for page in other.pages(extent):
                other.forget(page)
            other.has.remove(extent)
        mine.has.add(extent)

    @invariant()
    def the_twin_agrees(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.check_invariants()
        owners = [next((n for n, twin in enumerate(self.twins) if e in twin.has), -1) for e in range(self.count)]
        assert self.arena.owners == owners
        assert self.arena.moved == self.moved
        for number, (pool, twin) in enumerate(zip(self.pools, self.twins, strict=True)):
            pool.check_invariants()
            assert pool.present == len(twin.present)
            assert pool.available == twin.available
            assert pool.in_use == len(twin.owners)
            other = self.twins[1 - number]
            within = sum(e not in twin.has and not (e in other.has and other.owned(e)) for e in range(self.count))
            assert self.arena.reachable(number) == within * twin.extent
            for page in twin.owners:
                assert pool.owners(page) == twin.owners[page]
                assert pool.immutable(page) == (twin.owners[page] > 1 or page in twin.names)


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_shares_come_in_order_and_the_rest_is_idle() -> None:
    pools, arena = make(5, [1, 2])
    assert arena.owners == [0, 1, 1, -1, -1]
    assert [pool.present for pool in pools] == [3, 4]
    assert [arena.reachable(n) for n in range(2)] == [4 * 3, 3 * 2]
    assert [pools[1].allocate() for _ in range(5)] == [7, 8, 14, 15, -1], "page numbers leave gaps: stride 7"
    assert [arena.reachable(n) for n in range(2)] == [2 * 3, 3 * 2]
    assert arena.moved == 0


def test_an_idle_extent_goes_before_a_donors() -> None:
    pools, arena = make(4, [1, 2])
    assert arena.claim(0, 0)
    assert arena.owners == [0, 1, 1, 0]
    assert arena.claim(0, 0)
    assert arena.owners in ([0, 0, 1, 0], [0, 1, 0, 0])
    assert pools[1].present == 2


def test_a_donor_keeps_what_was_asked_to_spare() -> None:
    pools, arena = make(3, [0, 3])
    assert not arena.claim(0, 5), "it has 6 pages and would keep 4"
    assert arena.claim(0, 4)
    assert not arena.claim(0, 3)
    assert arena.claim(0, 2)
    assert pools[1].available == 2
    page = pools[1].allocate()
    assert not arena.claim(0, 0), "one page of its last extent is owned"
    pools[1].release(page)
    assert arena.claim(0, 0)
    assert pools[1].present == 0
    assert pools[1].allocate() == -1
    assert not arena.claim(0, 0), "nobody takes from himself"


def test_what_was_cached_in_an_extent_that_leaves_is_forgotten() -> None:
    pools, arena = make(2, [1, 1])
    page = pools[0].allocate()
    pools[0].publish(page, digest(1))
    assert not arena.claim(1, 0), "an owned page holds its extent"
    pools[0].release(page)
    assert pools[0].available == 3
    assert arena.claim(1, 0)
    assert pools[0].lookup(digest(1)) == -1
    assert arena.claim(0, 0)
    assert pools[0].available == 3
    assert pools[0].lookup(digest(1)) == -1


def test_misuse_is_refused() -> None:
    def pool(pages: int = 6, extent: int = 3) -> PagePool:
        return PagePool(pages, 4, True, extent, extent)

    for pools, shares, reason in (
        ((), [], "a share per pool"),
        ((pool(), pool()), [1], "a share per pool"),
        ((pool(), pool(9)), [1, 1], "equally many extents"),
        ((pool(), PagePool(6, 4, True)), [1, 1], "equally many extents"),
        ((pool(), pool()), [2, 1], "more than there is"),
    ):
        with pytest.raises(ValueError, match=reason):
            Arena(pools, shares)
    lent = pool()
    Arena((lent,), [1])
    with pytest.raises(ValueError, match="all absent"):
        Arena((lent,), [1])
    for bad in ((6, 4, True, 4, 4), (6, 4, True, 3, 2), (6, 4, True, 0, 3), (6, 4, True, -1, 3)):
        with pytest.raises(ValueError, match="do not make"):
            PagePool(*bad)


def test_pages_of_gaps_and_of_absent_extents_are_nobodys() -> None:
    pools, _ = make(3, [1, 1])
    for page in (2, 6, 21):  # in a gap of the stride, in another, beyond the end
        for call in (pools[1].release, pools[1].owners, pools[1].allocate):
            with pytest.raises(RuntimeError, match=f"no page {page} "):
                call(page)
    with pytest.raises(RuntimeError, match="which nobody owns"):
        pools[1].release(14)  # of the extent that is idle
    assert pools[1].owners(14) == 0
