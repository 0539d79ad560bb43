"""Each sign of a sick pair: a healthy pair raises no alarm, an injected fault raises that one."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.scripted import Stage

from splitdecode import SamplingParams, SplitDecoder
from splitdecode.families import problems
from splitdecode.split import engine
from splitdecode.split.health import MEMORY, MIN_ANSWERS, Health, Seen, paired, seam_jump
from splitdecode.split.outputs import ModelMetrics
from splitdecode.split.policies import LargeOnly
from splitdecode.split.roles import Pair, Role

PARAMS = SamplingParams(temperature=0.0, max_tokens=200)
OPEN, CLOSE = ("<", "big", "model", ">"), ("</", "big", "model", ">")


def steps_take(decoder: SplitDecoder, small: float, large: float) -> None:
    """Every step of a model takes so many milliseconds."""
    for role, ms in zip(Role, (small, large), strict=True):
        runner = decoder.engine.runners[role]

        def launch(batch: Any, counts: Any = (), inner: Any = runner.launch, ms: float = ms) -> Any:
            return replace(inner(batch, counts), ms=ms)

        runner.launch = launch  # type: ignore[method-assign]


def names(decoder: SplitDecoder) -> list[str]:
    return [alarm.name for alarm in decoder.health.alarms()]


def answer_all(decoder: SplitDecoder, count: int = MIN_ANSWERS) -> None:
    for problem in problems(count, 5):
        decoder.generate(problem.prompt, PARAMS)


def test_a_healthy_pair_raises_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    decoder = SplitDecoder.demo(watch_seams=2)
    steps_take(decoder, 1.0, 17.0)
    answer_all(decoder)
    figures = decoder.health.figures()
    assert decoder.health.alarms() == []
    assert caplog.records == []
    assert 0.02 < figures["offload"] < 0.1
    assert (figures["tags"], figures["no_return"]) == (0.0, 0.0)
    assert 0.3 < figures["slow"] < 1.0
    assert figures["no_gain"] > 5
    assert figures["seam"] is not None
    assert [len(seam) for seam in decoder.health.seams] == [MIN_ANSWERS // 2] * 2


def test_too_much_is_handed_over(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage().small(0, "a", *OPEN).large(1, *"bcbcbcbc").small(13, *CLOSE, "T", "<|eos|>")
    with caplog.at_level(logging.WARNING, "splitdecode"):
        for _ in range(2 * MIN_ANSWERS):
            stage.run()
    assert stage.decoder.health.figures()["offload"] == pytest.approx(8 / 11)
    assert "offload" in names(stage.decoder)
    said = [record.getMessage() for record in caplog.records if "offload" in record.getMessage()]
    assert len(said) == 1, "an alarm is logged once"
    assert said[0].startswith("offload: 0.727, above 0.2: ")


def test_tags_that_do_not_pair_up() -> None:
    stage = Stage().small(0, "a", *CLOSE, "b", "<|eos|>")
    for _ in range(MIN_ANSWERS):
        assert stage.run().outputs[0].raw_text == "a</bigmodel>b"
    assert stage.decoder.health.figures()["tags"] == 1.0
    assert "tags" in names(stage.decoder)


def test_spans_that_never_return() -> None:
    stage = Stage(max_span=3).small(0, "a", *OPEN).large(1, *"bcbcbcbc").small(12, "T", "<|eos|>")
    for _ in range(MIN_ANSWERS):
        assert stage.run().outputs[0].raw_text == "a<bigmodel>bcb</bigmodel>T"
    assert stage.decoder.health.figures()["no_return"] == 1.0
    assert "no_return" in names(stage.decoder)


def test_slow_despite_offloading() -> None:
    """Catching up token by token, as a runtime without a batched prefill does."""
    decoder = SplitDecoder.demo(max_num_batched_tokens=1, enable_prefix_caching=False)
    steps_take(decoder, 1.0, 17.0)
    answer_all(decoder)
    assert decoder.health.figures()["slow"] < 0.3
    assert "slow" in names(decoder)


def test_the_large_model_alone_would_be_faster() -> None:
    decoder = SplitDecoder.demo()
    steps_take(decoder, 1.0, 1.0)
    answer_all(decoder)
    assert decoder.health.figures()["no_gain"] < 1.0
    assert names(decoder) == ["no_gain"]


def test_a_model_that_reads_another_vocabulary_finds_the_text_absurd() -> None:
    decoder = SplitDecoder.demo(watch_seams=1)
    weights = decoder.models.large.weights
    order = torch.randperm(len(weights.embed), generator=torch.Generator().manual_seed(0))
    weights.embed.copy_(weights.embed[order].clone())  # tied: what it reads and what it writes
    answer_all(decoder)
    assert decoder.health.figures()["seam"] > 3.0
    assert "seam" in names(decoder)


def test_policies_of_ones_own_are_no_fault() -> None:
    decoder = SplitDecoder.demo()
    for problem in problems(MIN_ANSWERS, 5):
        decoder.generate(problem.prompt, PARAMS, handoff=LargeOnly())
    assert len(decoder.health.answers) == 0
    assert decoder.health.alarms() == []
    assert set(decoder.health.figures().values()) == {None}


def test_an_answer_cut_short_need_not_have_closed_its_tags_but_the_span_did_not_return() -> None:
    """max_span lies far behind the end of the answer."""
    stage = Stage().small(0, "a", *OPEN).large(1, *"bcbcbcbcbc")
    for _ in range(MIN_ANSWERS):
        assert stage.run(max_tokens=6).outputs[0].finish_reason == "length"
    figures = stage.decoder.health.figures()
    assert (figures["tags"], figures["no_return"]) == (None, 1.0)
    assert "no_return" in names(stage.decoder)


def test_a_span_that_ends_the_answer_did_not_return() -> None:
    stage = Stage().small(0, "a", *OPEN).large(1, *"bcb", "<|eos|>")
    assert stage.run().outputs[0].finish_reason == "stop"
    figures = stage.decoder.health.figures()
    assert (figures["tags"], figures["no_return"]) == (1.0, 1.0)


def test_an_answer_cut_short_by_the_small_model_has_spans_that_returned() -> None:
    stage = Stage().small(0, "a", *OPEN).large(1, *"bcbcbcbc").small(13, *CLOSE, "T", "T", "T", "T")
    assert stage.run(max_tokens=10).outputs[0].finish_reason == "length"
    assert stage.decoder.health.figures()["no_return"] == 0.0


def test_seams_can_wait() -> None:
    """What is timed is not disturbed by two prefills; both ways the figure is the same."""
    found = []
    for waits in (False, True):
        decoder = SplitDecoder.demo(watch_seams=2)
        decoder.engine.seams_wait = waits
        decoder.generate([problem.prompt for problem in problems(5, 5)], PARAMS)
        measured = [len(seam) for seam in decoder.health.seams]
        assert measured == ([0, 0] if waits else [2, 2])
        decoder.engine.score_seams()
        assert [len(seam) for seam in decoder.health.seams] == [2, 2]
        assert decoder.health.unscored == []
        found.append(decoder.health.figures()["seam"])
    assert found[0] == found[1] is not None


def test_no_memory_for_a_seam_ends_no_answer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(engine, "token_logprobs", full)
    decoder = SplitDecoder.demo(watch_seams=1)
    (output,) = decoder.generate(problems(1, 5)[0].prompt, PARAMS)
    assert output.outputs[0].finish_reason == "stop"
    assert decoder.health.figures()["seam"] is None
    assert "seam: not measured: no memory left for a prefill of " in caplog.text


def test_figures_are_of_the_last_answers_only() -> None:
    health = Health()
    for k in range(MEMORY + 5):
        models = Pair(ModelMetrics(tokens=10, ms=10.0), ModelMetrics(tokens=10 if k < 5 else 0, ms=1.0))
        health.settle(Seen(models, 1, 0, True))
    assert health.figures()["offload"] == 0.0


def test_all_answers_can_be_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    real = Health.alarms
    monkeypatch.setattr(Health, "alarms", lambda self: looks.append(self._ended) or real(self))
    health = Health()
    health.clear(memory=None)
    for k in range(16 * MEMORY):
        health.settle(Seen(Pair(ModelMetrics(tokens=3), ModelMetrics(tokens=5 if k < 3 else 1)), 1, 0, True))
    assert health.figures()["offload"] == pytest.approx((16 * MEMORY + 12) / (4 * 16 * MEMORY + 12))
    assert len(looks) < 40  # rarer as they cost more
    assert looks[-1] > 12 * MEMORY


def test_looks_for_alarms_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look sums over all that is remembered: it must not come with every answer."""
    looks: list[int] = []
    monkeypatch.setattr(Health, "alarms", lambda self: looks.append(self._ended) or [])
    health = Health()
    for _ in range(300):
        health.settle(Seen(Pair(ModelMetrics(), ModelMetrics()), 0, 0, True))
    assert looks == [*range(8, 64, 8), 64, 128, 192, 256]


@given(st.lists(st.integers(0, 3), max_size=12))
def test_tags_pair_up_as_brackets_without_nesting(patterns: list[int]) -> None:
    word = "".join("()"[pattern] for pattern in patterns if pattern < 2)
    assert paired(patterns) == (re.fullmatch(r"(\(\))*", word) is not None)


def test_seam_jump_by_hand() -> None:
    logprobs = np.array([math.nan, -1.0, -3.0, -5.0, -9.0])
    assert seam_jump(logprobs, np.array([1, 1, 1, 0, -1])) == pytest.approx(-2.0 + 5.0)
    assert seam_jump(logprobs, np.array([1, 1, 1, 1, -1])) is None
    assert seam_jump(logprobs, np.array([0, 1, 1, 1, -1])) is None
