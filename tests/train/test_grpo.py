"""GRPO on TRL, with the real pair in the rollouts: what is logged, what the gradient sees, when it stops."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

import splitdecode
from splitdecode import RequestOutput, SamplingParams, SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import Problem, boxed, problems
from splitdecode.train.grpo import Converged, Rollouts, make_trainer

pytest.importorskip("trl")
PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"
PARAMS = SamplingParams(temperature=1.6, max_tokens=200, seed=1)


@pytest.fixture(autouse=True)
def others_warnings() -> Iterator[None]:
    """transformers warns of names that TRL still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def right(output: RequestOutput, problem: Problem) -> float:
    return float(boxed(output.outputs[0].text) == problem.answer)


def cost(output: RequestOutput, problem: Problem) -> float:
    return -(output.metrics.small.tokens + 17 * output.metrics.large.tokens) / (17 * 150)


def untrained() -> dict[str, torch.Tensor]:
    return dict(Qwen2ForCausalLM.from_pretrained(PAIR / "small", dtype=torch.float32).state_dict())


def rollouts_of(count: int = 8, **options: Any) -> Rollouts:
    references = {problem.prompt: problem for problem in problems(count, 5)}
    options = {"params": PARAMS, "rewards": {"accuracy": right, "latency": cost}, **options}
    return Rollouts(SplitDecoder.demo(), references, **options)


def trained(rollouts: Rollouts, folder: Path, stop: Converged | None = None, **options: Any) -> tuple[Any, Any]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(PAIR / "small" / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    policy = Qwen2ForCausalLM.from_pretrained(PAIR / "small", dtype=torch.float32)
    options = {
        "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "use_cpu": True,
        "bf16": False, "output_dir": str(folder), "disable_tqdm": True, "logging_steps": 100, **options,
    }  # fmt: skip
    trainer = make_trainer(policy, tokenizer, rollouts, stop=stop, **options)
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
