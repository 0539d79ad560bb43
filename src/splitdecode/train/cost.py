"""F7: what an answer costs, told from its transcript alone: equal answers cost the same, whatever was scheduled how.

    model   steps                                        positions                                    hand-offs
    small   tokens it wrote + a step for each            tokens it wrote + tokens it read             opening tags
            read_interval tokens of a span it read
    large   tokens it wrote                              tokens it wrote + tokens it caught up with   opening tags

    ms = step_ms x steps + token_ms x positions + handoff_ms x hand-offs, summed over both models

Counters of the runtime would say what this very answer took, tokens that were written ahead and dropped with it: that
depends on what else ran. What is dropped and what the tags take is in handoff_ms, as it is on average. Text behind the
last span is not caught up with. Tokens are the author's: of unequal tokenizers the reader's count is taken to be equal.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from splitdecode.errors import CheckpointError, RequestError
from splitdecode.models.checkpoint import read_json
from splitdecode.split.outputs import ModelSpan, RequestMetrics, RequestOutput
from splitdecode.split.questions import opening
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import OPEN_TAG

RATES = ("step_ms", "token_ms", "handoff_ms")
READ_INTERVAL = 4  # EngineConfig's own default


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reward may look at.

    text     the whole answer, control tags in it (CompletionOutput.raw_text)
    gold     the right answer, for accuracy             metrics   of this one answer, for measured latency
    spans    who wrote which tokens, for latency, as CompletionOutput has it
    """

    text: str
    gold: str | None = None
    metrics: RequestMetrics | None = None
    spans: Sequence[ModelSpan] | None = None

    @classmethod
    def of(cls, output: RequestOutput, gold: str | None = None) -> Answer:
        """The first answer of a request; a `<think>` that ends the prompt is put back in front of its text."""
        one = output.outputs[0]
        return cls(opening(output.prompt or "") + one.raw_text, gold, output.metrics, one.spans)

    @property
    def tokens(self) -> int:
        """Content tokens, whoever wrote them."""
        return self.spans[-1].end if self.spans else 0


@dataclass(frozen=True, slots=True)
class CostModel:
    """What work costs, of each model: ms a step, a position run, a hand-off. read_interval: tokens a step reads."""

    step_ms: Pair[float]
    token_ms: Pair[float]
    handoff_ms: Pair[float]
    read_interval: int = READ_INTERVAL

    @classmethod
    def calibrate(cls, answers: Sequence[Answer], read_interval: int = READ_INTERVAL) -> CostModel:
        """Non-negative least squares, a model at a time, of measured ms over what the transcripts say was done, and
        the positions of the prompt that were run.

        answers: with metrics, measured as they will be served, since a step that many share costs each of them less;
        of those in which a model ran nothing it learns nothing, and without any other it costs nothing.
        read_interval: EngineConfig's. Raises RequestError for no answers, or times that are not finite.
        """
        if not answers:
            raise RequestError("CostModel: found no answers, expected at least one that was measured")
        fitted = Pair.of(lambda role: _fit(answers, role, read_interval))
        step, token, handoff = (Pair(*numbers) for numbers in zip(*fitted, strict=True))
        return cls(step, token, handoff, read_interval)

    @classmethod
    def read(cls, file: Path, flag: str = "--cost") -> CostModel:
        """What write() wrote. Raises RequestError naming the flag, the file and the field that cannot be used."""
        try:
            found = read_json(file)
        except (OSError, CheckpointError) as error:
            raise RequestError(f"{flag}: {file} cannot be read ({error})") from None
        step, token, handoff = (_rates(found.get(name), f"{flag}: {file}: {name}") for name in RATES)
        interval = found.get("read_interval")
        if type(interval) is not int or interval < 1:
            raise RequestError(f"{flag}: {file}: read_interval: found {interval!r}, expected a whole number from 1")
        if unknown := sorted(set(found) - {*RATES, "read_interval", "run"}):
            raise RequestError(f"{flag}: {file}: found {unknown[0]!r}, expected {', '.join(RATES)}, read_interval")
        cost = cls(step, token, handoff, interval)
        if not cost.large_only_ms(1):
            raise RequestError(f"{flag}: {file}: found 0 ms for a token of the large model, expected a number above 0")
        return cost

    def write(self, file: Path, run: str = "") -> None:
        """As JSON, whole or not at all. run: whose it is, for run_of(). Raises RequestError where it cannot."""
        part = file.with_name(file.name + ".part")
        try:
            part.write_text(json.dumps({**self.as_dict(), "run": run}, indent=1) + "\n", "utf-8")
            os.replace(part, file)
        except OSError as error:
            raise RequestError(f"--output: {file} cannot be written ({error.strerror})") from None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        rates = {name: {str(role): getattr(self, name)[role] for role in Role} for name in RATES}
        return {**rates, "read_interval": self.read_interval}

    def ms(self, answer: Answer) -> float:
        """The modelled ms of an answer whose hand-offs its tags decided. The prompt is left out: who of a group finds
        it cached is chance."""
        done = work(answer, self.read_interval)
        return sum(
            sum(getattr(self, name)[role] * count for name, count in zip(RATES, done[role], strict=True))
            for role in Role
        )

    def large_only_ms(self, tokens: int) -> float:
        """What the large model alone would take to write so many tokens, one a step."""
        return (self.step_ms[Role.LARGE] + self.token_ms[Role.LARGE]) * tokens


def run_of(file: Path) -> str | None:
    """Whose a written cost model is; None where there is none. Raises RequestError for a file that is not one."""
    if not file.is_file():
        return None
    CostModel.read(file, "--output")
    return str(read_json(file).get("run", ""))


def work(answer: Answer, read_interval: int) -> Pair[tuple[int, int, int]]:
    """Steps, positions and hand-offs of each model, by the table above."""
    small = large = read = caught = waiting = 0
    for span in answer.spans or ():
        tokens = span.end - span.start
        if span.model == str(Role.SMALL):
            small, waiting = small + tokens, waiting + tokens
        else:
            large, caught, waiting = large + tokens, caught + waiting, 0
            read += math.ceil(tokens / read_interval)
    handoffs = answer.text.count(OPEN_TAG)
    return Pair((small + read, small + large, handoffs), (large, large + caught, handoffs))


def measured_ms(metrics: RequestMetrics) -> float:
    """What both models took for an answer, in ms: its share of the steps it took part in."""
    return sum(work.ms for work in metrics.models)


def _rates(value: Any, where: str) -> Pair[float]:
    names = [str(role) for role in Role]
    numbers = [value[name] for name in names] if isinstance(value, dict) and set(value) == set(names) else []
    good = [type(number) in (int, float) and 0 <= number < math.inf for number in numbers]
    if not (good and all(good)):
        raise RequestError(f"{where}: found {value!r}, expected an object of two finite numbers from 0, {names}")
    return Pair(*map(float, numbers))


def _fit(answers: Sequence[Answer], role: Role, read_interval: int) -> tuple[float, ...]:
    counts, ms = [], []
    for answer in answers:
        if answer.metrics is None:
            raise RequestError("CostModel: found an answer without metrics, expected measured ones")
        did, (steps, positions, handoffs) = answer.metrics.models[role], work(answer, read_interval)[role]
        if not math.isfinite(did.ms):
            raise RequestError(f"CostModel: found {did.ms} ms, expected finite times")
        if did.forwards:
            counts.append([steps, positions + did.prompt_tokens, handoffs])
            ms.append(did.ms)
    a = np.array(counts, dtype=np.float64).reshape(len(counts), len(RATES))
    return tuple(nonnegative_least_squares(a, np.array(ms, dtype=np.float64)).tolist())


def nonnegative_least_squares(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """x [n] >= 0 that makes |a x - b| least; a [m, n], n small: every set of columns is tried.

    The best x is the plain least squares of the columns it uses; of equally good ones that with the fewest is taken.
    """
    best, least = np.zeros(a.shape[1]), float(np.linalg.norm(b))
    for count in range(1, a.shape[1] + 1):
        for columns in combinations(range(a.shape[1]), count):
            part, _, rank, _ = np.linalg.lstsq(a[:, columns], b, rcond=None)
            residual = float(np.linalg.norm(a[:, columns] @ part - b))
            if rank == count and (part >= 0).all() and residual < least - 1e-12 * float(np.linalg.norm(b)):
                best, least = np.zeros(a.shape[1]), residual
                best[list(columns)] = part
    return best
