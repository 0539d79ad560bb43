"""F7: one row at a time: every question of a task answered under one policy, and what that took.

Rows are fair to each other: the same questions in the same order, the same seeds, the same decoder, a warm-up each, and
no row finds another row's prompts in the prefix cache. A random row switches at the rate measured in the split row of
its own task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile

from splitdecode.config import SamplingParams, request_key
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.evaluate.decisions import Decisions, compare
from splitdecode.evaluate.policies import RATE_FROM, Rate, Row, kept, large_ranges, policies_of
from splitdecode.evaluate.tasks import Item, Task
from splitdecode.split.outputs import CompletionOutput, RequestMetrics, RequestOutput
from splitdecode.split.policies import HandoffPolicy
from splitdecode.split.prompts import Prompt
from splitdecode.split.questions import question_prompts
from splitdecode.split.roles import Pair, Role

NO_SPAN = 32  # tokens per chunk where nothing was handed over: never drawn, and each chunk costs a mark
WARM_UP_TOKENS = 256  # per answer: steps of every size have run once, whatever the task's own limit


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for all rows. temperature, top_p, max_tokens: None = the task's own; budget: a share of the tokens for
    the split row (max_offload_fraction); rate: of random rows, None = as measured in the split row."""

    seed: int = 0
    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    budget: float | None = None
    rate: Rate | None = None
    use_tqdm: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RequestError(f"--samples: found {self.samples}, expected at least 1")

    def params(self, task: Task) -> SamplingParams:
        """How answers of a task are sampled. Special tokens stay in the text: every token has its characters."""
        named = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        given = {name: value for name, value in named.items() if value is not None}
        return SamplingParams(**{**task.sampling, **given}, skip_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: to which item, whether it was right, and where its time and tokens went.

    spans      runs of tokens by the large model
    decisions  hand-offs against labels; None without labels, or under a policy that decides nothing
    compared   characters the decisions were compared over, and characters of the solution, or of the answer itself
    kept       labelled spans that began on the reference, of how many; None: the policy forces none
    """

    item: int
    right: bool
    output: CompletionOutput
    metrics: RequestMetrics
    spans: int
    decisions: Decisions | None
    compared: tuple[int, int]
    kept: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row on one task: `samples` answers per item, in order; wall and cpu are seconds for all of them together.

    health: signs of how the two models got on, and what they alarm of; None where no control tags decided hand-offs.
    """

    task: Task
    row: Row
    answers: list[Answer]
    samples: int
    wall: float
    cpu: float
    rate: Rate | None = None
    health: dict[str, float | None] | None = None
    alarms: tuple[str, ...] = ()

    @property
    def scores(self) -> list[list[bool]]:
        """Right or wrong, per item."""
        right = [answer.right for answer in self.answers]
        return [right[at : at + self.samples] for at in range(0, len(right), self.samples)]

    @property
    def measured_rate(self) -> Rate:
        """What a random switch needs to write as much by the large model, in pieces as long as here."""
        return rate_of([answer.metrics for answer in self.answers], sum(answer.spans for answer in self.answers))


def run_task(
    task: Task, rows: Sequence[Row], decoder_of: Callable[[Row], SplitDecoder], settings: Settings
) -> Iterator[Outcome]:
    """All rows of one task, each when it is done, random ones last: they need the split row's rate.

    Raises RequestError before anything runs where a row cannot.
    """
    kinds = {row.kind for row in rows}
    if "forced" in kinds and not task.labelled:
        raise RequestError(f"forced: {task.name} has questions without labels, expected 'trace' and 'hard' in each")
    check_rate(rows, settings.rate)
    rate = settings.rate
    for row in random_last(rows):
        found = run_row(task, row, decoder_of(row), settings, rate)
        if row.kind == "split" and rate is None:
            rate = found.measured_rate
        yield found


def random_last(rows: Iterable[Row]) -> list[Row]:
    """The same rows in an order in which they can run."""
    return sorted(rows, key=lambda row: row.kind == "random")


def check_rate(rows: Iterable[Row], rate: Rate | None) -> None:
    """Raises RequestError where a random row has neither a rate nor a split row to take it from."""
    kinds = {row.kind for row in rows}
    if rate is None and "random" in kinds and "split" not in kinds:
        raise RequestError(f"random: no share to switch at: {RATE_FROM}")


def run_row(task: Task, row: Row, decoder: SplitDecoder, settings: Settings, rate: Rate | None) -> Outcome:
    """Every item of the task, `settings.samples` times, under one policy."""
    rate = rate if row.kind == "random" else None
    items = [item for item in task.items for _ in range(settings.samples)]
    policies = policies_of(row, items, decoder.tokens, rate)
    base = settings.params(task)
    if row.kind == "split":
        base = replace(base, max_offload_fraction=settings.budget)
    params = [replace(base, seed=request_key(settings.seed, index)) for index in range(len(items))]
    few = slice(0, decoder.config.max_num_seqs)
    short = [replace(one, max_tokens=min(one.max_tokens or WARM_UP_TOKENS, WARM_UP_TOKENS)) for one in params[few]]
    _generate(decoder, task, row, items[few], short, policies[few], "warm-up", use_tqdm=False)
    with watched(decoder) as signs:
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = _generate(decoder, task, row, items, params, policies, "", use_tqdm=settings.use_tqdm)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    answers = [_answer(task, row, decoder, index // settings.samples, output) for index, output in enumerate(outputs)]
    return Outcome(task, row, answers, settings.samples, wall, cpu, rate, signs.figures, tuple(signs.alarms))


@dataclass(slots=True)
class Signs:
    """How two models got on: figures by signature (split/health.py), None where no control tags decided hand-offs; and
    what they alarm of."""

    figures: dict[str, float | None] | None = None
    alarms: list[str] = field(default_factory=list)


@contextmanager
def watched(decoder: SplitDecoder) -> Iterator[Signs]:
    """Signs of all answers of the block, filled in at its end. Seams are measured then: what is timed inside is not
    disturbed."""
    engine, health, signs = decoder.engine, decoder.health, Signs()
    health.clear(memory=None)
    engine.seams_wait = True
    try:
        yield signs
        engine.score_seams()
        signs.figures = health.figures() if health.answers else None
        signs.alarms = [str(alarm) for alarm in health.alarms()]
    finally:
        engine.seams_wait = False
        health.clear()


def rate_of(metrics: Sequence[RequestMetrics], spans: int) -> Rate:
    """The large model's share of all tokens, and the mean length of its `spans` spans; of none, NO_SPAN."""
    tokens, large = sum(m.tokens for m in metrics), sum(m.large.tokens for m in metrics)
    return Rate(large / tokens if tokens else 0.0, max(1, round(large / spans)) if spans else NO_SPAN)


def prompts_of(decoder: SplitDecoder, task: Task, item: Item, hint: bool) -> Pair[str]:
    """What each model reads. Families: the prompt as it is. Questions: what split/questions.py makes of them, the hint
    in the small model's alone."""
    if not task.chat:
        return Pair(item.prompt, item.prompt)
    return question_prompts(item.prompt, decoder.templates, hint=hint)


def _generate(
    decoder: SplitDecoder,
    task: Task,
    row: Row,
    items: Sequence[Item],
    params: Sequence[SamplingParams],
    policies: list[HandoffPolicy],
    salt: str,
    *,
    use_tqdm: bool,
) -> list[RequestOutput]:
    texts = [prompts_of(decoder, task, item, row.hint) for item in items]
    asked = Pair.of(lambda r: [_salted(text[r], f"{task.name}/{row.name}/{salt}") for text in texts])
    return decoder.generate(
        asked[Role.SMALL], params, handoff=policies, large_prompt=asked[Role.LARGE], use_tqdm=use_tqdm
    )


def _salted(text: str, salt: str) -> Prompt:
    return {"prompt": text, "cache_salt": salt}


def _answer(task: Task, row: Row, decoder: SplitDecoder, index: int, output: RequestOutput) -> Answer:
    item, answer = task.items[index], output.outputs[0]
    decides = row.kind in ("split", "accept", "random", "forced")
    decisions, compared = _decisions(task, item, decoder, answer) if decides else (None, (0, 0))
    forced = (kept(decoder.tokens, item, answer), len(item.hard or ())) if row.kind == "forced" else None
    return Answer(
        item=index,
        right=answer.finish_reason != "error" and task.score(answer.text, item.answer),
        output=answer,
        metrics=output.metrics,
        spans=sum(span.model == str(Role.LARGE) for span in answer.spans),
        decisions=decisions,
        compared=compared,
        kept=forced,
    )


def _decisions(
    task: Task, item: Item, decoder: SplitDecoder, answer: CompletionOutput
) -> tuple[Decisions | None, tuple[int, int]]:
    """Against the labels of the answer's own text where a rule gives them, else its solution's as far as they agree."""
    handed = large_ranges(decoder.tokens, answer)
    if task.labels is not None:
        length = len(answer.text)
        return compare(handed, task.labels(answer.text), length), (length, length)
    if item.reference is None or item.hard is None:
        return None, (0, 0)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(answer.text, item.reference, strict=False))
    length = sum(1 for _ in same)
    return compare(handed, item.hard, length), (length, len(item.reference))
