"""An answer depends on its request alone: crowds on engines with random knobs against the same requests, each alone.

    alone     pages of 16, memory for everything, one step in flight, lazy catch-up, nothing shared
    a crowd   any page size, budget, depth, pace, catch-up, chunk, memory, shelf; requests come and go at any tick

In float64 the two must agree to the last token. What a crowd can meet is counted: a run that never preempted, evicted,
shared, shelved, caught up ahead of need or moved memory between the models would prove nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from oracles.tapes import tape_runner
from oracles.worlds import World, make_decoder, make_worlds, random_engine, random_params, random_policy

from splitdecode import CloseRule, ControlTags, HandoffPolicy, SamplingParams, SplitDecoder
from splitdecode.runtime.batch import Batch
from splitdecode.split.engine import Choice, Engine
from splitdecode.split.outputs import CompletionOutput
from splitdecode.split.roles import Role
from splitdecode.split.tracing import Tracer

LENGTH = 64  # positions; equal for all engines, as is the longest span: both are part of what an answer is
SPAN = 9
ALONE = {"page_size": 16, "max_num_seqs": 1, "enable_prefix_caching": False, "max_model_len": LENGTH, "max_span": SPAN}
NAMES = ("plain", "added", "unequal")
ON_TAPES = 0.1  # of the engines: the step program of a GPU
TIGHT = 0.6  # of the engines: memory for one to a few sequences
WRONG = 20_000  # ticks after which a crowd is stuck


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


@dataclass(frozen=True)
class Request:
    """What is asked."""

    prompt: list[int]
    params: SamplingParams
    policy: HandoffPolicy

    @property
    def by_block(self) -> bool:
        """The answer depends on where blocks end, so on read_interval."""
        return isinstance(self.policy, ControlTags) and self.policy.which == "last"


def random_requests(world: World, number: int, rng: np.random.Generator) -> list[Request]:
    """Prompts that share beginnings, all policies and both close rules."""
    texts = [rng.integers(1, 6, size=24).tolist() for _ in range(4)]
    found = []
    for _ in range(number):
        text = texts[rng.integers(len(texts))]
        prompt = text[: int(rng.integers(1, 20))] + rng.integers(1, 6, size=int(rng.integers(0, 4))).tolist()
        params = random_params(rng, world.tokenizers)
        policy = random_policy(rng)
        if isinstance(policy, ControlTags) and rng.random() < 0.3:
            which = str(rng.choice(["first", "last"]))
            policy = ControlTags(CloseRule.CONTINUE, probe_tokens=int(rng.integers(2, 7)), which=which)
        found.append(Request(prompt, replace(params, max_tokens=min(params.max_tokens or 0, 20)), policy))
    return found


@dataclass
class Truth:
    """Answers of requests that ran alone."""

    world: World
    requests: list[Request]
    known: dict[tuple[int, int], CompletionOutput] = field(default_factory=dict)
    decoders: dict[int, SplitDecoder] = field(default_factory=dict)

    def of(self, index: int, read_interval: int) -> CompletionOutput:
        request = self.requests[index]
        interval = read_interval if request.by_block else 1
        if (index, interval) not in self.known:
            if interval not in self.decoders:
                self.decoders[interval] = make_decoder(self.world, ALONE | {"read_interval": interval}, pages=1000)
            decoder = self.decoders[interval]
            assert set(decoder.max_len) == {LENGTH}
            prompt = {"prompt_token_ids": request.prompt}
            output = decoder.generate(prompt, request.params, handoff=request.policy)[0].outputs[0]
            assert output.finish_reason in ("stop", "length")
            self.known[index, interval] = output
        return self.known[index, interval]


class Ahead(Tracer):
    """Counts rows of a model that does not hold the pen: what it runs before it is asked."""

    def __init__(self, met: Counter[str]) -> None:
        self.met = met

    def planned(self, engine: Engine, role: Role, batch: Batch) -> None:
        self.met["ahead of need"] += sum(engine.scheduler.active(seq) != role for seq in batch.seqs.tolist())


def knobs(rng: np.random.Generator) -> dict[str, Any]:
    """An engine's, where they must not matter."""
    return random_engine(rng) | {
        "max_model_len": LENGTH,
        "max_span": SPAN,
        "max_num_seqs": int(rng.choice([2, 8, 16, 32, 32])),
        "max_num_batched_tokens": int(rng.choice([4, 32, 64, 128, 512])),
        "steps_per_graph": int(rng.integers(1, 5)),
        "enforce_eager": bool(rng.integers(2)),
    }


def random_decoder(
    world: World, engine: dict[str, Any], rng: np.random.Generator, met: Counter[str], tapes: bool
) -> SplitDecoder:
    pages = 2 * engine["max_num_seqs"] * -(-LENGTH // engine["page_size"])
    if rng.random() < TIGHT:
        pages = -(-LENGTH // engine["page_size"])
        while set(make_decoder(world, engine, pages).max_len) != {LENGTH}:
            pages += 1
        pages += int(rng.integers(0, 4 if rng.random() < 0.3 else 3 * pages))
    with pytest.MonkeyPatch.context() as patch:
        if tapes:
            patch.setattr("splitdecode.decoder.make_runner", tape_runner)
            met["on tapes"] += 1
        decoder = make_decoder(world, engine, pages)
    assert set(decoder.max_len) == {LENGTH}
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += float(rng.exponential(1e-3))
        return now

    decoder.engine.clock = clock
    decoder.engine.tracer = Ahead(met)
    for runner in decoder.engine.runners:
        if runner.cache.shelf is not None:
            count_transfers(runner.cache.shelf, met)
    return decoder


def count_transfers(shelf: Any, met: Counter[str]) -> None:
    for name in ("put", "take"):
        plain = getattr(shelf, name)

        def counting(kv: Any, pages: Any, kept: Any, plain: Any = plain, name: str = name) -> None:
            met[f"pages {name}"] += len(pages)
            plain(kv, pages, kept)

        setattr(shelf, name, counting)


def run_crowd(decoder: SplitDecoder, requests: list[Request], rng: np.random.Generator) -> list[Choice]:
    """Requests in this order at random ticks, a few aborted at random moments; one choice each."""
    engine, arrivals = decoder.engine, float(rng.choice([0.1, 0.5, 0.9]))
    choices: list[Choice] = []
    for _ in range(WRONG):
        while len(choices) < len(requests) and (not engine.unfinished or rng.random() < arrivals):
            request = requests[len(choices)]
            made = decoder._request(request.prompt, None, request.params, request.policy)
            choices += made
            decoder._queue(made, None)
        if rng.random() < 0.003:
            decoder.engine.abort(choices[rng.integers(len(choices))])
        if not engine.unfinished and len(choices) == len(requests):
            return choices
        engine.tick()
        if rng.random() < 0.05:
            engine.scheduler.check_invariants()
    raise AssertionError(f"{engine.unfinished} answers unfinished after {WRONG} ticks")


def check_rest(decoder: SplitDecoder, met: Counter[str]) -> None:
    """Nothing is held any more; notes what the engine met."""
    scheduler = decoder.engine.scheduler
    scheduler.check_invariants()
    for runner in decoder.engine.runners:
        assert runner.cache.pool.in_use == 0
        assert runner.cache.shelf_pool is None or runner.cache.shelf_pool.in_use == 0
        met["prefix hits"] += runner.cache.pool.hits
    met["preemptions"] += scheduler.preemptions
    met["idle evictions"] += scheduler.idle_evictions
    met["extents moved"] += decoder.memory.arena.moved


def compare_crowds(world: World, seed: int, requests: int, wanted: int, crowd: int = 120) -> Counter[str]:
    """Crowds until so many answers were compared; what they met."""
    rng = np.random.default_rng(seed)
    truth = Truth(world, random_requests(world, requests, rng))
    met: Counter[str] = Counter()
    while met["compared"] < wanted:
        engine_seed = int(rng.integers(1 << 30))
        random = np.random.default_rng(engine_seed)
        engine = knobs(random)
        tapes = random.random() < ON_TAPES
        decoder = random_decoder(world, engine, random, met, tapes)
        order = [int(i) for i in random.permutation(requests)[: 8 if tapes else crowd]]
        choices = run_crowd(decoder, [truth.requests[i] for i in order], random)
        check_rest(decoder, met)
        for index, choice in zip(order, choices, strict=True):
            assert choice.output is not None
            met["handoffs"] += choice.metrics.handoffs
            if choice.output.finish_reason == "abort":
                met["aborted"] += 1
                continue
            met["compared"] += 1
            alone = truth.of(index, engine["read_interval"])
            assert choice.output == alone, (seed, engine_seed, engine, index, truth.requests[index])
    return met


def assert_met(met: Counter[str], world: World) -> None:
    expected = ["handoffs", "aborted", "preemptions", "idle evictions", "prefix hits", "pages put", "pages take"]
    expected += ["extents moved", "on tapes"]
    if world.tokenizers.small.same_ids(world.tokenizers.large):
        expected.append("ahead of need")  # unequal tokenizers catch up when the pen is handed over
    assert not [name for name in expected if not met[name]], met


def test_crowds_answer_as_each_request_alone(worlds: dict[str, World]) -> None:
    met = sum((compare_crowds(worlds[name], 1, 16, 50, crowd=16) for name in NAMES), Counter[str]())
    assert met["compared"] >= 150
    assert met["handoffs"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_answer_as_each_request_alone(worlds: dict[str, World], name: str) -> None:
    met = compare_crowds(worlds[name], 100, 200, 3400)
    assert_met(met, worlds[name])
