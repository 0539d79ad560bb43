"""Rollouts: the small lane as it was written and read, log-probs a trainer agrees with, every act of (not) closing."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from oracles.scripted import Stage, ids
from oracles.worlds import World, make_decoder, make_worlds, random_engine
from scipy.stats import chisquare

from splitdecode import ForcedSpans, SamplingParams, SplitDecoder
from splitdecode.families import problems
from splitdecode.split.outputs import RequestOutput
from splitdecode.split.policies import HandoffPolicy
from splitdecode.split.roles import Role
from splitdecode.split.rollout import Rollout

OPEN, CLOSE = ("<", "big", "model", ">"), ("</", "big", "model", ">")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


def of(output: RequestOutput) -> Rollout:
    found = output.outputs[0].rollout
    assert found is not None
    return found


def read_prefixes(large: list[tuple[int, int]]) -> list[int]:
    """Where it read on: in each run of large tokens behind the first of them; the last place is where it closed."""
    return [p for start, stop in large for p in range(start + 1, stop)]


def runs(authors: np.ndarray) -> list[tuple[int, int]]:
    """Half-open runs of the large model's tokens."""
    marks = np.flatnonzero(np.diff(np.concatenate(([0], authors == 0, [0])).astype(int)))
    return [(int(a), int(b)) for a, b in marks.reshape(-1, 2)]


def test_a_trainer_sees_the_same_log_probabilities() -> None:
    decoder = SplitDecoder.demo()
    params = SamplingParams(temperature=1.0, max_tokens=200, seed=3, rollout=True)
    outputs = decoder.generate([problem.prompt for problem in problems(6, 5)], params)
    scores = decoder.score([of(o).prompt_token_ids + of(o).ids for o in outputs], Role.SMALL)
    for output, score in zip(outputs, scores, strict=True):
        rollout, answer = of(output), output.outputs[0]
        theirs = score[len(rollout.prompt_token_ids) :]
        np.testing.assert_allclose(rollout.logprobs[rollout.sampled], theirs[rollout.sampled], atol=1e-4)
        assert np.isnan(rollout.logprobs[~rollout.sampled]).all()
        # Its tags are plain text that it draws token by token, so all the small model put into its lane it drew.
        assert (rollout.sampled == (rollout.authors != 0)).all()
        assert (rollout.authors == 0).sum() == output.metrics.large.tokens
        text = decoder.tokenizers.small.decode(rollout.ids, skip_special_tokens=False)
        kept = decoder.generate(
            [o.prompt for o in [output]],
            SamplingParams(temperature=1.0, max_tokens=200, seed=3, skip_special_tokens=False),
        )[0].outputs[0]
        assert text.removesuffix("<|endoftext|>") == kept.raw_text.removesuffix("<|endoftext|>")
        assert kept.token_ids == answer.token_ids
        assert rollout.passed == read_prefixes(runs(rollout.authors))
        assert rollout.dead == []


@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
def test_every_prefix_is_an_act_whatever_the_block_and_the_batch(worlds: dict[str, World], name: str) -> None:
    """What is recorded does not depend on how often the small model reads, nor on who runs beside it."""
    params = [SamplingParams(temperature=1.2, max_tokens=24, seed=seed, rollout=True) for seed in range(24)]
    prompts = [[1 + seed % 4, 2, 3] for seed in range(24)]
    found = []
    for interval, seqs in ((1, 1), (3, 8), (8, 3)):
        engine = random_engine(np.random.default_rng(7)) | {"read_interval": interval, "max_num_seqs": seqs}
        decoder = make_decoder(worlds[name], engine | {"max_model_len": 64, "max_span": 6})
        outputs = decoder.generate([{"prompt_token_ids": p} for p in prompts], params)
        found.append([of(output) for output in outputs])
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert (one.ids, one.passed, one.dead) == (other.ids, other.passed, other.dead)
            assert one.authors.tolist() == other.authors.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6, equal_nan=True)
    passed = sum(len(rollout.passed) for rollout in found[0])
    assert passed > 20
    if name == "plain":
        assert sum(len(rollout.dead) for rollout in found[0]) > 0


def test_answers_are_as_frequent_as_their_acts_say() -> None:
    """Behind one large token a tag may be begun, and dies; behind two it may close; behind three the span is over."""
    stage, h = Stage(max_span=3).small(0, *OPEN), 0.3
    stage.models.large.says(3, ids("a", "b", "c"))
    for at in (8, 9):
        stage.models.small.draws(at, {ids("</")[0]: math.log(h), ids("T")[0]: math.log(1 - h)})
    stage.models.small.says(10, ids("big", "model", ">", "T"))
    seen: Counter[tuple[bool, bool]] = Counter()
    for seed in range(500):
        rollout = of(stage.run(temperature=1.0, seed=seed, max_tokens=3, rollout=True))
        closed = rollout.passed == [5]
        assert closed or rollout.passed == [5, 6]
        assert [at for at, _ in rollout.dead] in ([], [5])
        assert float(np.nansum(rollout.logprobs)) == pytest.approx(math.log(h) if closed else 0.0, abs=1e-5)
        seen[bool(rollout.dead), closed] += 1
    chances = {(dead, closed): (h if dead else 1 - h) * (h if closed else 1 - h) for dead, closed in seen}
    assert sum(chances.values()) == pytest.approx(1.0)
    assert chisquare([*seen.values()], [500 * chance for chance in chances.values()]).pvalue > 1e-3


def test_a_tag_that_dies_is_recorded_with_what_was_drawn() -> None:
    stage = Stage(read_interval=2).small(0, "a", *OPEN).large(1, *"bcbc")
    stage.small(6, "</", "big", "T")  # begun behind b, and dead
    stage.small(7, *CLOSE, "T", "<|eos|>")  # behind bc it closes; what stands at 7, 8 above is written over
    output = stage.run(rollout=True)
    rollout = of(output)
    assert output.outputs[0].raw_text == "a<bigmodel>bc</bigmodel>T"
    assert rollout.passed == [6]
    assert rollout.dead == [(6, ids("</", "</"))]
    assert rollout.ids == ids("a", *OPEN, "b", "c", *CLOSE, "T", "<|eos|>")
    assert rollout.authors.tolist() == [1, *[-1] * 4, 0, 0, *[-1] * 4, 1, 1]
    assert rollout.sampled.tolist() == [True] * 5 + [False] * 2 + [True] * 6


@pytest.mark.parametrize("policy", [ForcedSpans([(1, 4)], tags=True, reads_along=True), None])
def test_what_was_forced_is_nobodys(policy: HandoffPolicy | None) -> None:
    stage = Stage(max_span=3).small(0, "a", *OPEN).large(1, *"bcbcbc").small(12, "T", "<|eos|>")
    if policy is not None:
        stage = Stage().small(0, "a").large(1, *"bcbcbc").small(12, "T", "<|eos|>")
    rollout = of(stage.run(policy, rollout=True))
    assert rollout.ids == ids("a", *OPEN, *"bcb", *CLOSE, "T", "<|eos|>")
    assert rollout.sampled.tolist() == [True] + [policy is None] * 4 + [False] * 7 + [True] * 2
    assert rollout.passed == ([] if policy is not None else [6, 7]), "the cap is reached before a draw at 8"


def test_an_answer_cut_short_keeps_what_became_content() -> None:
    stage = Stage(read_interval=4).small(0, "a", *OPEN).large(1, *"bcbcbc")
    rollout = of(stage.run(max_tokens=3, rollout=True))
    assert rollout.ids == ids("a", *OPEN, "b", "c")
    assert rollout.passed == [6]


def test_nothing_is_kept_unless_asked() -> None:
    stage = Stage().small(0, "a", "<|eos|>")
    assert stage.run().outputs[0].rollout is None
    assert stage.run().outputs[0].logprobs is None
    assert stage.run(rollout=True).outputs[0].logprobs is None, "the caller did not ask for these"
