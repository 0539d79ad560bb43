"""`splitdecode train grpo`: settings, questions, a run that ends in a directory the runtime loads, and going on."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import splitdecode
from splitdecode import SamplingParams, SplitDecoder
from splitdecode.cli import main
from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.families import problems
from splitdecode.models import load_model
from splitdecode.train import grpo_run

pytest.importorskip("trl")
PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"


@pytest.fixture(autouse=True)
def others_warnings() -> Iterator[None]:
    """transformers warns of names that TRL still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def settings(**changes: Any) -> grpo_run.GrpoSettings:
    small = {"prompts": 2, "generations": 4, "steps": 4, "save_steps": 2, "temperature": 1.6, "max_tokens": 200}
    return grpo_run.preset("toy", **{**small, "learning_rate": 1e-3, **changes})


def run(folder: Path, **changes: Any) -> list[dict[str, float]]:
    questions = grpo_run.family_questions(["two-products"], 16, 0)
    return grpo_run.train(PAIR / "small", PAIR / "large", questions, folder, settings(**changes))


def test_presets_hold_the_published_numbers() -> None:
    paper = grpo_run.preset("paper")
    assert (paper.learning_rate, paper.temperature, paper.max_tokens) == (1e-6, 0.7, 4096)
    assert 14 <= paper.generations <= 21
    assert 84 <= paper.prompts * paper.generations <= 128
    assert abs(paper.steps * paper.prompts - 5000) < paper.prompts
    assert grpo_run.weights_of(paper.rewards) == {"accuracy": 1.0, "format": 1.0, "tag_count": 1.0}


def test_a_run_saves_what_the_runtime_loads(tmp_path: Path) -> None:
    steps = run(tmp_path / "out", steps=2)
    assert [sorted(line) for line in steps] == [sorted(steps[0])] * 2
    decoder = SplitDecoder.from_pretrained(tmp_path / "out", PAIR / "large")
    answer = decoder.generate(problems(1, 5)[0].prompt, SamplingParams(temperature=0.0, max_tokens=200))[0]
    assert answer.metrics.handoffs > 0
    tuned, before = (load_model(path, dtype=torch.float32) for path in (tmp_path / "out", PAIR / "small"))
    assert not torch.equal(tuned.weights.layers[0].qkv, before.weights.layers[0].qkv)


def test_a_run_that_goes_on_is_the_run_that_was_never_interrupted(tmp_path: Path) -> None:
    """With rewards that do not depend on the clock; the cost model is fitted once and kept."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, rewards="accuracy=1,tag_count=0.5")
    run(parts, rewards="accuracy=1,tag_count=0.5")
    # As if killed behind step 2: what was saved later is gone, and so are the tuned weights.
    for path in (parts / "config.json", parts / "model.safetensors"):
        path.unlink()
    for path in sorted((parts / "checkpoints" / "checkpoint-4").iterdir()):
        path.unlink()
    assert len(run(parts, rewards="accuracy=1,tag_count=0.5")) == 2
    logs = [
        [json.loads(line) for line in (path / "log.jsonl").read_text("utf-8").splitlines()] for path in (whole, parts)
    ]
    for one, other in zip(*logs, strict=True):
        for name in set(one) - {"ms"}:
            assert one[name] == pytest.approx(other[name], abs=1e-6), name
    ours, theirs = (load_model(path, dtype=torch.float32).weights for path in (whole, parts))
    torch.testing.assert_close(ours.layers[0].qkv, theirs.layers[0].qkv, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generations": 1}, "generations: found 1, expected a whole number from 2"),
        ({"temperature": 0.0}, "temperature: found 0.0"),
        ({"rewards": "accuracy"}, "rewards: found 'accuracy', expected term=weight"),
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
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--families", "two-products", "--generations", "1"], "generations: found 1"),
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


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"GRPO needs trl: pip install 'splitdecode\[train\]'"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine", "utf-8")
    with pytest.raises(RequestError, match="which is no run of this command"):
        run(tmp_path)
    with pytest.raises(RequestError, match="the model's own directory"):
        grpo_run.train(PAIR / "small", PAIR / "large", {"a": "1"}, PAIR / "small", settings())
