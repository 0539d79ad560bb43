"""predict.py: the launches of a real step, and predictions that move as they must."""

from __future__ import annotations

import json
from pathlib import Path

import predict
import pytest

from splitdecode.models import geometry
from splitdecode.plan import GPUS


@pytest.fixture(scope="module")
def steps() -> list[list[predict.Launch]]:
    return [predict.record_step(geometry.preset(name), 4096) for name in ("1.5b", "32b")]


def test_a_step_is_five_launches_a_layer_and_three(steps: list[list[predict.Launch]]) -> None:
    assert [len(launches) for launches in steps] == [143, 323]


def test_the_launches_move_what_a_token_must_read(steps: list[list[predict.Launch]]) -> None:
    for name, launches in zip(("1.5b", "32b"), steps, strict=True):
        config = geometry.preset(name)
        least = geometry.weight_bytes(config) + 4096 * geometry.kv_bytes(config)
        moved = sum(launch.bytes for launch in launches)
        assert least <= moved <= 1.02 * least


def test_predictions_lie_above_the_floor_and_launches_cost(steps: list[list[predict.Launch]]) -> None:
    found = {mode: predict.predict(("1.5b", "32b"), GPUS["h200"], 4096, costs, steps) for mode, costs in predict.MODES}
    plain, dependent = found["graph"], found["graph + PDL"]
    for name in ("1.5b", "32b"):
        assert plain[name]["floor_ms"] < dependent[name]["ms"] < plain[name]["ms"]
    assert plain["1.5b"]["floor_ms"] == pytest.approx(0.745, rel=0.01)
    assert plain["32b"]["floor_ms"] == pytest.approx(15.13, rel=0.01)
    speedups = [plain[f"split {100 * share:g} %"]["speedup"] for share in predict.SHARES]
    assert speedups == sorted(speedups, reverse=True)


def test_measured_ceilings_replace_assumed_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        {"stage": "bandwidth", "name": "read 6 GiB", "value": 4000.0},
        {"stage": "gap", "name": "node, 132 programs", "value": 2.0},
        {"stage": "gap", "name": "node, 132 programs, PDL", "value": 0.9},
    ]
    file = tmp_path / "first.json"
    file.write_text(json.dumps({"figures": figures}), "utf-8")
    assert predict.measured_gpu(GPUS["h200"], predict.PLAIN, file)[0].bandwidth == 4.0e12
    assert predict.measured_gpu(GPUS["h200"], predict.PLAIN, file)[1].gap == 2.0
    assert predict.measured_gpu(GPUS["h200"], predict.DEPENDENT, file)[1].gap == 0.9
    assert predict.main(["--gpu", "h200", "--measured", str(file), "--output-json", str(tmp_path / "out.json")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert predict.main(["--gpu", "tpu"]) == 2
