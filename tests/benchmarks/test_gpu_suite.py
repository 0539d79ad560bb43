"""gpu_suite.py without a GPU: stages that fail, hang or run out of time cost the others nothing."""

from __future__ import annotations

import json
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


def test_the_tests_stage_runs_every_gpu_test(tmp_path: Path) -> None:
    tests = gpu_suite.ROOT / "tests"
    covered = [gpu_suite.ROOT / part for part in gpu_suite.TESTS]
    assert all(path.exists() for path in covered)
    for file in tests.rglob("test_*.py"):
        text = file.read_text("utf-8")
        if file.parent != tests / "benchmarks" and ("pytest.mark.gpu" in text or "device: torch.device" in text):
            assert any(path in (file, *file.parents) for path in covered), file
    (stage,) = (stage for stage in gpu_suite.stages(tmp_path) if stage.name == "tests")
    assert stage.command[-len(gpu_suite.TESTS) :] == gpu_suite.TESTS


def test_a_wrong_stage_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--only", "dance"]) == 2
    assert "--only" in capsys.readouterr().err


def test_compiling_wants_to_know_for_what(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_compile.main([]) == 2
    assert "--arch" in capsys.readouterr().err
