"""Traces as ids and labels: exact bytes, masked prompts, tokens that hold a byte of a tag."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles.tiny_sft import save_checkpoint

from splitdecode.errors import CheckpointError, RequestError
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.tokens import HINT
from splitdecode.train.settings import Settings, preset
from splitdecode.train.traces import (
    IGNORED,
    Trace,
    asked,
    check_tags,
    encode,
    family_traces,
    read_traces,
    tag_tokens,
)

TRACES = family_traces(["one-product"], 10, 0)
WORDS = Path(__file__).resolve().parents[1] / "oracles" / "unigram"  # has the tags as tokens of their own


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("traces") / "model"
    return Tokenizer.from_directory(save_checkpoint(folder, [trace.tagged for trace in TRACES]))


def test_the_prompt_is_masked_and_the_rest_is_not(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    assert eos is not None
    for trace in TRACES:
        example = encode(trace, tokenizer, eos)
        prompt = tokenizer.encode(trace.prompt)
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels == [IGNORED] * len(prompt) + example.input_ids[len(prompt) :]
        assert example.input_ids[-1] == eos
        assert tokenizer.decode(example.labels[len(prompt) : -1]) == trace.tagged
        assert len(example.in_tag) == len(example.labels)


def test_single_added_tags_are_one_token() -> None:
    tokenizer = Tokenizer.from_directory(WORDS)
    example = encode(TRACES[0], tokenizer, 0)
    marked = [i for i, tag in zip(example.input_ids, example.in_tag, strict=True) if tag]
    assert marked == [tokenizer.id_of("<bigmodel>"), tokenizer.id_of("</bigmodel>")]


def test_tags_apart_are_encoded_by_themselves(tokenizer: Tokenizer) -> None:
    """As a forced hand-off puts them; otherwise they merge with what stands at their edges."""
    tag = [tokenizer.encode("<bigmodel>"), tokenizer.encode("</bigmodel>")]
    merged = 0
    for trace in TRACES:
        plain, apart = encode(trace, tokenizer, 0), encode(trace, tokenizer, 0, lambda: True)
        assert tokenizer.decode(plain.input_ids) == tokenizer.decode(apart.input_ids)
        marked = [i for i, inside in zip(apart.input_ids, apart.in_tag, strict=True) if inside]
        assert marked == (tag[0] + tag[1]) * trace.tagged.count("<bigmodel>")
        merged += plain.input_ids != apart.input_ids
    assert merged


def test_tokens_that_hold_a_byte_of_a_tag() -> None:
    tokens = [
        b"a.",
        b" <",
        b"big",
        b"model",
        b">The",
        b" x",
        b".</",
        b"bigmodel",
        b">\n\n",
        b"<bigmod",
        b"\xc3",
        b"\xa9",
    ]
    text = b"".join(tokens).decode()
    assert tag_tokens(text, tokens) == [False, *[True] * 4, False, True, True, True, False, False, False]


def test_families_give_tagged_training_problems() -> None:
    assert len(family_traces(["one-product", "three-products"], 3, 1)) == 6
    assert family_traces(["one-product"], 10, 0) == TRACES
    assert all(trace.tagged.count("<bigmodel>") == 1 for trace in TRACES)
    with pytest.raises(RequestError, match="--n: found 0"):
        family_traces(["one-product"], 0, 0)
    with pytest.raises(RequestError, match="family: found 'x'"):
        family_traces(["x"], 1, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("</bigmodel>", "found </bigmodel> at character 0, expected <bigmodel>"),
        ("<bigmodel>a<bigmodel>", "found <bigmodel> at character 11, expected </bigmodel>"),
        ("a<bigmodel>", "found an <bigmodel> that nothing closes"),
    ],
)
def test_unbalanced_tags_are_refused(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        check_tags(text, "x")


def test_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    file.write_text('{"prompt": "p", "tagged": "a\\u2028<bigmodel>b</bigmodel>", "id": 1}\n\n')
    assert read_traces(file) == [Trace("p", "a\u2028<bigmodel>b</bigmodel>")]
    file.write_text('{"question": "q", "tagged": "a"}\n{"prompt": "p", "question": null, "tagged": "b"}')
    assert read_traces(file) == [Trace("q", "a", bare=True), Trace("p", "b")]
    for text, said in (
        ("", "found no traces"),
        ("\n\n{", "--data: traces.jsonl line 3: found no JSON"),
        ("[]", "traces.jsonl line 1: found list, expected an object"),
        ('{"prompt": "p"}', "found 'prompt', expected an object with the texts 'prompt' and 'tagged'"),
        ('{"tagged": "a"}', "traces.jsonl line 1: found 'tagged', expected either 'question' or 'prompt'"),
        ('{"prompt": null, "tagged": "a"}', "found 'prompt', 'tagged', expected either 'question' or 'prompt'"),
        (
            '\n{"prompt": "p", "question": "q", "tagged": "a"}',
            "traces.jsonl line 2: found 'question', 'prompt', expected either",
        ),
        ('{"question": "", "tagged": "a"}', "found an empty text, expected a 'question' and a 'tagged' solution"),
        ('{"prompt": "p", "tagged": 1}', "expected an object"),
        ('{"prompt": "p", "tagged": ""}', "found an empty text"),
        ('{"prompt": "p", "tagged": "<bigmodel>"}', "that nothing closes"),
    ):
        file.write_text(text)
        with pytest.raises(RequestError, match=said):
            read_traces(file)
    with pytest.raises(RequestError, match="found no text to read"):
        read_traces(tmp_path)
    file.write_bytes(b"\xff")
    with pytest.raises(RequestError, match="not UTF-8"):
        read_traces(file)


SOLUTIONS = {
    "<think>\nA <bigmodel>b</bigmodel>": "A <bigmodel>b</bigmodel>",
    "<think>\n\nA": "\nA",
    "<think>A": "A",
    "A": "A",
    " <think>\nA": " <think>\nA",
    "<bigmodel><think>\nA</bigmodel> b": "<bigmodel>A</bigmodel> b",
    "<bigmodel><think></bigmodel>\nA<bigmodel>b</bigmodel>": "A<bigmodel>b</bigmodel>",
    "<bigmodel></bigmodel>A": "<bigmodel></bigmodel>A",
}


@pytest.mark.parametrize("tagged", SOLUTIONS)
def test_what_the_template_has_opened_is_not_written_again(tagged: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("S[{{ messages[0].content }}]{{ '<think>\\n' }}")
    (trace,) = asked([Trace("1+1?", tagged, bare=True)], tmp_path)
    assert trace == Trace(f"S[1+1?\n{HINT}\n\n Put your final answer within \\boxed{{}}.]<think>\n", SOLUTIONS[tagged])


def test_elsewhere_a_solution_stands_as_it_is(tmp_path: Path) -> None:
    """A template that opens nothing, none at all, and prompts: these are trained on to the letter."""
    begun, words = "<think>\nA", f"1+1?\n{HINT}\n\n Put your final answer within \\boxed{{}}."
    verbatim = Trace("p<think>\n", begun)
    assert asked([Trace("1+1?", begun, bare=True), verbatim], tmp_path) == [Trace(words + "\n", begun), verbatim]
    (tmp_path / "chat_template.jinja").write_text("S[{{ messages[0].content }}]")
    assert asked([Trace("1+1?", begun, bare=True), verbatim], tmp_path) == [Trace(f"S[{words}]", begun), verbatim]
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    assert asked([verbatim], tmp_path) == [verbatim], "a template that is not needed is not read"
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not readable"):
        asked([Trace("1+1?", begun, bare=True)], tmp_path)


def test_presets_and_what_goes_over_them() -> None:
    paper = preset("paper")
    assert (paper.epochs, paper.learning_rate, paper.min_lr_ratio, paper.warmup_ratio) == (3, 5e-5, 0.1, 0.05)
    assert (paper.global_batch, paper.max_length, paper.packing, paper.bf16) == (64, 16384, True, True)
    assert preset("toy", epochs=2, packing=True).packing
    assert not preset("toy").bf16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "epochs: found 0, expected a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: found nan"),
        ({"warmup_ratio": 1}, "warmup_ratio: found 1"),
        ({"global_batch": 6, "micro_batch": 4}, "global_batch: found 6, expected a multiple of micro_batch, 4"),
        ({"packing": 1}, "packing: found 1, expected true or false"),
        ({"tag_weight": -1}, "tag_weight: found -1"),
        ({"max_steps": 0}, "max_steps: found 0"),
        ({"speed": 1}, "settings: found 'speed', expected epochs, "),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as raised:
        preset("toy", **changes)
    assert str(raised.value).startswith(said)
    with pytest.raises(RequestError, match="preset: found 'x'"):
        preset("x")
    assert Settings().tag_weight == 1
