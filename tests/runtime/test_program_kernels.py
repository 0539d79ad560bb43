"""The whole decoder over interpreted Triton kernels: what a GPU would run, launch for launch, against the CPU path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.tapes import kernel_runner
from oracles.tiny import PIECES, ToyTokenizer, random_hf

from splitdecode import ForcedSpans, SamplingParams, SplitDecoder
from splitdecode.config import EngineConfig
from splitdecode.models import load_model
from splitdecode.split.roles import Pair


@pytest.mark.slow
def test_the_decoder_writes_the_same_over_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences at once: plain, cut, edited and counted rows, log-probs, hand-offs, several steps in a graph."""
    words = ToyTokenizer(PIECES)
    for i, kind in enumerate(("qwen2", "qwen3")):
        random_hf(kind, words.size + 3, 64, 1, i).save_pretrained(tmp_path / kind)
    models = Pair.of(lambda r: load_model(tmp_path / ("qwen3" if r else "qwen2"), dtype=torch.float32))
    prompts = [{"prompt_token_ids": ids} for ids in ([1, 2, 3], [4, 5, 1, 2, 2], [3, 3])]
    params = [
        SamplingParams(temperature=0.9, max_tokens=7, seed=1, ignore_eos=True),
        SamplingParams(temperature=1.1, top_p=0.9, top_k=9, repetition_penalty=1.3, logprobs=0, max_tokens=7, seed=2),
        SamplingParams(temperature=0.0, logit_bias={4: 1.5}, min_tokens=4, max_tokens=6),
    ]
    policy = ForcedSpans([(2, 5)], tags=True, reads_along=True)

    def answers(**options: object) -> list[tuple[list[int], list[float]]]:
        config = EngineConfig(page_size=4, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=48,
                              kv_cache_memory="8MiB", read_interval=2, **options)  # type: ignore[arg-type] # fmt: skip
        decoder = SplitDecoder(models, Pair(words, words), eos_ids=Pair((0,), (0,)), config=config)  # type: ignore[arg-type]
        outputs = decoder.generate(prompts, params, handoff=policy)
        assert [runner.cache.pool.in_use for runner in decoder.engine.runners] == [0, 0]
        chances = [[next(iter(c.values())) if c else 0.0 for c in o.outputs[0].logprobs or []] for o in outputs]
        return list(zip([o.outputs[0].token_ids for o in outputs], chances, strict=True))

    wanted = answers(depth=1)
    monkeypatch.setattr("splitdecode.decoder.make_runner", kernel_runner)
    found = answers(depth=2, steps_per_graph=2)
    for (mine, chances), (theirs, expected) in zip(found, wanted, strict=True):
        assert mine == theirs
        assert chances == pytest.approx(expected, abs=1e-4)
