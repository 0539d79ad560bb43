"""What becomes of an idle model's cache when memory runs out must not change a token: only "fp8" may, and by how much.

Three or four answers at once in a memory that holds little more than one: caches of idle lanes are given up, and run
again, fetched back, or restored from a byte per value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from oracles.clocks import steady
from oracles.worlds import World, make_decoder, make_worlds

from splitdecode import ForcedSpans, SamplingParams
from splitdecode.split.outputs import RequestOutput
from splitdecode.split.roles import Role

PROMPTS = [[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 2, 2], [5, 4, 3, 2, 1, 1, 2], [3, 3, 1, 4, 1, 5, 5, 2, 2, 1], [2, 1, 4, 4]]
SPANS = [(3, 6), (10, 14), (19, 23), (28, 30)]
LENGTH = 64
ENGINE = {"page_size": 2, "max_num_seqs": 4, "max_model_len": LENGTH, "handoff_patience": 1.0, "seed": 3}
TIGHT = LENGTH // 2 + 8  # pages of each model; one sequence of full length needs LENGTH / 2


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


@dataclass
class Ran:
    """Answers, and what was given up for them."""

    outputs: list[RequestOutput]
    idle_evictions: int
    preemptions: int
    put: int
    taken: int
    run_again: int


def run(world: World, pages: int, tags: bool = True, **engine: Any) -> Ran:
    decoder = steady(make_decoder(world, ENGINE | {"weight_bound_tokens": 0} | engine, pages=pages))
    moved = [0, 0]
    for runner in decoder.engine.runners:
        shelf = runner.cache.shelf
        if shelf is not None:
            for way, name in enumerate(("take", "put")):
                plain = getattr(shelf, name)

                def counting(kv: Any, places: Any, kept: Any, plain: Any = plain, way: int = way) -> None:
                    moved[way] += len(places)
                    plain(kv, places, kept)

                setattr(shelf, name, counting)
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, logprobs=0)
    policy = ForcedSpans(SPANS, tags=tags, reads_along=tags)
    outputs = decoder.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, handoff=policy)
    scheduler = decoder.engine.scheduler
    assert [runner.cache.pool.in_use for runner in decoder.engine.runners] == [0, 0]
    assert all(pool is None or pool.in_use == 0 for pool in (r.cache.shelf_pool for r in decoder.engine.runners))
    again = sum(output.metrics.models[role].catch_up_tokens for output in outputs for role in Role)
    return Ran(outputs, scheduler.idle_evictions, scheduler.preemptions, moved[1], moved[0], again)


def ids(ran: Ran) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in ran.outputs]


@pytest.mark.parametrize(
    ("name", "caching", "idle_cache"),
    [("plain", True, "recompute"), ("plain", False, "recompute"), ("plain", False, "swap"), ("unequal", True, "swap")],
)
def test_exact_policies_change_no_token(worlds: dict[str, World], name: str, caching: bool, idle_cache: str) -> None:
    more = {"idle_cache": idle_cache, "enable_prefix_caching": caching}
    plenty, tight = (run(worlds[name], pages, **more) for pages in (1000, TIGHT))
    assert plenty.idle_evictions == plenty.preemptions == plenty.put == 0
    assert tight.idle_evictions > 5
    assert ids(tight) == ids(plenty)
    if idle_cache == "swap":
        assert tight.put >= tight.taken > 10
    elif not caching:
        assert tight.run_again > plenty.run_again + 10


@pytest.mark.parametrize("name", ["plain", "unequal"])
def test_fp8_runs_to_the_end_with_a_bounded_error(worlds: dict[str, World], name: str) -> None:
    """Log-probs of the tokens up to the first that differs; behind it the answers are about different texts."""
    plenty, tight = (run(worlds[name], pages, idle_cache="fp8", tags=False) for pages in (1000, TIGHT))
    assert tight.idle_evictions > 5
    assert tight.put >= tight.taken > 10
    worst, compared = 0.0, 0
    for mine, exact in zip(tight.outputs, plenty.outputs, strict=True):
        answer, truth = mine.outputs[0], exact.outputs[0]
        assert answer.finish_reason == truth.finish_reason == "length"
        assert answer.logprobs is not None
        assert truth.logprobs is not None
        both = zip(answer.token_ids, truth.token_ids, answer.logprobs, truth.logprobs, strict=False)
        for token, wanted, got, known in both:
            if token != wanted:
                break
            if got is not None and known is not None:  # else a residue of a token that a tag cut in two
                worst = max(worst, abs(got[token] - known[token]))
                compared += 1
    assert compared > 32
    assert 0.0 < worst < 0.5, "something was restored from a byte per value, and nothing went far astray"
