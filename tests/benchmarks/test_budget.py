"""The benchmark of offload budgets: its table, its document, its picture, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import budget
import pytest


def test_targets_beside_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, file = tmp_path / "a" / "plot.png", tmp_path / "b" / "out.json"
    asked = ["--problems", "6", "--targets", "2,0", "--max-num-seqs", "4", "--max-tokens", "200"]
    assert budget.main([*asked, "--plot", str(picture), "--output-json", str(file)]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads(file.read_text("utf-8"))
    assert picture.stat().st_size > 1000
    nothing, some, free = document["runs"]
    assert [run["target"] for run in document["runs"]] == [0.0, 0.02, None]
    assert (nothing["reached"], nothing["handoffs"], nothing["off_by"]) == (0, 0, None)
    assert nothing["budget_rejections"] == {"fraction": nothing["rejected_openings"]}
    assert some["off_by"] == pytest.approx(some["reached"] / 0.02 - 1)
    assert (free["rejected_openings"], free["accuracy"]) == (0, 1)
    assert "none" in out


@pytest.mark.parametrize("asked", [["--targets", "many"], ["--targets", "101"], ["--problems", "0"]])
def test_what_is_refused(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert budget.main(["--problems", "1", *asked]) == 2
    assert capsys.readouterr().err.startswith("budget.py: ")
