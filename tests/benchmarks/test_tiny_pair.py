"""The recipe of the embedded pair, at sizes of seconds: what lessons hold, that training learns and repeats, stages."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_base
import tiny_pair
import tiny_report
import torch

from splitdecode.evaluate.claims import shipped_results
from splitdecode.families import FAMILIES, part_of
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.train.scratch import Shape, write_scratch

POLICIES = "small-base,large,split,random-base"


def test_the_pair_that_comes_with_the_package_does_what_it_is_for() -> None:
    (document,) = shipped_results()
    rows = [row for row in document["rows"] if row["task"] == tiny_report.FAMILY]
    assert min(row["n"] for row in rows) >= 500
    found = tiny_report.targets(document)
    assert len(found) == 5
    assert [one for one in found if not one.met] == []


def test_the_pair_that_comes_with_the_package_is_small() -> None:
    files = [file for file in tiny_pair.INSTALLED.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"model.safetensors", "tokenizer.json"}
    assert sum(file.stat().st_size for file in files) <= 8e6


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scratch(tmp_path_factory.mktemp("base") / "start", tiny_base.texts(), Shape(16, 1, 2, 1, 32))


@pytest.fixture(scope="module")
def words(start: Path) -> Tokenizer:
    return Tokenizer.from_directory(start)


def test_rows_are_equally_long_and_the_loss_is_on_solutions(words: Tokenizer) -> None:
    lessons = tiny_base.Lessons(words, 3, "train")
    for name in FAMILIES:
        ids, labels = lessons.family(3, name)
        assert ids.shape == labels.shape
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            prompt = label.count(-100)
            assert label == [-100] * prompt + row[prompt:]
            assert words.decode(row[:prompt]).endswith("\n")
            assert words.decode(row[prompt:]).startswith("<think>\n")
            assert row[-1] == words.eos_id


def test_only_the_values_of_drills_are_labels(words: Tokenizer) -> None:
    ids, labels = tiny_base.Lessons(words, 3, "train").drills(2)
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        lines = words.decode(row).split("\n")[1:]
        values = "".join(words.decode([i]) for i in label if i != -100)
        assert len(lines) == tiny_base.DRILL_LINES
        assert values == "".join(line.split("=")[1].removesuffix("<|endoftext|>") for line in lines)
        assert all(eval(line.split("=")[0]) == int(line.split("=")[1][:4]) for line in lines)


@pytest.mark.parametrize("part", ["train", "held-out"])
def test_lessons_are_of_one_part(part: str, words: Tokenizer) -> None:
    ids, _ = tiny_base.Lessons(words, 3, part).family(60, "one-product")
    for row in ids.tolist():
        *factors, taken = map(int, re.findall(r"\d+", words.decode(row).partition("<think>")[0]))
        assert part_of(factors, taken) == part


def test_training_learns_and_repeats(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(tiny_base, "mastery", partial(tiny_base.mastery, rows=4))
    recipe = tiny_base.Recipe(Shape(16, 1, 2, 1, 32), 5, (tiny_base.Phase(30, 2, 1, 2), tiny_base.Phase(10, 1, 2, 2)))
    runs = []
    for _ in range(2):
        seen: list[dict[str, float]] = []
        model = tiny_base.base(start, recipe, seen.append)
        runs.append((seen, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    assert [row["step"] for row in runs[0][0]] == list(range(2, 41, 2))
    assert runs[0][0][-1]["loss"] < runs[0][0][0]["loss"] - 1


def test_a_model_is_saved_over_what_a_run_left(start: Path, tmp_path: Path) -> None:
    from transformers import Qwen2ForCausalLM

    target = tmp_path / "model"
    target.mkdir()
    (target / "left").touch()
    tiny_pair.save(Qwen2ForCausalLM.from_pretrained(start), start, target)
    assert not (target / "left").exists()
    assert Tokenizer.from_directory(target).size == Tokenizer.from_directory(start).size


def test_mastery_tells_easy_from_hard(words: Tokenizer) -> None:
    class Answers:
        """Says the next token, but 0 where it is one of `wrong`."""

        def __init__(self, wrong: str) -> None:
            self.wrong = wrong

        def __call__(self, input_ids: torch.Tensor) -> Any:
            rows = torch.cat([full[:, 1:] for full in seen if full.shape[1] == input_ids.shape[1] + 1][-1:])
            hard = torch.tensor([tiny_base.hard_tokens(words, row) for row in seen[-1].tolist()])[:, 1:]
            said = torch.where(hard if self.wrong == "hard" else ~hard, 0, rows)
            return type("Logits", (), {"logits": torch.nn.functional.one_hot(said, words.size)})

        def eval(self) -> None: ...

        def train(self) -> None: ...

    seen: list[torch.Tensor] = []
    family = tiny_base.Lessons.family

    def kept(self: Any, *args: Any) -> Any:
        rows = family(self, *args)
        seen.append(rows[0])
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_base.Lessons, "family", kept)
        for wrong, right in (("hard", "easy"), ("easy", "hard")):
            found = tiny_base.mastery(Answers(wrong), words, 4)
            for name in FAMILIES:
                assert (found[name], found[f"{name}, {right}"], found[f"{name}, {wrong}"]) == (0, 1, 0)


def row(policy: str, right: float, offload: float = 0.0) -> dict[str, Any]:
    return {"task": "two-products", "policy": policy, "accuracy": {"value": right}, "offload": offload}


def test_targets() -> None:
    rows = [row("small-base", 0.44), row("large", 1), row("split", 0.98, 0.05), row("random-base", 0.5)]
    found = tiny_report.targets({"rows": rows})
    assert [round(one.value, 6) for one in found] == [44, 100, 2, 5, 48]
    assert all(one.met for one in found)
    for place, worse in ((0, row("small-base", 0.61)), (1, row("large", 0.94)), (2, row("split", 0.9, 0.09))):
        assert not all(one.met for one in tiny_report.targets({"rows": [*rows[:place], worse, *rows[place + 1 :]]}))


def test_stages_that_are_done_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    failing = {"traces", "tuned"}

    def stage(_: Path, name: str) -> None:
        if name in failing:
            failing.remove(name)
            raise RuntimeError(name)
        done.append(name)

    monkeypatch.setattr(tiny_pair, "make_small", lambda work: done.append("small"))
    monkeypatch.setattr(tiny_pair, "run", stage)
    with pytest.raises(RuntimeError, match="traces"):
        tiny_pair.make(tmp_path)
    assert sorted(done) == ["large", "small-base"], "what ran beside the stage that failed is kept"
    with pytest.raises(RuntimeError, match="tuned"):
        tiny_pair.make(tmp_path)
    found = tiny_pair.make(tmp_path)
    assert done[2:] == ["traces", "sft", "tuned", "small", "eval"]
    assert tiny_pair.make(tmp_path) == found
    assert sorted(found) == sorted(done)


def test_what_another_recipe_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def stage(work: Path, name: str) -> None:
        assert not (work / name).exists(), "nothing of the other recipe is left"
        (work / name).mkdir()
        done.append(name)

    monkeypatch.setattr(tiny_pair, "make_small", lambda work: stage(work, "small"))
    monkeypatch.setattr(tiny_pair, "run", stage)
    tiny_pair.make(tmp_path)
    done.clear()
    monkeypatch.setitem(tiny_pair.COMMANDS, "sft", tiny_pair.COMMANDS["sft"] + " --epochs 1")
    tiny_pair.make(tmp_path)
    assert done == ["sft", "tuned", "small", "eval"]
    done.clear()
    longer = dataclasses.replace(tiny_base.RECIPES["large"], seed=7)
    monkeypatch.setitem(tiny_pair.RECIPES, "large", longer)
    tiny_pair.make(tmp_path)
    assert done == ["large", "tuned", "small", "eval"]


def test_wall_is_of_the_longer_lane() -> None:
    seconds = {"large": 10.0, "small-base": 3.0, "traces": 1.0, "sft": 2.0, "tuned": 20.0, "small": 30.0, "eval": 40.0}
    assert tiny_pair.wall(seconds) == 100
    assert tiny_pair.wall({**seconds, "sft": 9.0}) == 103


@pytest.mark.slow
def test_the_whole_recipe_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {
        name: dataclasses.replace(one, phases=(tiny_base.Phase(3, 2, 1, 2),)) for name, one in tiny_base.RECIPES.items()
    }
    for module in (tiny_base, tiny_pair, tiny_report):
        monkeypatch.setattr(module, "RECIPES", short)
    run, lock = tiny_pair.run, threading.Lock()

    def stage(work: Path, name: str) -> None:
        if name in short:
            with lock:  # in one process transformers is imported by one thread at a time
                tiny_pair.make_base(work, name)
        else:
            run(work, name)

    monkeypatch.setattr(tiny_pair, "run", stage)
    monkeypatch.setattr(tiny_base, "REPORTS", 1)
    commands = tiny_pair.COMMANDS
    shorter = {
        "traces": commands["traces"].replace("8000", "24"),
        "sft": commands["sft"] + " --epochs 1",
        "tuned": commands["tuned"] + " --steps 1 --prompts 2 --generations 2 --max-tokens 16",
        "eval": commands["eval"].replace("--n 500", "--n 2").replace(tiny_pair.POLICIES, POLICIES) + " --max-tokens 40",
    }
    monkeypatch.setattr(tiny_pair, "COMMANDS", shorter)
    package, root = tmp_path / "package", tmp_path / "root"
    for folder in (package / "tiny-pair", package / "results", root / "docs"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(tiny_pair, "INSTALLED", package / "tiny-pair")
    assert tiny_pair.main(["--work", str(tmp_path / "work"), "--install"]) == 1, "nothing was learned"
    assert not list((package / "tiny-pair").iterdir())
    monkeypatch.setattr(tiny_pair, "ROOT", root)
    tiny_pair.install(tmp_path / "work", tiny_pair.make(tmp_path / "work"))
    assert sorted(one.name for one in (package / "tiny-pair").iterdir()) == ["large", "small", "small-base"]
    page = (root / "docs" / "tiny-pair.md").read_text("utf-8")
    assert "**missed**" in page
    assert str(tmp_path) not in page + (root / "docs" / "tiny-pair-eval.md").read_text("utf-8")
    assert (root / "docs" / "tiny-pair.png").stat().st_size > 10_000
    document = json.loads((package / "results" / "eval-demo.json").read_text("utf-8"))
    assert document["pair"] == {"name": "embedded pair", "trained_on": "two-products"}
    assert str(tmp_path) not in json.dumps(document)
