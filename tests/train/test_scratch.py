"""Checkpoints with nothing learned: what the tokenizer promises, and equal files for equal arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitdecode import SamplingParams, SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import problems, tagged
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.train.scratch import Shape, write_scratch

TASKS = problems(20, 0)
TEXTS = [text for task in TASKS for text in (task.prompt, task.trace)] + ["=<", "</", ">\n", "big", "model"] * 100
SHAPE = Shape(hidden=32, layers=1, heads=2, kv_heads=1, inner=64, positions=256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scratch(tmp_path_factory.mktemp("scratch") / "model", TEXTS, SHAPE, vocabulary=350, padding=3, seed=4)


def test_transformers_reads_the_same_ids(model: Path) -> None:
    ours, theirs = Tokenizer.from_directory(model), AutoTokenizer.from_pretrained(model)
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    for text in (tagged(TASKS[0]), TASKS[1].prompt, "Grüße, 世界 \n\n 12 ", "it's  x"):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text


def test_tags_are_text_in_pieces_that_merge_at_both_edges(model: Path) -> None:
    tokenizer = Tokenizer.from_directory(model)
    pieces = [tokenizer.token_bytes[i].decode() for i in tokenizer.encode("3*4=<bigmodel>12</bigmodel>\n")]
    assert pieces == ["3", "*", "4", "=<", "big", "model", ">", "1", "2", "</", "big", "model", ">\n"]
    assert tokenizer.id_of("<bigmodel>") is None
    assert (tokenizer.eos_id, tokenizer.special_ids) == (0, {0})


def test_equal_arguments_give_equal_files_and_the_seed_counts(model: Path, tmp_path: Path) -> None:
    again = write_scratch(tmp_path / "again", TEXTS, SHAPE, vocabulary=350, padding=3, seed=4)
    other = write_scratch(tmp_path / "other", TEXTS, SHAPE, vocabulary=350, padding=3, seed=5)
    names = sorted(file.name for file in model.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    for name in names:
        assert (model / name).read_bytes() == (again / name).read_bytes(), name
    weights = "model.safetensors"
    assert (model / weights).read_bytes() != (other / weights).read_bytes()


def test_the_model_has_the_shape_and_rows_to_spare(model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model)
    size = Tokenizer.from_directory(model).size
    assert size <= 350
    assert network.get_input_embeddings().weight.shape == (size + 3, 32)
    assert network.get_output_embeddings().weight.data_ptr() == network.get_input_embeddings().weight.data_ptr()
    assert (network.config.num_hidden_layers, network.config.max_position_embeddings) == (1, 256)


def test_the_runtime_loads_it(model: Path) -> None:
    with SplitDecoder.from_pretrained(model, model, kv_cache_memory="8MiB") as decoder:
        (output,) = decoder.generate(["3*4"], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4


def test_a_directory_that_exists_is_refused(model: Path) -> None:
    with pytest.raises(RequestError, match="model: exists, expected a new directory"):
        write_scratch(model, TEXTS, SHAPE)
