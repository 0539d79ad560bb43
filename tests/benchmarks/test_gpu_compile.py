"""gpu_compile.py without a GPU: every launch of the suite can be made on tensors without memory, and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *flags: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_compile.py"), "--arch", "90", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_every_launch_can_be_made(tmp_path: Path) -> None:
    """A share so small that nothing is compiled."""
    found = run(tmp_path, "--part", "0", "--jobs", "1000000000")
    assert found["failed"] == {}
    assert found["compiled"] == 0
    assert found["seen"] > 300


@pytest.mark.slow
def test_the_shares_are_everything_and_are_found_again(tmp_path: Path) -> None:
    shares = [run(tmp_path, "--part", str(part), "--jobs", "7", "--only", "contests") for part in range(2)]
    assert all(share["failed"] == {} and 0 < share["compiled"] < share["seen"] for share in shares)
    compiled = sorted(tmp_path.glob("*/*.cubin"))
    assert len(compiled) == sum(share["compiled"] for share in shares)
    assert run(tmp_path, "--part", "0", "--jobs", "7", "--only", "contests") == shares[0]
    assert sorted(tmp_path.glob("*/*.cubin")) == compiled
