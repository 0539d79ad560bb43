"""F7: what the small model handed over, against what labels say it should have: by characters and by spans.

               written by the large model     written by the small one
    labelled          both                          missed
    not               extra                         neither

    precision = both / (both + extra)       recall = both / (both + missed)
    IoU = both / (both + extra + missed)    F1 = 2 both / (2 both + extra + missed)
    kappa = (p - c) / (1 - c)               agreement p = (both + neither) / all, beyond the c that chance would give:
                                            the sum over both classes of the product of their shares

Source of kappa: J. Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20
(1960). A figure whose denominator is 0 is None. Counts of many answers are added up before anything is divided.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from splitdecode.errors import RequestError

Ranges = Iterable[tuple[int, int]]
_HIT = 0.5  # of a labelled span's characters


@dataclass(slots=True)
class Decisions:
    """Counts of characters (both, extra, missed, neither) and of spans.

    labelled  labelled spans                       hit       those of which the large model wrote at least half
    handed    spans the large model wrote          stray     those without a single labelled character
    """

    both: int = 0
    extra: int = 0
    missed: int = 0
    neither: int = 0
    labelled: int = 0
    hit: int = 0
    handed: int = 0
    stray: int = 0

    def add(self, other: Decisions) -> None:
        """Sums every count."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def precision(self) -> float | None:
        """Share of the large model's characters that were labelled."""
        return _share(self.both, self.both + self.extra)

    @property
    def recall(self) -> float | None:
        """Share of the labelled characters that the large model wrote."""
        return _share(self.both, self.both + self.missed)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall."""
        return _share(2 * self.both, 2 * self.both + self.extra + self.missed)

    @property
    def iou(self) -> float | None:
        """Intersection over union."""
        return _share(self.both, self.both + self.extra + self.missed)

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa, -1 to 1: 1 is agreement everywhere, 0 what chance would give."""
        total = self.both + self.extra + self.missed + self.neither
        if not total:
            return None
        handed, labelled = self.both + self.extra, self.both + self.missed
        chance = handed * labelled + (total - handed) * (total - labelled)
        return _share((self.both + self.neither) * total - chance, total * total - chance)

    @property
    def hit_rate(self) -> float | None:
        """Share of the labelled spans that are hit."""
        return _share(self.hit, self.labelled)

    def figures(self) -> dict[str, float | int | None]:
        """All counts and all figures, by name."""
        names = ("precision", "recall", "f1", "iou", "kappa", "hit_rate")
        return {f.name: getattr(self, f.name) for f in fields(self)} | {name: getattr(self, name) for name in names}


def compare(handed: Ranges, labelled: Ranges, length: int) -> Decisions:
    """One text of `length` characters: what the large model wrote against what is labelled.

    handed, labelled: half-open ranges of characters, ordered and disjoint. What lies beyond the text is cut off.
    Raises RequestError for ranges that are not ordered, disjoint and half-open.
    """
    given = [_checked(ranges, length) for ranges in (handed, labelled)]
    masks = [bytearray(length) for _ in given]
    for mask, ranges in zip(masks, given, strict=True):
        for start, stop in ranges:
            mask[start:stop] = b"\1" * (stop - start)
    large, hard = masks
    both = sum(a & b for a, b in zip(large, hard, strict=True))
    found = Decisions(both, sum(large) - both, sum(hard) - both, length - sum(large) - sum(hard) + both)
    found.handed, found.labelled = len(given[0]), len(given[1])
    found.hit = sum(sum(large[start:stop]) >= _HIT * (stop - start) for start, stop in given[1])
    found.stray = sum(not any(hard[start:stop]) for start, stop in given[0])
    return found


def _checked(ranges: Ranges, length: int) -> list[tuple[int, int]]:
    out, edge = [], 0
    for start, stop in ranges:
        if not edge <= start < stop:
            raise RequestError(f"ranges: found ({start}, {stop}) after {edge}, expected ordered and disjoint ones")
        edge = stop
        if start < length:
            out.append((start, min(stop, length)))
    return out


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
