"""F7: what this machine can do, what it lacks, and what each lack means.

report() looks and never changes anything: it opens no network connection, installs nothing, and finds optional packages
without importing them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

PYTHON_FLOOR = (3, 11)
TORCH_RANGE = ((2, 9), (2, 14))  # pyproject.toml; the upper end is excluded
EXTRAS = {
    "transformers": ("compare", "comparing against Hugging Face models"),
    "httpx": ("annotate", "annotating traces by an endpoint"),
    "rapidfuzz": ("annotate", "placing snippets that are not verbatim"),
    "matplotlib": ("plot", "drawing plots"),
    "math_verify": ("eval", "scoring mathematics"),
    "lm_eval": ("eval", "tasks of lm-evaluation-harness"),
    "datasets": ("eval", "data sets of the hub"),
    "trl": ("train", "fine-tuning"),
    "peft": ("train", "fine-tuning low-rank adapters"),
    "accelerate": ("train", "fine-tuning on one device or more"),
    "pytest": ("test", "running the tests"),
    "hypothesis": ("test", "running the property tests"),
    "cmake": ("test", "building the extension from source and its sanitizer tests"),
    "nanobind": ("test", "building the extension from source"),
}
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked for: `found` says what is there, `means` what its presence or absence entails.

    `required` is True where splitdecode cannot run without it.
    """

    name: str
    ok: bool
    found: str
    means: str
    required: bool = False


def report() -> list[Check]:
    """Every check, required ones first. Raises nothing: a probe that fails is a Check that is not ok."""
    probes: list[Callable[[], list[Check]]] = [_python, _torch, _extension, _kernels, _pair, _cpu, _memory]
    probes += [_cuda, _triton, _nvcc, _extras]
    return [check for probe in probes for check in _guarded(probe)]


def _guarded(probe: Callable[[], list[Check]]) -> list[Check]:
    try:
        return probe()
    except Exception as error:
        return [Check(probe.__name__.strip("_"), False, f"{type(error).__name__}: {error}", "the probe itself failed")]


def _python() -> list[Check]:
    wanted = ".".join(map(str, PYTHON_FLOOR))
    ok = sys.version_info[:2] >= PYTHON_FLOOR
    means = "supported" if ok else f"splitdecode needs Python {wanted} or newer"
    return [Check("python", ok, f"{platform.python_version()} ({sys.executable})", means, True)]


def torch_supported(version: str) -> bool:
    """Whether a torch version ("2.13.0+cpu") lies in TORCH_RANGE; False for one that cannot be read."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and TORCH_RANGE[0] <= (int(match[1]), int(match[2])) < TORCH_RANGE[1]


def _torch() -> list[Check]:
    wanted = "torch>={}.{},<{}.{}".format(*TORCH_RANGE[0], *TORCH_RANGE[1])
    version = _version("torch")
    if version is None:
        return [Check("torch", False, "not installed", f"nothing runs: pip install '{wanted}'", True)]
    ok = torch_supported(version)
    return [Check("torch", ok, version, "supported" if ok else f"outside the tried range {wanted}", True)]


def _extension() -> list[Check]:
    try:
        module = importlib.import_module("splitdecode._C")
    except ImportError as error:
        means = "the scheduler is missing, nothing decodes: pip install -e . builds it (a C++17 compiler is needed)"
        return [Check("extension", False, str(error), means, True)]
    return [Check("extension", True, str(module.__file__), "the C++ scheduler is importable", True)]


def _kernels() -> list[Check]:
    folder = _package() / "kernels"
    if folder.is_dir():
        return [Check("kernels", True, str(folder.resolve()), "reference ops and kernels are there", True)]
    means = "a checkout without symlinks: git config core.symlinks true, then git checkout -- src/splitdecode/kernels"
    return [Check("kernels", False, f"{folder} is no folder", means, True)]


def _pair() -> list[Check]:
    folder = _package() / "data" / "tiny-pair"
    wanted = [
        f"{role}/{name}"
        for role in ("small", "large")
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    absent = [name for name in wanted if not (folder / name).is_file()]
    if absent:
        means = "the demo and the end-to-end tests have no models; your own checkpoints still work"
        return [Check("embedded pair", False, f"{folder} lacks {', '.join(absent)}", means)]
    size = sum((folder / name).stat().st_size for name in wanted)
    return [Check("embedded pair", True, f"{folder} ({size / 1e6:.1f} MB)", "`splitdecode demo` works offline")]


def _cpu() -> list[Check]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = "unknown"
    if _version("torch") is not None:
        threads = str(importlib.import_module("torch").get_num_threads())
    found = f"{platform.machine()}, {usable} cores usable of {os.cpu_count()}, torch uses {threads} threads"
    return [Check("cpu", True, found, "on a busy machine set OMP_NUM_THREADS to the idle cores: more is far slower")]


def _memory() -> list[Check]:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return [Check("memory", False, "unknown", "this system does not say how much memory it has")]
    limit = _cgroup_limit()
    found = f"{total / _GIB:.1f} GiB" + (f", limited to {limit / _GIB:.1f} GiB" if limit and limit < total else "")
    return [Check("memory", True, found, "CPU decoding holds weights and caches here")]


def _cgroup_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _cuda() -> list[Check]:
    missing = "decoding runs on the CPU with the reference ops"
    if _version("torch") is None:
        return [Check("cuda", False, "torch is not installed", missing)]
    torch = importlib.import_module("torch")
    if torch.version.cuda is None:
        return [Check("cuda", False, f"torch {torch.__version__} is built without CUDA", missing)]
    if not torch.cuda.is_available():
        return [Check("cuda", False, f"torch is built for CUDA {torch.version.cuda} but sees no device", missing)]
    checks = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / _GIB:.1f} GiB, sm_{device.major}{device.minor}"
        ok = device.major >= 8
        means = "captured graphs and Triton kernels" if ok else "bf16 and the kernels need sm_80 or newer"
        checks.append(Check(f"cuda:{index}", ok, f"{found}, CUDA {torch.version.cuda}", means))
    return checks or [Check("cuda", False, "no device", missing)]


def _triton() -> list[Check]:
    if find_spec("triton") is None:
        return [Check("triton", False, "not installed", "no GPU kernels, and none under the interpreter")]
    return [Check("triton", True, _version("triton") or "version unknown", "kernels for CUDA; interpreted on the CPU")]


def _nvcc() -> list[Check]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)
    means = "CUDA C++ can be compiled" if found else "not needed: Triton brings its own assembler"
    return [Check("nvcc", found is not None, found or "not on PATH, nor under CUDA_HOME", means)]


def _extras() -> list[Check]:
    checks = []
    for package, (extra, purpose) in EXTRAS.items():
        ok = find_spec(package) is not None
        found = (_version(package) or "version unknown") if ok else "not installed"
        means = purpose if ok else f"no {purpose}: pip install 'splitdecode[{extra}]'"
        checks.append(Check(package, ok, found, means))
    return checks


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package() -> Path:
    return Path(__file__).resolve().parent


def render(checks: list[Check], console: Console) -> None:
    """Prints one row per check and, below, what stands between this machine and a first token."""
    table = Table(title="splitdecode on this machine", title_justify="left")
    for heading in ("", "", "found", "what it means"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]missing[/]" if check.required else "[yellow]absent[/]"
        table.add_row(check.name, mark, check.found.replace("[", r"\["), check.means.replace("[", r"\["))
    console.print(table)
    lacking = [check.name for check in checks if check.required and not check.ok]
    console.print(f"Cannot run yet: {', '.join(lacking)}." if lacking else "Everything required is here.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `splitdecode doctor`."""
    parser.add_argument("--json", action="store_true", help="print the checks as one JSON list")


def main(args: argparse.Namespace) -> int:
    """Prints the report; 0 when everything required is there, else 1."""
    checks = report()
    if args.json:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        render(checks, Console())
    return 0 if all(check.ok for check in checks if check.required) else 1
