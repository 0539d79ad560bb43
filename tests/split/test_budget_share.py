"""The share of large tokens as a target: thinning against a logit bias, the account's sums, the loop at work."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.openings import IDS, OPEN, ids, pair, run, three_openings
from oracles.tiny import PIECES
from scipy.stats import chisquare

from splitdecode import SamplingParams, SplitDecoder
from splitdecode.families import problems
from splitdecode.split.budget import ACCOUNTS, LOWEST_BIAS, SLACK, Account, Budgets, Seat, acceptance
from splitdecode.split.roles import Role


@given(p=st.floats(1e-6, 1.0), bias=st.floats(LOWEST_BIAS, 0.0))
def test_thinning_moves_the_log_odds_by_the_bias(p: float, bias: float) -> None:
    alpha = acceptance(math.log(p), bias)
    assert 0 < alpha <= 1
    assert p * alpha == pytest.approx(p * math.exp(bias) / (1 - p + p * math.exp(bias)), rel=1e-9)
    assert acceptance(0.0, bias) == 1.0
    assert acceptance(math.log(p), min(0.0, bias + 0.1)) >= alpha


class Fixed(Account):
    """Thins by a bias that stands still; notes the log-probs it was asked with."""

    def __init__(self, target: float, bias: float) -> None:
        super().__init__(target)
        self.bias, self.seen = bias, list[float]()

    def grants(self, seat: Seat, content: int, logprob: float, draws: tuple[float, float]) -> bool:
        self.seen.append(logprob)
        return draws[0] < acceptance(logprob, self.bias)


def first_tokens(bias: float, thinned: bool, number: int = 3000) -> Counter[str]:
    """What 3000 answers of one token begin with, under a bias on the opening tag: by thinning, or on its logit."""
    decoder, models = pair(max_num_seqs=256, kv_cache_memory="64MiB")
    models.small.draws(3, {OPEN: 1.0, IDS["a"]: 0.3, IDS["b"]: -0.4})
    models.large.says(3, ids("T"))
    decoder.engine.budgets.accounts[0.5] = Fixed(0.5, bias)
    more: dict[str, Any] = {"max_offload_fraction": 0.5} if thinned else {"logit_bias": {OPEN: bias}}
    params = [SamplingParams(max_tokens=1, seed=seed, **more) for seed in range(number)]
    outputs = decoder.generate([{"prompt_token_ids": ids("a", "b", "c")}] * number, params)
    return Counter(output.outputs[0].text for output in outputs)


@pytest.mark.parametrize("thinned", [True, False])
@pytest.mark.parametrize("bias", [0.0, -0.7, -2.5])
def test_thinning_is_a_logit_bias_on_the_tag(bias: float, thinned: bool) -> None:
    weights = {"T": math.exp(1.0 + bias), "a": math.exp(0.3), "b": math.exp(-0.4)}
    seen = first_tokens(bias, thinned)
    assert set(seen) == set(weights)
    wanted = [3000 * w / sum(weights.values()) for w in weights.values()]
    assert chisquare([seen[text] for text in weights], wanted).pvalue > 1e-3


def test_the_certainty_of_an_opening_is_that_of_all_its_tokens() -> None:
    decoder, models = pair(PIECES)
    models.small.draws(3, {IDS["(<"]: 0.0, IDS["a"]: -1.0}).draws(4, {IDS["big"]: 0.0, IDS["b"]: -2.0})
    models.small.says(5, ids("model", ">T")).says(7, ids("c", "<|eos|>"))
    decoder.engine.budgets.accounts[0.5] = account = Fixed(0.5, LOWEST_BIAS)
    output = run(decoder, max_offload_fraction=0.5)
    assert account.seen == [pytest.approx(-math.log1p(math.exp(-1.0)) - math.log1p(math.exp(-2.0)), abs=1e-6)]
    assert output.metrics.budget_rejections == {"fraction": 1}
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None
    again = run(decoder, max_offload_fraction=0.5, logprobs=2).outputs[0]
    assert again.token_ids == output.outputs[0].token_ids
    assert again.logprobs is not None
    assert len(again.logprobs[-1] or ()) == 2


# ---- the account


def test_requests_without_a_share_have_no_account() -> None:
    decoder = three_openings()
    run(decoder)
    run(decoder, max_offloads=1, max_large_tokens=3, deadline_ms=1e6, max_offload_fraction=1.0)
    assert decoder.engine.budgets.accounts == {}
    params = SamplingParams()
    budgets = Budgets(decoder.config, lambda: 0.0)
    assert all(budgets.sampling(params, role) is params for role in Role)
    asked = SamplingParams(max_offload_fraction=0.5)
    assert budgets.sampling(asked, Role.LARGE) is asked
    assert budgets.sampling(asked, Role.SMALL).logprobs == 0


def test_an_engine_forgets_targets_beyond_so_many() -> None:
    budgets = Budgets(three_openings().config, lambda: 0.0)
    for index in range(ACCOUNTS + 5):
        budgets.of(SamplingParams(max_offload_fraction=index / (2 * ACCOUNTS)), 0, 0.0)
    assert len(budgets.accounts) == ACCOUNTS
    assert 0.0 not in budgets.accounts


def test_a_share_of_nothing_opens_nothing() -> None:
    decoder = three_openings()
    for seed in range(5):
        assert run(decoder, max_offload_fraction=0.0, seed=seed).metrics.budget_rejections == {"fraction": 3}


def test_an_aborted_answer_leaves_its_account() -> None:
    decoder = three_openings()
    account = decoder.engine.budgets.accounts[0.9] = Account(0.9)
    made = decoder._request(ids("a", "b", "c"), None, SamplingParams(max_offload_fraction=0.9, max_tokens=40), None)
    decoder._queue(made, "it")
    while account.balance == 0.0:
        decoder.engine.tick()
    decoder.abort("it")
    assert account.balance == pytest.approx(0.0, abs=1e-12)
    assert account.answer.count == 0


moves = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(["ask", "grow", "close", "end", "leave"]), st.floats(-12.0, 0.0)),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(target=st.floats(0.0, 0.99), moves=moves, seed=st.integers(0, 99))
def test_the_account_adds_up(target: float, moves: list[tuple[int, str, float]], seed: int) -> None:
    """Its balance against sums over all answers; what it grants never overdraws it by more than what that costs."""
    rng, account = random.Random(seed), Account(target)
    running = [(Seat(), [10], [0]) for _ in range(5)]  # seat, content, length of the span or 0
    ended: list[tuple[float, float]] = []
    for index, move, logprob in moves:
        seat, content, span = running[index]
        content[0] += (grown := rng.randint(1, 30))
        if span[0]:
            span[0] += grown
        if move == "ask" and not span[0]:
            before = seat.share
            if account.grants(seat, content[0], logprob, (rng.random(), rng.random())):
                assert account.balance > -(seat.share - before) * (1 + 1e-9)
                span[0], content[0] = 1, content[0] + 1
        elif move == "grow" and span[0]:
            closes = account.overdrawn(seat, span[0], content[0])
            assert not closes or account.balance < -SLACK * account.span.value / max(account.answer.value, content[0])
        elif move == "close" and span[0]:
            account.close(seat, span[0], content[0])
            span[0] = 0
        elif move in ("end", "leave") and not span[0]:
            if move == "end":
                account.settle(seat, seat.spent, content[0])
                ended.append((1.0, seat.spent / content[0]))
            else:
                account.leave(seat)
            running[index] = (Seat(), [10], [0])
        rows = [*ended, *((seat.released, seat.share) for seat, *_ in running)]
        assert account.balance == pytest.approx(sum(target * r - s for r, s in rows), abs=1e-9)
        assert LOWEST_BIAS <= account.bias <= 0
        assert all(0 <= released <= 1 and share >= 0 for released, share in rows)


def simulate(target: float, logprobs: list[float], answers: int, seed: int, abreast: int = 1) -> Counter[int]:
    """Answers of 100 tokens that ask every 10 of them, in turns; granted openings by their place in the answer."""
    rng, account, granted = random.Random(seed), Account(target), Counter[int]()
    shares = []
    for _ in range(answers // abreast):
        wave = [(Seat(), [0]) for _ in range(abreast)]
        for place, logprob in enumerate(logprobs):
            for seat, large in wave:
                content = 10 * (place + 1)
                if account.grants(seat, content, logprob, (rng.random(), rng.random())):
                    granted[place] += 1
                    large[0] += 4
                    account.close(seat, 4, content + 4)
        for seat, large in wave:
            account.settle(seat, large[0], 100)
            shares.append(large[0] / 100)
    assert np.mean(shares) == pytest.approx(target, rel=0.05)
    return granted


@pytest.mark.parametrize("abreast", [1, 8, 64])
@pytest.mark.parametrize("target", [0.01, 0.03, 0.05, 0.07])
def test_rejection_alone_reaches_the_target_and_favours_no_place(target: float, abreast: int) -> None:
    """Openings that are certain: of two an answer (8 %), as many first ones are granted as second ones."""
    total: Counter[int] = Counter()
    for seed in range(4):
        total += simulate(target, [0.0, 0.0], 1024, seed, abreast)
    each = 4 * 1024 * target / 0.08
    spread = math.sqrt(each)  # wider than a binomial's
    assert abs(total[0] - total[1]) < 4 * spread + 4 * 2 * abreast  # the first wave has nothing to go by


@pytest.mark.parametrize("abreast", [1, 16])
def test_the_least_certain_openings_go_first(abreast: int) -> None:
    certain, likely, rare = math.log1p(-1e-5), math.log(0.95), math.log(0.3)
    granted = simulate(0.06, [rare, certain, likely], 2048, 3, abreast)  # half of 12 %
    assert granted[1] > 1.3 * granted[2] > 1.3 * 1.3 * granted[0]


def test_a_share_above_the_natural_one_changes_nothing() -> None:
    for logprob in (0.0, math.log(0.5)):
        account, rng = Account(0.2), random.Random(0)
        seats = [Seat() for _ in range(300)]
        refused = 0
        for seat in seats:
            refused += not account.grants(seat, 40, logprob, (rng.random(), rng.random()))
            account.settle(seat, 4, 100)
        assert refused <= 3
        assert account.bias == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("abreast", [64, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("target", [0.01, 0.03])
def test_the_embedded_pair_keeps_its_share(target: float, temperature: float, abreast: int) -> None:
    """Left alone it has the large model write 4.4 %. Rejections confuse it: spans of 4 tokens become some of 300."""
    number = 500
    with SplitDecoder.demo(max_num_seqs=abreast) as decoder:
        params = [
            SamplingParams(temperature=temperature, max_tokens=400, seed=seed, max_offload_fraction=target)
            for seed in range(number)
        ]
        outputs = decoder.generate([problem.prompt for problem in problems(number, 11)], params)
        reached = np.mean([output.metrics.offload_fraction for output in outputs])
    assert reached == pytest.approx(target, rel=0.1)
