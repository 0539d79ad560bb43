"""The simulator and what it is made of: costs, the engine on a clock, mean values for fleets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import scheduler
import simulate
from arrivals import closed_loop
from clockwork import Fitted, Load, choice_of, clock_engine, positions_of, roofline_pair
from fleet import Stream, best_fleet, settle
from recorded import check
from traces import workload

from splitdecode.config import EngineConfig
from splitdecode.plan import GPUS
from splitdecode.split.roles import Pair, Role

H200 = GPUS["h200"]
SMALL_STEP, LARGE_STEP = 1.0, 17.0


def flat(ms: float) -> Any:
    return lambda load: ms


def run(streams: int, **knobs: Any) -> tuple[float, list[int]]:
    """(simulated seconds, tokens of every answer) of a fixed workload at flat step times."""
    traces = [replace(t.scaled(120), seed=n) for n, t in enumerate(workload("math", 2 * streams))]
    config = EngineConfig(max_num_seqs=streams, enable_prefix_caching=False, depth=1, **knobs)
    engine = clock_engine(Pair(flat(SMALL_STEP), flat(LARGE_STEP)), config, Pair(4000, 4000), positions_of(traces))
    choices = [choice_of(trace, n) for n, trace in enumerate(traces)]
    closed_loop(engine, choices, streams)
    assert [runner.cache.pool.in_use for runner in engine.runners] == [0, 0]
    assert all(c.output is not None and c.output.finish_reason == "length" for c in choices)
    return engine.clock(), [len(c.output.token_ids) for c in choices if c.output is not None]


def test_gathering_hand_offs_takes_less_time_for_the_same_answers() -> None:
    slow, answers = run(64, handoff_patience=0.0)
    fast, same = run(64)
    assert answers == same
    assert fast < 0.75 * slow


def test_one_stream_is_never_held_back() -> None:
    assert run(1, handoff_patience=0.0) == run(1, handoff_patience=50.0)


def test_costs_are_found_again_from_their_steps() -> None:
    true = Fitted(0.3, 0.01, 0.002, 1e-5, 0.004)
    loads = [Load(r, t, c, d) for r in (1, 4, 16) for t in (r, 40, 200) for c in (64, 2000, 9000) for d in (1, r)]
    found = Fitted.of(loads * 3, [true(load) for load in loads] * 3)
    for load in loads:
        assert found(load) == pytest.approx(true(load), rel=0.02)


def test_a_hiccup_does_not_move_the_costs() -> None:
    loads = [Load(r, r, 64, r) for r in (1, 2, 4, 8)] * 9
    ms = [1.0 + load.rows for load in loads]
    ms[3] = 900.0
    assert Fitted.of(loads, ms)(Load(4, 4, 64, 4)) == pytest.approx(5.0, rel=0.01)


def test_roofline_is_flat_until_the_products_outgrow_the_weights() -> None:
    large = roofline_pair(("1.5b", "32b"), H200)[Role.LARGE]
    assert large(Load(1, 1, 0, 1)) == large(Load(100, 100, 0, 1)) == pytest.approx(16.9, rel=0.02)
    assert large(Load(1, 2000, 0, 1)) > 10 * large(Load(1, 1, 0, 1))


def test_fleets_grow_with_the_streams_and_keep_their_limit() -> None:
    costs, stream = roofline_pair(("1.5b", "32b"), H200), Stream(1843, 97, 4096)
    most = Pair(1000, 60)
    sizes = []
    for streams in (1000, 10_000, 1_000_000):
        fleet = best_fleet(costs, stream, streams, most, 10.0)
        assert fleet is not None
        assert fleet.token_ms <= 10.0
        assert fleet.batch.large <= most.large
        sizes.append(sum(fleet.gpus))
    assert sizes == sorted(sizes)
    assert sizes[2] == pytest.approx(100 * sizes[1], rel=0.15)


def test_mean_values_agree_with_little() -> None:
    costs, stream = Pair(flat(1.0), flat(10.0)), Stream(100, 10, 64)
    fleet = settle(costs, stream, 20, Pair(1, 1), Pair(1000, 1000))
    assert fleet is not None
    cycle = (100 + 2.5) * 1.0 + 10 * 10.0 + 5.0  # a catch-up waits half a step
    assert fleet.token_ms == pytest.approx(cycle / 110)
    assert fleet.batch.small + fleet.batch.large == pytest.approx(20, rel=1e-3)


def test_simulated_and_real_runs_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    found = check([2], 1, 0, 20)
    assert [row["trace"] for row in found["check"]] == ["math", "minimal", "stress"]
    for row in found["check"]:
        assert row["error"] == pytest.approx(row["simulated"] / row["measured"] - 1)
    assert "largest error" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--streams", "4", "--max-tokens", "60"], ["--fleet", "--streams", "500"]])
def test_command_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(options) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["prediction"] is True


def test_wrong_numbers_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--streams", "0"]) == 2
    assert "found '0'" in capsys.readouterr().err
    assert scheduler.main(["--sequences", "x"]) == 2


def test_host_cost_has_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert scheduler.main(["--sequences", "1,8", "--steps", "200", "--repeats", "1", "--context", "32"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["sequences"] for row in rows] == [1, 8]
    for row in rows:
        assert row["step_us"] == pytest.approx(row["plan_us"] + row["commit_us"])
        assert 0 < row["python_share"] < 1
    assert max(row["events_per_tick"] for row in rows) > 0
