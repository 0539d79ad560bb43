"""The stages of gpu_suite.sh, each in a process of its own with a time limit of its own: one failure costs no other.

    build     the extension, in place, by the Python that runs this
    compile   the kernels of all that follows, on all cores                                          (gpu_compile.py)
    tests     pytest -m gpu: every kernel against its reference, streams of graph, eager and CPU against each other
    first     ceilings: bandwidth, products, gap per graph node, a sweep of GEMVs and of attention   (gpu_first.py)
    kernels   every kernel in a captured graph over rotated weights, beside its peers                (kernels.py)
    latency   1.5B + 32B with random weights: the headline                                           (latency.py)
    predict   what was expected of all this, with the ceilings just measured                         (predict.py)

Writes suite.json, and each stage's document and log, under ${OUT:-benchmarks/results}. A short table comes last.
Exit code: 0 when every stage passed, 1 otherwise, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 535.0  # seconds for everything
LATENCY = ("--small", "1.5b", "--large", "32b", "--num-iters", "2", "--max-tokens", "128")
# Where `-m gpu` picks from; the GPU tests of the benchmarks would only repeat other stages.
TESTS = ("tests/kernels", "tests/runtime/test_step_model.py", "tests/test_decoder_gpu.py")


@dataclass(frozen=True, slots=True)
class Stage:
    """A command and the seconds it may take; document: the JSON file it writes under OUT, if it writes one."""

    name: str
    seconds: float
    command: tuple[str, ...]
    document: str = ""


@dataclass(slots=True)
class End:
    """How a stage went."""

    name: str
    outcome: str
    seconds: float
    tail: list[str]


def stages(out: Path, python: str = sys.executable) -> list[Stage]:
    """In order; limits add up to less than TOTAL."""

    def bench(name: str, seconds: float, script: str, *flags: str) -> Stage:
        file = f"h200-{name}.json"
        return Stage(name, seconds, (python, f"benchmarks/{script}", *flags, "--output-json", str(out / file)), file)

    first = (python, "benchmarks/gpu_first.py", "--limit", "65", "--only", "bandwidth,gap,gemv,attention")
    tests = (python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default")
    spread = ("-n", "12") if find_spec("xdist") else ()  # kernels of odd shapes: compiling takes most of the time
    return [
        Stage("build", 45, (python, "setup.py", "build_ext", "--inplace")),
        Stage("compile", 80, (python, "benchmarks/gpu_compile.py")),
        Stage("tests", 110, (*tests, *spread, "--continue-on-collection-errors", *TESTS)),
        Stage("first", 80, first, "h200-first.json"),
        bench("kernels", 65, "kernels.py", "--what", "gpu"),
        bench("latency", 130, "latency.py", *LATENCY, "--device", "cuda", "--compare", "transformers"),
        bench("predict", 20, "predict.py", "--gpu", "h200", "--measured", str(out / "h200-first.json")),
    ]


def run_stage(stage: Stage, out: Path, left: float) -> End:
    """Runs it to its end or its limit; what it printed is kept in a log."""
    limit = min(stage.seconds, left)
    if limit < 5:
        return End(stage.name, "skipped: no time left", 0.0, [])
    path = os.pathsep.join(str(ROOT / part) for part in ("src", "tests", "benchmarks"))
    environment = {
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
        **os.environ,
        "PYTHONPATH": path,
        "OUT": str(out),
    }
    log, begin = out / f"suite-{stage.name}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout=limit)
            outcome = "passed" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            outcome = f"stopped at its limit of {limit:.0f} s"
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return End(stage.name, outcome, round(time.monotonic() - begin, 1), [line[:200] for line in lines[-12:]])


def run_all(wanted: list[Stage], out: Path, total: float, told: Callable[[End], None]) -> dict[str, Any]:
    """Every stage; the document is written after each, so that a run cut short leaves what it has."""
    start, ends = time.monotonic(), []
    document: dict[str, Any] = {
        "benchmark": "gpu_suite",
        "date": datetime.now(UTC).strftime("%F %T UTC"),
        "command": " ".join(["benchmarks/gpu_suite.sh", *sys.argv[1:]]),
    }
    out.mkdir(parents=True, exist_ok=True)
    for stage in wanted:
        end = run_stage(stage, out, total - (time.monotonic() - start))
        ends.append(end)
        told(end)
        document["stages"] = [asdict(one) for one in ends]
        document["seconds"] = round(time.monotonic() - start, 1)
        (out / "suite.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return document


def show(document: dict[str, Any]) -> None:
    """One row per stage, and the end of what failed."""
    for end in document["stages"]:
        if end["outcome"] != "passed":
            print(f"\n--- {end['name']}: {end['outcome']}", *end["tail"], sep="\n    ")
    print(f"\n{'stage':<10}{'seconds':>8}  outcome")
    for end in document["stages"]:
        print(f"{end['name']:<10}{end['seconds']:>8.1f}  {end['outcome']}")
    print(f"{'all':<10}{document['seconds']:>8.1f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="stages, separated by commas (default: all)")
    parser.add_argument("--total", type=float, default=TOTAL, help=f"seconds for everything ({TOTAL:.0f})")
    args = parser.parse_args(argv)
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks/results").resolve()
    every = stages(out)
    names = args.only.split(",") if args.only else [stage.name for stage in every]
    if not set(names) <= {stage.name for stage in every}:
        print(f"gpu_suite: --only takes some of {', '.join(stage.name for stage in every)}", file=sys.stderr)
        return 2
    chosen = [stage for stage in every if stage.name in names]
    document = run_all(chosen, out, args.total, lambda end: print(f"{end.name}: {end.outcome}", flush=True))
    show(document)
    return int(any(end["outcome"] != "passed" for end in document["stages"]))


if __name__ == "__main__":
    sys.exit(main())
