"""Two optimisers as one: every parameter is in one of them, rates are scheduled, a state is the whole state."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from splitdecode.errors import RequestError
from splitdecode.train import sft
from splitdecode.train.muon import MuonAdam
from splitdecode.train.settings import preset


def model(tied: bool) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def stepped(network: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(seed))
    network(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_of_them(tied: bool) -> None:
    network = model(tied)
    optimizer = MuonAdam(network, matrix_rate=0.02, rate=0.003)
    names = {id(p): name for name, p in network.named_parameters()}
    muon, adam = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert not muon & adam
    assert muon | adam == set(names.values())
    assert {name.rsplit(".", 2)[-2] for name in muon} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert all(name.endswith("weight") for name in muon)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.003]


def test_a_schedule_reaches_both_and_a_state_is_whole() -> None:
    one, other = model(True), model(True)
    first = MuonAdam(one, matrix_rate=0.02, rate=0.003)
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 1 / (1 + step))
    stepped(one, first, 0)
    schedule.step()
    assert [group["lr"] for group in first.param_groups] == [0.01, 0.0015]
    assert [part.param_groups[0]["lr"] for part in first.parts] == [0.01, 0.0015]
    other.load_state_dict(one.state_dict())
    second = MuonAdam(other, matrix_rate=9.0, rate=9.0)
    second.load_state_dict(deepcopy(first.state_dict()))  # else torch shares the tensors of the state
    for seed in (1, 2):
        stepped(one, first, seed)
        stepped(other, second, seed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_muon_is_for_whole_matrices() -> None:
    with pytest.raises(RequestError, match=r"matrix_rate: found 0\.01 with lora_rank 4"):
        sft._optimizer(model(True), preset("toy", lora_rank=4))
    assert sft._optimizer(model(True), preset("paper")) is None
