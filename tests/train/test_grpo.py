"""GRPO on TRL, with the real pair in the rollouts: what is logged, what the gradient sees, when it stops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM, TrainerCallback

import splitdecode
from splitdecode import RequestOutput, SamplingParams, SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import Problem, boxed, problems
from splitdecode.split.roles import Role
from splitdecode.split.tokens import CLOSE_TAG
from splitdecode.train import sft
from splitdecode.train.grpo import Converged, Rollouts, make_trainer

pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("others_warnings")
PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"
PARAMS = SamplingParams(temperature=1.6, max_tokens=200, seed=1)


def right(output: RequestOutput, problem: Problem) -> float:
    return float(boxed(output.outputs[0].text) == problem.answer)


def cost(output: RequestOutput, problem: Problem) -> float:
    return -(output.metrics.small.tokens + 17 * output.metrics.large.tokens) / (17 * 150)


def untrained() -> dict[str, torch.Tensor]:
    return dict(Qwen2ForCausalLM.from_pretrained(PAIR / "small", dtype=torch.float32).state_dict())


def rollouts_of(count: int = 8, **options: Any) -> Rollouts:
    references = {problem.prompt: problem for problem in problems(count, 5)}
    options = {"params": PARAMS, "rewards": {"accuracy": right, "latency": cost}, **options}
    return Rollouts(options.pop("decoder", None) or SplitDecoder.demo(), references, **options)


def built(
    rollouts: Rollouts,
    folder: Path,
    stop: Converged | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Any, Any]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(PAIR / "small" / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    policy = Qwen2ForCausalLM.from_pretrained(PAIR / "small", dtype=dtype)
    options = {
        "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False,
        "output_dir": str(folder), "disable_tqdm": True, "logging_steps": 100, **options,
    }  # fmt: skip
    return make_trainer(policy, tokenizer, rollouts, stop=stop, **options), policy


def trained(rollouts: Rollouts, folder: Path, stop: Converged | None = None, **options: Any) -> tuple[Any, Any]:
    trainer, policy = built(rollouts, folder, stop, **options)
    trainer.train()
    return trainer, policy


def test_steps_move_the_policy_and_the_decoder_follows(tmp_path: Path) -> None:
    rollouts = rollouts_of(log=tmp_path / "log.jsonl", weights={"latency": 2.0})
    before = untrained()
    trainer, policy = trained(rollouts, tmp_path)
    assert any(not torch.equal(before[name], value) for name, value in policy.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["reward"] == pytest.approx(line["reward/accuracy"] + 2.0 * line["reward/latency"])
        assert 0 < line["offload_fraction"] < 1
        assert line["spans"] > 0 < line["ms"]
        assert 0 <= line["unbalanced"] <= 1
        assert 0 <= line["unreturned"] <= 1
    # The next answers are drawn from the new weights: scores of the runtime are the trainer's.
    rollouts.decoder.update_weights(policy.state_dict())
    (output,) = rollouts.draw([problems(1, 5)[0].prompt])
    found = output.outputs[0].rollout
    assert found is not None
    ids = torch.tensor([found.prompt_token_ids + found.ids])
    scores = policy.eval()(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    theirs = scores[len(found.prompt_token_ids) - 1 :].detach().numpy()
    assert abs(theirs[found.sampled] - found.logprobs[found.sampled]).max() < 1e-4
    assert len(trainer.drawn) == 8


def entering_ids(decoder: SplitDecoder) -> list[int]:
    """Tokens that hold the closing tag or end in a beginning of it, told from their bytes alone."""
    tag = CLOSE_TAG.encode()
    heads = tuple(tag[:n] for n in range(1, len(tag)))
    return [
        i for i, text in enumerate(decoder.tokenizers[Role.SMALL].token_bytes) if tag in text or text.endswith(heads)
    ]


def gradients_by_hand(rollouts: Rollouts, group: int) -> dict[str, torch.Tensor]:
    """What a step should do: act by act, answer by answer, in float64, advantages told from the rewards themselves."""
    model = Qwen2ForCausalLM.from_pretrained(PAIR / "small", dtype=torch.float64)
    entering = entering_ids(rollouts.decoder)
    worth = [sum(rollouts.weights.get(k, 1.0) * v for k, v in one.items()) for one in rollouts.earned()]
    total, acts = torch.zeros((), dtype=torch.float64), 0
    for number, output in enumerate(rollouts.outputs):
        mates = worth[number // group * group : (number // group + 1) * group]
        advantage = worth[number] - fmean(mates)
        found = output.outputs[0].rollout
        assert found is not None
        lane, start = found.prompt_token_ids + found.ids, len(found.prompt_token_ids)
        chances = (model(torch.tensor([lane])).logits[0] / rollouts.params.temperature).softmax(-1)
        dead = dict(found.dead)
        for at, own in enumerate(found.sampled.tolist()):
            if own:
                total, acts = total - advantage * chances[start + at - 1, lane[start + at]].log(), acts + 1
        for at in found.passed:
            if at not in dead:
                stay = 1 - chances[start + at - 1, entering].sum()
                total, acts = total - advantage * stay.log(), acts + 1
        for at, tried in found.dead:
            branch = lane[: start + at] + tried
            there = (model(torch.tensor([branch])).logits[0] / rollouts.params.temperature).softmax(-1)
            for place in range(start + at, len(branch)):
                total = total - advantage * there[place - 1, branch[place]].log()
            acts += 1
    (total / acts).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [8, 2], ids=["one batch", "accumulated"])
def test_the_gradient_of_a_step_is_that_of_every_act(rows: int, tmp_path: Path) -> None:
    """Whatever the trainer shuffled, however many rows a forward has: one set of rollouts, one gradient."""
    kept: dict[str, torch.Tensor] = {}
    orders: list[int] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    rollouts = rollouts_of(weights={"latency": 2.0}, params=replace(PARAMS, temperature=2.0))  # hot: some closings die
    trainer, _ = built(
        rollouts, tmp_path, dtype=torch.float64, max_steps=1, per_device_train_batch_size=rows,
        gradient_accumulation_steps=8 // rows, scale_rewards="none", max_grad_norm=0.0,
    )  # fmt: skip
    trainer.add_callback(Keep())
    loss_of = trainer._compute_loss

    def watched(model: Any, inputs: Any) -> Any:
        orders.extend(inputs["rollout_index"].tolist())
        return loss_of(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    assert len(rollouts.steps) == 1  # drawn once, whatever a forward takes
    assert sorted(orders) == list(range(8)) != orders
    wanted = gradients_by_hand(rollouts, 4)
    assert sum(len(one.dead) for one in trainer.drawn) > 0
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    assert largest > 0
    assert kept.keys() == wanted.keys()
    for name, grad in kept.items():
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-5 * largest)


def test_no_gradient_falls_on_what_others_wrote(tmp_path: Path) -> None:
    """Rollouts of the pair, through the trainer's own loss: text of the large model, tags put there by force."""
    rollouts = rollouts_of(decoder=SplitDecoder.demo(max_span=2))
    trainer, policy = built(rollouts, tmp_path, max_steps=1)
    trainer.train()
    kept: list[torch.Tensor] = []

    def scores(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        kept.append(policy(input_ids=input_ids, attention_mask=attention_mask).logits.detach().requires_grad_())
        return SimpleNamespace(logits=kept[-1])

    inputs = {"rollout_index": torch.arange(8).flip(0), "advantages": torch.linspace(-1.5, 1.7, 8)}
    trainer._compute_loss(scores, inputs).backward()
    gradient = kept[0].grad
    assert gradient is not None
    forced = foreign = 0
    for row, number in enumerate(range(7, -1, -1)):
        one = trainer.drawn[number]
        start, begun = len(one.prompt_token_ids), {at for at, _ in one.dead}
        drawn = [start + at - 1 for at in np.flatnonzero(one.sampled).tolist()]
        stayed = [start + at - 1 for at in one.passed if at not in begun]
        others = sorted(set(range(gradient.shape[1])) - {*drawn, *stayed})
        assert (gradient[row, others] == 0).all()
        assert (gradient[row, drawn].abs().sum(1) > 0).all()
        forced += int(((one.authors == -1) & ~one.sampled).sum())
        foreign += int((one.authors == 0).sum())
    assert forced > 0 < foreign


def test_equal_rewards_teach_nothing(tmp_path: Path) -> None:
    rollouts = rollouts_of(rewards={"same": lambda output, problem: 1.0})
    before = untrained()
    _, policy = trained(rollouts, tmp_path, max_steps=1)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_training_ends_when_rewards_no_longer_rise(tmp_path: Path) -> None:
    rollouts = rollouts_of(rewards={"same": lambda output, problem: 1.0})
    trained(rollouts, tmp_path, stop=Converged(steps=1), max_steps=10)
    assert len(rollouts.steps) == 2


def test_converged_by_hand() -> None:
    stop = Converged(steps=2, gain=0.1)
    assert not stop([0.0, 0.0, 1.0])
    assert not stop([0.0, 0.0, 0.1, 0.2])
    assert stop([0.0, 0.2, 0.1, 0.2])
    assert stop([9.0, 9.0, 0.0, 0.2, 0.1, 0.2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"params": SamplingParams(temperature=0.0)}, "temperature above 0"),
        ({"params": SamplingParams(top_p=0.9)}, "no top_p"),
        ({"params": SamplingParams(n=2)}, "n=1"),
        ({"rewards": {}}, "weights: found"),
        ({"weights": {"speed": 1.0}}, r"weights: found \['speed'\], expected some of \['accuracy', 'latency'\]"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        rollouts_of(**options)


def test_the_signs_of_a_pair_that_fails_are_logged() -> None:
    """A span of two tokens and no more: what the small model wants longer is closed by force."""
    rollouts = rollouts_of(decoder=SplitDecoder.demo(max_span=2))
    rollouts.decoder.generate("a question of somebody else", SamplingParams(max_tokens=20))
    prompts = list(rollouts.references)
    rollouts.draw(prompts)
    line = rollouts.note(rollouts.earned(), 1)
    spans = sum(output.metrics.handoffs for output in rollouts.outputs)
    assert len(rollouts.seen) == len(prompts)
    assert line["unreturned"] == sum(seen.unreturned for seen in rollouts.seen) / spans > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.04}, "beta: found 0.04, expected 0.0"),
        ({"num_iterations": 2}, "num_iterations: found 2, expected 1"),
        ({"epsilon_high": 0.28}, "epsilon_high: found 0.28, expected None"),
        ({"loss_type": "grpo"}, "loss_type: found 'grpo', expected 'dapo'"),
        ({"top_p": 0.9}, "top_p: found 0.9, expected 1.0"),
        ({"temperature": 0.9}, "temperature: found 0.9, expected none: Rollouts has it"),
        ({"steps_per_generation": 2}, "steps_per_generation: found 2, expected that of gradient_accumulation_steps, 1"),
    ],
)
def test_what_the_loss_would_not_follow_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=said):
        built(rollouts_of(), tmp_path, **options)


def test_nobody_is_told_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **named: told.append(args))
    built(rollouts_of(), tmp_path)
    for weight in (1.0, 2.0):
        sft.trainer_class(weight)._send_telemetry(None)
    assert not told
