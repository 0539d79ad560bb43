"""The cache of a lane equals a fresh prefill of its first `cached` ids: checked every few ticks of random schedules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from oracles.worlds import World, make_decoder, make_worlds, random_engine, random_params, random_policy
from torch import Tensor

from splitdecode import SplitDecoder
from splitdecode.ops import PagedBatch
from splitdecode.split.engine import Choice
from splitdecode.split.roles import Role


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


@dataclass
class Seen:
    """What the checks came across: a check that meets nothing proves nothing."""

    lanes: int = 0
    positions: int = 0
    handoffs: int = 0
    shared_pages: int = 0
    given_up: int = 0  # lanes and sequences that lost their pages
    cached_tokens: int = 0


def prefill(model: Any, ids: list[int]) -> Tensor:
    """Keys and values [L, n, 2, Hkv, D] of `ids`, from one forward into a cache of one page."""
    count = len(ids)
    kv = model.new_cache(1, count)
    steps = torch.arange(count, dtype=torch.int32)
    ends = torch.tensor([0, count], dtype=torch.int32)
    batch = PagedBatch(
        tokens=torch.tensor(ids, dtype=torch.int32),
        positions=steps,
        slots=steps,
        cu_q=ends,
        kv_len=ends[1:],
        page_indptr=torch.tensor([0, 1], dtype=torch.int32),
        pages=torch.zeros(1, dtype=torch.int32),
        page_size=count,
    )
    model.forward(batch, kv, torch.tensor([count - 1]))
    return kv[:, 0]


def held(decoder: SplitDecoder, role: Role, pages: list[int], count: int) -> Tensor:
    """What the lane's pages hold of its first `count` positions: [L, count, 2, Hkv, D]."""
    kv = decoder.engine.runners[role].cache.kv[:, pages]
    return kv.flatten(1, 2)[:, :count]


def check_caches(decoder: SplitDecoder, seen: Seen) -> None:
    """Every running sequence, both lanes."""
    scheduler = decoder.engine.scheduler
    for handle in decoder.engine.running:
        for role in Role:
            state = scheduler.lane_state(handle, role)
            pool = decoder.engine.runners[role].cache.pool
            pages, count = state["pages"].tolist(), state["cached"]
            if not count:
                continue
            ids = scheduler.lane_ids(handle, role, 0, count).tolist()
            fresh = prefill(decoder.models[role], ids)
            torch.testing.assert_close(held(decoder, role, pages, count), fresh, rtol=0.0, atol=1e-9)
            seen.lanes += 1
            seen.positions += count
            seen.shared_pages += sum(pool.owners(page) > 1 for page in pages)


def queue_requests(world: World, decoder: SplitDecoder, rng: np.random.Generator) -> list[Choice]:
    """Prompts that share their beginnings, some with several choices: pages get shared."""
    common = [int(i) for i in rng.integers(1, 6, size=12)]
    made: list[Choice] = []
    for _ in range(int(rng.integers(2, 6))):
        tail = [int(i) for i in rng.integers(1, 6, size=int(rng.integers(0, 6)))]
        prompt = common[: int(rng.integers(1, 13))] + tail
        params = replace(random_params(rng, world.tokenizers), n=int(rng.choice([1, 1, 3])))
        choices = decoder._request(prompt, None, params, random_policy(rng))
        decoder._queue(choices, None)
        made += choices
    return made


def run_schedule(world: World, seed: int, seen: Seen) -> None:
    rng = np.random.default_rng(seed)
    engine = random_engine(rng)
    tight = rng.random() < 0.5
    per_lane = -(-engine["max_model_len"] // engine["page_size"])
    decoder = make_decoder(world, engine, pages=per_lane + int(rng.integers(0, 3)) if tight else None)
    made = queue_requests(world, decoder, rng)
    every = int(rng.integers(2, 9))
    ticks = 0
    while decoder.engine.unfinished:
        decoder.engine.tick()
        ticks += 1
        if rng.random() < 0.01:
            decoder.engine.abort(made[int(rng.integers(len(made)))])
        if ticks % every == 0:
            check_caches(decoder, seen)
    metrics = {id(choice.metrics): choice.metrics for choice in made}.values()
    seen.handoffs += sum(m.handoffs for m in metrics)
    seen.given_up += sum(m.preemptions for m in metrics) + decoder.engine.scheduler.idle_evictions
    seen.cached_tokens += sum(m.models[role].cached_tokens for m in metrics for role in Role)
    assert [runner.cache.pool.in_use for runner in decoder.engine.runners] == [0, 0]


def run_schedules(world: World, seeds: range) -> Seen:
    seen = Seen()
    for seed in seeds:
        run_schedule(world, seed, seen)
    assert seen.lanes > 5 * len(seeds)
    assert seen.positions > 10 * seen.lanes
    assert seen.handoffs > len(seeds)
    assert min(seen.shared_pages, seen.given_up, seen.cached_tokens) > 0
    return seen


@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
def test_caches_equal_a_fresh_prefill(worlds: dict[str, World], name: str) -> None:
    run_schedules(worlds[name], range(8, 20) if name == "unequal" else range(12))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
def test_caches_equal_a_fresh_prefill_at_length(worlds: dict[str, World], name: str) -> None:
    run_schedules(worlds[name], range(1000, 1050))


def test_the_check_finds_a_wrong_row(worlds: dict[str, World]) -> None:
    """One value of one cached row is changed: the comparison must not pass."""
    world = worlds["plain"]
    engine = {"page_size": 4, "max_num_seqs": 4, "max_model_len": 64}
    decoder = make_decoder(world, engine)
    queue_requests(world, decoder, np.random.default_rng(0))
    for _ in range(3):
        decoder.engine.tick()
    check_caches(decoder, Seen())
    states = [(r, decoder.engine.scheduler.lane_state(h, r)) for h in decoder.engine.running for r in Role]
    role, page = next((role, state["pages"][0]) for role, state in states if state["cached"] > 1)
    decoder.engine.runners[role].cache.kv[0, page, 1, 0, 0, 0] += 1e-6
    with pytest.raises(AssertionError, match="not close"):
        check_caches(decoder, Seen())
    decoder.close()
