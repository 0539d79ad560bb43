"""What one CUDA device gives to batch-1 decoding, measured in the first minutes on it: each figure by its prediction.

    python3 benchmarks/gpu_first.py                           every stage, at most --limit seconds (480)
    python3 benchmarks/gpu_first.py --only gemv,attention     some of them

    bandwidth   reading only, 6 GiB and windows of 96 MiB; copying; a bf16 product of 8192^3
    gap         a node of a captured graph, with and without programmatic dependent launch (PDL)
    gemv        y = w x in bf16 at the shapes of the 1.5B and the 32B: Triton tiles against F.linear
    attention   one token over a paged cache in S splits, against SDPA (and FlashInfer, where it is)
    anchor      a plain torch step of 1.5B geometry at 4k context: eager, and as one graph

Every kernel is timed inside a captured graph, over weights or caches that rotate through 512 MB so that the L2 is cold,
as the median of seven blocks of replays; its time includes the gap to the next node. Before it counts, its output is
poisoned with NaN, replayed and compared with float32 torch on random data. Stages run in processes of their own, so one
that fails or hangs costs only itself; what it had measured by then is kept.

Needs torch and triton. Writes ${OUT:-benchmarks/results}/h200-first.json; the last line is one JSON document. Exit
code 2: no CUDA device, or wrong input.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_stages import PEAK, anchor, attention, bandwidth, gap, gemv
from gpu_timing import Figure, Log, half

HERE = Path(__file__).resolve().parent
STAGES: dict[str, tuple[Callable[[Log], None], float]] = {  # at most so many seconds each
    "bandwidth": (bandwidth, 60.0),
    "gap": (gap, 60.0),
    "gemv": (gemv, 180.0),
    "attention": (attention, 150.0),
    "anchor": (anchor, 60.0),
}


def run_stage(args: argparse.Namespace) -> int:
    """One stage, in this process."""
    log = Log(args.stage, args.into, args.limit, args.ceiling)
    try:
        torch.manual_seed(0)
        a = half(4096, 4096)
        for _ in range(200):  # wakes the clocks
            a @ a
        STAGES[args.stage][0](log)
    except Exception as error:
        log.fail("the stage", error)
        return 1
    return 0


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def about() -> dict[str, Any]:
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    gpu = torch.cuda.get_device_properties(0)
    return {
        "device": gpu.name,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "multiprocessors": gpu.multi_processor_count,
        "driver, sm clock, memory clock, power limit": driver,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "triton", "flashinfer-python", "numpy")},
    }


def run_all(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """The whole document; written after every stage, so that a run cut short leaves what it has."""
    start, rows, ends, ceiling = time.monotonic(), [], {}, PEAK
    out = Path(os.environ.get("OUT") or HERE / "results") / "h200-first.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": "gpu_first", "command": " ".join(["python3", "benchmarks/gpu_first.py", *sys.argv[1:]])}
    document |= {"date": datetime.now(UTC).strftime("%F %T UTC"), "machine": about(), "stages": ends, "figures": rows}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            left = min(STAGES[name][1], args.limit - (time.monotonic() - start))
            if left < 5:
                ends[name] = "skipped: no time left"
                continue
            into = Path(folder) / name
            command = [sys.executable, str(HERE / Path(__file__).name), "--stage", name, "--into", str(into)]
            command += ["--limit", str(left), "--ceiling", str(ceiling)]
            begin = time.monotonic()
            try:
                code: object = subprocess.run(command, timeout=left + 15, check=False).returncode
            except subprocess.TimeoutExpired:
                code = "killed past its time limit"
            ends[name] = f"{code} after {time.monotonic() - begin:.0f} s"
            rows += [json.loads(line) for line in (into.read_text("utf-8").splitlines() if into.exists() else ())]
            ceiling = max((row["value"] for row in rows if row["name"] == "read 6 GiB"), default=PEAK)
            document["seconds"] = round(time.monotonic() - start, 1)
            out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return document


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--limit", type=float, default=480.0, help="seconds for everything (default: 480)")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas (default: all)")
    for name, kind in (("--stage", str), ("--into", Path), ("--ceiling", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    names = args.only.split(",")
    if not set(names) <= set(STAGES):
        print(f"gpu_first: --only takes some of {', '.join(STAGES)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu_first: no CUDA device here, so there is nothing to measure", file=sys.stderr)
        return 2
    if args.stage:
        return run_stage(args)
    document = run_all(args, names)
    figures = [Figure(**row) for row in document["figures"] if "error" not in row]
    print("\n".join(["", "The figures that count:", *(one.line() for one in figures if one.headline)]))
    summary = {one.name: round(one.value, 3) for one in figures if one.headline}
    failed = [f"{row['name']}: {row['error']}" for row in document["figures"] if "error" in row]
    small = {"benchmark": "gpu_first", "machine": document["machine"], "stages": document["stages"], "failed": failed}
    print(json.dumps(small | {"figures": summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
