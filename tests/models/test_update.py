"""New weights into a model that exists: as if it had been loaded with them, and all or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.hf import MODELS, build, nan_cache, row, save
from transformers import Qwen2ForCausalLM

import splitdecode
from splitdecode import SamplingParams, SplitDecoder
from splitdecode.errors import CheckpointError, RequestError
from splitdecode.families import problems
from splitdecode.models import load_model
from splitdecode.split.roles import Role

PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"


@pytest.mark.parametrize("name", MODELS)
def test_an_updated_model_is_the_one_loaded(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    save(name, first)
    torch.manual_seed(1)
    other = build(name)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(0.05 * torch.randn_like(value))
    other.save_pretrained(second)
    model, wanted = load_model(first, dtype=torch.float32), load_model(second, dtype=torch.float32)
    before = model.weights.layers[0].qkv.data_ptr()
    model.update(other.state_dict())
    assert model.weights.layers[0].qkv.data_ptr() == before, "captured steps read where they always did"
    step = row([3, 1, 4, 1, 5], 0, [2, 0], 4)
    assert torch.equal(model.forward(step, nan_cache(model, 4, 4)), wanted.forward(step, nan_cache(wanted, 4, 4)))


def test_wrong_tensors_change_nothing(tmp_path: Path) -> None:
    oracle = save("qwen2", tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    kept = model.weights.layers[0].down.clone()
    tensors = dict(oracle.state_dict())
    name = "model.layers.1.mlp.down_proj.weight"
    for wrong, said in (
        (None, "found none"),
        (tensors[name].t(), "expected a tensor"),
        (tensors[name] * torch.nan, "NaN"),
    ):
        given = {k: 2 * v for k, v in tensors.items() if k != name} | ({} if wrong is None else {name: wrong})
        with pytest.raises(CheckpointError, match=name) as error:
            model.update(given)
        assert said in str(error.value)
        assert torch.equal(model.weights.layers[0].down, kept)


def test_a_decoder_forgets_what_it_had_cached() -> None:
    decoder = SplitDecoder.demo()
    params = SamplingParams(temperature=0.0, max_tokens=60)
    prompt = problems(1, 3)[0].prompt
    tuned = decoder.generate(prompt, params)[0].outputs[0].raw_text
    base = Qwen2ForCausalLM.from_pretrained(PAIR / "small-base", dtype=torch.float32).state_dict()
    decoder.update_weights(base)
    wanted = SplitDecoder.demo(small="small-base").generate(prompt, params)[0].outputs[0].raw_text
    assert decoder.generate(prompt, params)[0].outputs[0].raw_text == wanted != tuned
    stream = decoder.stream(prompt, params)
    with pytest.raises(RequestError, match="found 1 unfinished answers"):
        decoder.update_weights(base, Role.SMALL)
    stream.close()
