"""plan against the published floors of this geometry on an H200 (4.3 TB/s, 700 TFLOP/s), computed independently."""

from __future__ import annotations

import argparse
import json
import math

import pytest
from rich.console import Console

from splitdecode import plan
from splitdecode.models import geometry

H200 = plan.GPUS["h200"]
SHARES = (0.0135, 0.05, 0.2)
CLOSE = 0.015

# weights read GB, ms, KV KiB per token, ms @4k, ms @16k, KV GiB @32k, catch-up ms per 1000 tokens @0, @4k, @16k
FLOORS = {
    "0.5b": (0.988, 0.230, 12, 0.241, 0.277, 0.375, 1.1, 1.6, 3.1),
    "1.5b": (3.087, 0.718, 28, 0.745, 0.827, 0.875, 3.9, 4.9, 7.9),
    "7b": (14.14, 3.289, 56, 3.343, 3.507, 1.75, 18.9, 21.3, 28.3),
    "14b": (27.98, 6.508, 192, 6.695, 7.257, 6.0, 38.5, 44.2, 61.5),
    "32b": (63.97, 14.88, 256, 15.13, 15.88, 8.0, 90.1, 97.8, 120.8),
    "72b": (142.9, 33.24, 320, 33.55, 34.49, 10.0, 202.0, 218.0, 264.0),
}


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    plan.add_arguments(parser)
    return parser.parse_args(argv)


def pair(context: int = 4096, small: str = "1.5b", large: str = "32b") -> plan.Plan:
    return plan.plan_pair(small, large, H200, context, SHARES, 32)


@pytest.mark.parametrize("name", FLOORS)
def test_floors_of_each_model(name: str) -> None:
    read, weights_ms, kv_kib, at_4k, at_16k, kv_gib, *catch_up = FLOORS[name]
    config = geometry.preset(name)
    assert plan.step_ms(config, H200, 0) * H200.bandwidth / 1e12 == pytest.approx(read, rel=CLOSE)
    found = [plan.step_ms(config, H200, context) for context in (0, 4096, 16384)]
    assert found == pytest.approx([weights_ms, at_4k, at_16k], rel=CLOSE)
    shape = plan.plan_model(name, H200, 32768)
    assert (shape.kv_bytes_per_token, shape.kv_bytes) == (kv_kib * 1024, kv_gib * plan.GIB)
    found = [plan.compute_ms(config, H200, 1000, prefix) for prefix in (0, 4096, 16384)]
    assert found == pytest.approx(catch_up, rel=CLOSE, abs=0.06)


@pytest.mark.parametrize(("tokens", "extra"), [(64, 0), (200, 4.3), (256, 9.7), (380, 21.8), (512, 34.7), (1000, 82.6)])
def test_what_a_catch_up_costs_beyond_a_decode_step(tokens: int, extra: float) -> None:
    config = geometry.preset("32b")
    cost = plan.catch_up_ms(config, H200, tokens, 4096) - plan.step_ms(config, H200, 4096)
    assert cost == pytest.approx(extra, rel=CLOSE, abs=0.06)


def test_the_split_floor() -> None:
    rows = pair().offloads
    assert [row.floor_ms for row in rows] == pytest.approx([1.031, 1.533, 3.622], rel=0.002)
    assert [row.floor_speedup for row in rows] == pytest.approx([14.7, 9.9, 4.2], rel=CLOSE)
    assert [row.caught_up for row in rows] == pytest.approx([2338, 608, 128], rel=0.001)
    assert [row.stall_ms for row in rows[:2]] == pytest.approx([231, 59], rel=CLOSE)
    at_16k = [row.floor_speedup for row in pair(16384).offloads]
    assert at_16k == pytest.approx([13.9, 9.5, 4.1], rel=CLOSE)


def test_the_expected_split() -> None:
    rows = pair().offloads
    assert [row.expected_ms for row in rows] == pytest.approx([1.37, 1.93, 4.28], rel=CLOSE)
    assert [row.expected_speedup for row in rows] == pytest.approx([12.6, 8.9, 4.0], rel=CLOSE)


@pytest.mark.parametrize("segment", [16, 64])
def test_the_segment_length_hardly_matters(segment: int) -> None:
    at_32 = pair().offloads
    other = plan.plan_pair("1.5b", "32b", H200, 4096, SHARES, segment).offloads
    assert [row.floor_ms for row in other] == pytest.approx([row.floor_ms for row in at_32], rel=0.025)


def test_memory_of_the_pair() -> None:
    memory = pair().memory
    assert memory.fits
    assert memory.sequences[32768] == 7
    assert memory.left / plan.GIB == pytest.approx(70, rel=0.02)
    assert memory.second_cache == pytest.approx(0.109, abs=0.001)
    assert pair().free_tokens == pytest.approx(163, abs=0.5)
    assert "7 sequences of 32768 tokens" in plan.verdict(pair(32768))


def test_a_pair_that_does_not_fit_says_so() -> None:
    found = pair(large="72b")
    assert not found.memory.fits
    for size in ("Does not fit", "145.4 GB", "3.1 GB", "150.7 GB"):
        assert size in plan.verdict(found)
    assert plan.main(parse("--large", "72b")) == 1


def test_weights_that_fit_without_room_for_a_sequence() -> None:
    gpu = plan.Gpu("tight", 4.3e12, 700e12, pair().memory.weights + plan.RESERVE_BYTES + 1e9, "made up")
    found = plan.plan_pair("1.5b", "32b", gpu, 4096, SHARES, 32)
    assert found.memory.fits
    assert found.memory.sequences[4096] == 0
    assert "no sequence of 4096 tokens" in plan.verdict(found)


def test_the_ends_of_the_range() -> None:
    ends = plan.plan_pair("1.5b", "32b", H200, 4096, (0.0, 1.0), 32)
    assert [row.floor_ms for row in ends.offloads] == [ends.small.step_ms, ends.large.step_ms]
    assert ends.offloads[1].floor_speedup == ends.offloads[1].expected_speedup == 1
    for share, segment in ((-0.1, 32), (1.1, 32), (0.5, 0.5), (math.nan, 32)):
        with pytest.raises(ValueError, match="share must lie"):
            plan.split_ms(*map(geometry.preset, ("1.5b", "32b")), H200, share, segment, 4096, plan.FLOOR)
    with pytest.raises(ValueError, match="context"):
        pair(0)


@pytest.mark.parametrize("name", plan.GPUS)
def test_every_gpu_says_where_its_numbers_come_from(name: str) -> None:
    gpu = plan.GPUS[name]
    assert gpu.source.startswith("reachable" if name == "h200" else "datasheet")
    assert 20 < gpu.flops / gpu.bandwidth < 500
    assert plan.plan_pair("0.5b", "7b", gpu, 2048, SHARES, 32).offloads[0].floor_speedup > 1


def test_reachable_rates_agree_with_what_was_published_for_the_h100() -> None:
    assert plan.GPUS["h100"].bandwidth / 1e12 == pytest.approx(3.0, rel=0.01)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(parse("--json", "--offload", "0.05", "--context", "8192")) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["context"] == 8192
    assert data["memory"]["fits"] is True
    assert [row["share"] for row in data["offloads"]] == [0.05]
    assert data["verdict"].startswith("Fits")


def test_render() -> None:
    console = Console(width=120, record=True)
    plan.render(pair(), console)
    text = console.export_text()
    for figure in ("15.127 ms", "0.745 ms", "1.533 ms", "9.9x", "256 KiB", "10.9%", "7 of 32768", "Fits"):
        assert figure in text, figure


@pytest.mark.parametrize("argv", [["--offload", "5%"], ["--offload", "1.5"], ["--offload", "nan"], ["--context", "0"]])
def test_bad_arguments_name_what_was_expected(argv: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError, match="expected"):
        parse(*argv)
