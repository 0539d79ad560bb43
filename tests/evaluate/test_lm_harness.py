"""lm-evaluation-harness drives a pair: text, likelihoods against transformers, chats, and (slow) a whole local task."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.embedded import OFFLOAD

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from transformers import Qwen2ForCausalLM

import splitdecode
from splitdecode import RequestError, SplitDecoder, cli
from splitdecode.evaluate.lm_harness import SplitDecodeLM
from splitdecode.families import boxed, problems

ROOT = Path(__file__).resolve().parents[2]
PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"
TASKS = problems(3, 11)


@pytest.fixture(scope="module")
def decoder() -> Iterator[SplitDecoder]:
    with SplitDecoder.demo() as made:
        yield made


def asked(context: str, **options: Any) -> Instance:
    return Instance("generate_until", {}, (context, options), 0)


def scored(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0)


def test_it_is_registered() -> None:
    assert get_model("splitdecode") is SplitDecodeLM


def test_answers(decoder: SplitDecoder) -> None:
    model = SplitDecodeLM(decoder=decoder)
    texts = model.generate_until([asked(task.prompt, until=["Question:"]) for task in TASKS], disable_tqdm=True)
    assert [boxed(text) for text in texts] == [task.answer for task in TASKS]
    assert not any(token in text for text in texts for token in ("<bigmodel>", "<|endoftext|>"))
    assert [m.offload_fraction for m in model.metrics] == pytest.approx([OFFLOAD] * 3)


def test_policies(decoder: SplitDecoder) -> None:
    for policy, share in (("small", 0), ("large", 1)):
        model = SplitDecodeLM(policy=policy, decoder=decoder)
        model.generate_until([asked(TASKS[0].prompt, max_gen_toks=20)], disable_tqdm=True)
        assert (model.metrics[0].offload_fraction, model.metrics[0].tokens) == (share, 20)
    model = SplitDecodeLM(policy="random", p=1.0, chunk=4, decoder=decoder)
    model.generate_until([asked(TASKS[0].prompt, max_gen_toks=8)], disable_tqdm=True)
    assert model.metrics[0].offload_fraction == 1


def test_stop_strings_count_only_behind_the_thinking(decoder: SplitDecoder) -> None:
    """ "sum" stands in the thinking and nowhere else; "}" ends the box."""
    plain = SplitDecodeLM(decoder=decoder)
    (text,) = plain.generate_until([asked(TASKS[0].prompt, until="sum")], disable_tqdm=True)
    assert "sum" not in text
    assert "ones" in text
    thinker = SplitDecodeLM(decoder=decoder, think_end_token="</think>")
    (text,) = thinker.generate_until([asked(TASKS[0].prompt, until=["sum", "}"])], disable_tqdm=True)
    assert text == f"\\boxed{{{TASKS[0].answer}"


def test_what_a_task_may_ask_for(decoder: SplitDecoder) -> None:
    model = SplitDecodeLM(decoder=decoder)
    hot = asked(TASKS[0].prompt, do_sample=True, temperature=4.0, top_k=50, max_gen_toks=12)
    first, second = (model.generate_until([hot, hot], disable_tqdm=True) for _ in range(2))
    assert first == second
    assert first[0] != first[1]  # repeats of a question are drawn with seeds of their own
    many = asked(TASKS[0].prompt, until=[f"stop {n}" for n in range(40)], max_gen_toks=4)
    assert len(model.generate_until([many], disable_tqdm=True)) == 1
    with pytest.raises(RequestError, match="generation_kwargs: found num_beams, expected until"):
        model.generate_until([asked("x", num_beams=4)], disable_tqdm=True)


@torch.inference_mode()
def oracle(name: str, ids: list[int], start: int) -> tuple[float, bool]:
    logits = Qwen2ForCausalLM.from_pretrained(PAIR / name, dtype=torch.float32)(torch.tensor([ids])).logits[0].double()
    logits = logits[start - 1 : -1]
    chosen = torch.tensor(ids[start:])
    return float(logits.log_softmax(-1)[range(len(chosen)), chosen].sum()), bool((logits.argmax(-1) == chosen).all())


@pytest.mark.parametrize("name", ["small", "large"])
def test_likelihoods_are_transformers(name: str, decoder: SplitDecoder) -> None:
    model = SplitDecodeLM(policy="split", score_with=name, decoder=decoder)
    context, endings = f"{TASKS[0].prompt}<think>\n", (TASKS[0].trace[8:23], "11111", "1")
    found = model.loglikelihood([scored(context, ending) for ending in endings], disable_tqdm=True)
    for (value, likeliest), ending in zip(found, endings, strict=True):
        first, whole = model.tok_encode(context.rstrip()), model.tok_encode(context + ending)  # lm-eval's own halves
        wanted = oracle(name, first + whole[len(first) :], len(first))
        assert value == pytest.approx(wanted[0], abs=1e-3)
        assert likeliest == wanted[1]
    (rolling,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (context,), 0)], disable_tqdm=True)
    ids = [model.eot_token_id, *model.tok_encode(context)]
    assert rolling == pytest.approx(oracle(name, ids, 1)[0], abs=1e-3)


def test_long_contexts_lose_their_beginning(decoder: SplitDecoder) -> None:
    model = SplitDecodeLM(policy="large", decoder=decoder)
    long, cut = ("1" * length + "2" * 509 for length in (300, 1))
    found = model.loglikelihood([scored(long, "345"), scored(cut, "345")], disable_tqdm=True)
    assert found[0] == found[1]
    with pytest.raises(RequestError, match="loglikelihood: found a continuation of 600 tokens, expected 1 to 512"):
        model.loglikelihood([scored("1", "2" * 600)], disable_tqdm=True)


def test_two_models_have_no_likelihood(decoder: SplitDecoder) -> None:
    model = SplitDecodeLM(decoder=decoder)
    with pytest.raises(RequestError, match="unsupported under policy 'split', where two models write in turns"):
        model.loglikelihood([scored("1", "2")], disable_tqdm=True)
    with pytest.raises(RequestError, match="unsupported under policy 'split'"):
        model.loglikelihood_rolling([scored("1", "2")], disable_tqdm=True)


def test_what_is_refused(decoder: SplitDecoder) -> None:
    with pytest.raises(RequestError, match="policy: found 'small,large', expected one"):
        SplitDecodeLM(policy="small,large", decoder=decoder)
    with pytest.raises(RequestError, match="--policies: found 'nobody'"):
        SplitDecodeLM(policy="nobody", decoder=decoder)
    with pytest.raises(RequestError, match="nonsense: unknown argument"):
        SplitDecodeLM(nonsense=1)
    with pytest.raises(RequestError, match="apply_chat_template: found a checkpoint without a chat template"):
        SplitDecodeLM(decoder=decoder).apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(RequestError, match="forced: lm-eval task has no labelled solution"):
        SplitDecodeLM(policy="forced", decoder=decoder).generate_until([asked("1")], disable_tqdm=True)


def test_each_model_reads_a_chat_in_its_own_template(tmp_path: Path) -> None:
    for name in ("small", "large"):
        shutil.copytree(PAIR / name, tmp_path / name)
        text = f"{name}: {{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}" + (
            "{% if add_generation_prompt %}go {% endif %}"
        )
        (tmp_path / name / "chat_template.jinja").write_text(text)
    folders = [str(tmp_path / name) for name in ("small", "large")]
    model = SplitDecodeLM(*folders, score_with="large", dtype="float32", device="cpu", batch_size=1)
    seen: list[Any] = []
    real = model.decoder.generate
    model.decoder.generate = lambda prompts, *rest, **named: (  # type: ignore[method-assign]
        seen.append((prompts, named["large_prompt"])) or real(prompts, *rest, **named)
    )
    context = model.apply_chat_template([{"role": "user", "content": "1+1"}])
    model.generate_until([asked(context, max_gen_toks=2)], disable_tqdm=True)
    ((smalls, larges),) = seen
    hint = "You always use <bigmodel>...</bigmodel> to mark parts of the reasoning process that are important."
    assert smalls == [f"small: 1+1\n{hint}go "]
    assert larges == ["large: 1+1go "]
    assert model.decoder.tokenizers.large.decode(model.tok_encode(context + "2")) == "large: 1+1go 2"
    begun = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "it is"}]
    prefilled = model.apply_chat_template(begun, add_generation_prompt=False)
    assert model.decoder.tokenizers.large.decode(model.tok_encode(prefilled)) == "large: 1+1it is"


# ---- whole tasks, without a network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of our own: answers in boxes, and the likelier of two products."""
    found = tmp_path_factory.mktemp("tasks")
    rows = [{"question": task.prompt, "answer": str(task.answer)} for task in TASKS]
    (found / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choices = []
    for task in TASKS:
        start, stop = task.hard[0]
        right = int(task.trace[start:stop])
        choices.append({"question": task.prompt + task.trace[:start], "choices": [str(right + 110), str(right)]})
    (found / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)))
    common = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {}\n"
    (found / "boxes.yaml").write_text(
        "task: splitdecode_boxes\noutput_type: generate_until\n"
        + common.format(found / "boxes.jsonl")
        + "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['<|endoftext|>'], do_sample: false, max_gen_toks: 300}\n"
        "filter_list: [{name: box, filter: [{function: regex, regex_pattern: 'boxed.(-?[0-9]+)', group_select: -1}, "
        "{function: take_first}]}]\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (found / "choices.yaml").write_text(
        "task: splitdecode_choices\noutput_type: multiple_choice\n"
        + common.format(found / "choices.jsonl")
        + "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 1\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return found


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **offline}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_local_task_from_our_command(folder: Path, tmp_path: Path) -> None:
    asked = ["--tasks", "splitdecode_boxes,splitdecode_choices", "--include-path", str(folder), "--score-with", "large"]
    command = [sys.executable, "-m", "splitdecode", "eval", *asked, "--policies", "random,large,split", "--json"]
    done = run([*command, "--output-dir", str(tmp_path)], folder)
    document = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["task"], row["policy"]): row for row in document["lm_eval"]}
    assert len(rows) == 6
    for policy in ("large", "split"):
        assert rows["splitdecode_boxes", policy]["metrics"]["exact_match,box"] == 1
        assert rows["splitdecode_choices", policy]["metrics"]["acc,none"] == 1
    assert rows["splitdecode_boxes", "split"]["offload"] == pytest.approx(OFFLOAD)
    assert 0 <= rows["splitdecode_boxes", "random"]["offload"] < 0.3
    assert rows["splitdecode_choices", "split"]["offload"] is None  # a likelihood hands nothing over
    for task in ("splitdecode_boxes", "splitdecode_choices"):
        assert rows[task, "large"]["health"] is None
    assert rows["splitdecode_boxes", "split"]["health"]["offload"] == pytest.approx(OFFLOAD)
    assert rows["splitdecode_choices", "split"]["health"] is None
    assert "| split | 0." in (tmp_path / "results.md").read_text("utf-8")
    assert "| splitdecode_boxes | split | exact_match,box 1" in (tmp_path / "results.md").read_text("utf-8")
    assert not (tmp_path / "pareto.png").exists()


@pytest.mark.slow
def test_a_local_task_from_their_command(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "splitdecode.evaluate.lm_harness", "run", "--model", "splitdecode"]
    command += ["--model_args", "policy=split", "--tasks", "splitdecode_boxes", "--include_path", str(folder)]
    run([*command, "--output_path", str(tmp_path)], folder)
    (file,) = tmp_path.rglob("results*.json")
    assert json.loads(file.read_text("utf-8"))["results"]["splitdecode_boxes"]["exact_match,box"] == 1


@pytest.mark.slow
def test_a_task_nobody_knows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--tasks", "lm_eval/nonsense", "--include-path", str(folder), "--policies", "small"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("splitdecode eval: --tasks: found 'nonsense', which is neither ours nor one lm-eval knows")


def test_a_folder_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--tasks", "mine", "--include-path", "nowhere", "--policies", "small"]) == 2
    assert capsys.readouterr().err == "splitdecode eval: --include-path: found no folder nowhere\n"
