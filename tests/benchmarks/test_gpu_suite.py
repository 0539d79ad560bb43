"""gpu_suite.py without a GPU: stages that fail, hang or run out of time cost the others nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_compile
import gpu_suite
import pytest
from gpu_suite import Stage


def script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_failure_and_a_hang_cost_only_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [
        Stage("one", 30, script("print('fine')")),
        Stage("two", 30, script("print('why'); raise SystemExit(3)")),
        Stage("three", 6, script("import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)")),
        Stage("four", 30, script("import os; print(os.environ['OUT'])")),
    ]
    start = time.monotonic()
    document = gpu_suite.run_all(wanted, tmp_path, 100.0, lambda _: None)
    assert time.monotonic() - start < 30
    outcomes = [end["outcome"] for end in document["stages"]]
    assert outcomes == ["passed", "failed: exit code 3", "stopped at its limit of 6 s", "passed"]
    assert json.loads((tmp_path / "suite.json").read_text("utf-8")) == document
    assert (tmp_path / "suite-four.log").read_text("utf-8").strip() == str(tmp_path)
    gpu_suite.show(document)
    assert "why" in capsys.readouterr().out


def test_no_stage_starts_without_time(tmp_path: Path) -> None:
    document = gpu_suite.run_all([Stage("one", 30, script("pass"))], tmp_path, 1.0, lambda _: None)
    assert document["stages"][0]["outcome"] == "skipped: no time left"


def test_the_stages_fit_into_nine_minutes(tmp_path: Path) -> None:
    every = gpu_suite.stages(tmp_path)
    assert sum(stage.seconds for stage in every) <= gpu_suite.TOTAL < 540
    for stage in every:
        scripts = [part for part in stage.command if part.startswith("benchmarks/")]
        assert all((gpu_suite.ROOT / part).exists() for part in scripts)


def test_a_wrong_stage_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--only", "dance"]) == 2
    assert "--only" in capsys.readouterr().err


def test_compiling_wants_to_know_for_what(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_compile.main([]) == 2
    assert "--arch" in capsys.readouterr().err


@pytest.mark.slow
def test_the_kernels_of_a_decoder_compile_beforehand(tmp_path: Path) -> None:
    """All that the embedded pair captures, for an H200 that is not here."""
    command = [sys.executable, str(gpu_suite.ROOT / "benchmarks/gpu_compile.py"), "--arch", "90", "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(gpu_suite.ROOT / "src"), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [*command, "--only", "bfloat16"], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == {}
    assert found["kernels"] > 20
