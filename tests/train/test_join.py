"""annotate -> train sft -> train grpo -> eval on one file of questions: each stage puts them as the runtime does.

The two checkpoints have chat templates of their own. What they must be given is written down here by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.tiny_sft import save_checkpoint
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from splitdecode import SamplingParams, SplitDecoder, cli
from splitdecode.annotate.gap import GapAnnotator
from splitdecode.annotate.traces import Trace as Untagged
from splitdecode.errors import RequestError
from splitdecode.families import problems, tagged
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.requests import Requests
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import CLOSE_TAG, HINT, OPEN_TAG
from splitdecode.train import ablate_plan, sft
from splitdecode.train.cost import Answer
from splitdecode.train.grpo import Rollouts, make_trainer
from splitdecode.train.traces import IGNORED, Example

pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("others_warnings")
PROBLEMS = problems(3, 0, "one-product", part="train")
QUESTIONS = [problem.prompt.strip() for problem in PROBLEMS]
TEMPLATES = Pair(
    "User: {{ messages[0].content }}\nAssistant: {{ '<think>\n' }}", "[INST]{{ messages[0].content }}[/INST]"
)
BOX = "\n\n Put your final answer within \\boxed{}."
BOTH = {
    (f"User: {question}\n{HINT}{BOX}\nAssistant: <think>\n", f"[INST]{question}\n{BOX}[/INST]")
    for question in QUESTIONS
}
SMALL = {small for small, _ in BOTH}
TOY = ["--preset", "toy", "--max-steps", "1", "--global-batch", "3", "--micro-batch", "3"]
GRPO = ["--preset", "toy", "--steps", "1", "--prompts", "3", "--generations", "2", "--max-tokens", "4"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair[Path]:
    folder = tmp_path_factory.mktemp("join")
    texts = [tagged(problem) for problem in problems(40, 0, "one-product", part="train")]
    found = Pair(save_checkpoint(folder / "small", texts), save_checkpoint(folder / "large", texts[:20], hidden=32))
    for role in Role:
        (found[role] / "chat_template.jinja").write_text(TEMPLATES[role])
    return found


def asked_file(folder: Path) -> Path:
    file = folder / "questions.jsonl"
    rows = [
        {"question": question, "trace": one.trace, "hard": one.hard, "answer": one.answer}
        for question, one in zip(QUESTIONS, PROBLEMS, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows), "utf-8")
    return file


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """The ids both lanes begin with, of every answer that any decoder makes."""
    seen: list[tuple[list[int], list[int]]] = []
    real = Requests.choices

    def watched(self: Requests, *args: Any, **options: Any) -> Any:
        made = real(self, *args, **options)
        seen.extend((list(one.prompts[Role.SMALL]), list(one.prompts[Role.LARGE])) for one in made)
        return made

    monkeypatch.setattr(Requests, "choices", watched)
    return seen


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """What fine-tuning trains on."""
    seen: list[Example] = []
    real = sft._trainer

    def watched(network: Any, fitting: Any, *rest: Any) -> Any:
        seen.extend(fitting)
        return real(network, fitting, *rest)

    monkeypatch.setattr(sft, "_trainer", watched)
    return seen


def texts_of(pair: Pair[Path], lanes: list[tuple[list[int], list[int]]]) -> set[tuple[str, str]]:
    words = pair.map(Tokenizer.from_directory)
    return {(words[Role.SMALL].decode(one), words[Role.LARGE].decode(other)) for one, other in lanes}


def run(*args: Any) -> None:
    assert cli.main([str(arg) for arg in args]) == 0


def test_one_file_through_all_stages(
    pair: Pair[Path], tmp_path: Path, lanes: list[tuple[list[int], list[int]]], examples: list[Example]
) -> None:
    file, large = asked_file(tmp_path), pair[Role.LARGE]
    made = {name: tmp_path / name for name in ("tagged.jsonl", "sft", "grpo")}

    run("annotate", file, "--out", made["tagged.jsonl"], "--by", "rules")
    rows = [json.loads(line) for line in made["tagged.jsonl"].read_text("utf-8").splitlines()]
    assert [row["question"] for row in rows] == QUESTIONS
    assert not any("prompt" in row for row in rows)
    assert all(row["tagged"].startswith("<think>\n") for row in rows)

    run("train", "sft", "--model", pair[Role.SMALL], "--data", made["tagged.jsonl"], "--output", made["sft"], *TOY)
    words = Tokenizer.from_directory(pair[Role.SMALL])
    starts = [example.labels.count(IGNORED) for example in examples]
    trained = [example.input_ids[:start] for example, start in zip(examples, starts, strict=True)]
    assert {words.decode(ids) for ids in trained} == SMALL
    for example, start, row in zip(examples, starts, rows, strict=True):
        assert words.decode(example.input_ids[start:-1]) == row["tagged"].removeprefix("<think>\n")

    rewards = ["--rewards", "accuracy=1,latency=1", "--latency", "modelled"]  # whose costs are fitted to answers too
    run("train", "grpo", "--small", made["sft"], "--large", large, "--data", file, "--output", made["grpo"], *GRPO,
        *rewards)  # fmt: skip
    assert len(lanes) == 3 * 2 + 3 * 2, "the cost model's answers, and the rollouts"
    assert texts_of(pair, lanes) == BOTH
    assert {tuple(one) for one, _ in lanes} == set(map(tuple, trained))

    lanes.clear()
    run("eval", "--small", made["grpo"], "--large", large, "--data", f"asked={file}", "--scorer", "integer",
        "--policies", "split,forced", "--max-tokens", "4", "--temperature", "0")  # fmt: skip
    assert texts_of(pair, lanes) == BOTH
    assert {tuple(one) for one, _ in lanes} == set(map(tuple, trained))
    assert not any(tag in text for _, text in texts_of(pair, lanes) for tag in (OPEN_TAG, CLOSE_TAG))


def test_prompts_as_they_stand(pair: Pair[Path], tmp_path: Path, lanes: list[tuple[list[int], list[int]]]) -> None:
    """From Python, in a trainer: the large lane begins with what `large_prompts` says, else with the same prompt."""
    decoder = SplitDecoder.from_pretrained(*pair, dtype="float32", kv_cache_memory="16MiB")
    prompts, params = [f"{QUESTIONS[0]}\n{HINT}\n", QUESTIONS[1]], SamplingParams(temperature=1.0, max_tokens=4)
    rewards = {"same": lambda output, gold: float(gold)}
    with pytest.raises(RequestError, match="large_prompts: found <bigmodel> in what the large model is given"):
        Rollouts(decoder, dict.fromkeys(prompts, "1"), rewards, params)
    rollouts = Rollouts(decoder, dict.fromkeys(prompts, "1"), rewards, params, large_prompts={prompts[0]: QUESTIONS[0]})
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(pair[Role.SMALL] / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    policy = Qwen2ForCausalLM.from_pretrained(pair[Role.SMALL], dtype=torch.float32)
    trainer = make_trainer(
        policy, words, rollouts, num_generations=2, per_device_train_batch_size=4, max_steps=1, use_cpu=True,
        bf16=False, output_dir=str(tmp_path), disable_tqdm=True,
    )  # fmt: skip
    trainer.train()
    assert texts_of(pair, lanes) == {(prompts[0], QUESTIONS[0]), (prompts[1], QUESTIONS[1])}
    assert len(lanes) == 4


def test_a_reward_sees_the_answer_from_its_opening(pair: Pair[Path]) -> None:
    decoder = SplitDecoder.from_pretrained(*pair, dtype="float32", kv_cache_memory="16MiB")
    begun, plain = decoder.generate(["1+1<think>\n", "1+1"], SamplingParams(temperature=0.0, max_tokens=4))
    assert Answer.of(begun, "2").text == "<think>\n" + begun.outputs[0].raw_text
    assert Answer.of(plain, "2").text == plain.outputs[0].raw_text


def test_the_gap_reads_a_question_in_each_models_template(pair: Pair[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hint, and with the opening once, whichever of prompt and trace holds it."""
    decoder = SplitDecoder.from_pretrained(*pair, dtype="float32", kv_cache_memory="16MiB")
    seen: dict[Role, list[str]] = {}
    real = decoder.score

    def watched(sequences: Any, role: Role) -> Any:
        seen[role] = [decoder.tokenizers[role].decode(ids) for ids in sequences]
        return real(sequences, role)

    monkeypatch.setattr(decoder, "score", watched)
    traces = [
        Untagged("a", "1+1?", "<think>\n2", bare=True),
        Untagged("b", "1+1?", "2", bare=True),
        Untagged("c", "p", "2"),
    ]
    list(GapAnnotator(decoder, Pair("a", "b")).annotate(traces))
    small, large = f"User: 1+1?\n{BOX}\nAssistant: ", f"[INST]1+1?\n{BOX}[/INST]"
    assert seen[Role.SMALL] == [f"{small}<think>\n2", f"{small}<think>\n2", "p2"]
    assert seen[Role.LARGE] == [f"{large}<think>\n2", f"{large}2", "p2"]


def test_an_ablation_asks_as_it_trains(pair: Pair[Path], tmp_path: Path) -> None:
    file, asked = asked_file(tmp_path), tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": QUESTIONS[0], "answer": 1}) + "\n", "utf-8")
    line = ["train", "ablate", "--base", str(pair[Role.SMALL]), "--large", str(pair[Role.LARGE]), "--data", str(file),
            "--eval-data", str(asked), "--scorer", "integer", "--output", str(tmp_path / "grid"), "--sources", "rules",
            "--sft", "toy"]  # fmt: skip
    plan = ablate_plan.plan_of(cli.build_parser().parse_args(line, argparse.Namespace(argv=line)))
    assert set(plan.questions) == SMALL
    assert set(plan.large_prompts.items()) == BOTH
    assert all(trace.bare for trace in plan.traces)
    assert [task.chat for task in plan.tasks] == [True]
    by_hand = tmp_path / "by-hand.jsonl"
    by_hand.write_text('{"question": "1+1", "tagged": "2"}\n{"prompt": "p", "tagged": "t"}\n', "utf-8")
    line[line.index("rules")] = f"file:{by_hand}"
    with pytest.raises(
        RequestError, match=r"by-hand.jsonl: found lines with 'prompt and question', expected 'question'"
    ):
        ablate_plan.plan_of(cli.build_parser().parse_args(line, argparse.Namespace(argv=line)))
    file.write_text(file.read_text("utf-8") + '{"prompt": "p", "trace": "t", "answer": 1}\n', "utf-8")
    with pytest.raises(RequestError, match=r"--data: .*found lines with 'question' and lines with 'prompt'"):
        ablate_plan.plan_of(cli.build_parser().parse_args(line, argparse.Namespace(argv=line)))
