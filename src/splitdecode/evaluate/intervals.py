"""F7: how sure a figure is. All intervals are two-sided, 95 %.

One answer per problem: each is right or wrong, independently: Wilson's interval. Several answers per problem are not
independent; what is drawn again is then the problem with all its answers (a cluster bootstrap). Two policies that
answered the same problems are compared problem by problem (a paired bootstrap): what makes a problem hard for both
cancels out.

Where every problem has the same value a bootstrap has no width, however few there are. Then Wilson's interval for the
share of problems with another value is what bounds the mean.

Sources: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927);
B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitdecode.errors import RequestError

Z = 1.959963984540054  # the standard normal distribution has 2.5 % beyond it
RESAMPLES = 10_000
_BLOCK = 1 << 22  # counts held at a time

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its bounds, in its own unit.

    method: "wilson", "cluster bootstrap", "paired bootstrap", or "all equal" where every problem has the same value
    """

    value: float
    low: float
    high: float
    method: str


def wilson(right: int, count: int) -> Interval:
    """The share right / count with Wilson's score interval.

    centre = (p + z^2 / 2n) / (1 + z^2 / n),  half width = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

    Raises RequestError unless 0 <= right <= count and count >= 1.
    """
    if count < 1 or not 0 <= right <= count:
        raise RequestError(f"interval: found {right} right of {count}, expected 0 to n of n >= 1 answers")
    p, square = right / count, Z * Z
    scale = 1 + square / count
    centre = (p + square / (2 * count)) / scale
    half = Z * math.sqrt(p * (1 - p) / count + square / (4 * count * count)) / scale
    low = 0.0 if right == 0 else centre - half  # exact there, where rounding would leave a trace
    high = 1.0 if right == count else centre + half
    return Interval(p, low, high, "wilson")


def accuracy(scores: Sequence[Sequence[bool]], seed: int = 0) -> Interval:
    """Mean over problems of the share of right answers, 0 to 1.

    scores: the answers of each problem; all problems have equally many, at least one. One each, and where all answers
    or none are right: Wilson, over problems; several: a cluster bootstrap over problems. Raises RequestError otherwise.
    """
    lengths = {len(answers) for answers in scores}
    if len(lengths) != 1 or 0 in lengths:
        raise RequestError(f"accuracy: found {sorted(lengths)} answers per problem, expected equally many, at least 1")
    right = [sum(answers) for answers in scores]
    if set(right) in ({0}, {len(scores[0])}) or lengths == {1}:
        return wilson(sum(map(bool, right)), len(scores))
    return _bootstrap(np.asarray(scores, dtype=np.float64).mean(axis=1), seed, "cluster bootstrap", 0.0)


def paired(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]], seed: int = 0) -> Interval:
    """Accuracy of `first` minus that of `second`, -1 to 1, over the same problems in the same order.

    first, second: the answers of each problem, any number >= 1. Raises RequestError unless they have equally many
    problems, at least one.
    """
    if len(first) != len(second) or not first or not all(map(len, (*first, *second))):
        raise RequestError(f"paired: found {len(first)} and {len(second)} problems, expected the same ones, answered")
    differences = [float(np.mean(a)) - float(np.mean(b)) for a, b in zip(first, second, strict=True)]
    return _bootstrap(np.asarray(differences), seed, "paired bootstrap", -1.0)


def _bootstrap(values: Floats, seed: int, method: str, least: float) -> Interval:
    """Mean of `values` [n], each `least` to 1, and the 2.5 and 97.5 % quantiles of the means of RESAMPLES draws of n
    with replacement. Where all are equal: what the mean is when the share of others is at Wilson's upper bound, and all
    of those `least`, or 1."""
    count = len(values)
    if np.ptp(values) == 0:
        value, others = float(values[0]), wilson(0, count).high
        low, high = ((1 - others) * value + others * extreme for extreme in (least, 1.0))
        return Interval(value, low, high, "all equal")
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    means: list[Floats] = []
    for start in range(0, RESAMPLES, block):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(block, RESAMPLES - start))
        means.append(times @ values / count)
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    mean = float(values.mean())
    return Interval(mean, min(float(low), mean), max(float(high), mean), method)
