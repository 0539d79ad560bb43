"""F7: what an answer is worth to a trainer. Pure functions of its transcript and, where time is measured, its metrics.

    accuracy    0 or 1            the last box is right, by a scorer of splitdecode.evaluate; without a box it is wrong
    format      0, 1 or 2         the scaffold, and tags properly nested
    tag_count   about -4 to 6     pieces of the scaffold, number of spans, their share of the text, balance
    latency     below 0           minus the time the models took, measured or modelled; or the coverage of the text

format and tag_count are the published terms as they work, oddities included. They read the whole text: a <think> that
a chat template opened is put back in front by Answer.of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from splitdecode.errors import RequestError
from splitdecode.evaluate.scorers import Scorer, scorer
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG
from splitdecode.train.cost import Answer, CostModel, measured_ms

TERMS = ("accuracy", "format", "tag_count", "latency")
FULL_COVERAGE = 0.4  # the share of the text that the published shaping likes best

_SCAFFOLD = re.compile(r"<think>\n.*\n</think>\n<answer>\n.*\n</answer>", re.DOTALL)
_PAIR = re.compile(f"{re.escape(OPEN_TAG)}(.*?){re.escape(CLOSE_TAG)}", re.DOTALL)
_PIECES = (("<think>\n", 0.5), ("\n</think>\n", 0.5), ("\n<answer>\n", 0.25), ("\n</answer>", 0.25))


class Latency(StrEnum):
    """Where the latency term takes its time from."""

    MEASURED = "measured"
    MODELLED = "modelled"
    COVERAGE = "coverage"


def accuracy(text: str, gold: str, score: Scorer) -> float:
    """1.0 when `score` takes the last box of the text for `gold`, else 0.0; without a box always 0.0."""
    return float(score(text, gold))


def format_score(text: str) -> float:
    """0, 1 or 2: one for the scaffold, which must be the whole text, and one for nested tags."""
    return float(_SCAFFOLD.fullmatch(text) is not None) + float(nested(text))


def nested(text: str) -> bool:
    """Whether each opening tag is followed by its closing tag before the next opening.

    The published rule goes from opening to opening: a text without any is nested, and closings that nothing opened are
    not looked at.
    """
    spans = text.split(OPEN_TAG)[1:]
    return all(CLOSE_TAG in span for span in spans)


def tag_count(text: str) -> float:
    """scaffold (0 to 2) + floor(c(n) / 2) + 2 cov(r) - 2 where openings and closings differ in number."""
    scaffold = sum(worth for piece, worth in _PIECES if text.count(piece) == 1) + 0.5 * ("\\boxed{" in text)
    openings, closings = text.count(OPEN_TAG), text.count(CLOSE_TAG)
    return scaffold + math.floor(span_credit(openings) / 2) + 2 * coverage(text) - 2 * (openings != closings)


def span_credit(openings: int) -> float:
    """c(n): half a point for each of the first 8 openings, half a point off for each one more."""
    return 0.5 * openings if openings <= 8 else 4 - 0.5 * (openings - 8)


def inside_share(text: str) -> float:
    """r: characters between an opening tag and the first closing tag behind it, over all characters, tags included."""
    return sum(len(found[1]) for found in _PAIR.finditer(text)) / len(text) if text else 0.0


def coverage_score(share: float) -> float:
    """cov(r): 0 at 0, up to 1 at 0.4 of the text, down to -1 where all of it is inside."""
    if share <= 0:
        return 0.0
    if share < FULL_COVERAGE:
        return share / FULL_COVERAGE
    return 1 - 2 * (share - FULL_COVERAGE) / (1 - FULL_COVERAGE)


def coverage(text: str) -> float:
    """cov(r) of a text: the nearest thing to a latency term that the published reward has."""
    return coverage_score(inside_share(text))


def latency(answer: Answer, kind: Latency, cost: CostModel | None = None, scale: float | None = None) -> float:
    """The latency term: -ms / scale, or with COVERAGE cov(r).

    scale, in ms: None is what large-only would take for as many tokens, by the cost model. So scaled, the term is about
    -1 for large-only at any length: it does not ask for short answers. A fixed scale does.
    Raises RequestError where spans, metrics, cost model or scale are missing, or the scale is not above 0.
    """
    if kind is Latency.COVERAGE:
        return coverage(answer.text)
    if cost is None and (kind is Latency.MODELLED or scale is None):
        raise RequestError(f"latency: found no cost model, expected one for {str(kind)!r}"
                           + ("" if kind is Latency.MODELLED else ", or a scale in ms"))  # fmt: skip
    if cost is not None and answer.spans is None:
        raise RequestError("latency: found no spans of the answer, expected who wrote which tokens")
    if scale is None and cost is not None:
        scale = cost.large_only_ms(max(answer.tokens, 1))
    if scale is None or not 0 < scale < math.inf:
        raise RequestError(f"scale: found {scale} ms, expected a finite number above 0 (was the large model measured?)")
    if kind is Latency.MODELLED and cost is not None:
        return -cost.ms(answer) / scale
    if answer.metrics is None:
        raise RequestError(f"latency: found no metrics of the answer, expected them for {str(kind)!r}")
    return -measured_ms(answer.metrics) / scale


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer's worth: the weighted sum, and every term by itself, unweighted, for reports."""

    total: float
    terms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reward:
    """A weighted sum of terms; made by combine(). Call it with an Answer."""

    weights: Mapping[str, float]
    parts: Mapping[str, Callable[[Answer], float]]

    def __call__(self, answer: Answer) -> Scored:
        """Raises RequestError where the answer lacks what a term needs."""
        terms = {name: self.parts[name](answer) for name in self.weights}
        return Scored(sum(self.weights[name] * value for name, value in terms.items()), terms)


def combine(
    weights: Mapping[str, float],
    *,
    scoring: str = "math",
    kind: Latency | str = Latency.MODELLED,
    cost: CostModel | None = None,
    scale: float | None = None,
) -> Reward:
    """A reward from {term: weight}; a term with weight 0 is computed and reported, but does not count.

    scoring: a scorer's name. kind, cost, scale: of the latency term, see latency(). The published reward is
    {"accuracy": 1, "format": 1, "tag_count": 1}; its coverage is in tag_count: Latency.COVERAGE beside it counts twice.
    Raises RequestError for unknown terms, or weights that are not finite numbers from 0 with one above 0;
    MissingExtraError where the scorer's package is absent.
    """
    unknown = [name for name in weights if name not in TERMS]
    if unknown:
        raise RequestError(f"weights: found {unknown[0]!r}, expected terms out of {', '.join(TERMS)}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise RequestError(f"weights: {name}: found {weight!r}, expected a finite number from 0 "
                               "(latency is negative by itself)")  # fmt: skip
    if not any(weights.values()):
        raise RequestError(f"weights: found {dict(weights)}, expected one above 0")
    if kind not in list(Latency):
        raise RequestError(f"latency: found {str(kind)!r}, expected one of {', '.join(Latency)}")
    how = Latency(kind)
    parts: dict[str, Callable[[Answer], float]] = {
        "format": lambda answer: format_score(answer.text),
        "tag_count": lambda answer: tag_count(answer.text),
        "latency": lambda answer: latency(answer, how, cost, scale),
    }
    if "accuracy" in weights:
        score = scorer(scoring)
        parts["accuracy"] = lambda answer: accuracy(answer.text, _gold(answer), score)
    return Reward(dict(weights), parts)


def _gold(answer: Answer) -> str:
    if answer.gold is None:
        raise RequestError("accuracy: found no gold answer, expected the right answer as text")
    return answer.gold
