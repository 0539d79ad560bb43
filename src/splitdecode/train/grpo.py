"""F7: GRPO on TRL with rollouts of the real pair: the large model writes in them, and the loss sees every act.

    one step     policy's weights -> decoder      n answers to each prompt, both models at work
                 rewards of whole answers -> advantages (TRL)
                 acts of the small model (objective.py) x advantages -> loss -> optimiser (TRL)

TRL's trainer does what it does: batches, advantages, optimiser, logging, checkpoints. Two of its methods are replaced:
rollouts come from a SplitDecoder, and the loss is over acts instead of tokens. Both decoders of one policy are the same
weights: they are copied into the runtime before each batch of rollouts, so old and new log-probabilities agree.

Needs the extra [train].
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from splitdecode.config import SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.split.health import Health, Seen
from splitdecode.split.outputs import RequestOutput
from splitdecode.split.policies import ControlTags, HandoffPolicy
from splitdecode.split.questions import check_large
from splitdecode.split.roles import Role
from splitdecode.split.rollout import Rollout
from splitdecode.train.objective import act_count, act_logprobs, policy_loss

Reward = Callable[[RequestOutput, Any], float]  # an answer and what is known of its question -> its reward
OnStep = Callable[[int, int, Mapping[str, float], float], None]  # step, steps in all, its figures, seconds it took

# What GRPOConfig has and the loss over acts, or drawing by the pair, has not: the only value that is no lie.
_ONLY: dict[str, Any] = {
    "beta": 0.0, "num_iterations": 1, "delta": None, "epsilon_high": None, "loss_type": "dapo",
    "importance_sampling_level": "token", "mask_truncated_completions": False, "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0, "use_adaptive_entropy": False, "off_policy_mask_threshold": None, "use_liger_kernel": False,
    "use_vllm": False, "use_transformers_continuous_batching": False, "generation_kwargs": None, "top_p": 1.0,
    "top_k": 0, "min_p": None, "repetition_penalty": 1.0,
}  # fmt: skip
_ROLLOUTS = ("temperature", "max_completion_length", "reward_weights")  # settings of GRPOConfig that Rollouts has


@dataclass(frozen=True)
class Converged:
    """When to stop: the mean reward of the last `steps` steps is no more than `gain` above that of those before."""

    steps: int = 50
    gain: float = 0.0

    def __call__(self, rewards: Sequence[float]) -> bool:
        """rewards: one per step so far."""
        if len(rewards) < 2 * self.steps:
            return False
        return fmean(rewards[-self.steps :]) - fmean(rewards[-2 * self.steps : -self.steps]) <= self.gain


@dataclass
class Rollouts:
    """Answers of the pair to TRL's prompts, what they earned, and a line of figures per step.

    decoder: its small model is the policy's twin; references: what the rewards know of a question, by prompt;
    rewards: by name, summed by `weights` (1 each where it names none); log: one JSON object per step is appended;
    large_prompts: what the large model is given, by the small model's prompt; where it has none, the same text.
    steps: the figures so far, those of a run that goes on too; outputs, seen (256 at most): of the last step.
    Raises RequestError where the large model would be given a control tag.
    """

    decoder: SplitDecoder
    references: Mapping[str, Any]
    rewards: Mapping[str, Reward]
    params: SamplingParams
    weights: Mapping[str, float] = field(default_factory=dict)
    handoff: HandoffPolicy = field(default_factory=ControlTags)
    log: Path | None = None
    large_prompts: Mapping[str, str] = field(default_factory=dict)
    outputs: list[RequestOutput] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = set(self.weights) - set(self.rewards)
        if unknown or not self.rewards:
            raise RequestError(f"weights: found {sorted(unknown)}, expected some of {sorted(self.rewards)}")
        if self.params.n != 1 or self.params.greedy or (self.params.top_p, self.params.top_k, self.params.min_p) != (
            1.0, 0, 0.0
        ) or self.params.penalised:  # fmt: skip
            raise RequestError(
                "params: expected n=1, a temperature above 0, no top_p, top_k, min_p and no penalties: a policy "
                "gradient needs the probabilities answers were drawn with"
            )
        for text in self.large_side(list(self.references)):
            check_large(text, "large_prompts", self.decoder.tokens.tags)

    def large_side(self, prompts: Sequence[str]) -> list[str]:
        """What the large model is given where the small one is given `prompts`."""
        return [self.large_prompts.get(prompt, prompt) for prompt in prompts]

    def draw(self, prompts: Sequence[str], step: int = 0) -> list[RequestOutput]:
        """An answer to each prompt, each with a seed of its own: a step's answers are the same after a restart."""
        first = (self.params.seed or 0) + step * len(prompts)
        params = [replace(self.params, seed=first + number, rollout=True) for number in range(len(prompts))]
        before, others = list(self.decoder.health.answers), self.large_side(prompts)
        self.outputs = self.decoder.generate(list(prompts), params, handoff=self.handoff, large_prompt=others)
        self.seen = [seen for seen in self.decoder.health.answers if all(seen is not other for other in before)]
        return self.outputs

    def earned(self) -> list[dict[str, float]]:
        """Each answer's rewards by name."""
        return [
            {name: reward(output, self.references[str(output.prompt)]) for name, reward in self.rewards.items()}
            for output in self.outputs
        ]

    def note(self, earned: Sequence[Mapping[str, float]], step: int) -> dict[str, float]:
        """The figures of this step: means of every reward, of their weighted sum, of offloading, spans, tokens and ms;
        shares of answers whose tags do not pair up and of spans that were not taken back (split/health.py)."""
        metrics = [output.metrics for output in self.outputs]
        line = {f"reward/{name}": fmean(one[name] for one in earned) for name in self.rewards}
        line["reward"] = fmean(sum(self.weights.get(k, 1.0) * v for k, v in one.items()) for one in earned)
        line["offload_fraction"] = fmean(m.offload_fraction for m in metrics)
        line["spans"] = fmean(m.handoffs for m in metrics)
        line["tokens"] = fmean(m.tokens for m in metrics)
        line["ms"] = fmean(sum(one.ms for one in m.models) for m in metrics)
        signs = Health(answers=deque(self.seen)).figures()
        line["unbalanced"], line["unreturned"] = signs["tags"] or 0.0, signs["no_return"] or 0.0
        self.steps.append(line)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        return line


def make_trainer(
    policy: Any,
    tokenizer: Any,
    rollouts: Rollouts,
    *,
    stop: Converged | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Any:
    """A TRL GRPOTrainer whose answers are `rollouts` and whose loss is over the small model's acts.

    policy: the small model in transformers, whose vocabulary is the decoder's; options: GRPOConfig's (num_generations,
    learning_rate, max_steps, ...); on_step: is told of each step. With gradient accumulation the rollouts of a step are
    made at once, and the gradient is that of one batch. Raises MissingExtraError without the extra [train],
    RequestError for options that this loss does not have.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is announced as experimental at every start
    try:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOTrainer
    except ImportError as error:
        raise MissingExtraError(error.name or "trl", "train", "GRPO") from error
    config = _config(rollouts, options)
    tags = rollouts.decoder.tokens
    entering = tags.entering(Role.SMALL, tags.tags[1])
    fallback = tokenizer.eos_token_id or 0

    def draw(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        rollouts.decoder.update_weights(trainer.accelerator.unwrap_model(trainer.model).state_dict())
        found = [_rollout(output) for output in rollouts.draw(prompts, trainer.state.global_step)]
        earned = rollouts.earned()
        for name, value in rollouts.note(earned, trainer.state.global_step + 1).items():
            trainer._metrics["train" if trainer.model.training else "eval"][name].append(value)
        return {
            "prompt_ids": [one.prompt_token_ids for one in found],
            "completion_ids": [one.ids or [fallback] for one in found],  # TRL cannot take an empty one
            "logprobs": [[0.0 if p != p else float(p) for p in one.logprobs] or [0.0] for one in found],
            "env_mask": [one.sampled.astype(int).tolist() or [0] for one in found],
            "earned": earned,
        }

    class Trainer(GRPOTrainer):
        """GRPOTrainer over acts."""

        def _send_telemetry(self) -> None:
            """TRL would report every run to its makers."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out = super()._generate_and_score_completions(inputs)
            self.drawn = [_rollout(output) for output in rollouts.outputs]
            self.acts = sum(map(act_count, self.drawn))
            out["rollout_index"] = torch.arange(len(self.drawn), device=out["advantages"].device)
            return out

        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            device = inputs["advantages"].device

            def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                return found

            drawn = [self.drawn[i] for i in inputs["rollout_index"].tolist()]
            acts = act_logprobs(logits, drawn, entering, temperature=rollouts.params.temperature)
            return policy_loss(
                [one.all() for one in acts], inputs["advantages"], clip=self.epsilon_low, total=self.acts
            )

    def reward_of(name: str) -> Callable[..., list[float]]:
        def reward(completions: Any, earned: list[dict[str, float]], **_: Any) -> list[float]:
            return [one[name] for one in earned]

        reward.__name__ = name
        return reward

    class Watch(TrainerCallback):
        """Tells of every step; ends the training, with a checkpoint, when the rewards no longer rise."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if on_step is not None:
                on_step(state.global_step, state.max_steps, rollouts.steps[-1], time.monotonic() - self.began)
            if stop is not None and stop([line["reward"] for line in rollouts.steps]):
                control.should_training_stop = True
                control.should_save |= args.save_strategy != "no"
            return control

    return Trainer(
        model=policy,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in rollouts.references]),
        processing_class=tokenizer,
        reward_funcs=[reward_of(name) for name in rollouts.rewards],
        rollout_func=draw,
        callbacks=[Watch()],
    )


def _config(rollouts: Rollouts, options: Mapping[str, Any]) -> Any:
    """The GRPOConfig. Raises RequestError for options that would be taken and not followed."""
    from trl import GRPOConfig

    for name, value in options.items():
        if name in _ONLY and value != _ONLY[name]:
            raise RequestError(f"{name}: found {value!r}, expected {_ONLY[name]!r}: all that the loss over acts has")
        if name in _ROLLOUTS:
            raise RequestError(f"{name}: found {value!r}, expected none: Rollouts has it")
    with warnings.catch_warnings():  # TRL 1.16 reads that name, and so does its default
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        config = GRPOConfig(
            temperature=rollouts.params.temperature,
            max_completion_length=rollouts.params.max_tokens,
            reward_weights=[rollouts.weights.get(name, 1.0) for name in rollouts.rewards],
            **{"report_to": "none", "save_strategy": "no", **options},
        )
    if config.steps_per_generation != config.gradient_accumulation_steps:
        raise RequestError(f"steps_per_generation: found {config.steps_per_generation}, expected that of "
                           f"gradient_accumulation_steps, {config.gradient_accumulation_steps}: answers of one "
                           "policy for one step")  # fmt: skip
    return config


def _rollout(output: RequestOutput) -> Rollout:
    found = output.outputs[0].rollout
    assert found is not None
    return found
