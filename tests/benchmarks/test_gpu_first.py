"""gpu_first.py: without a device it says so; with one, a short run gives every figure or the reason why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_first
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_first.main([]) == 2
    assert gpu_first.main(["--only", "nothing"]) == 2
    no_device, unknown = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in no_device
    assert "--only takes" in unknown
    assert "triton" not in vars(gpu_first)


@pytest.mark.gpu
def test_a_short_run_on_the_device(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_first.py"), "--limit", "60"]
    environment = {**os.environ, "OUT": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    small = json.loads(done.stdout.splitlines()[-1])
    found = json.loads((tmp_path / "h200-first.json").read_text())
    assert small["stages"] == found["stages"]
    assert set(found["stages"]) == {"bandwidth", "gap", "gemv", "attention", "anchor"}
    assert small["figures"]["read 6 GiB"] > 500
    assert str(ROOT) not in json.dumps(found), "results name no paths of the machine"
