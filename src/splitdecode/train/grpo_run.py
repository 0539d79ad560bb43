"""F7: one GRPO run from checkpoints to a tuned directory: settings, questions, rewards, going on after a kill.

output/   config.json  model.safetensors  tokenizer files      the tuned small model
          log.jsonl                                            a line of figures per step
          checkpoints/checkpoint-10/...                        from which a killed run goes on
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from splitdecode.config import SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import CheckpointError, MissingExtraError, RequestError
from splitdecode.families import problems
from splitdecode.models.checkpoint import open_checkpoint
from splitdecode.split.outputs import RequestOutput
from splitdecode.split.policies import ControlTags, LargeOnly
from splitdecode.split.questions import opening
from splitdecode.split.roles import Pair
from splitdecode.train.export import write_model, write_tokenizer
from splitdecode.train.grpo import Converged, Rollouts, make_trainer
from splitdecode.train.output import claim, newest_checkpoint, step_of
from splitdecode.train.rewards import Answer, CostModel, Latency, combine

PRESETS = ("paper", "toy")
_CALIBRATE = 16  # questions whose answers the cost model is fitted to, under two policies


@dataclass(frozen=True, slots=True)
class GrpoSettings:
    """One run. Raises RequestError naming the field that cannot be used.

    learning_rate             constant            temperature, max_tokens   of the rollouts
    prompts, generations      of a step: so many prompts, so many answers to each
    steps, stop_after         optimiser steps; fewer where the mean reward of the last stop_after steps is no more than
                              that of those before (0: never)
    rewards, latency, scoring term=weight,... of rewards.py; where latency comes from; how answers are scored
    save_steps                steps between checkpoints
    """

    learning_rate: float = 1e-6
    temperature: float = 0.7
    max_tokens: int = 4096
    generations: int = 14
    prompts: int = 6
    steps: int = 833
    stop_after: int = 0
    rewards: str = "accuracy=1,format=1,tag_count=1"
    latency: str = "modelled"
    scoring: str = "integer"
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise RequestError(f"{name}: found {value!r}, expected a finite number above 0")
        least = {"generations": 2, "stop_after": 0, "seed": 0}
        for name in ("max_tokens", "generations", "prompts", "steps", "stop_after", "save_steps", "seed"):
            value, low = getattr(self, name), least.get(name, 1)
            if type(value) is not int or value < low:
                raise RequestError(f"{name}: found {value!r}, expected a whole number from {low}")
        weights_of(self.rewards)
        if self.latency not in list(Latency):
            raise RequestError(f"latency: found {self.latency!r}, expected one of {', '.join(Latency)}")


def weights_of(text: str) -> dict[str, float]:
    """{term: weight} of "accuracy=1,latency=0.5"."""
    try:
        return {name.strip(): float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise RequestError(f"rewards: found {text!r}, expected term=weight,... as in accuracy=1,latency=1") from None


def preset(name: str, **changes: Any) -> GrpoSettings:
    """The settings of a preset, with `changes` over them. Raises RequestError for an unknown preset or field."""
    if name not in PRESETS:
        raise RequestError(f"preset: found {name!r}, expected one of {', '.join(PRESETS)}")
    text = resources.files("splitdecode.train").joinpath("presets", f"grpo-{name}.toml").read_text("utf-8")
    values = {**tomllib.loads(text), **changes}
    known = [field.name for field in fields(GrpoSettings)]
    for field in values:
        if field not in known:
            raise RequestError(f"settings: found {field!r}, expected {', '.join(known)}")
    return GrpoSettings(**values)


def family_questions(names: Sequence[str], count: int, seed: int) -> dict[str, str]:
    """{prompt: right answer} of training problems of synthetic families."""
    return {task.prompt: str(task.answer) for name in names for task in problems(count, seed, name, part="train")}


def train(
    small: str | Path,
    large: str | Path,
    questions: Mapping[str, str],
    output: str | Path,
    settings: GrpoSettings,
    *,
    large_prompts: Mapping[str, str] | None = None,
) -> list[dict[str, float]]:
    """Tunes `small` beside `large` on the questions and saves it to `output`; goes on where that holds the same run.

    questions: {prompt of the small model: right answer}; large_prompts: {the same: what the large model is given
    instead}, where it is another text; questions.asked() makes both. Returns the figures of every step of this call.
    Raises MissingExtraError without the [train] extra, RequestError for settings or an output that do not fit,
    CheckpointError for a model that cannot be used.
    """
    import torch

    try:
        import trl  # noqa: F401
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback
    except ImportError as error:
        raise MissingExtraError((error.name or "trl").partition(".")[0], "train", "GRPO") from error
    target, size = Path(output), settings.prompts * settings.generations
    checkpoint = open_checkpoint(small)
    if target.resolve() == checkpoint.directory.resolve():
        raise RequestError(f"--output: found {target}, the model's own directory, expected another one")
    if len(questions) < settings.prompts:
        raise RequestError(f"questions: found {len(questions)}, expected at least {settings.prompts}, those of a step")
    claim(target, {**asdict(settings), "small": str(small), "large": str(large), "questions": len(questions)})
    decoder = SplitDecoder.from_pretrained(small, large, dtype="float32", max_num_seqs=min(size, 256))
    tokens, _ = write_tokenizer(checkpoint.directory, target, False)
    if tokens.eos_id is None:
        raise CheckpointError(f"{checkpoint.directory}: expected an EOS token, found none: answers would not end")
    eos = tokens.decode([tokens.eos_id], skip_special_tokens=False)
    fast: Any = PreTrainedTokenizerFast
    words = fast(tokenizer_file=str(checkpoint.directory / "tokenizer.json"), eos_token=eos, pad_token=eos)
    policy: Any = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    found = newest_checkpoint(target / "checkpoints")
    done = 0 if found is None else step_of(found)
    others = large_prompts or {}
    rollouts = Rollouts(
        decoder, questions, _rewards(decoder, questions, others, settings, target / "cost.json"),
        SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens, seed=settings.seed),
        weights_of(settings.rewards), log=_log(target, done), large_prompts=others,
    )  # fmt: skip
    trainer = make_trainer(
        policy, words, rollouts, stop=Converged(settings.stop_after) if settings.stop_after else None,
        num_generations=settings.generations, per_device_train_batch_size=size, max_steps=settings.steps,
        learning_rate=settings.learning_rate, lr_scheduler_type="constant", seed=settings.seed, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), bf16=False, output_dir=str(target / "checkpoints"), logging_steps=10**9,
        save_strategy="steps", save_steps=settings.save_steps, save_total_limit=2,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it writes to standard output
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    write_model(policy, checkpoint.directory, target)
    return rollouts.steps


def _rewards(
    decoder: SplitDecoder, questions: Mapping[str, str], others: Mapping[str, str], settings: GrpoSettings, file: Path
) -> dict[str, Any]:
    """One function per term. Where time counts, costs are fitted first, to answers of the pair and of the large model
    alone, and kept in `file`: a run that goes on goes on with them."""
    weights, cost = weights_of(settings.rewards), None
    if "latency" in weights and settings.latency != Latency.COVERAGE:
        if not file.is_file():
            asked = list(questions)[:_CALIBRATE]
            params = SamplingParams(
                temperature=settings.temperature, max_tokens=settings.max_tokens, seed=settings.seed
            )
            seen = [others.get(prompt, prompt) for prompt in asked]
            runs = [
                output
                for policy in (ControlTags(), LargeOnly())
                for output in decoder.generate(asked, params, handoff=policy, large_prompt=seen)
            ]
            fitted = CostModel.calibrate([output.metrics for output in runs])
            file.write_text(json.dumps([list(fitted.forward_ms), list(fitted.token_ms)]) + "\n", "utf-8")
        forward_ms, token_ms = json.loads(file.read_text("utf-8"))
        cost = CostModel(Pair(*forward_ms), Pair(*token_ms))
    reward = combine(weights, scoring=settings.scoring, kind=settings.latency, cost=cost)

    def term(name: str) -> Any:
        part = reward.parts[name]
        return lambda output, gold: part(_answer(output, gold))

    return {name: term(name) for name in weights}


def _answer(output: RequestOutput, gold: str) -> Answer:
    """The whole answer: what the prompt has begun of it, `<think>\\n` say, and what was written behind it."""
    return Answer(opening(str(output.prompt)) + output.outputs[0].raw_text, gold, output.metrics)


def _log(target: Path, done: int) -> Path:
    """The log, without the lines of steps that were not saved."""
    log = target / "log.jsonl"
    lines = log.read_text("utf-8").splitlines()[:done] if log.is_file() else []
    log.write_text("".join(line + "\n" for line in lines), "utf-8")
    return log
