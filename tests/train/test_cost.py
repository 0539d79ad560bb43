"""The cost model: fitted, written, and the same for equal answers, whatever ran beside them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitdecode import LargeOnly, RequestOutput, SamplingParams, SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import problems
from splitdecode.split.outputs import CompletionOutput, ModelMetrics, ModelSpan, RequestMetrics
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import OPEN_TAG
from splitdecode.train.cost import Answer, CostModel, nonnegative_least_squares, run_of, work
from splitdecode.train.rewards import Latency, combine, latency

COST = CostModel(step_ms=Pair(1.0, 4.0), token_ms=Pair(0.1, 0.5), handoff_ms=Pair(7.0, 5.0))


def answer_of(authors: list[tuple[str, int]], metrics: RequestMetrics | None = None) -> Answer:
    """An answer of these spans, an opening tag before each of the large model's."""
    spans, text, at = [], "", 0
    for name, count in authors:
        spans.append(ModelSpan(name, at, at + count))
        text, at = text + OPEN_TAG * (name == "large") + "x", at + count
    return Answer(text, None, metrics, spans)


@pytest.mark.parametrize(
    ("authors", "small", "large"),
    [
        ([], (0, 0, 0), (0, 0, 0)),
        ([("small", 7)], (7, 7, 0), (0, 0, 0)),
        ([("small", 7), ("large", 4)], (8, 11, 1), (4, 11, 1)),
        ([("small", 7), ("large", 5), ("small", 2)], (11, 14, 1), (5, 12, 1)),  # what is behind a span is not caught up
        ([("large", 1), ("small", 3), ("large", 9)], (3 + 1 + 3, 13, 2), (10, 13, 2)),
    ],
)
def test_work_by_hand(authors: list[tuple[str, int]], small: tuple[int, ...], large: tuple[int, ...]) -> None:
    assert work(answer_of(authors), 4) == Pair(small, large)


def planted(rng: np.random.Generator, noise: float) -> Answer:
    authors = [(name, int(rng.integers(1, 60))) for _ in range(rng.integers(1, 6)) for name in ("small", "large")]
    answer, models = answer_of(authors), []
    for role, (steps, positions, handoffs) in zip(Role, work(answer_of(authors), 4), strict=True):
        ms = COST.step_ms[role] * steps + COST.token_ms[role] * (30 + positions) + COST.handoff_ms[role] * handoffs
        models.append(ModelMetrics(forwards=1, ms=ms * (1 + noise * rng.standard_normal()), prompt_tokens=30))
    return Answer(answer.text, None, RequestMetrics(models=Pair(*models)), answer.spans)


def test_a_planted_cost_is_found() -> None:
    rng = np.random.default_rng(0)
    exact = CostModel.calibrate([planted(rng, 0.0) for _ in range(20)])
    noisy = CostModel.calibrate([planted(rng, 0.02) for _ in range(1000)])
    for role in Role:
        for name in ("step_ms", "token_ms", "handoff_ms"):
            assert getattr(exact, name)[role] == pytest.approx(getattr(COST, name)[role])
        assert noisy.step_ms[role] == pytest.approx(COST.step_ms[role], rel=0.1)


def test_answers_in_which_a_model_ran_nothing_say_nothing_of_it() -> None:
    rng = np.random.default_rng(3)
    idle = RequestMetrics(models=Pair(ModelMetrics(), ModelMetrics(forwards=50, ms=50 * 4.5, prompt_tokens=0)))
    alone = Answer("x", None, idle, [ModelSpan("large", 0, 50)])
    found = CostModel.calibrate([*(planted(rng, 0.0) for _ in range(20)), *[alone] * 20])
    assert found.step_ms.small == pytest.approx(COST.step_ms.small)
    assert found.step_ms.large == pytest.approx(COST.step_ms.large)


@given(st.integers(0, 10**6))
def test_least_squares_meet_the_optimality_conditions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((6, 3)), rng.standard_normal(6)
    x = nonnegative_least_squares(a, b)
    gradient = a.T @ (a @ x - b)
    assert (x >= 0).all()
    assert (gradient >= -1e-8).all()
    assert np.abs(gradient[x > 0]).max(initial=0) < 1e-8


def test_columns_that_say_the_same_are_used_once() -> None:
    a = np.array([[1.0, 1.0], [2.0, 2.0]])
    assert nonnegative_least_squares(a, np.array([3.0, 6.0])) == pytest.approx(np.array([3.0, 0.0]))


def test_what_cannot_be_fitted_is_named() -> None:
    with pytest.raises(RequestError, match="CostModel: found no answers"):
        CostModel.calibrate([])
    with pytest.raises(RequestError, match="CostModel: found an answer without metrics"):
        CostModel.calibrate([Answer("x", spans=[])])
    timed = RequestMetrics(models=Pair(ModelMetrics(forwards=1, ms=math.nan), ModelMetrics()))
    with pytest.raises(RequestError, match="CostModel: found nan ms"):
        CostModel.calibrate([Answer("x", None, timed, [])])


def counters(output: RequestOutput) -> tuple[int, ...]:
    models = output.metrics.models
    return tuple(n for work in models for n in (work.forwards, work.writes, work.catch_up_tokens, work.read_tokens))


def test_jitter_is_no_advantage() -> None:
    """Answers of the runtime, many at once: equal texts are worth the same, bit by bit, though the runtime's counters
    and its clock tell them apart. So a group of equal answers has no advantages, however they are scaled."""
    asked = [task.prompt for task in problems(4, 3) for _ in range(24)]
    params = [SamplingParams(temperature=1.0, max_tokens=320, seed=seed) for seed in range(len(asked))]
    with SplitDecoder.demo(max_num_seqs=64) as decoder:
        outputs = decoder.generate(asked, params)
        cost = CostModel.calibrate([Answer.of(output) for output in outputs], decoder.config.read_interval)
    groups: dict[tuple[str | None, str], list[RequestOutput]] = defaultdict(list)
    for output in outputs:
        groups[output.prompt, output.outputs[0].raw_text].append(output)
    equal = [group for group in groups.values() if len(group) > 1]
    assert sum(map(len, equal)) >= 24
    for group in equal:
        worth = torch.tensor([latency(Answer.of(one), Latency.MODELLED, cost) for one in group], dtype=torch.float64)
        assert len(set(worth.tolist())) == 1
        advantages = (worth - worth[0]) / (worth.std() + 1e-4)
        assert not advantages.any()
    told_apart = [
        group for group in equal if len({latency(Answer.of(one), Latency.MEASURED, cost) for one in group}) > 1
    ]
    counted = [group for group in equal if len({counters(one) for one in group}) > 1]
    assert told_apart  # so the clock would be an advantage
    assert counted  # and so would counters


def test_real_answers() -> None:
    """Measured on the embedded pair: right answers, and the split costs less than the large model alone would."""
    tasks, params = problems(6, 3), SamplingParams(temperature=0, max_tokens=400)
    with SplitDecoder.demo() as decoder:
        prompts = [task.prompt for task in tasks]
        outputs = decoder.generate(prompts, params)
        alone = decoder.generate(prompts, params, handoff=LargeOnly())
    cost = CostModel.calibrate([Answer.of(output) for output in (*outputs, *alone)])
    reward = combine({"accuracy": 1, "latency": 1}, scoring="integer", cost=cost)
    for task, output, other in zip(tasks, outputs, alone, strict=True):
        found = reward(Answer.of(output, str(task.answer)))
        assert found.terms["accuracy"] == 1
        assert -1 < found.terms["latency"] < 0
        written = other.metrics.large.tokens
        small = cost.step_ms.small, cost.token_ms.small, cost.handoff_ms.small
        assert cost.ms(Answer.of(other)) >= cost.large_only_ms(written) > 0 < sum(small)


def output_of(prompt: str, text: str) -> RequestOutput:
    one = CompletionOutput(0, text, text, [1], [ModelSpan("small", 0, 1)], "stop", None)
    return RequestOutput("r", prompt, [1], [one], True, RequestMetrics())


def test_a_think_that_the_prompt_opened_is_put_back() -> None:
    rest = "a\n</think>\n<answer>\n\\boxed{7}\n</answer>"
    reward = combine({"accuracy": 1, "format": 1, "tag_count": 1})
    for prompt, text, worth in (
        ("Question<think>\n", rest, (1, 2, 2)),
        ("Question", rest, (1, 1, 1.5)),  # the scaffold lacks its first piece
        ("Question", "<think>\n" + rest, (1, 2, 2)),
        ("<think>\nQuestion", rest, (1, 1, 1.5)),
    ):
        assert tuple(reward(Answer.of(output_of(prompt, text), "7")).terms.values()) == worth


def test_a_written_cost_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    assert run_of(file) is None
    COST.write(file, "mine")
    assert CostModel.read(file) == COST
    assert run_of(file) == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "cannot be read"),
        ("[1, 2]", "cannot be read"),
        ("{", "cannot be read"),
        ({"step_ms": None}, "step_ms: found None, expected an object of two finite numbers from 0"),
        ({"token_ms": {"small": 1}}, "token_ms: found"),
        ({"token_ms": {"small": 1, "large": -1}}, "token_ms: found"),
        ({"handoff_ms": {"small": True, "large": 1}}, "handoff_ms: found"),
        ({"handoff_ms": {"small": math.inf, "large": 1}}, "handoff_ms: found"),
        ({"read_interval": 0}, "read_interval: found 0, expected a whole number from 1"),
        ({"speed": 1}, "found 'speed', expected step_ms"),
        ({"step_ms": {"small": 1, "large": 0}, "token_ms": {"small": 1, "large": 0}}, "found 0 ms for a token"),
    ],
)
def test_a_file_that_holds_no_cost_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    if isinstance(change, dict):
        file.write_text(json.dumps({**COST.as_dict(), **change}), "utf-8")
    elif change is not None:
        file.write_text(change, "utf-8")
    with pytest.raises(RequestError) as raised:
        CostModel.read(file)
    assert said in str(raised.value)
    assert str(raised.value).startswith(f"--cost: {file}")
