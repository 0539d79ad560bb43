"""Streams of the runtime against the oracle that keeps no cache, over fuzzed schedules, token for token in float64."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.worlds import (
    World,
    compare,
    expected,
    make_decoder,
    make_worlds,
    random_engine,
    random_params,
    random_policy,
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


def run_schedule(world: World, seed: int) -> int:
    """One engine, a few requests at once. Returns how many hand-offs there were."""
    rng = np.random.default_rng(seed)
    engine = random_engine(rng)
    tight = rng.random() < 0.4
    per_lane = -(-engine["max_model_len"] // engine["page_size"])
    decoder = make_decoder(world, engine, pages=per_lane + int(rng.integers(0, 3)) if tight else None)
    number = int(rng.integers(1, 5))
    prompts, params, policies = [], [], []
    for _ in range(number):
        ids = [int(i) for i in rng.integers(1, 6, size=int(rng.integers(1, 20)))]
        prompts.append(ids)
        params.append(random_params(rng, world.tokenizers.small))
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


@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
def test_streams_equal_the_oracle(worlds: dict[str, World], name: str) -> None:
    assert sum(run_schedule(worlds[name], seed) for seed in range(15)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
@pytest.mark.parametrize("part", range(4))
def test_streams_equal_the_oracle_at_length(worlds: dict[str, World], name: str, part: int) -> None:
    assert sum(run_schedule(worlds[name], 1000 + 45 * part + i) for i in range(45)) > 30
