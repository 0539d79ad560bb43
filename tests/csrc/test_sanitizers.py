"""csrc/ under ASan and UBSan: builds the stand-alone fuzzer with CMake and runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 120


def cmake() -> str:
    found = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip("no cmake beside this Python or on PATH")
    return found


@pytest.mark.slow
def test_fuzz_under_sanitizers(tmp_path: Path) -> None:
    program = cmake()
    for command in (
        [program, "-S", str(ROOT), "-B", str(tmp_path), "-DSPLITDECODE_SANITIZE=ON", "-DCMAKE_UNITY_BUILD=ON"],
        [program, "--build", str(tmp_path), "--target", "csrc_fuzz"],
        [str(tmp_path / "csrc_fuzz"), "1", str(SEEDS)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for structure in ("page_pool", "scheduler"):
        assert f"{structure}: {SEEDS} seeds" in done.stdout
    met = dict(re.findall(r"([a-z ]+) (\d+)", done.stdout.split("scheduler met:")[1]))
    assert len(met) == 5
    assert min(int(count) for count in met.values()) > 100, met
