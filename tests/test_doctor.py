"""doctor looks and reports; it never imports triton and never raises."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from rich.console import Console

from splitdecode import doctor

ROOT = Path(__file__).resolve().parents[1]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(argv)


def by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.report()}


def test_every_check_says_something() -> None:
    checks = doctor.report()
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.found and check.means for check in checks)
    wanted = {"python", "torch", "extension", "kernels", "embedded pair", "cpu", "memory", "triton", "nvcc"}
    assert wanted | set(doctor.EXTRAS) <= {check.name for check in checks}
    assert [c.required for c in checks] == sorted((c.required for c in checks), reverse=True)


def test_what_these_tests_run_on_is_found() -> None:
    checks = by_name()
    assert all(checks[name].ok for name in ("python", "torch", "kernels", "embedded pair", "pytest", "hypothesis"))
    assert checks["extension"].ok, checks["extension"].found


def test_the_torch_range_is_the_one_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    spec = next(line for line in project["dependencies"] if line.startswith("torch"))
    low, high = re.findall(r"(\d+)\.(\d+)", spec)
    assert (tuple(map(int, low)), tuple(map(int, high))) == doctor.TORCH_RANGE
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.PYTHON_FLOOR))
    for package, (extra, _) in doctor.EXTRAS.items():
        assert any(line.replace("-", "_").startswith(package) for line in project["optional-dependencies"][extra])


@pytest.mark.parametrize(
    ("version", "ok"),
    [("2.9.0", True), ("2.13.0+cpu", True), ("2.8.1", False), ("2.14.0", False), ("3.0", False), ("odd", False)],
)
def test_torch_versions(version: str, ok: bool) -> None:
    assert doctor.torch_supported(version) is ok


def test_missing_packages_are_told_with_their_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(doctor, "find_spec", absent)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    checks = by_name()
    assert not checks["torch"].ok
    assert checks["torch"].required
    assert not checks["triton"].ok
    assert "splitdecode[plot]" in checks["matplotlib"].means
    assert not checks["cuda"].ok


def test_a_missing_pair_and_missing_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_package", lambda: tmp_path)
    checks = by_name()
    assert not checks["embedded pair"].ok
    assert "small/config.json" in checks["embedded pair"].found
    assert not checks["kernels"].ok
    assert doctor.main(parse("--json")) == 1


def test_a_failing_probe_is_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[doctor.Check]:
        raise OSError("no such file")

    monkeypatch.setattr(doctor, "_nvcc", broken)
    assert any("no such file" in check.found for check in doctor.report())


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main(parse("--json"))
    checks = json.loads(capsys.readouterr().out)
    assert {"name", "ok", "found", "means", "required"} == set(checks[0])
    assert code == (0 if all(check["ok"] for check in checks if check["required"]) else 1)


def test_render_prints_markup_literally() -> None:
    console = Console(width=120, record=True)
    checks = [doctor.Check("x", False, "a [b] c", "pip install 'splitdecode[plot]'", required=True)]
    doctor.render(checks, console)
    text = console.export_text()
    assert "a [b] c" in text
    assert "splitdecode[plot]" in text
    assert "Cannot run yet: x." in text


def test_triton_is_not_imported() -> None:
    code = "import sys; from splitdecode import doctor; doctor.report(); assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
