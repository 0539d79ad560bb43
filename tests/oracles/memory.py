"""The memory under oracles/lanes.py: pools, perhaps one memory for both lanes, shelves, and what lies in every cell.

    apart    | lane 0 .................. | lane 1 .................. |
    shared   | extent 0                  | extent 1                  | ..      laid out as in runtime/kvcache.py
    lane 0   | p0 p1 p2                  | absent                    |
    lane 1   | absent                    | l0 p0 | l1 p0 | l2 p0 | . |

A slot has several cells there, and what one lane writes the other one loses: a copy to the shelf that comes too late
finds something else, as it would on a device.
"""

from __future__ import annotations

from collections import Counter

from splitdecode._C import Arena, PagePool, Scheduler

Cell = tuple[int, int] | None  # lane, value


class Memory:
    """Pools and shelves of two lanes, and what they hold."""

    def __init__(
        self, pages: int, page_size: int, caching: bool, *, extent: int = 0, spare_extents: int = 0, shelf: int = 0
    ) -> None:
        """extent: pages in an extent of a memory that both share, with room for one sequence of `pages` in each lane
        and spare_extents more; 0: each has its own. shelf: pages of each; 0: none."""
        self.page_size = page_size
        self.arena: Arena | None = None
        each = -(-pages // max(extent, 1))
        if extent:
            extents, strides, layers = 2 * each + spare_extents, (extent, 3 * extent + 1), (1, 3)
            self.pools = [PagePool(extents * extent, page_size, caching, extent, stride) for stride in strides]
            self.arena = Arena((self.pools[0], self.pools[1]), [each, each])
            self._bases, self._widths = (0, 0), (strides[1], strides[0])  # so that both strides fill an extent
            self._steps = [[n * extent * page_size for n in range(count)] for count in layers]
            size = extents * page_size * strides[0] * strides[1]
        else:
            self.pools = [PagePool(pages, page_size, caching) for _ in range(2)]
            self._bases, self._widths, self._steps = (0, pages * page_size), (1, 1), [[0], [0]]
            size = 2 * pages * page_size
        self.shelves = [PagePool(shelf, page_size, False) if shelf else None for _ in range(2)]
        self._cells: list[Cell] = [None] * size
        self.met: Counter[tuple[str, str]] = Counter()  # pages put and taken, of the lane that was planned or the other
        self._kept: list[dict[int, list[list[Cell]]]] = [{}, {}]  # by shelf slot: cells of each layer

    def read(self, lane: int, slot: int) -> int | None:
        """What a slot holds for a lane. None: nothing, or parts of different things."""
        parts, width = self._parts(lane, slot), self._widths[lane]
        first = self._cells[parts[0].start]
        if first is None or first[0] != lane or any(self._cells[part] != [first] * width for part in parts):
            return None
        return first[1]

    def write(self, lane: int, slot: int, value: int) -> None:
        for part in self._parts(lane, slot):
            self._cells[part] = [(lane, value)] * self._widths[lane]

    def transfer(self, scheduler: Scheduler, planned: int) -> None:
        """The copies a plan ordered, as Engine._transfer makes them: the other lane's first, whose pages may lie where
        those do that this one was given."""
        for lane in (1 - planned, planned):
            for page, place, out in scheduler.take_transfers(lane).reshape(-1, 3).tolist():
                self.met["put" if out else "taken", "planned" if lane == planned else "other"] += 1
                assert out or not self.pools[lane].immutable(page)
                self._copy(lane, page * self.page_size, place * self.page_size, bool(out))

    def _copy(self, lane: int, slot: int, place: int, out: bool) -> None:
        """A page, cell by cell as they are: the last one of a lane is rarely full."""
        for n in range(self.page_size):
            parts = self._parts(lane, slot + n)
            if out:
                self._kept[lane][place + n] = [self._cells[part] for part in parts]
                continue
            for part, cells in zip(parts, self._kept[lane][place + n], strict=True):
                self._cells[part] = cells

    def _parts(self, lane: int, slot: int) -> list[slice]:
        """The cells of a slot, by layer."""
        width = self._widths[lane]
        starts = [self._bases[lane] + (slot + step) * width for step in self._steps[lane]]
        return [slice(start, start + width) for start in starts]
