"""Ours against transformers: prefill, chunks, paged decode, mixed batches, greedy text; fp32, fp64, halves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.hf import MODELS, exact, greedy, nan_cache, oracle_logits, packed, row, save
from torch import Tensor
from transformers import Qwen2ForCausalLM

import splitdecode
from splitdecode.models import Transformer, load_model

PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"


def random_ids(count: int, vocab: int = 160, seed: int = 0) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def in_steps(model: Transformer, ids: list[int], steps: list[int], pages: list[int], size: int) -> Tensor:
    """Logits of all `ids`, run in pieces of the given lengths over a poisoned cache."""
    kv, at, parts = nan_cache(model, 40, size), 0, []
    for step in steps:
        parts.append(model.forward(row(ids[at : at + step], at, pages, size), kv))
        at += step
    return torch.cat(parts)


@pytest.mark.parametrize("name", MODELS)
def test_fp32_prefill_chunks_decode_and_greedy_text(name: str, tmp_path: Path) -> None:
    oracle = save(name, tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    ids = random_ids(70)
    wanted = oracle_logits(oracle, ids)
    for steps, pages in (
        ([70], list(range(3, 12))),
        ([40, 9, 1, 1, 3, 16], [9, 10, 11, 2, 3, 4, 5, 6, 7]),
        ([1] * 5 + [45, 20], [30, 2, 28, 4, 26, 6, 24, 8, 22]),
    ):
        torch.testing.assert_close(in_steps(model, ids, steps, pages, 8), wanted, rtol=0, atol=1e-4)
    text = oracle.generate(torch.tensor([ids[:20]]), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert greedy(model, ids[:20], 64) == text[0, 20:].tolist()


@pytest.mark.parametrize("name", ["qwen2-yarn", "qwen3", "llama-biased", "llama-llama3"])
def test_fp64_is_exact(name: str, tmp_path: Path) -> None:
    oracle = exact(save(name, tmp_path))
    model = load_model(tmp_path, dtype=torch.float64)
    ids = random_ids(60)
    wanted = oracle_logits(oracle, ids)
    for steps, pages in (([60], [5, 6, 7, 8, 9, 10, 11, 12]), ([30, 10, 20], [1, 2, 9, 8, 7, 5, 6, 3])):
        torch.testing.assert_close(in_steps(model, ids, steps, pages, 8), wanted, rtol=0, atol=1e-10)
    decoded = in_steps(model, ids, [1] * 60, [5, 6, 7, 8, 9, 10, 11, 12], 8)
    torch.testing.assert_close(decoded, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_near_the_exact_logits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    oracle = save(name, tmp_path).to(dtype).float()  # the rounded weights, exact arithmetic
    model = load_model(tmp_path, dtype=dtype)
    ids = random_ids(40)
    wanted = oracle_logits(oracle, ids)
    logits = in_steps(model, ids, [20, 17, 1, 1, 1], [4, 3, 7, 8, 9], 8)
    assert logits.dtype == torch.float32
    error = (logits - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_mixed_rows_in_one_forward_equal_each_alone(tmp_path: Path) -> None:
    save("qwen3", tmp_path)
    model = load_model(tmp_path, dtype=torch.float64)
    plans = [(0, 30), (12, 1), (40, 1), (25, 9), (0, 5), (33, 18), (7, 1)]  # (cached, pending)
    kv, size, rows, wanted, free = nan_cache(model, 64, 4), 4, [], [], list(range(64))
    for index, (cached, pending) in enumerate(plans):
        ids = random_ids(cached + pending, seed=index)
        need = -(-len(ids) // size)
        pages, free = free[:need][:: 1 if index % 2 else -1], free[need:]
        if cached:
            model.forward(row(ids[:cached], 0, pages, size), kv, torch.tensor([], dtype=torch.int64))
        rows.append(row(ids[cached:], cached, pages, size))
        wanted.append(in_steps(model, ids, [len(ids)], list(range(20)), 4)[cached:])
    batch = packed(rows)
    logits = model.forward(batch, kv)
    torch.testing.assert_close(logits, torch.cat(wanted), rtol=0, atol=1e-11)
    chosen = torch.tensor([0, 29, 30, 40, 64])
    torch.testing.assert_close(model.forward(batch, kv, chosen), logits[chosen], rtol=0, atol=1e-11)


def test_no_rows_wanted_still_fills_the_cache(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model = load_model(tmp_path, dtype=torch.float64)
    ids, none = random_ids(9), torch.tensor([], dtype=torch.int64)
    for pieces in ([8, 1], [1] * 9):
        kv, at = nan_cache(model, 4, 4), 0
        for piece in pieces[:-1]:
            assert model.forward(row(ids[at : at + piece], at, [2, 1, 0], 4), kv, none).shape == (0, 160)
            at += piece
        last = model.forward(row(ids[8:], 8, [2, 1, 0], 4), kv)
        torch.testing.assert_close(last[0], in_steps(model, ids, [9], [0, 1, 2], 4)[-1], rtol=0, atol=1e-11)


def test_positions_beyond_the_first_table_grow_it(tmp_path: Path) -> None:
    oracle = save("llama-llama3", tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    ids = random_ids(300)  # the table starts at max_position_embeddings = 256
    logits = in_steps(model, ids, [256, 44], list(range(38)), 8)
    torch.testing.assert_close(logits, oracle_logits(oracle, ids), rtol=0, atol=1e-4)


def test_logits_are_the_callers_to_keep(tmp_path: Path) -> None:
    save("qwen2", tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    kv = model.new_cache(4, 8)
    first = model.forward(row([5], 0, [0], 8), kv)
    kept = first.clone()
    model.forward(row([6], 1, [0], 8), kv)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("which", ["small", "small-base", "large"])
def test_the_embedded_pair_equals_transformers(which: str) -> None:
    oracle = Qwen2ForCausalLM.from_pretrained(PAIR / which, dtype=torch.float32).eval()
    oracle.generation_config.eos_token_id = None
    model = load_model(PAIR / which, dtype=torch.float32)
    ids = random_ids(60, 152)
    wanted = oracle_logits(oracle, ids)
    torch.testing.assert_close(in_steps(model, ids, [50, 9, 1], list(range(8)), 8), wanted, rtol=0, atol=2e-4)
    prompt = torch.tensor([ids[:16]])
    length = {"max_new_tokens": 32, "min_new_tokens": 32}  # the mask: id 0 is padding to generate() unless told
    text = oracle.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)
    assert greedy(model, ids[:16], 32) == text[0, 16:].tolist()
    assert load_model(PAIR / which).dtype == torch.float16
