"""The step program of a GPU, replayed from tapes on a CPU, against the oracle that keeps no cache: token for token.

Device-side advance, run-ahead, several steps in a graph, overshoot past tags, padded shapes, block tables kept on the
device: whatever of it went wrong would change a token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.tapes import tape_runner
from oracles.worlds import World, compare, expected, make_decoder, make_worlds, run_schedule

from splitdecode import ControlTags, SamplingParams
from splitdecode.models.step import StepShape
from splitdecode.runtime.batch import Batch
from splitdecode.runtime.device import DeviceRunner
from splitdecode.split.roles import Pair, Role


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def on_tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitdecode.decoder.make_runner", tape_runner)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepShape, bool]]:
    """The shapes that run, and whether a tape was replayed."""
    seen: list[tuple[StepShape, bool]] = []
    plain = DeviceRunner._shape

    def shape(runner: DeviceRunner, batch: Batch) -> StepShape:
        found = plain(runner, batch)
        seen.append((found, found in runner._graphs))
        return found

    monkeypatch.setattr(DeviceRunner, "_shape", shape)
    return seen


def run(world: World, seed: int) -> int:
    return run_schedule(world, seed, steps_per_graph=1 + seed % 4, enforce_eager=seed % 5 == 4)


@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
def test_streams_equal_the_oracle(worlds: dict[str, World], name: str, shapes: list[tuple[StepShape, bool]]) -> None:
    assert sum(run(worlds[name], seed) for seed in range(200, 208)) > 10
    replayed = {shape for shape, captured in shapes if captured}
    for kind in (
        lambda s: s.steps > 1,
        lambda s: s.steps == 1 and s.queries == 1 and s.tokens == 1,
        lambda s: s.queries == 1 and s.tokens > 1,
        lambda s: s.queries > 1,
        lambda s: s.full,
        lambda s: not s.full,
    ):
        assert any(map(kind, replayed))
    assert any(not captured for _, captured in shapes)


def test_a_long_prompt_runs_eagerly_between_tapes(
    worlds: dict[str, World], shapes: list[tuple[StepShape, bool]]
) -> None:
    world = worlds["plain"]
    decoder = make_decoder(world, {"max_model_len": 160, "page_size": 8, "steps_per_graph": 2, "depth": 2})
    ids = [1 + i % 5 for i in range(90)]
    params = SamplingParams(temperature=0.8, max_tokens=24, seed=3)
    output = decoder.generate({"prompt_token_ids": ids}, params)[0]
    compare(expected(world, decoder, Pair(ids, ids), params, ControlTags()), output.outputs[0])
    assert {(shape.tokens, shape.split) for shape, captured in shapes if not captured} >= {(90, False)}
    assert any(captured for _, captured in shapes)


def test_log_probs_and_alternatives_are_the_hosts(worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch) -> None:
    params = [
        SamplingParams(temperature=0.9, max_tokens=12, seed=seed, logprobs=logprobs, top_k=top_k)
        for seed, (logprobs, top_k) in enumerate([(0, 0), (3, 5), (None, 0), (5, 0)])
    ]
    engine = {"max_model_len": 96, "page_size": 4, "steps_per_graph": 3, "depth": 2}
    prompts = [{"prompt_token_ids": [1, 2, 3 + seed % 2]} for seed in range(len(params))]
    found = make_decoder(worlds["added"], engine).generate(prompts, params)
    monkeypatch.undo()
    wanted = make_decoder(worlds["added"], engine | {"depth": 1}).generate(prompts, params)
    for mine, theirs in zip(found, wanted, strict=True):
        (a,), (b,) = mine.outputs, theirs.outputs
        assert a.token_ids == b.token_ids
        assert (a.logprobs is None) == (b.logprobs is None)
        for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
            assert (x is None) == (y is None)
            assert list(x or {}) == list(y or {})
            assert list((x or {}).values()) == pytest.approx(list((y or {}).values()), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
@pytest.mark.parametrize("part", range(2))
def test_streams_equal_the_oracle_at_length(worlds: dict[str, World], name: str, part: int) -> None:
    assert sum(run(worlds[name], 2000 + 30 * part + i) for i in range(30)) > 30


def test_a_row_that_is_not_a_number_ends_its_request_and_no_other(tmp_path: Path) -> None:
    """Whatever follows token 3 is NaN: flagged by the sampler, never written, never cached; the other goes on."""
    world = make_worlds(tmp_path)["plain"]
    for table in world.models:
        table.table = table.table.clone()
    world.models[Role.SMALL].table[3] = torch.nan
    engine = {"max_model_len": 64, "page_size": 4, "steps_per_graph": 4, "depth": 2}
    decoder = make_decoder(world, engine)
    params = SamplingParams(temperature=0.0, max_tokens=10, logit_bias={3: -100.0})
    bad, good = decoder.generate([{"prompt_token_ids": ids} for ids in ([1, 2, 4, 5, 3], [1, 2, 4, 5, 1])], params)
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].token_ids == []
    assert good.outputs[0].finish_reason in ("stop", "length")
    assert good.outputs[0].token_ids
    assert [runner.cache.pool.in_use for runner in decoder.engine.runners] == [0, 0]
