"""`splitdecode train ablate`: every product made once, cells and margins, going on after a crash, wrong input named."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles.tiny_sft import save_checkpoint

from splitdecode import cli
from splitdecode.annotate.gap import GapRecipe
from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.families import problems, tagged
from splitdecode.train import ablate, ablate_plan, ablate_report
from splitdecode.train.ablate_plan import folders, parse_rl, parse_sft, parse_sources
from splitdecode.train.traces import family_traces

pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("others_warnings")
ROOT = Path(__file__).resolve().parents[2]
GAP = "gap:share=0.2,window=3,merge=1"
SFT = "toy:max_steps=2,global_batch=2,micro_batch=2,save_steps=1"
GRPO = "grpo-toy:steps=1,generations=2,prompts=1,max_tokens=8,rewards=accuracy=1+latency=1,latency=coverage"
SMALL = ["--n", "4", "--eval-n", "3", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, texts = tmp_path_factory.mktemp("pair"), [trace.tagged for trace in family_traces(["one-product"], 40, 0)]
    return save_checkpoint(folder / "small-base", texts), save_checkpoint(folder / "large", texts, hidden=32)


def words(pair: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    base, large = map(str, pair)
    return ["train", "ablate", "--base", base, "--large", large, "--output", str(output), *more]


def grid_of(pair: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    return words(pair, output, "--families", "one-product", *SMALL, *(more or ("--sources", "rules", "--sft", SFT)))


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what is really run."""
    calls: Counter[str] = Counter()

    def watch(owner: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def count(*args: Any, **more: Any) -> Any:
            calls[f"{owner.__name__.rpartition('.')[2]}.{name}"] += 1
            return inner(*args, **more)

        monkeypatch.setattr(owner, name, count)

    watch(ablate.annotation, "annotate")
    watch(ablate.sft, "train")
    watch(ablate.grpo_run, "train")
    watch(ablate, "run_task")
    return calls


@pytest.fixture(scope="module")
def grid(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, Counter[str]]:
    """Two sources, one way of SFT, two of RL, run to the end."""
    output = tmp_path_factory.mktemp("ablate") / "grid"
    line = grid_of(pair, output, "--sources", "rules", GAP, "--sft", SFT, "--rl", "none", GRPO)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = counted(patch)
        assert cli.main(line) == 0
    return line, output, calls


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text("utf-8"))
    return found


def test_each_product_is_made_once(grid: tuple[list[str], Path, Counter[str]]) -> None:
    _, output, calls = grid
    assert calls == {"run.annotate": 2, "sft.train": 2, "grpo_run.train": 2, "ablate.run_task": 2 + 2 + 1}
    for kind, count in (("annotations", 2), ("sft", 2), ("rl", 2), ("eval", 5)):
        assert len(list((output / kind).glob("*.json"))) == count, kind
    assert len(list(output.glob("sft/*/model.safetensors"))) == len(list(output.glob("rl/*/model.safetensors"))) == 2


def test_a_report_has_every_cell(grid: tuple[list[str], Path, Counter[str]]) -> None:
    line, output, _ = grid
    found = results(output)
    cells = [(cell["source"], cell["sft"], cell["rl"]) for cell in found["cells"]]
    assert cells == [(source, SFT, rl) for source in ("rules", GAP) for rl in ("none", GRPO)]
    rules, gap = found["annotations"]
    assert rules["agreement"]["f1"] == 1.0
    assert 0 <= gap["agreement"]["f1"] < 1
    assert (rules["traces"], rules["failed"], rules["spans"]) == (4, 0, 1.0)
    for row, cell in zip(found["rows"], found["cells"], strict=True):
        assert row["accuracy"]["method"] == "wilson"
        assert (
            (row["before"] is None) == (cell["before"] is None) == (row["rl"] == "none") == (row["cpu_s"]["rl"] is None)
        )
        assert row["n"] == 3
        assert row["offload"] == cell["offload"]
        assert row["loss"] > 0
        assert all(row["cpu_s"][stage] > 0 for stage in ("annotation", "sft", "eval"))
    assert [row["policy"] for row in found["baselines"]] == ["small-base", "large", "random-base"]
    share = sum(cell["offload"] for cell in found["cells"]) / 4
    assert found["baselines"][2]["rate"]["share"] == pytest.approx(share)
    assert {(one["axis"], one["level"]) for one in found["margins"]} == {
        ("source", "rules"), ("source", GAP), ("rl", "none"), ("rl", GRPO)
    }  # fmt: skip
    assert found["rl"][0]["steps"] == 1
    assert found["settings"]["base"] == "small-base"
    assert found["command"].startswith("splitdecode train ablate --base small-base --large large --output grid")
    text = (output / "results.md").read_text("utf-8")
    assert all(f"| {one} |" in text for one in (GAP, SFT, GRPO, "small-base"))
    assert str(output.parent) not in text
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    assert line[2] == "--base"


def test_a_finished_grid_is_only_reported_again(
    grid: tuple[list[str], Path, Counter[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, output, _ = grid
    before, calls = results(output), counted(monkeypatch)
    assert cli.main([*line, "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert not calls
    assert {k: v for k, v in after.items() if k != "command"} == {k: v for k, v in before.items() if k != "command"}
    assert cli.main([*line, "--seeds", "0,1"]) == 2
    assert "holds a run with seeds [0], found [0, 1]: expected the same" in capsys.readouterr().err


def plan_of(line: list[str]) -> ablate_plan.Plan:
    return ablate_plan.plan_of(cli.build_parser().parse_args(line, argparse.Namespace(argv=line)))


def test_margins_are_over_everything_else(grid: tuple[list[str], Path, Counter[str]]) -> None:
    plan = plan_of(grid[0])
    plan = replace(plan, seeds=[0, 1], identity={**plan.identity, "seeds": [0, 1]})
    found = ablate.run(plan_of(grid[0]))
    right = {("rules", "none"): [1, 1, 1], ("rules", GRPO): [1, 1, 0], (GAP, "none"): [1, 0, 0], (GAP, GRPO): [0, 0, 0]}
    for (source, sft, rl, _), record in list(found.answers.items()):
        for seed in (0, 1):
            scores = {"one-product": [[bool(one)] for one in right[source, rl]]}
            found.answers[source, sft, rl, seed] = {**record, "scores": scores}
            found.sft[source, sft, seed] = {"loss": 1.0 + seed, "cpu_s": 1.0}
            found.rl[source, sft, rl, seed] = {"cpu_s": 2.0}
    document = ablate_report.document(plan, found, grid[0])
    margins = {one["level"]: one for one in document["margins"]}
    assert margins["rules"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert margins["rules"]["accuracy"]["method"] == "cluster bootstrap"
    assert margins["rules"]["minus_first"] is None
    assert margins[GAP]["minus_first"]["value"] == pytest.approx(-4 / 6)
    assert margins[GRPO]["minus_first"]["value"] == pytest.approx(-2 / 6)
    assert margins[GRPO]["minus_first"]["method"] == "paired bootstrap"
    first, second, *_, last = document["cells"]
    assert (first["accuracy"]["method"], first["accuracy"]["high"]) == ("wilson", 1.0)
    assert second["accuracy"]["value"] == pytest.approx(2 / 3)
    assert second["before"]["value"] == 1.0
    assert last["accuracy"]["value"] == 0.0 < last["accuracy"]["high"]
    assert first["loss"] == 1.5
    assert "### Each seed, one-product" in ablate_report.markdown(document)


class Killed(Exception):
    """What an interrupted run raises."""


def test_a_crash_between_stages_goes_on(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it only what was missing is run; a model whose record was lost is found complete."""

    def crash(*_: Any, **__: Any) -> Any:
        raise Killed

    output = tmp_path / "grid"
    line = grid_of(pair, output, "--sources", "rules", "--sft", SFT, "--rl", GRPO)
    with monkeypatch.context() as patch:
        patch.setattr(ablate.grpo_run, "train", crash)
        with pytest.raises(Killed):
            cli.main(line)
    assert not (output / "results.json").exists()
    assert cli.main([*line, "--n", "5"]) == 2
    (record,) = (output / "sft").glob("*.json")
    record.unlink()
    (model,) = output.glob("sft/*/model.safetensors")
    weights = model.read_bytes()
    calls = counted(monkeypatch)
    assert cli.main(line) == 0
    assert calls == {"sft.train": 1, "grpo_run.train": 1, "ablate.run_task": 2}
    assert model.read_bytes() == weights
    (one,) = results(output)["sft"]
    assert (one["steps"], one["resumed_from"]) == (2, 2)


def test_traces_and_questions_from_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = problems(3, 0, "one-product", part="train")
    names = {"data": tmp_path / "traces.jsonl", "eval": tmp_path / "asked.jsonl", "tagged": tmp_path / "by-hand.jsonl"}
    lines = {
        "data": [{"prompt": one.prompt, "trace": one.trace, "answer": one.answer} for one in found],
        "eval": [{"question": one.prompt, "answer": one.answer} for one in found],
        "tagged": [{"prompt": one.prompt, "tagged": tagged(one)} for one in found],
    }
    for name, rows in lines.items():
        names[name].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    files = ["--data", str(names["data"]), "--eval-data", str(names["eval"]), "--scorer", "integer"]
    line = words(pair, tmp_path / "grid", *files, "--temperature", "0", "--max-tokens", "8",
                 "--sources", f"file:{names['tagged']}", "--sft", SFT)  # fmt: skip
    assert cli.main(line) == 0
    document = results(tmp_path / "grid")
    assert document["annotations"][0]["source"] == "file:by-hand.jsonl"
    assert document["annotations"][0]["agreement"] is None
    assert 0 < document["annotations"][0]["share"] < 0.1
    assert [row["task"] for row in document["rows"]] == ["asked"]
    assert "file:by-hand.jsonl" in document["command"]
    assert plan_of(line).tasks[0].chat is False
    names["tagged"].write_text("", "utf-8")
    with pytest.raises(RequestError, match=r"--sources: .*by-hand.jsonl: found no traces"):
        plan_of(line)


def test_traces_no_annotator_can_do_end_it_before_training(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, data, asked = counted(monkeypatch), tmp_path / "traces.jsonl", tmp_path / "asked.jsonl"
    data.write_text('{"prompt": "1+1", "trace": "It is two.", "answer": 2}\n', "utf-8")
    asked.write_text('{"question": "1+1", "answer": 2}\n', "utf-8")
    files = ["--data", str(data), "--eval-data", str(asked), "--scorer", "integer"]
    for _ in range(2):  # also where it is known already
        assert cli.main(words(pair, tmp_path / "grid", *files, "--sources", "rules", "--sft", SFT)) == 2
        assert "--sources: rules: found 1 of 1 traces it cannot annotate" in capsys.readouterr().err
    assert calls == {"run.annotate": 2}


def test_levels_of_the_axes() -> None:
    assert parse_sources(["rules", "gap", "gap:share=0.05,min-length=2", "rules"]) == {
        "rules": None, "gap": GapRecipe(), "gap:share=0.05,min-length=2": GapRecipe(share=0.05, min_length=2)
    }  # fmt: skip
    (settings,) = parse_sft(["toy:packing=true,max_steps=3,learning_rate=1e-4"]).values()
    assert (settings.packing, settings.max_steps, settings.learning_rate, settings.global_batch) == (True, 3, 1e-4, 24)
    found = parse_rl(["none", "grpo-toy", "grpo-paper:rewards=accuracy=1+format=0.5,latency=coverage"], "math")
    assert found.pop("none") is None
    toy, paper = (one for one in found.values() if one is not None)
    assert (paper.rewards, paper.latency, paper.generations) == ("accuracy=1,format=0.5", "coverage", 14)
    assert toy.scoring == paper.scoring == "math"
    (own,) = (one for one in parse_rl(["grpo-toy:scoring=integer"], "math").values() if one is not None)
    assert own.scoring == "integer"


def test_levels_from_files(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("steps = 7\n", "utf-8")
    (own,) = parse_rl([f"{file}:prompts=3"]).values()
    assert own is not None
    assert (own.steps, own.prompts) == (7, 3)
    file.write_text("epochs = 7\n", "utf-8")
    (tuned,) = parse_sft([f"{file}:packing=true"]).values()
    assert (tuned.epochs, tuned.packing) == (7, True)


def test_folders_differ() -> None:
    assert list(folders(["gap:share=0.1", "gap,share:0.1", "file:a b.jsonl"]).values()) == [
        "gap-share-0.1", "gap-share-0.1-1", "file-a-b.jsonl"
    ]  # fmt: skip


USUAL = "--families one-product --sources rules --sft toy"
WRONG = {
    "--sources rules --sft toy": "--data and --families: found neither",
    "--families sums --sources rules --sft toy": "--families: found 'sums', expected some of two-products",
    "--data nowhere --sources rules --sft toy": "--eval-data: found --data alone",
    "--data nowhere --eval-data nowhere --sources rules --sft toy": "--data: nowhere: found no such file",
    f"{USUAL} --eval-data nowhere": "--eval-data: found --eval-data beside --families",
    f"{USUAL} --scorer math": "--scorer: found math beside --families",
    f"{USUAL} --sources endpoint": "--sources: found 'endpoint', expected rules, gap[:key=value,...] or file:PATH",
    f"{USUAL} --sources gap:share=2": "--sources: gap:share=2: share: found 2.0",
    f"{USUAL} --sources gap:window": "--sources: gap:window: found 'window', expected key=value",
    f"{USUAL} --sources file:nowhere": "--sources: nowhere: found no text to read",
    f"{USUAL} --sft tiny": "--sft: found 'tiny', expected paper, toy or a .toml file, with [:key=value,...]",
    f"{USUAL} --sft toy:speed=1": "--sft: toy:speed=1: found 'speed', expected one of epochs, max_steps",
    f"{USUAL} --sft toy:epochs=many": "--sft: toy:epochs=many: epochs: found 'many', expected a number",
    f"{USUAL} --sft toy:packing=yes": "--sft: toy:packing=yes: packing: found 'yes', expected true or false",
    f"{USUAL} --sft toy:seed=1": "--sft: toy:seed=1: found 'seed', expected it in --seeds",
    f"{USUAL} --sft toy:lora_rank=2": "--sft: toy:lora_rank=2: matrix_rate: found 0.01",
    f"{USUAL} --rl grpo": "--rl: found 'grpo', expected none, grpo-paper, grpo-toy or a .toml file, with",
    f"{USUAL} --rl grpo-toy:generations=1": "--rl: grpo-toy:generations=1: generations: found 1",
    f"{USUAL} --rl grpo-toy:rewards=speed=1": "--rl: grpo-toy:rewards=speed=1: weights: found 'speed'",
    f"{USUAL} --rl grpo-toy:cost=no.json": "--rl: grpo-toy:cost=no.json: --cost: no.json cannot be read",
    f"{USUAL} --rl no.toml": "--rl: no.toml: preset: no.toml cannot be read",
    f"{USUAL} --rl grpo-toy --n 4": "--n: found 4 questions, expected at least 12, those of a step of grpo-toy",
    f"{USUAL} --seeds 0,x": "--seeds: found '0,x', expected whole numbers",
    f"{USUAL} --eval-n 0": "--eval-n: found 0, expected at least 1",
    f"{USUAL} --temperature -1": "temperature: found -1.0",
    f"{USUAL} --base nowhere": "--base: nowhere: expected a directory or a hub id",
    f"{USUAL} --output .": "--output: found ., which is no run of this command",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(
    line: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    assert cli.main([*words(pair, Path("out")), *line.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"splitdecode train: {WRONG[line]}")
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = grid_of(pair, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"needs trl: pip install 'splitdecode\[train\]'"):
        plan_of(line)


@pytest.mark.slow
def test_a_grid_killed_by_the_system_goes_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "grid"
    line = grid_of(pair, output, "--sources", "rules", GAP, "--sft", SFT, "--rl", "none", GRPO)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "splitdecode", *line]
    process = subprocess.Popen(run, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 180
    while not list(output.glob("sft/*.json")) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {file: file.read_bytes() for kind in ("annotations", "sft") for file in output.glob(f"{kind}/*.json")}
    subprocess.run(run, env=environment, capture_output=True, check=True)
    assert len(kept) == 3
    assert all(file.read_bytes() == before for file, before in kept.items())
    assert len(results(output)["cells"]) == 4
