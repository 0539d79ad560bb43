"""kernels.py, run as a user runs it: every op and every method is in the JSON document of its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernels
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def check_figures(found: dict[str, Any]) -> None:
    us = found["us"]
    assert 0 < us["low"] <= us["median"] <= us["high"]


def test_a_run_of_some_ops(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    flags = ("--what", "ops", "--only", "weights 128x768", "--num-iters", "2", "--num-iters-warmup", "1")
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *flags, "--output-json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(file.read_text())
    assert str(ROOT) not in file.read_text(), "results name no paths of the machine"
    (one,) = found["contests"]
    assert (one["op"], one["shape"], one["bytes"]) == ("weights", "128x768", 4 * (128 * 768 + 128 + 768))
    assert list(one["alternatives"]) == ["mm [in, out]", "linear [out, in]", "mv [out, in]"]
    for alternative in one["alternatives"].values():
        check_figures(alternative)
        assert alternative["gbps"] == pytest.approx(one["bytes"] / alternative["us"]["median"] / 1e3, rel=0.01)
        assert alternative["share"] == pytest.approx(alternative["gbps"] / one["read_gbps"], rel=0.01)


def test_the_sampler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "VOCABULARIES", (152, 2000))
    flags = ["--what", "sampler", "--num-iters", "2", "--num-iters-warmup", "1", "--bundle-ms", "1"]
    assert kernels.main(flags) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["contests"]) == 8, "two vocabularies, two spreads, two numbers of rows"
    for one in found["contests"]:
        assert set(one["alternatives"]) == set(kernels.METHODS)
        for alternative in one["alternatives"].values():
            check_figures(alternative)


def test_alternatives_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WEIGHTS", ((128, 768),))
    found = set()
    with torch.inference_mode():
        for contest in kernels.all_ops():
            kernels.check(contest)
            for work in contest.works.values():
                work()
            found.add((contest.op, contest.alike))
    assert found == {
        ("rmsnorm + linear", 3), ("weights", 3), ("rope", 0), ("kv write", 0), ("attention", 3), ("swiglu", 2)
    }  # fmt: skip


def test_alternatives_for_many_rows_agree() -> None:
    found = set()
    with torch.inference_mode():
        for contest in kernels.contests("rows"):
            kernels.check(contest)
            found.add((contest.op, contest.alike))
    assert found == {("attention", 2), ("norm", 3), ("swiglu", 2), ("product", 4)}


def test_what_does_not_agree_is_refused() -> None:
    ones, twos = torch.ones(3), torch.full((3,), 2.0)
    with pytest.raises(AssertionError, match="not close"):
        kernels.check(kernels.Contest("op", "3", 12, {"a": lambda: ones, "b": lambda: twos}, alike=2))


def test_nothing_to_measure_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "all_ops", lambda: iter(()))
    assert kernels.main(["--only", "softmax"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("kernels.py: --only: found 'softmax'")
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
