"""`splitdecode train grpo`: settings, questions, a run that ends in a directory the runtime loads, and going on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import splitdecode
from splitdecode import SamplingParams, SplitDecoder
from splitdecode.cli import build_parser, main
from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.families import problems
from splitdecode.models import load_model
from splitdecode.split.roles import Pair
from splitdecode.train import grpo_run
from splitdecode.train.cost import CostModel
from splitdecode.train.grpo import make_trainer
from splitdecode.train.grpo_settings import GrpoSettings, preset, weights_of
from splitdecode.train.output import newest_checkpoint, step_of

pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("others_warnings")
PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"


def settings(**changes: Any) -> grpo_run.GrpoSettings:
    small = {"prompts": 2, "generations": 4, "steps": 4, "save_steps": 2, "temperature": 1.6, "max_tokens": 200}
    return preset("toy", **{**small, "learning_rate": 1e-3, **changes})


def run(folder: Path, count: int = 16, said: list[str] | None = None, **changes: Any) -> list[dict[str, float]]:
    questions = grpo_run.family_questions(["two-products"], count, 0)
    say = (lambda _: None) if said is None else said.append
    return grpo_run.train(PAIR / "small", PAIR / "large", questions, folder, settings(**changes), say=say)


@pytest.fixture
def cost(tmp_path: Path) -> str:
    """A file with costs: of a run that is given them nothing depends on the clock."""
    CostModel(Pair(0.2, 0.6), Pair(0.01, 0.02), Pair(1.0, 0.5)).write(tmp_path / "given.json")
    return str(tmp_path / "given.json")


def saved(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def log_of(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "ms"} for line in lines]


def test_presets_hold_the_published_numbers() -> None:
    paper = preset("paper")
    assert (paper.learning_rate, paper.temperature, paper.max_tokens) == (1e-6, 0.7, 4096)
    assert 14 <= paper.generations <= 21
    assert 84 <= paper.prompts * paper.generations <= 128
    assert abs(paper.steps * paper.prompts - 5000) < paper.prompts
    assert weights_of(paper.rewards) == {"accuracy": 1.0, "format": 1.0, "tag_count": 1.0}
    assert (paper.max_prompt, paper.scoring, paper.scale_rewards) == (512, "math", "group")
    assert (paper.dtype, paper.bf16, paper.gradient_checkpointing, paper.micro_batch) == ("bfloat16", True, True, 1)
    assert preset("toy").scale_rewards == "none"


def test_a_run_saves_what_the_runtime_loads(tmp_path: Path) -> None:
    steps = run(tmp_path / "out", steps=2)
    assert [sorted(line) for line in steps] == [sorted(steps[0])] * 2
    decoder = SplitDecoder.from_pretrained(tmp_path / "out", PAIR / "large")
    answer = decoder.generate(problems(1, 5)[0].prompt, SamplingParams(temperature=0.0, max_tokens=200))[0]
    assert answer.metrics.handoffs > 0
    tuned, before = (load_model(path, dtype=torch.float32) for path in (tmp_path / "out", PAIR / "small"))
    assert not torch.equal(tuned.weights.layers[0].qkv, before.weights.layers[0].qkv)


def test_a_run_that_goes_on_is_the_run_that_was_never_interrupted(tmp_path: Path, cost: str) -> None:
    """With costs that were given; those that are fitted are kept, see below. With other rows a forward, too."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, cost=cost)
    assert not (whole / "cost.json").exists()
    run(parts, cost=cost)
    # As if killed behind step 2: what was saved later is gone, and so are the tuned weights.
    for path in (parts / "config.json", parts / "model.safetensors"):
        path.unlink()
    shutil.rmtree(parts / "checkpoints" / "checkpoint-4")
    assert len(run(parts, cost=cost, micro_batch=4)) == 2
    for one, other in zip(log_of(whole), log_of(parts), strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], abs=1e-6), name
    ours, theirs = (load_model(path, dtype=torch.float32).weights for path in (whole, parts))
    torch.testing.assert_close(ours.layers[0].qkv, theirs.layers[0].qkv, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_weights(tmp_path: Path, cost: str) -> None:
    words = [
        "train", "grpo", "--small", str(PAIR / "small"), "--large", str(PAIR / "large"), "--preset", "toy",
        "--families", "two-products", "--n", "24", "--prompts", "4", "--generations", "4", "--steps", "8",
        "--save-steps", "2", "--temperature", "1.6", "--cost", cost,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "splitdecode", *words, "--output", str(tmp_path / name)]

    subprocess.run(command("whole"), env=environment, check=True, capture_output=True)
    cut = tmp_path / "cut"
    with subprocess.Popen(command("cut"), env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 5/8" in line:
                os.kill(process.pid, signal.SIGKILL)
                break
        else:
            raise AssertionError("it ended before it was killed")
    assert process.returncode == -signal.SIGKILL
    assert not (cut / "config.json").exists()
    found = newest_checkpoint(cut / "checkpoints")
    assert found is not None
    assert step_of(found) == 4
    subprocess.run(command("cut"), env=environment, check=True, capture_output=True)
    assert log_of(cut) == log_of(tmp_path / "whole")
    assert saved(cut) == saved(tmp_path / "whole") != saved(PAIR / "small")


def test_a_run_that_ended_stays_ended(tmp_path: Path, cost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule looks at the steps before a restart too; where it ended a run, nothing follows."""
    seen: list[int] = []

    def rule(rewards: Sequence[float]) -> bool:
        seen.append(len(rewards))
        return len(rewards) >= 3

    monkeypatch.setattr(grpo_run, "Converged", lambda steps: rule)
    options: dict[str, Any] = {"cost": cost, "steps": 6, "stop_after": 3}
    assert len(run(tmp_path / "out", **options)) == 3
    before, log = saved(tmp_path / "out"), log_of(tmp_path / "out")
    said: list[str] = []
    assert run(tmp_path / "out", said=said, **options) == []
    assert said == ["ended after step 3: nothing is left to do"]
    assert saved(tmp_path / "out") == before
    assert log_of(tmp_path / "out") == log
    shutil.rmtree(tmp_path / "out/checkpoints/checkpoint-3")
    seen.clear()
    assert len(run(tmp_path / "out", **options)) == 1
    assert seen == [2, 3]
    assert log_of(tmp_path / "out") == log


def test_what_is_set_reaches_the_trainer(tmp_path: Path, cost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def watched(*args: Any, **options: Any) -> Any:
        made.append(make_trainer(*args, **options))
        return made[-1]

    monkeypatch.setattr(grpo_run, "make_trainer", watched)
    said: list[str] = []
    run(
        tmp_path / "out", said=said, cost=cost, steps=1, scale_rewards="batch", micro_batch=2, dtype="bfloat16",
        bf16=True, gradient_checkpointing=True, kv_cache_memory="4MiB",
    )  # fmt: skip
    (trainer,) = made
    assert trainer.scale_rewards == "batch"
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (2, 4)
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    assert next(trainer.model.parameters()).dtype is torch.float32
    (step,) = said
    assert step.startswith("step 1/1: reward ")
    assert "(accuracy " in step
    assert " % offloaded, " in step


def test_costs_are_fitted_once_and_kept(tmp_path: Path) -> None:
    chosen, file = settings(rewards="latency=1"), tmp_path / "cost.json"
    questions = grpo_run.family_questions(["two-products"], 4, 0)
    with SplitDecoder.demo() as decoder:
        first = grpo_run._fitted_cost(decoder, questions, {}, chosen, file, {"large": "a"})
        again = grpo_run._fitted_cost(decoder, questions, {}, chosen, file, {"large": "a"})
        assert first == again == CostModel.read(file)
        assert first.read_interval == decoder.config.read_interval
        kept = file.read_text("utf-8")
        grpo_run._fitted_cost(decoder, questions, {}, chosen, file, {"large": "b"})
        assert file.read_text("utf-8") != kept  # those of another pair are not taken over
        file.write_text("{", "utf-8")
        with pytest.raises(RequestError, match=r"--output: .*cost.json cannot be read"):
            grpo_run._fitted_cost(decoder, questions, {}, chosen, file, {"large": "b"})


def test_prompts_without_room_are_left_out(tmp_path: Path, cost: str) -> None:
    questions = grpo_run.family_questions(["two-products"], 16, 0)
    long = {"1" * 600: "1", **questions, "2" * 5000: "2"}
    said: list[str] = []
    grpo_run.train(
        PAIR / "small", PAIR / "large", long, tmp_path / "out", settings(cost=cost, steps=1), say=said.append
    )
    assert said[0] == "2 of 18 questions left out: their prompts are longer than 511 tokens"
    few = {**dict(list(questions.items())[:1]), "1" * 600: "1", "2" * 600: "2"}
    with pytest.raises(RequestError, match="questions: found 1 with prompts of at most 511 tokens, of 3, expected at"):
        grpo_run.train(PAIR / "small", PAIR / "large", few, tmp_path / "few", settings(cost=cost))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generations": 1}, "generations: found 1, expected a whole number from 2"),
        ({"temperature": 0.0}, "temperature: found 0.0"),
        ({"temperature": 1e-9}, "temperature: found 1e-09, expected a finite number from 1e-05"),
        ({"rewards": "accuracy"}, "rewards: found 'accuracy', expected term=weight"),
        ({"rewards": "speed=1"}, "weights: found 'speed', expected terms out of"),
        ({"rewards": "accuracy=0"}, "weights: found .*, expected one above 0"),
        ({"scoring": "taste"}, "scorer: found 'taste'"),
        ({"scale_rewards": "all"}, "scale_rewards: found 'all', expected one of none, group, batch"),
        ({"device": "tpu"}, "device: found 'tpu', expected one of auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype: found 'int8', expected one of float32, bfloat16, float16"),
        ({"kv_cache_memory": "much"}, "kv_cache_memory: found 'much'"),
        ({"micro_batch": 3}, "micro_batch: found 3, expected a number that divides prompts x generations, 8"),
        ({"bf16": 1}, "bf16: found 1, expected true or false"),
        ({"cost": "x.json", "latency": "coverage"}, "cost: found x.json for rewards .*, expected rewards with latency"),
        ({"latency": "guessed"}, "latency: found 'guessed', expected one of measured, modelled, coverage"),
        ({"speed": 1}, "settings: found 'speed'"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        settings(**changes)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset", "toy"], "--data and --families: expected one of them"),
        (["--families", "four-products"], "family: found 'four-products'"),
        (["--families", "two-products", "--n", "2"], "questions: found 2, expected at least 6"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: found no text to read"),
        (["--families", "two-products", "--generations", "1"], "generations: found 1"),
        (["--families", "two-products", "--preset", "huge"], "preset: found 'huge', expected paper or toy, or a file"),
        (["--families", "two-products", "--preset", "no.toml"], "preset: no.toml cannot be read"),
        (["--families", "two-products", "--preset", "toy", "--cost", "no.json"], "--cost: no.json cannot be read"),
    ],
)
def test_wrong_input_is_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--small", str(PAIR / "small"), "--large", str(PAIR / "large"), "--output", str(tmp_path / "out")]
    assert main(["train", "grpo", *pair, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_every_setting_has_a_flag() -> None:
    given = {
        "learning_rate": 0.5, "temperature": 0.25, "max_tokens": 3, "max_prompt": 9, "generations": 4, "prompts": 3,
        "steps": 5, "stop_after": 6, "rewards": "latency=1", "latency": "measured", "scoring": "aime", "cost": "a.json",
        "scale_rewards": "batch", "device": "cuda", "dtype": "float16", "kv_cache_memory": "2GiB", "micro_batch": 6,
        "gradient_checkpointing": False, "bf16": True, "save_steps": 7, "seed": 8,
    }  # fmt: skip
    words = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    args = build_parser().parse_args(["train", "grpo", "--small", "s", "--large", "l", "--output", "o", *words])
    assert list(given) == [field.name for field in fields(GrpoSettings)]
    assert {name: getattr(args, name) for name in given} == given
    GrpoSettings(**given)


def test_presets_from_files(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("steps = 7\nbf16 = true\nlearning_rate = 1\n", "utf-8")
    assert preset(str(file), steps=9) == GrpoSettings(steps=9, bf16=True, learning_rate=1)
    for text, said in (
        ("step = 7", "own.toml: found 'step', expected learning_rate"),
        ("a b", "own.toml cannot be read"),
    ):
        file.write_text(text, "utf-8")
        with pytest.raises(RequestError, match=said):
            preset(str(file))


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"GRPO needs trl: pip install 'splitdecode\[train\]'"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_written_over(tmp_path: Path, cost: str) -> None:
    run(tmp_path / "out", cost=cost, steps=1, save_steps=1)
    questions = grpo_run.family_questions(["two-products"], 16, 1)
    with pytest.raises(RequestError, match=r"--output: .* holds a run with data "):
        grpo_run.train(
            PAIR / "small", PAIR / "large", questions, tmp_path / "out", settings(cost=cost, steps=1, save_steps=1)
        )
    CostModel(Pair(0.2, 0.6), Pair(0.01, 0.02), Pair(1.0, 0.7)).write(Path(cost))
    with pytest.raises(RequestError, match=r"--output: .* holds a run with cost "):
        run(tmp_path / "out", cost=cost, steps=1, save_steps=1)
    (tmp_path / "note.txt").write_text("mine", "utf-8")
    with pytest.raises(RequestError, match="which is no run of this command"):
        run(tmp_path)
    with pytest.raises(RequestError, match="the model's own directory"):
        grpo_run.train(PAIR / "small", PAIR / "large", {"a": "1"}, PAIR / "small", settings())
