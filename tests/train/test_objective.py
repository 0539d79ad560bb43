"""The log-probability of an answer: complete, the runtime's own, and blind to what the policy did not do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.hf import exact
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import splitdecode
from splitdecode import SamplingParams, SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import problems
from splitdecode.split.roles import Role
from splitdecode.split.rollout import Rollout
from splitdecode.train.objective import act_count, act_logprobs, log1mexp, policy_loss

PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"
A, B, BEGIN, END, BOTH = range(5)  # words; `BEGIN END` is the closing tag, and so is `BOTH`
ENTERING = [BEGIN, BOTH]
SPAN = [A, B, A]


def policy_of(model: Qwen2ForCausalLM) -> object:
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.6, max_position_embeddings=64,
    )  # fmt: skip
    return exact(Qwen2ForCausalLM(config)).eval()  # type: ignore[return-value]


def rollout_of(ids: list[int], sampled: list[bool], passed: list[int], dead: list[tuple[int, list[int]]]) -> Rollout:
    own = np.array(sampled, dtype=bool)
    authors = np.where(own, np.int8(1), np.int8(0))
    return Rollout([A, B], ids, own, authors, np.where(own, 0.0, np.nan).astype(np.float32), passed, dead)


def every_answer() -> Iterator[Rollout]:
    """All there is to do while three large tokens are read and the cap comes behind the third: at the first and at the
    second prefix begin no tag, begin one that dies, close by one token or by two. Behind a closing nothing follows."""
    stay: list[list[int]] = [[], *([BEGIN, other] for other in (A, B, BEGIN, BOTH))]
    close = [[BOTH], [BEGIN, END]]
    for first in (*stay, *close):
        if first in close:
            yield rollout_of(SPAN[:1] + first, [False] + [True] * len(first), [], [])
            continue
        before = [(1, first)] if first else []
        for second in (*stay, *close):
            if second in close:
                yield rollout_of(SPAN[:2] + second, [False] * 2 + [True] * len(second), [1], before)
            else:
                yield rollout_of(SPAN, [False] * 3, [1, 2], before + ([(2, second)] if second else []))


def test_all_answers_together_are_certain(model: Qwen2ForCausalLM) -> None:
    answers = list(every_answer())
    assert len(answers) == 2 + 5 * 7
    acts = act_logprobs(policy_of(model), answers, ENTERING)  # type: ignore[arg-type]
    chances = torch.stack([one.all().sum().exp() for one in acts])
    assert float(chances.detach().sum()) == pytest.approx(1.0, abs=1e-12)
    model.zero_grad()
    chances.sum().backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-12


def test_temperature_is_that_of_the_draws(model: Qwen2ForCausalLM) -> None:
    answers = list(every_answer())
    acts = act_logprobs(policy_of(model), answers, ENTERING, temperature=0.7)  # type: ignore[arg-type]
    assert float(sum(one.all().sum().exp() for one in acts).detach()) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(RequestError, match="temperature: found 0"):
        act_logprobs(policy_of(model), answers, ENTERING, temperature=0)  # type: ignore[arg-type]


def test_log_probs_are_the_runtimes_own() -> None:
    decoder = SplitDecoder.demo()
    params = SamplingParams(temperature=1.0, max_tokens=200, seed=11, rollout=True)
    outputs = decoder.generate([problem.prompt for problem in problems(6, 9)], params)
    rollouts = [output.outputs[0].rollout for output in outputs]
    trainer = Qwen2ForCausalLM.from_pretrained(PAIR / "small", dtype=torch.float32)
    entering = decoder.tokens.entering(Role.SMALL, decoder.tokens.tags[1])
    acts = act_logprobs(policy_of(trainer), rollouts, entering)  # type: ignore[arg-type]
    for rollout, one in zip(rollouts, acts, strict=True):
        assert rollout is not None
        drawn = one.drawn.detach().numpy()
        np.testing.assert_allclose(drawn, rollout.logprobs[rollout.sampled], atol=1e-4)
        assert len(one.stayed) == len(rollout.passed) > 0
        assert (one.stayed <= 0).all()


def test_the_hazard_of_closing_is_the_runtimes_own() -> None:
    """The probability to read on, by the trainer: that of the runtime's model; and the runtime closes as often as that
    says: at each prefix it begins a tag with probability q, so begun - q, summed over all prefixes, is about 0."""
    decoder = SplitDecoder.demo(max_num_seqs=128)
    params = [SamplingParams(temperature=2.0, max_tokens=120, seed=seed, rollout=True) for seed in range(96)]
    outputs = decoder.generate([problem.prompt for problem in problems(96, 9)], params)
    entering = decoder.tokens.entering(Role.SMALL, decoder.tokens.tags[1])
    trainer = Qwen2ForCausalLM.from_pretrained(PAIR / "small", dtype=torch.float32)
    rollouts, begun, prefixes = [], 0, 0
    for output in outputs:
        one = output.outputs[0].rollout
        assert one is not None
        # A token that it drew behind one of the large model's began a closing tag, which completed.
        closed = [at for at in np.flatnonzero(one.sampled).tolist() if at and one.authors[at - 1] == 0]
        begun += len(closed) + len(one.dead)
        prefixes += len(closed) + len(one.passed)
        rollouts.append(replace(one, passed=sorted({*one.passed, *closed}), dead=[]))
    with torch.no_grad():
        acts = act_logprobs(policy_of(trainer), rollouts, entering, temperature=2.0)  # type: ignore[arg-type]
        cold = act_logprobs(policy_of(trainer), rollouts[:4], entering)  # type: ignore[arg-type]
    hazards = -torch.cat([one.stayed for one in acts]).double().expm1().numpy()
    assert len(hazards) == prefixes > begun > 50
    spread = float(np.sqrt((hazards * (1 - hazards)).sum()))
    assert 2 < spread < 0.1 * begun
    assert abs(begun - hazards.sum()) < 4 * spread
    for one, act in zip(rollouts[:4], cold, strict=True):
        for at, stay in list(zip(one.passed, act.stayed.tolist(), strict=True))[:3]:
            prefix = one.prompt_token_ids + one.ids[:at]
            q = sum(math.exp(found[-1]) for found in decoder.score([[*prefix, token] for token in entering]))
            assert stay == pytest.approx(math.log1p(-q), abs=1e-4)


def test_no_gradient_falls_on_what_others_wrote(model: Qwen2ForCausalLM) -> None:
    """Of logits that predict a foreign token nothing is asked but whether a tag began."""
    kept: list[Tensor] = []

    def policy(ids: Tensor, mask: Tensor) -> Tensor:
        kept.append(model(input_ids=ids, attention_mask=mask).logits.detach().requires_grad_())
        return kept[-1]

    own = [True, True, False, False, False, True, False, True]
    ids = [A, BEGIN, B, A, B, END, A, B]
    for passed in ([], [4]):
        rollout = rollout_of(ids, own, passed, [])
        (one,) = act_logprobs(policy, [rollout], ENTERING)
        policy_loss([one.all()], torch.tensor([1.0])).backward()
        gradient = kept[-1].grad
        assert gradient is not None
        predicts = gradient[0, 1:-1]  # row i predicts ids[i]
        foreign = [i for i, mine in enumerate(own) if not mine and i not in passed]
        assert (predicts[foreign] == 0).all()
        assert (predicts[[i for i, mine in enumerate(own) if mine]].abs().sum(1) > 0).all()
        for at in passed:
            p = kept[-1][0, 1 + at].detach().softmax(-1)
            q = float(p[ENTERING].sum())
            enters = torch.tensor([float(word in ENTERING) for word in range(5)], dtype=torch.float64)
            wanted = p * (enters - q) / (1 - q) / len(one.all())  # minus the gradient of log(1 - q)
            torch.testing.assert_close(predicts[at], wanted, rtol=1e-9, atol=1e-12)


def test_log1mexp_at_both_ends() -> None:
    x = torch.tensor([-1e-12, -1e-3, -0.5, -1.0, -30.0, -700.0], dtype=torch.float64, requires_grad=True)
    found = log1mexp(x)
    wanted = [math.log(-math.expm1(v)) if v > -0.7 else math.log1p(-math.exp(v)) for v in x.tolist()]
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-12)
    found.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_loss_by_hand() -> None:
    acts = [torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-0.5], requires_grad=True)]
    loss = policy_loss(acts, torch.tensor([1.0, -2.0]))
    assert float(loss.detach()) == pytest.approx(-(1 + 1 - 2) / 3)
    loss.backward()
    assert acts[0].grad is not None
    assert acts[1].grad is not None
    assert acts[0].grad.tolist() == pytest.approx([-1 / 3, -1 / 3])
    assert acts[1].grad.tolist() == pytest.approx([2 / 3])
    old = [torch.tensor([-1.0, -3.0]), torch.tensor([-1.5])]
    clipped = policy_loss([one.detach() for one in acts], torch.tensor([1.0, -2.0]), old, clip=0.2)
    assert float(clipped) == pytest.approx(-(1.0 + 1.2 - 2.0 * math.e) / 3)
    for wrong in ((acts, torch.ones(3), None), (acts, torch.ones(2), old[:1])):
        with pytest.raises(RequestError, match="expected one for one"):
            policy_loss(*wrong)
    parts = [policy_loss(acts[n : n + 1], torch.tensor([1.0, -2.0])[n : n + 1], total=3) for n in range(2)]
    assert float(sum(parts).detach()) == pytest.approx(float(loss.detach()))
    assert float(policy_loss([torch.zeros(0)], torch.ones(1), total=3)) == 0  # an answer without acts is a part too
    with pytest.raises(RequestError, match="no act"):
        policy_loss([torch.zeros(0)], torch.ones(1))


def test_acts_are_counted_as_they_are_scored(model: Qwen2ForCausalLM) -> None:
    answers = list(every_answer())
    acts = act_logprobs(policy_of(model), answers, ENTERING)  # type: ignore[arg-type]
    assert [act_count(one) for one in answers] == [len(one.all()) for one in acts]


def test_a_tag_that_was_certain_leaves_a_finite_gradient() -> None:
    """Where a policy in low precision says that it must close, and it did not."""
    logits = torch.full((1, 5, 5), -100.0).index_fill(2, torch.tensor(BOTH), 100.0).requires_grad_()
    (one,) = act_logprobs(lambda ids, mask: logits, [rollout_of(SPAN, [False] * 3, [1], [])], ENTERING)
    one.all().sum().backward()
    assert torch.isfinite(one.stayed).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_every_way_to_stay_is_enumerated_once() -> None:
    keys = [(tuple(r.ids), tuple(r.passed), tuple((at, tuple(i)) for at, i in r.dead)) for r in every_answer()]
    assert all(a != b for a, b in itertools.combinations(keys, 2))
