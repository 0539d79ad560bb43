"""Compiles kernels for GPUs that are not here, and tells what they need: registers, spills, memory, instructions.

    python -m oracles.compiled linear --arch 90 --into out.json        (PYTHONPATH=src:tests, TRITON_INTERPRET unset)

`oracles.cases.<name>.cases()` yields Cases: a thunk that calls launchers on meta tensors of real shapes. Every kernel a
thunk launches is compiled exactly as it would be on that device (constants, divisibility, warps, stages) and not run.
A process of its own, because Triton chooses between compiling and interpreting when it is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Case:
    """A launch and the bounds the design assumes.

    regs, smem: at most so many registers a thread and bytes of shared memory a program.  wide: 128-bit global loads
    (or cp.async / TMA) are there.  mma: matrix instructions are there.
    """

    name: str
    launch: Callable[[], None]
    regs: int = 128
    smem: int = 48 << 10
    wide: bool = True
    mma: bool = False


@dataclass(frozen=True)
class Made:
    """One compiled kernel of a case."""

    case: str
    kernel: str
    arch: int
    warps: int
    regs: int
    stack: int
    local: int
    smem: int
    wide: int
    mma: int

    def faults(self, case: Case) -> list[str]:
        """What breaks the case's bounds."""
        out = []
        if self.stack or self.local:
            out.append(f"spills: stack {self.stack}, local {self.local} bytes")
        if self.regs > case.regs:
            out.append(f"{self.regs} registers, bound {case.regs}")
        if self.smem > case.smem:
            out.append(f"{self.smem} bytes of shared memory, bound {case.smem}")
        if case.wide and not self.wide:
            out.append("no 128-bit loads")
        if case.mma and not self.mma:
            out.append("no matrix instructions")
        return out


def dependent() -> bool:
    """Whether the device compiled for has programmatic dependent launch."""
    from triton.runtime import driver

    return int(driver.active.get_current_target().arch) >= 90


def compile_case(case: Case, arch: int) -> list[Made]:
    """Compiles what the thunk launches for sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """The device a launch asks about; nothing is launched."""

        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    made: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **more: Any) -> Any:
        made.append((self.fn.__name__, run(self, *args, warmup=True, **more)))
        return made[-1][1]

    JITFunction.run = compile_only  # type: ignore[method-assign]
    driver.set_active(Absent())
    try:
        case.launch()
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return [_resources(case.name, name, arch, kernel, tool) for name, kernel in made]


def _resources(case: str, name: str, arch: int, kernel: Any, tool: Path) -> Made:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    regs, stack, _, local = map(int, found.groups())
    ptx = kernel.asm["ptx"]
    wide = len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|\.v8\.b32", ptx))
    wide += len(re.findall(r"cp\.async[\w.]*\.shared\.global[^;]*, 0x10|cp\.async\.bulk\.tensor", ptx))
    mma = len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx))
    meta = kernel.metadata
    return Made(case, name, arch, meta.num_warps, regs, stack, local, meta.shared, wide, mma)


def compile_all(names: list[str], arch: int, match: str = "") -> list[dict[str, Any]]:
    """Every case of these files: its resources and its faults."""
    rows = []
    for name in names:
        for case in import_module(f"oracles.cases.{name}").cases():
            if match in case.name:
                for made in compile_case(case, arch):
                    rows.append({**asdict(made), "faults": made.faults(case)})
    return rows


def compiled_elsewhere(names: list[str], arch: int) -> list[dict[str, Any]]:
    """compile_all in a process of its own, whatever mode this one is in."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "rows.json"
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}", "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", "oracles.compiled", *names, "--arch", str(arch), "--into", str(into)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        rows: list[dict[str, Any]] = json.loads(into.read_text("utf-8"))
        return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The resources, for people."""
    head = f"{'case':36} {'kernel':24} sm_ warps regs  smem wide mma"
    lines = [
        f"{r['case'][:36]:36} {r['kernel'][:24]:24} {r['arch']:3} {r['warps']:5} {r['regs']:4} {r['smem']:5} "
        f"{r['wide']:4} {r['mma']:3} {'; '.join(r['faults'])}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="files of oracles/cases")
    parser.add_argument("--arch", type=int, default=90, choices=ARCHS)
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--into", type=Path, help="write the rows here as JSON")
    args = parser.parse_args()
    rows = compile_all(args.names, args.arch, args.match)
    print(table(rows))
    if args.into:
        args.into.write_text(json.dumps(rows), "utf-8")
    return 0 if args.into else int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
