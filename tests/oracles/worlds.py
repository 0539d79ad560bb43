"""Pairs of models for fuzzed schedules, twice: ours and transformers'; and what a random request looks like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracles.stream import Oracle
from oracles.tiny import PIECES, TAGS, WHOLE, Biased, ToyTokenizer, bigrams, load_twin, random_hf
from oracles.words import Spec, hf_logits

from splitdecode import (
    ControlTags,
    EngineConfig,
    ForcedSpans,
    HandoffPolicy,
    LargeOnly,
    RandomSwitch,
    SamplingParams,
    SmallOnly,
    SplitDecoder,
)
from splitdecode.config import request_key
from splitdecode.runtime.kvcache import kv_token_bytes
from splitdecode.split.roles import Pair, Role

OTHER = [PIECES[0], *reversed(PIECES[1:]), "ab", "c d", "é(", "bc"]  # another tokenizer over the same alphabet


@dataclass
class World:
    """A pair of models, twice: ours and transformers'."""

    models: Pair[Any]
    hf: Pair[Any]
    tokenizers: Pair[ToyTokenizer]
    tables: Pair[np.ndarray]


def make_world(
    directory: Path,
    kinds: tuple[str, str],
    pieces: tuple[list[str], list[str]],
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> World:
    tokenizers = Pair(ToyTokenizer(pieces[0]), ToyTokenizer(pieces[1]))
    sizes = Pair(tokenizers.small.size + 3, tokenizers.large.size + 9)  # padded vocabularies of different size
    hf = Pair(random_hf(kinds[0], sizes.small, 16, 1, seed), random_hf(kinds[1], sizes.large, 32, 2, seed + 1))
    tables = Pair.of(lambda r: bigrams(tokenizers[r], sizes[r], 9.0, seed + r))
    models = Pair.of(lambda r: Biased(load_twin(hf[r], directory / f"{seed}-{r}", dtype), tables[r]))
    return World(models, hf, tokenizers, tables)


def make_worlds(base: Path, dtype: torch.dtype = torch.float64) -> dict[str, World]:
    """Three pairs: tags as plain text, tags as added tokens, two tokenizers."""
    plain, added = PIECES, PIECES + WHOLE
    return {
        "plain": make_world(base, ("qwen2", "qwen2"), (plain, plain), 1, dtype),
        "added": make_world(base, ("qwen3", "llama"), (added, added), 3, dtype),
        "unequal": make_world(base, ("llama", "qwen3"), (plain, OTHER), 5, dtype),
    }


def random_policy(rng: np.random.Generator) -> HandoffPolicy:
    kind = rng.integers(8)
    if kind == 0:
        return [SmallOnly(), LargeOnly()][rng.integers(2)]
    if kind == 1:
        return RandomSwitch(float(rng.choice([0.0, 0.3, 0.7, 1.0])), int(rng.integers(1, 6)), int(rng.integers(99)))
    if kind <= 3:
        edges = sorted(rng.choice(30, size=2 * int(rng.integers(1, 4)), replace=False).tolist())
        spans = [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]
        return ForcedSpans(spans, tags=bool(rng.integers(2)), reads_along=bool(rng.integers(2)))
    return ControlTags()


def random_params(rng: np.random.Generator, tokenizers: Pair[ToyTokenizer]) -> SamplingParams:
    """Parameters that a pair with these tokenizers can serve: ids are named where they mean the same to both."""
    small, large = (tokenizer.token_bytes for tokenizer in tokenizers)
    greedy = rng.random() < 0.3
    some: dict[str, Any] = {}
    if rng.random() < 0.3:
        some["stop"] = [str(s) for s in rng.choice(["ab", "d", "cc", "T\n", "a b", "bb", "é"], size=2)]
        some["include_stop_str_in_output"] = bool(rng.integers(2))
    if rng.random() < 0.2:
        some["stop_token_ids"] = [int(rng.integers(1, 6))]
    if rng.random() < 0.3:
        some["repetition_penalty"], some["presence_penalty"] = 1.2, 0.3
    if rng.random() < 0.3:
        some["min_tokens"] = 6
    if rng.random() < 0.3:
        some["logit_bias"] = {0: -3.0, 1: 1.0}
    if rng.random() < 0.2:
        some["ignore_eos"] = True
    if not greedy:
        some["temperature"] = float(rng.choice([0.5, 1.0, 1.5]))
        some["top_p"] = float(rng.choice([1.0, 0.9]))
        some["top_k"] = int(rng.choice([0, 5]))
        some["min_p"] = float(rng.choice([0.0, 0.05]))
    some["stop_token_ids"] = [i for i in some.get("stop_token_ids", []) if small[i] == large[i]]
    some["logit_bias"] = {i: bias for i, bias in some.get("logit_bias", {}).items() if small[i] == large[i]}
    params = SamplingParams(
        temperature=some.pop("temperature", 0.0),
        max_tokens=int(rng.integers(8, 40)),
        seed=int(rng.integers(1 << 30)),
        **some,
    )
    return replace(params, **random_budget(np.random.default_rng(params.seed)))


def random_budget(rng: np.random.Generator) -> dict[str, int]:
    """Caps, for some requests: a generator of their own leaves all else of a schedule as it is."""
    found = {}
    if rng.random() < 0.2:
        found["max_offloads"] = int(rng.integers(0, 4))
    if rng.random() < 0.3:
        found["max_large_tokens"] = int(rng.choice([0, 1, 2, 3, 5, 8]))
    return found


def random_engine(rng: np.random.Generator) -> dict[str, Any]:
    page = int(rng.choice([1, 2, 4, 8, 16, 64]))
    return {
        "page_size": page,
        "max_num_batched_tokens": int(rng.choice([1, 2, 5, 16, 512])),
        "max_num_seqs": int(rng.choice([1, 2, 3, 8])),
        "max_model_len": int(rng.choice([40, 64, 96])),
        "enable_prefix_caching": bool(rng.integers(2)),
        "depth": int(rng.choice([1, 1, 2, 3])),
        "read_interval": int(rng.choice([1, 2, 3, 4, 8])),
        "max_span": int(rng.choice([1, 3, 7, 40])),
        "handoff_patience": float(rng.choice([0.0, 1.0, 20.0])),
        "handoff_max_wait_ms": float(rng.choice([0.0, 5.0, 1000.0])),
        "catch_up": str(rng.choice(["lazy", "eager", "adaptive"])),
        "catch_up_chunk": int(rng.choice([1, 4, 256])),
        "weight_bound_tokens": int(rng.choice([0, 4, 160])),
        "idle_cache": str(rng.choice(["recompute", "swap"])),
        "idle_cache_memory": str(rng.choice(["4kB", "1MiB"])),
    }


def make_decoder(world: World, engine: dict[str, Any], pages: int | None = None) -> SplitDecoder:
    token_bytes = [kv_token_bytes(m.config, m.dtype.itemsize) for m in world.models]
    length = engine["max_model_len"]
    wanted = pages if pages is not None else 4 * -(-length // engine["page_size"])
    budget = engine["page_size"] * max(wanted * sum(token_bytes), 2 * max(token_bytes))
    config = EngineConfig(kv_cache_memory=budget, **engine)
    return SplitDecoder(world.models, world.tokenizers, eos_ids=Pair((0,), (0,)), config=config)


def expected(
    world: World,
    decoder: SplitDecoder,
    prompt: Pair[list[int]],
    params: SamplingParams,
    policy: HandoffPolicy,
    *,
    index: int = 0,
    margins: list[tuple[int, float]] | None = None,
) -> Oracle:
    """The oracle's answer to the same request; `margins` gets how certain each draw was."""
    spec = Spec(
        tokenizers=world.tokenizers,
        logits=hf_logits(world.hf, world.tables),
        tags=TAGS,
        vocab_limit=tuple(decoder.vocab_limits),
        eos=([0], [0]),
        max_len=tuple(decoder.max_len),
        max_span=decoder.config.max_span,
        same=decoder.tokens.same,
    )
    key = request_key(params.seed or 0, index)
    return Oracle(spec, (prompt.small, prompt.large), params, policy.bind(key), key, margins=margins).run()


def compare(oracle: Oracle, output: Any) -> None:
    assert output.finish_reason == oracle.finish
    assert output.token_ids == [token for _, token in oracle.content]
    authors = [Role[span.model.upper()] for span in output.spans for _ in range(span.start, span.end)]
    assert authors == [author for author, _ in oracle.content]
    text = oracle.text if oracle.cut is None else oracle.text[: oracle.cut]
    assert output.text == text.decode("utf-8", "replace")
    if "\N{REPLACEMENT CHARACTER}" not in output.text:
        assert output.raw_text == oracle.raw_text()


def run_schedule(world: World, seed: int, **more: Any) -> int:
    """One engine, a few requests at once. Returns how many hand-offs there were. more: EngineConfig fields."""
    rng = np.random.default_rng(seed)
    engine = random_engine(rng) | more
    tight = rng.random() < 0.4
    per_lane = -(-engine["max_model_len"] // engine["page_size"])
    decoder = make_decoder(world, engine, pages=per_lane + int(rng.integers(0, 3)) if tight else None)
    number = int(rng.integers(1, 5))
    prompts, params, policies = [], [], []
    for _ in range(number):
        ids = [int(i) for i in rng.integers(1, 6, size=int(rng.integers(1, 20)))]
        prompts.append(ids)
        params.append(random_params(rng, world.tokenizers))
        policies.append(random_policy(rng))
    made = [decoder._request(p, None, s, h) for p, s, h in zip(prompts, params, policies, strict=True)]
    names = [decoder._queue(choices, None) for choices in made]
    while decoder.engine.unfinished:
        decoder.engine.tick()
        decoder.engine.scheduler.check_invariants()
    handoffs = 0
    for name, sampling, policy in zip(names, params, policies, strict=True):
        choice = decoder._requests[name][0]
        handoffs += choice.metrics.handoffs
        compare(expected(world, decoder, choice.prompts, sampling, policy), choice.output)
    assert [runner.cache.pool.in_use for runner in decoder.engine.runners] == [0, 0]
    return handoffs
