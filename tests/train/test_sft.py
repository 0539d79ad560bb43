"""Fine-tuning: a random model learns to hand over, a killed run goes on as if it had not been, errors are named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.tiny_sft import save_checkpoint

from splitdecode import SamplingParams, SplitDecoder, cli
from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.train import sft
from splitdecode.train.settings import Settings, preset
from splitdecode.train.traces import IGNORED, Trace, encode, family_traces

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "src/splitdecode/data/tiny-pair"
TRACES = family_traces(["one-product"], 40, 0)
FEW = TRACES[:8]
PLAIN = preset("toy", matrix_rate=0.0, learning_rate=3e-3, tags_apart=0.0)
SHORT = replace(PLAIN, max_steps=6, global_batch=4, micro_batch=2, save_steps=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("sft") / "base", [trace.tagged for trace in TRACES])


def loss_by_hand(directory: Path, traces: list[Trace], tag_weight: float) -> float:
    """Mean over all trained tokens of weight times -log p, a trace at a time, without the trainer."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(),
        Tokenizer.from_directory(directory),
    )
    total, count = 0.0, 0
    for trace in traces:
        example = encode(trace, tokenizer, tokenizer.eos_id or 0)
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0]
        logp = logits.double().log_softmax(-1)
        for at, (label, tag) in enumerate(zip(example.labels, example.in_tag, strict=True)):
            if label != IGNORED:
                total -= (tag_weight if tag else 1) * logp[at - 1, label].item()
                count += 1
    return total / count


@pytest.mark.parametrize(
    "changes",
    [{}, {"tag_weight": 3.0}, {"packing": True, "tag_weight": 0.0}, {"packing": True, "micro_batch": 1}],
    ids=["plain", "weighted", "packed and weighted", "packed"],
)
def test_the_loss_is_the_one_computed_by_hand(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = replace(PLAIN, **{"max_steps": 1, "global_batch": 8, "micro_batch": 4, "max_length": 512, **changes})
    report = sft.train(base, FEW, tmp_path / "out", settings)
    assert report.losses[0] == pytest.approx(loss_by_hand(base, FEW, settings.tag_weight), rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_packed_traces_do_not_see_each_other(tmp_path: Path, packing: bool) -> None:
    """A trained model, which would be lost at wrong positions or in another problem's numbers."""
    traces = family_traces(["two-products"], 8, 0)
    settings = replace(
        PLAIN, max_steps=1, packing=packing, global_batch=8, micro_batch=1, max_length=700, tag_weight=2.0
    )
    report = sft.train(PAIR / "small", traces, tmp_path / "out", settings)
    assert report.losses[0] == pytest.approx(loss_by_hand(PAIR / "small", traces, 2.0), rel=1e-3)


class Killed(Exception):
    """What an interrupted run raises."""


def kill_at(step: int) -> sft.OnStep:
    def on_step(now: int, steps: int, loss: float | None) -> None:
        if now == step:
            raise Killed

    return on_step


def saved(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads that name
@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 2, "tag_weight": 2.0}, {"matrix_rate": 0.01}],
    ids=["all weights", "lora", "muon"],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = replace(SHORT, **changes)
    sft.train(base, FEW, tmp_path / "whole", settings)
    with pytest.raises(Killed):
        sft.train(base, FEW, tmp_path / "cut", settings, on_step=kill_at(5))
    torn = tmp_path / "cut/checkpoints/checkpoint-99"  # a save that a kill cut short
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_')
    report = sft.train(base, FEW, tmp_path / "cut", settings)
    assert (report.resumed_from, report.steps) == (4, 6)
    assert len(report.losses) == 6
    assert saved(tmp_path / "cut") == saved(tmp_path / "whole") != saved(base)


def test_a_finished_run_is_left_as_it_is(base: Path, tmp_path: Path) -> None:
    settings = replace(SHORT, max_steps=2)
    sft.train(base, FEW, tmp_path / "out", settings)
    before = saved(tmp_path / "out")
    report = sft.train(base, FEW, tmp_path / "out", settings)
    assert report.resumed_from == 2
    assert saved(tmp_path / "out") == before
    for traces, other, said in (
        (FEW, replace(settings, learning_rate=1.0), "holds a run with learning_rate 0.003, found 1.0"),
        (FEW[:7], settings, "holds a run with traces 8, found 7"),
    ):
        with pytest.raises(RequestError, match=said):
            sft.train(base, traces, tmp_path / "out", other)


def test_a_run_that_never_began_gives_way(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="traces: found 8, the shortest of"):
        sft.train(base, FEW, tmp_path / "out", replace(SHORT, max_length=9))
    report = sft.train(base, FEW, tmp_path / "out", replace(SHORT, max_steps=1))
    assert (report.steps, report.left_out) == (1, 0)


def test_tags_as_added_tokens(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    sft.train(base, FEW, out, replace(SHORT, max_steps=1, added_tokens=True, learning_rate=1e-12))
    before, after = Tokenizer.from_directory(base), Tokenizer.from_directory(out)
    ids = [after.id_of(tag) for tag in ("<bigmodel>", "</bigmodel>")]
    assert ids == [before.size, before.size + 1]
    assert not set(ids) & after.special_ids
    theirs = AutoTokenizer.from_pretrained(out)
    text = TRACES[0].tagged
    assert theirs.encode(text) == after.encode(text)
    assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text
    assert len([i for i in after.encode_inserted(text) if i in ids]) == 2
    rows = embedding(out)
    assert rows.shape[0] == before.size + 2
    mean = embedding(base).mean(0)
    assert all(torch.allclose(rows[i], mean, atol=1e-6) for i in ids if i is not None)


def embedding(directory: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")["model.embed_tokens.weight"]


def test_padding_rows_are_used_before_the_matrix_grows(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", [trace.tagged for trace in FEW], padding=8)
    sft.train(base, FEW, tmp_path / "out", replace(SHORT, max_steps=1, added_tokens=True))
    assert embedding(tmp_path / "out").shape == embedding(base).shape


def test_tags_that_are_tokens_already_leave_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    """A Unigram is one that AutoTokenizer would not read for a Qwen2: the file must stay what it was."""
    words, model, out = ROOT / "tests" / "oracles" / "unigram", tmp_path / "model", tmp_path / "out"
    save_checkpoint(model, ["a"])
    for file in words.iterdir():
        shutil.copyfile(file, model / file.name)
    sft.train(model, family_traces(["two-products"], 4, 0), out, replace(SHORT, max_steps=1, added_tokens=True))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (words / name).read_bytes()
    assert embedding(out).shape == embedding(model).shape


def test_the_embedded_pair_is_trained_on_as_it_was(tmp_path: Path) -> None:
    out, traces = tmp_path / "out", family_traces(["two-products"], 8, 0)
    report = sft.train(PAIR / "small", traces, out, replace(SHORT, max_steps=2, learning_rate=1e-5))
    assert report.losses[0] < 0.1
    with SplitDecoder.from_pretrained(out, PAIR / "large", kv_cache_memory="16MiB") as decoder:
        answer = decoder.generate(traces[0].prompt, SamplingParams(temperature=0, max_tokens=200))[0]
    assert "<bigmodel>" in answer.outputs[0].raw_text


@pytest.mark.slow
@pytest.mark.parametrize("added", [False, True], ids=["plain text", "added tokens"])
def test_a_random_model_learns_to_hand_over(base: Path, tmp_path: Path, added: bool) -> None:
    settings = replace(PLAIN, epochs=40, global_batch=8, micro_batch=8, added_tokens=added, save_steps=1000)
    report = sft.train(base, TRACES, tmp_path / "out", settings)
    assert report.losses[-1] < report.losses[0] / 4
    params = SamplingParams(temperature=0, max_tokens=80)
    with SplitDecoder.from_pretrained(tmp_path / "out", base, kv_cache_memory="16MiB") as decoder:
        outputs = decoder.generate([trace.prompt for trace in TRACES[:4]], params)
    for output in outputs:
        assert re.match(r"<think>\n[-*0-9]+\n[*0-9]+=<bigmodel>", output.outputs[0].raw_text)
        assert output.metrics.large.tokens > 0


@pytest.mark.slow
def test_a_run_killed_by_the_system_goes_on(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "traces.jsonl"
    data.write_text("".join(json.dumps({"prompt": t.prompt, "tagged": t.tagged}) + "\n" for t in TRACES))
    flags = ["train", "sft", "--model", str(base), "--data", str(data), "--preset", "toy", "--json"]
    flags += ["--max-steps", "200", "--save-steps", "10", "--global-batch", "8", "--micro-batch", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "splitdecode", *flags, "--output"]
    process = subprocess.Popen([*run, str(tmp_path / "cut")], env=environment, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (tmp_path / "cut/checkpoints/checkpoint-20/trainer_state.json").exists() and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reports = [
        json.loads(
            subprocess.run([*run, str(tmp_path / name)], env=environment, capture_output=True, check=True).stdout
        )
        for name in ("cut", "whole")
    ]
    assert reports[0]["resumed_from"] >= 20
    assert reports[1]["resumed_from"] == 0
    assert reports[0]["losses"] == reports[1]["losses"]
    assert saved(tmp_path / "cut") == saved(tmp_path / "whole")


def test_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert sft.newest_checkpoint(tmp_path / "none") is None
    for step, text in ((2, "{}"), (9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, "{"), (100, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-x").mkdir()
    assert sft.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_missing_extra_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"needs trl: pip install 'splitdecode\[train\]'"):
        sft.require_extra(Settings())
    assert cli.main(["train", "sft", "--model", "m", "--output", "o", "--families", "one-product"]) == 2
    err = capsys.readouterr().err
    assert err == "splitdecode train: supervised fine-tuning needs trl: pip install 'splitdecode[train]'\n"


WRONG = {
    "--model nowhere --families one-product": "nowhere: expected a directory or a hub id",
    "--model BASE": "--data and --families: found neither",
    "--model BASE --data x --families one-product": "--data and --families: found both",
    "--model BASE --data nowhere.jsonl": "--data: nowhere.jsonl: found no text to read",
    "--model BASE --families sums": "family: found 'sums'",
    "--model BASE --families one-product --n 0": "--n: found 0",
    "--model BASE --families one-product --learning-rate 0": "learning_rate: found 0.0",
    "--model BASE --families one-product --n 2 --max-length 9": "traces: found 2, the shortest of",
    "--model BASE --families one-product --output .": "--output: found ., which is no run of this command",
    "--model BASE --families one-product --output BASE": "--output: found",
    "--model BASE --families one-product --n 2 --matrix-rate 0 --lora-rank 2 --added-tokens": "added_tokens: found",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(
    line: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    words = ["train", "sft", "--output", "out", "--preset", "toy", *line.replace("BASE", str(base)).split()]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"splitdecode train: {WRONG[line]}")


def test_the_command_trains(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--families", "one-product", "--n", "4", "--max-steps", "2", "--global-batch", "2", "--micro-batch", "2"]
    words = ["train", "sft", "--model", str(base), "--output", str(tmp_path / "out"), "--preset", "toy", *flags]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 steps on 4 traces; ")
    assert out.endswith(f"saved to {tmp_path / 'out'}\n")
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["resumed_from"], found["left_out"]) == (2, 2, 0)
