"""Scores of given text against transformers' logits, whatever runs together and in whatever parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.hf import MODELS, oracle_logits, save

from splitdecode.errors import RequestError
from splitdecode.models import Transformer, load_model
from splitdecode.runtime.scoring import token_logprobs


def lengths(*counts: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(counts))
    return [torch.randint(0, 160, (count,), generator=generator).tolist() for count in counts]


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_the_oracles(name: str, tmp_path: Path) -> None:
    oracle = save(name, tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    sequences = lengths(30, 1, 7, 2, 18, 0, 41)
    wanted = []
    for ids in sequences:
        row = np.full(len(ids), np.nan)
        if len(ids) > 1:
            logprobs = oracle_logits(oracle, ids).double().log_softmax(-1)
            row[1:] = [float(logprobs[i, following]) for i, following in enumerate(ids[1:])]
        wanted.append(row)
    for most in (2048, 50, 9, 1):
        found = token_logprobs(model, sequences, most=most)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, equal_nan=True)


def test_what_cannot_be_scored_is_named(tmp_path: Path) -> None:
    save("qwen2", tmp_path)
    model: Transformer = load_model(tmp_path, dtype=torch.float32)
    assert token_logprobs(model, []) == []
    with pytest.raises(RequestError, match="sequence 1: found id 99999, expected ids below"):
        token_logprobs(model, [[1, 2], [3, 99999]])
    with pytest.raises(RequestError, match="sequence 0: found id -1"):
        token_logprobs(model, [[1, -1]])
    long = [1] * (model.config.max_positions + 1)
    with pytest.raises(RequestError, match=f"found {len(long)} ids, expected at most {model.config.max_positions}"):
        token_logprobs(model, [long])
