"""F7: supervised fine-tuning on tagged traces, with TRL's trainer: the small model learns where to hand over.

    output/   config.json  model.safetensors  tokenizer files      for SplitDecoder.from_pretrained
              run.json                                             the settings and the data of this run
              checkpoints/checkpoint-40/...                        from which a killed run goes on

A checkpoint is complete once its trainer_state.json is: the trainer writes that last. Going on gives the weights of a
run that was never interrupted.
"""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from splitdecode.errors import CheckpointError, MissingExtraError, RequestError
from splitdecode.models.checkpoint import Checkpoint, open_checkpoint
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.train.export import grow_embeddings, write_model, write_tokenizer
from splitdecode.train.muon import MuonAdam
from splitdecode.train.output import claim, newest_checkpoint, step_of
from splitdecode.train.settings import Settings
from splitdecode.train.traces import IGNORED, Example, Trace, asked, encode

MARK = 1 << 32  # added to the label of a token of a tag: so the mark goes wherever packing and padding put the label
OnStep = Callable[[int, int, float | None], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did: optimiser steps, mean training loss a token at each logged step, traces used and left out as too
    long, the step it went on from (0: from the start), seconds."""

    steps: int
    traces: int
    left_out: int
    resumed_from: int
    seconds: float
    losses: list[float] = field(default_factory=list)


def train(
    model: str | Path,
    traces: Sequence[Trace],
    output: str | Path,
    settings: Settings,
    *,
    revision: str | None = None,
    on_step: OnStep | None = None,
) -> Report:
    """Fine-tunes a checkpoint (a directory or a hub id) and saves it to `output`; goes on where that holds a part of
    the same run. Bare questions are put to it by asked(). on_step(step, steps in all, last loss logged or None): after
    each step, before its checkpoint.

    Raises MissingExtraError without the [train] extra, RequestError for traces or an output that do not fit,
    CheckpointError for a model that cannot be used.
    """
    require_extra(settings)
    started, target = time.monotonic(), Path(output)
    checkpoint = open_checkpoint(model, revision=revision)
    if target.resolve() == checkpoint.directory.resolve():
        raise RequestError(f"--output: found {target}, the model's own directory, expected another one")
    traces = asked(traces, checkpoint.directory)
    _claim(target, traces, settings, str(model), revision)
    tokenizer, new = write_tokenizer(checkpoint.directory, target, settings.added_tokens)
    if settings.lora_rank and new:
        raise RequestError("added_tokens: found with lora_rank, which leaves the embeddings as they are: expected one "
                           "of the two, or a model that has the tags")  # fmt: skip
    eos_id = _eos_id(checkpoint, tokenizer)
    draws = random.Random(settings.seed)
    examples = [encode(trace, tokenizer, eos_id, lambda: draws.random() < settings.tags_apart) for trace in traces]
    fitting = [example for example in examples if len(example.input_ids) <= settings.max_length]
    if not fitting:
        shortest = min((len(example.input_ids) for example in examples), default=0)
        raise RequestError(f"traces: found {len(examples)}, the shortest of {shortest} tokens, expected at least one "
                           f"within max_length, {settings.max_length}")  # fmt: skip
    network = _load(checkpoint.directory, tokenizer, new, settings)
    trainer = _trainer(network, fitting, target, eos_id, settings, on_step)
    found = newest_checkpoint(target / "checkpoints")
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if trainer.is_world_process_zero():
        _save(trainer, checkpoint.directory, target, settings)
    history = trainer.state.log_history
    return Report(
        steps=trainer.state.global_step,
        traces=len(fitting),
        left_out=len(examples) - len(fitting),
        resumed_from=0 if found is None else step_of(found),
        seconds=time.monotonic() - started,
        losses=[float(entry["loss"]) for entry in history if "loss" in entry],
    )


def require_extra(settings: Settings) -> None:
    """Raises MissingExtraError where a package of the [train] extra that a run needs is absent."""
    try:
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
        import trl  # noqa: F401

        if settings.lora_rank:
            import peft  # noqa: F401
    except ImportError as error:
        name = (error.name or "trl").partition(".")[0]
        raise MissingExtraError(name, "train", "supervised fine-tuning") from error


def labels_of(example: Example, tag_weight: float) -> list[int]:
    """Labels for the trainer: those of the example, tokens of tags marked where they are to be weighed."""
    if tag_weight == 1:
        return list(example.labels)
    return [
        label + MARK if tag and label != IGNORED else label
        for label, tag in zip(example.labels, example.in_tag, strict=True)
    ]


def trainer_class(tag_weight: float) -> type[Any]:
    """TRL's SFTTrainer, which multiplies the loss of marked labels by tag_weight.

    The sum is divided by the number of trained tokens, not by the sum of weights: other tokens count as ever.
    """
    from trl import SFTTrainer

    class QuietTrainer(SFTTrainer):
        """SFTTrainer, with nothing sent to anybody."""

        def _send_telemetry(self) -> None:
            """TRL would report every run to its makers."""

    class TagWeightedTrainer(QuietTrainer):
        """Takes the marks off the labels and weighs the log-probabilities the model returns for them."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            marked = inputs["labels"] >= MARK
            inputs["labels"] = inputs["labels"] - MARK * marked

            def weighed(**given: Any) -> Any:
                outputs = model(**given)
                outputs.log_probs = outputs.log_probs * (1 + (tag_weight - 1) * marked[:, 1:])
                return outputs

            return super().compute_loss(weighed, inputs, return_outputs, **more)

    return QuietTrainer if tag_weight == 1 else TagWeightedTrainer


def _claim(target: Path, traces: Sequence[Trace], settings: Settings, model: str, revision: str | None) -> None:
    data = sha256(json.dumps([[trace.prompt, trace.tagged] for trace in traces]).encode()).hexdigest()
    mine = {"model": model, "revision": revision, "traces": len(traces), "data": data, **asdict(settings)}
    claim(target, mine)


def _eos_id(checkpoint: Checkpoint, tokenizer: Tokenizer) -> int:
    ids = [i for i in (tokenizer.eos_id, *checkpoint.eos_ids) if i is not None]
    if not ids:
        raise CheckpointError(f"{checkpoint.directory}: expected an EOS token, found none: answers would not end")
    return ids[0]


def _load(directory: Path, tokenizer: Tokenizer, new: list[int], settings: Settings) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    grow_embeddings(network, tokenizer.size, new)
    tokenizer.check_against_vocab(network.get_input_embeddings().weight.shape[0], directory / "config.json")
    return network


def _trainer(
    network: Any, examples: Sequence[Example], target: Path, eos_id: int, settings: Settings, on_step: OnStep | None
) -> Any:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, PrinterCallback, ProgressCallback
    from trl import pack_dataset

    rows = {
        "input_ids": [example.input_ids for example in examples],
        "labels": [labels_of(example, settings.tag_weight) for example in examples],
    }
    dataset = Dataset.from_dict(rows)
    if settings.packing:
        dataset = pack_dataset(dataset, settings.max_length, "bfd")
    fast: Any = PreTrainedTokenizerFast
    processing = fast(tokenizer_file=str(target / "tokenizer.json"))
    processing.eos_token = processing.pad_token = processing.convert_ids_to_tokens(eos_id)
    trainer = trainer_class(settings.tag_weight)(
        model=network,
        args=_arguments(target, settings),
        train_dataset=dataset,
        processing_class=processing,
        peft_config=_lora(settings),
        optimizers=(_optimizer(network, settings), None),
    )
    for callback in (PrinterCallback, ProgressCallback):  # both write to standard output
        trainer.remove_callback(callback)
    if on_step is not None:
        trainer.add_callback(_listener(on_step))
    return trainer


def _arguments(target: Path, settings: Settings) -> Any:
    import torch
    from trl import SFTConfig

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.global_batch % (settings.micro_batch * processes):
        raise RequestError(f"global_batch: found {settings.global_batch}, expected a multiple of micro_batch "
                           f"{settings.micro_batch} x {processes} processes")  # fmt: skip
    with warnings.catch_warnings():  # TRL 1.16 reads that name, and so does its default
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        return SFTConfig(
            output_dir=str(target / "checkpoints"),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": settings.min_lr_ratio},
            warmup_steps=settings.warmup_ratio,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.global_batch // (settings.micro_batch * processes),
            max_length=settings.max_length,
            packing=settings.packing,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=settings.bf16,
            gradient_checkpointing=settings.gradient_checkpointing,
            save_strategy="steps",
            save_steps=settings.save_steps,
            save_total_limit=2,
            logging_steps=1,
            seed=settings.seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        )


def _optimizer(network: Any, settings: Settings) -> Any:
    if not settings.matrix_rate:
        return None
    return MuonAdam(network, matrix_rate=settings.matrix_rate, rate=settings.learning_rate)


def _lora(settings: Settings) -> Any:
    if not settings.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _listener(on_step: OnStep) -> Any:
    from transformers import TrainerCallback

    class Listener(TrainerCallback):
        """Passes steps and losses on."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            losses = [entry["loss"] for entry in state.log_history[-1:] if "loss" in entry]
            on_step(state.global_step, state.max_steps, losses[0] if losses else None)

    return Listener()


def _save(trainer: Any, source: Path, target: Path, settings: Settings) -> None:
    import torch

    network = trainer.accelerator.unwrap_model(trainer.model)
    if settings.lora_rank:
        network = network.merge_and_unload()
    write_model(network.to(torch.bfloat16 if settings.bf16 else torch.float32), source, target)
