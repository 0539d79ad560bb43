"""Tags that are added tokens of the small model alone, behind every id the large one knows: the easy case must work."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles.tiny_sft import save_checkpoint
from transformers import AutoModelForCausalLM

from splitdecode import SamplingParams, SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.families import problems, tagged
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.roles import Role
from splitdecode.split.tokens import HINT
from splitdecode.train.export import grow_embeddings, write_model, write_tokenizer

TASKS = problems(8, 0, "one-product")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random small model with the tags as ids of its own, and the large one it was made from, without them."""
    folder = tmp_path_factory.mktemp("added")
    large = save_checkpoint(folder / "large", [tagged(task) for task in TASKS])
    model = AutoModelForCausalLM.from_pretrained(large)
    tokenizer, new = write_tokenizer(large, folder / "small", added_tokens=True)
    grow_embeddings(model, tokenizer.size, new)
    write_model(model, large, folder / "small")
    return folder / "small", large


def test_the_small_model_may_draw_its_tags_and_nothing_else_beyond(pair: tuple[Path, Path]) -> None:
    shared = Tokenizer.from_directory(pair[1]).size
    with SplitDecoder.from_pretrained(*pair, kv_cache_memory="32MiB") as decoder:
        assert list(decoder.vocab_limits) == [shared + 2, shared]
        params = SamplingParams(n=8, temperature=1.0, max_tokens=200, seed=0, ignore_eos=True)
        (output,) = decoder.generate([f"{TASKS[0].prompt}{HINT}\n"], params)
    assert output.metrics.handoffs > 0
    assert output.metrics.large.tokens > 0
    assert any("<bigmodel>" in answer.raw_text for answer in output.outputs)
    assert all(token < shared for answer in output.outputs for token in answer.token_ids)


def test_a_tag_in_a_prompt_of_ids_is_refused_as_the_large_model_has_none(pair: tuple[Path, Path]) -> None:
    tokenizer = Tokenizer.from_directory(pair[0])
    with SplitDecoder.from_pretrained(*pair, kv_cache_memory="32MiB") as decoder:
        ids = tokenizer.encode("ab<bigmodel>")
        with pytest.raises(RequestError, match=r"expected ids from 0 to \d+ \(the large model's tokenizer\)"):
            decoder.generate([ids], SamplingParams(max_tokens=1))
        answer = decoder.generate([ids], SamplingParams(max_tokens=1, temperature=0), large_prompt=ids[:-1])[0]
    assert len(answer.outputs[0].token_ids) == 1
    assert tokenizer.id_of("<bigmodel>") == decoder.vocab_limits[Role.LARGE]
