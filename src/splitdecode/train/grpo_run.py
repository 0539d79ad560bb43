"""F7: one GRPO run from checkpoints to a tuned directory: questions, rewards, going on after a kill.

output/   config.json  model.safetensors  tokenizer files      the tuned small model
          run.json                                             the settings, the pair and the questions of this run
          cost.json                                            the cost model, where it was fitted
          log.jsonl                                            a line of figures per step
          checkpoints/checkpoint-10/...                        from which a killed run goes on
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from splitdecode.config import SamplingParams
from splitdecode.decoder import DTYPES, SplitDecoder
from splitdecode.errors import CheckpointError, MissingExtraError, RequestError
from splitdecode.families import problems
from splitdecode.models.checkpoint import open_checkpoint
from splitdecode.split.outputs import RequestOutput
from splitdecode.split.policies import ControlTags, LargeOnly
from splitdecode.split.prompts import prompt_ids
from splitdecode.train.cost import Answer, CostModel, run_of
from splitdecode.train.export import write_model, write_tokenizer
from splitdecode.train.grpo import Converged, Rollouts, make_trainer
from splitdecode.train.grpo_settings import GrpoSettings, weights_of
from splitdecode.train.log_plot import LOG, read_log
from splitdecode.train.output import claim, newest_checkpoint, step_of
from splitdecode.train.rewards import combine

_CALIBRATE = 16  # questions whose answers the cost model is fitted to, under two policies
# Settings that change no weight but by rounding: a run goes on with others of these.
_FREE = ("micro_batch", "gradient_checkpointing")
Say = Callable[[str], None]


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
    say: Say = lambda _: None,
) -> list[dict[str, float]]:
    """Tunes `small` beside `large` on the questions and saves it to `output`; goes on where that holds the same run.
    say: is told of questions that are left out and of every step.

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
    target, device, cost = Path(output), _device(settings.device), settings.given_cost()
    checkpoint = open_checkpoint(small)
    if target.resolve() == checkpoint.directory.resolve():
        raise RequestError(f"--output: found {target}, the model's own directory, expected another one")
    _check_number(questions, settings)
    others = large_prompts or {}
    mine = _identity(small, large, questions, others, settings, cost)
    claim(target, mine)
    tokens, _ = write_tokenizer(checkpoint.directory, target, False)
    if tokens.eos_id is None:
        raise CheckpointError(f"{checkpoint.directory}: expected an EOS token, found none: answers would not end")
    found = newest_checkpoint(target / "checkpoints")
    steps = _steps(target, 0 if found is None else step_of(found))
    stop = Converged(settings.stop_after) if settings.stop_after else None
    if found is not None and (step_of(found) >= settings.steps or (stop and stop([line["reward"] for line in steps]))):
        say(f"ended after step {step_of(found)}: nothing is left to do")
        ended: Any = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32)
        write_model(ended, checkpoint.directory, target)
        return []
    decoder = SplitDecoder.from_pretrained(
        small, large, device=device, dtype=DTYPES[settings.dtype], kv_cache_memory=settings.kv_cache_memory,
        max_num_seqs=min(settings.answers, 256),
    )  # fmt: skip
    questions = _with_room(decoder, questions, others, settings, say)
    if cost is None and settings.timed:
        cost = _fitted_cost(decoder, questions, others, settings, target / "cost.json", mine)
    eos = tokens.decode([tokens.eos_id], skip_special_tokens=False)
    fast: Any = PreTrainedTokenizerFast
    words = fast(tokenizer_file=str(checkpoint.directory / "tokenizer.json"), eos_token=eos, pad_token=eos)
    policy: Any = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    begun, rows = len(steps), settings.micro_batch or settings.answers
    rollouts = Rollouts(
        decoder, questions, _rewards(settings, cost),
        SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens, seed=settings.seed),
        weights_of(settings.rewards), log=target / LOG, large_prompts=others, steps=steps,
    )  # fmt: skip
    trainer = make_trainer(
        policy, words, rollouts, stop=stop, on_step=lambda *step: say(_told(*step)),
        num_generations=settings.generations, per_device_train_batch_size=rows, max_steps=settings.steps,
        gradient_accumulation_steps=settings.answers // rows, scale_rewards=settings.scale_rewards,
        learning_rate=settings.learning_rate, lr_scheduler_type="constant", seed=settings.seed, disable_tqdm=True,
        use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu", bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing, output_dir=str(target / "checkpoints"),
        logging_steps=10**9, save_strategy="steps", save_steps=settings.save_steps, save_total_limit=2,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it writes to standard output
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    write_model(policy, checkpoint.directory, target)
    return rollouts.steps[begun:]


def _device(wanted: str) -> str:
    """cpu or cuda. Raises RequestError where there is none, or more than the trainer and the pair would agree on."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return "cpu"
    if count != 1:
        raise RequestError(f"device: found {count} GPUs for {wanted!r}, expected one (CUDA_VISIBLE_DEVICES=0, say)")
    return "cuda"


def _check_number(questions: Mapping[str, str], settings: GrpoSettings, where: str = "") -> None:
    if len(questions) < settings.prompts:
        raise RequestError(f"questions: found {len(questions)}{where}, expected at least {settings.prompts}, those of "
                           "a step")  # fmt: skip


def _identity(
    small: str | Path,
    large: str | Path,
    questions: Mapping[str, str],
    others: Mapping[str, str],
    settings: GrpoSettings,
    cost: CostModel | None,
) -> dict[str, Any]:
    """What tells this run from others, as JSON has it."""
    data = sha256(json.dumps([[*pair, others.get(pair[0])] for pair in questions.items()]).encode()).hexdigest()
    chosen = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    given = None if cost is None else cost.as_dict()
    return {
        **chosen,
        "cost": given,
        "small": str(small),
        "large": str(large),
        "questions": len(questions),
        "data": data,
    }


def _with_room(
    decoder: SplitDecoder, questions: Mapping[str, str], others: Mapping[str, str], settings: GrpoSettings, say: Say
) -> Mapping[str, str]:
    """The questions whose prompts are within max_prompt and leave either model room for a token.

    Raises RequestError where fewer are left than a step takes, and for a prompt that holds no tokens.
    """
    most = min(settings.max_prompt, *(limit - 1 for limit in decoder.max_len))
    sizes = {
        prompt: max(map(len, prompt_ids(decoder.tokens, prompt, others.get(prompt), decoder.vocab_limits)))
        for prompt in questions
    }
    fitting = {prompt: gold for prompt, gold in questions.items() if sizes[prompt] <= most}
    if left := len(questions) - len(fitting):
        say(f"{left} of {len(questions)} questions left out: their prompts are longer than {most} tokens")
        _check_number(fitting, settings, f" with prompts of at most {most} tokens, of {len(questions)}")
    return fitting


def _fitted_cost(
    decoder: SplitDecoder,
    questions: Mapping[str, str],
    others: Mapping[str, str],
    settings: GrpoSettings,
    file: Path,
    mine: Mapping[str, Any],
) -> CostModel:
    """The cost model kept in `file` where this very run fitted it; else one fitted now, to answers of the pair and of
    the large model alone."""
    run = sha256(json.dumps(mine).encode()).hexdigest()
    if run_of(file) == run:
        return CostModel.read(file, "--output")
    asked = list(questions)[:_CALIBRATE]
    params = SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens, seed=settings.seed)
    large = [others.get(prompt, prompt) for prompt in asked]
    runs = [
        output
        for policy in (ControlTags(), LargeOnly())
        for output in decoder.generate(asked, params, handoff=policy, large_prompt=large)
    ]
    cost = CostModel.calibrate([Answer.of(output) for output in runs], decoder.config.read_interval)
    cost.write(file, run)
    return cost


def _rewards(settings: GrpoSettings, cost: CostModel | None) -> dict[str, Any]:
    """One function per term."""
    reward = combine(weights_of(settings.rewards), scoring=settings.scoring, kind=settings.latency, cost=cost)

    def term(name: str) -> Callable[[RequestOutput, str], float]:
        return lambda output, gold: reward.parts[name](Answer.of(output, gold))

    return {name: term(name) for name in reward.weights}


def _steps(target: Path, done: int) -> list[dict[str, float]]:
    """The figures of the first `done` steps; later ones, whose weights were not saved, are taken out of the log."""
    log = target / LOG
    lines = [line for line in read_log(target) if line["step"] <= done] if done and log.is_file() else []
    part = log.with_name(log.name + ".part")
    try:
        part.write_text("".join(json.dumps({**line, "step": int(line["step"])}) + "\n" for line in lines), "utf-8")
        os.replace(part, log)
    except OSError as error:
        raise RequestError(f"--output: {log} cannot be written ({error.strerror})") from None
    return [{name: value for name, value in line.items() if name != "step"} for line in lines]


def _told(step: int, steps: int, figures: Mapping[str, float], seconds: float) -> str:
    """A line for people: step 3/40: reward 0.31 (accuracy 0.75, latency -0.44), 4.4 % offloaded, 1.2 s."""
    each = ", ".join(f"{name[7:]} {value:.3g}" for name, value in figures.items() if name.startswith("reward/"))
    share = 100 * figures["offload_fraction"]
    return f"step {step}/{steps}: reward {figures['reward']:.3g} ({each}), {share:.2g} % offloaded, {seconds:.1f} s"
