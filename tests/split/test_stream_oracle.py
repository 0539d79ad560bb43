"""Streams of the runtime against the oracle that keeps no cache, over fuzzed schedules, token for token in float64."""

from __future__ import annotations

import pytest
from oracles.worlds import World, make_worlds, run_schedule


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
def test_streams_equal_the_oracle(worlds: dict[str, World], name: str) -> None:
    assert sum(run_schedule(worlds[name], seed) for seed in range(15)) > 10


def test_a_forced_span_may_end_inside_a_character(worlds: dict[str, World]) -> None:
    """Its budget ends between two tokens that the reader can only read together."""
    assert run_schedule(worlds["unequal"], 1045) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
@pytest.mark.parametrize("part", range(4))
def test_streams_equal_the_oracle_at_length(worlds: dict[str, World], name: str, part: int) -> None:
    assert sum(run_schedule(worlds[name], 1000 + 45 * part + i) for i in range(45)) > 30
