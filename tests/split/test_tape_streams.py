"""The step program of a GPU, replayed from tapes on a CPU, against the oracle that keeps no cache: token for token.

Device-side advance, run-ahead, several steps in a graph, overshoot past tags, padded shapes, block tables kept on the
device: whatever of it went wrong would change a token.
"""

from __future__ import annotations

import pytest
from oracles.tapes import tape_runner
from oracles.worlds import World, make_worlds, run_schedule


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def on_tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitdecode.decoder.make_runner", tape_runner)


def run(world: World, seed: int) -> int:
    return run_schedule(world, seed, steps_per_graph=1 + seed % 4, enforce_eager=seed % 5 == 4)


@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
def test_streams_equal_the_oracle(worlds: dict[str, World], name: str) -> None:
    assert sum(run(worlds[name], seed) for seed in range(200, 208)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
@pytest.mark.parametrize("part", range(3))
def test_streams_equal_the_oracle_at_length(worlds: dict[str, World], name: str, part: int) -> None:
    assert sum(run(worlds[name], 2000 + 30 * part + i) for i in range(30)) > 30
