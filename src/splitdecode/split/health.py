"""F5: signs that a pair does not work well together, seen while it runs.

    signature   figure, over the last answers whose hand-offs the control tags decide                        alarm
    offload     share of the tokens that the large model wrote                                                > 20 %
    tags        share of the answers whose tags do not pair up (text cut short by a limit is not held to it)  > 5 %
    no_return   share of the spans that were closed by force at max_span, or open when their answer ended     > 10 %
    slow        time the tokens would take if writing them were all there was, over the time they took        < 0.3
    no_gain     time the large model alone would have taken to write them, over the time they took            < 1
    seam        by how many nats a model likes the other one's tokens less than its own, the worse of both    > 3

Times are the two models' own (ModelMetrics.ms): waiting for others is not in them. `seam` is measured on every
EngineConfig.watch_seams-th answer with hand-offs, by two prefills (runtime/scoring.py); 0 leaves it out. That it is
positive says nothing, since what is hard for a model is what it hands over: the alarm is for text one of them finds
absurd, as with a wrong tokenizer or template. Below MIN_ANSWERS no alarm is raised.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from splitdecode.split.outputs import ModelMetrics
from splitdecode.split.roles import Pair, Role

MEMORY = 256  # answers, and seam measurements, that figures are taken over
MIN_ANSWERS = 8
RARELY = 64  # answers between two looks for alarms to log, once so many have ended; a quarter of what is remembered
log = logging.getLogger("splitdecode")


@dataclass(frozen=True, slots=True)
class Alarm:
    """A figure beyond its bound. over: the bound is a maximum; else a minimum."""

    name: str
    value: float
    bound: float
    over: bool
    text: str

    def __str__(self) -> str:
        side = "above" if self.over else "below"
        return f"{self.name}: {self.value:.3g}, {side} {self.bound:g}: {self.text}"


BOUNDS: dict[str, tuple[float, bool, str]] = {
    "offload": (0.20, True, "the small model hands over more than it should: nothing is gained by splitting"),
    "tags": (0.05, True, "answers with control tags that do not pair up"),
    "no_return": (0.10, True, "spans that the small model does not take back"),
    "slow": (0.3, False, "most of the time goes into catching up, reading along and tokens that were dropped"),
    "no_gain": (1.0, False, "the large model alone would have been faster"),
    "seam": (3.0, True, "one model finds the other one's text absurd: tokenizer, template or prompt may differ"),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What one answer adds.

    unreturned  spans that ran into max_span or the answer's end        balanced  None where a limit cut it short
    """

    models: Pair[ModelMetrics]
    spans: int
    unreturned: int
    balanced: bool | None


@dataclass(slots=True)
class Health:
    """Figures and alarms of one engine.

    bounds    by signature, as BOUNDS has them
    unscored  per lane its ids and owners (transcript.lane_owners), of answers whose seams are still to be measured
    """

    bounds: dict[str, float] = field(default_factory=lambda: {name: bound[0] for name, bound in BOUNDS.items()})
    answers: deque[Seen] = field(default_factory=lambda: deque(maxlen=MEMORY))
    seams: Pair[deque[float]] = field(default_factory=lambda: Pair(deque(maxlen=MEMORY), deque(maxlen=MEMORY)))
    unscored: list[Pair[tuple[np.ndarray, np.ndarray]]] = field(default_factory=list)
    _raised: set[str] = field(default_factory=set)
    _ended: int = 0
    _look: int = MIN_ANSWERS  # answers that must have ended before the next look

    def settle(self, seen: Seen) -> None:
        """An answer ended. An alarm that this raises is logged once, until it goes out again."""
        self.answers.append(seen)
        self._ended += 1
        if self._ended < self._look:
            return  # a look costs a sum over all that is remembered
        self._look += MIN_ANSWERS if self._ended < RARELY else max(RARELY, len(self.answers) // 4)
        alarms = self.alarms()
        for alarm in alarms:
            if alarm.name not in self._raised:
                log.warning("%s", alarm)
        self._raised = {alarm.name for alarm in alarms}

    def clear(self, memory: int | None = MEMORY) -> None:
        """Forgets what was seen. memory: answers that figures are taken over from here on; None: all of them."""
        self.answers = deque(maxlen=memory)
        self.seams = Pair.of(lambda _: deque(maxlen=memory))
        self.unscored.clear()
        self._raised.clear()
        self._ended, self._look = 0, MIN_ANSWERS

    def figures(self) -> dict[str, float | None]:
        """Every signature's figure now; None where nothing was seen that it could be taken from."""
        answers = list(self.answers)  # other threads may ask while answers end
        models = Pair.of(lambda role: _total([seen.models[role] for seen in answers]))
        tokens, spent = sum(m.tokens for m in models), sum(m.ms for m in models)
        spans = sum(seen.spans for seen in answers)
        judged = [seen.balanced for seen in answers if seen.balanced is not None]
        large = models[Role.LARGE]
        alone = large.write_ms / large.writes * tokens if large.writes else None
        jumps = [sum(seam) / len(seam) for seam in map(list, self.seams) if seam]
        return {
            "offload": large.tokens / tokens if tokens else None,
            "tags": judged.count(False) / len(judged) if judged else None,
            "no_return": sum(seen.unreturned for seen in answers) / spans if spans else None,
            "slow": sum(m.ideal_ms for m in models) / spent if spent and spans else None,
            "no_gain": alone / spent if alone is not None and spent and spans else None,
            "seam": max(jumps) if jumps else None,
        }

    def alarms(self) -> list[Alarm]:
        """The figures beyond their bounds; none before MIN_ANSWERS answers have ended."""
        if len(self.answers) < MIN_ANSWERS:
            return []
        out = []
        for name, value in self.figures().items():
            _, over, text = BOUNDS[name]
            bound = self.bounds[name]
            if value is not None and (value > bound if over else value < bound):
                out.append(Alarm(name, value, bound, over, text))
        return out


def _total(metrics: Sequence[ModelMetrics]) -> ModelMetrics:
    total = ModelMetrics()
    for one in metrics:
        total.add(one)
    return total


def paired(patterns: Sequence[int], closes: int = 1) -> bool:
    """Whether tags (0 opens, `closes` closes, others mean something else) open and close in turns."""
    is_open = False
    for pattern in patterns:
        if pattern in (0, closes):
            if is_open is (pattern == 0):
                return False
            is_open = not is_open
    return not is_open


def seam_jump(logprobs: np.ndarray, owner: np.ndarray) -> float | None:
    """Mean NLL of the other model's tokens less that of its own, in nats.

    logprobs: [n] of one lane's text by its own model; owner: [n] 1 its own tokens, 0 the other's, -1 neither. None
    where there are none of one kind.
    """
    own, other = logprobs[owner == 1], logprobs[owner == 0]
    own, other = own[~np.isnan(own)], other[~np.isnan(other)]
    return float(own.mean() - other.mean()) if len(own) and len(other) else None
