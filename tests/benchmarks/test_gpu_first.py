"""gpu_first.py without a GPU: its kernels compile for sm_90, its stages run through in Triton's interpreter.

Both need processes of their own: Triton chooses between compiling and interpreting when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_first
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILE = '''
import json, re, subprocess, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
import gpu_kernels as g
from gpu_stages import HEADS, SHAPES

class Hopper:
    """The device a launch asks about; nothing is launched."""
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

made, run = [], JITFunction.run
JITFunction.run = lambda self, *args, warmup, **more: made.append(run(self, *args, warmup=True, **more))
driver.set_active(Hopper())

def half(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)

for block, warps, steps in g.READS:
    g.read(torch.zeros(16 * block * steps), torch.zeros(16), block, warps, steps)
for pdl in (False, True):
    g.tick(torch.zeros(132), torch.zeros(132), pdl)
    g.link(half(g.LINK), half(16, g.LINK), half(16), pdl)
for k in sorted({k for shapes in SHAPES.values() for _, k, _ in shapes.values()}):
    for how in g.GEMVS:
        g.gemv(half(k), half(16, k), half(16), how)
one = torch.zeros(1, dtype=torch.int32)
for heads, kv in HEADS.values():
    for count in g.SPLITS:
        for how in g.ATTENDS if count == g.SPLITS[0] else g.ATTENDS[:1]:
            q, cache = half(heads, g.HEAD), half(1, g.PAGE, 2, kv, g.HEAD)
            g.attend(q, cache, one, one, g.Partials.of(count, heads, "cpu"), q, how)

tool, rows = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", {}
for kernel in made:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        used = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\\d+) STACK:(\\d+) SHARED:\\d+ LOCAL:(\\d+)", used.stdout)
    regs, stack, local = map(int, found.groups())
    ptx = kernel.asm["ptx"]
    wide = len(re.findall(r"ld\\.global[\\w.:]*\\.v4\\.b32|cp\\.async[\\w.]*\\.shared\\.global[^;]*, 0x10", ptx))
    narrow = len(re.findall(r"ld\\.global(?![\\w.:]*\\.v4)[\\w.:]*evict_first", ptx))
    loads = len(re.findall(r"ld\\.global|cp\\.async\\.c[ag]", ptx))
    waits = [ptx.count("griddepcontrol." + what) for what in ("wait", "launch_dependents")]
    waits.append(kernel.metadata.launch_pdl)
    rows[kernel.hash] = [kernel.metadata.name, regs, stack + local, kernel.metadata.shared, wide, narrow, loads, waits]
print(json.dumps(list(rows.values())))
'''
REHEARSE = '''
import sys
from pathlib import Path
import torch
import gpu_timing

class Rehearsal:
    """A Replay that runs its work and makes the times up."""
    def __init__(self, work):
        self.once = work
        work()

    def us(self, parts=1):
        return 2.0

gpu_timing.DEVICE, gpu_timing.Replay = "cpu", Rehearsal
torch.cuda.synchronize = lambda: None
import gpu_kernels, gpu_stages as stages
stages.NODES, stages.SQUARE, stages.WINDOW, stages.ROTATION = 5, 64, 1 << 17, 1.0
stages.LAYERS = dict.fromkeys(stages.LAYERS, 2)
log = gpu_timing.Log("gpu", Path(sys.argv[1]), 600.0, stages.PEAK)
gpu_kernels.READS, gpu_kernels.GEMVS = gpu_kernels.READS[::3], gpu_kernels.GEMVS[::3]
stages.bandwidth(log)
stages.gap(log)
plain = gpu_kernels.attend

def attend(q, cache, table, length, scratch, y, how):
    """The interpreter's loops want numbers known beforehand: tiles of a split of 1024 tokens."""
    plain(q, cache, table, length, scratch, y, how, fixed=max(1, 16 // len(scratch.sums)) * 64 // how.tile)

gpu_kernels.attend, gpu_kernels.SPLITS, gpu_kernels.ATTENDS = attend, (8, 32), gpu_kernels.ATTENDS[::2]
stages.HEADS, stages.CONTEXTS = {"1.5B": (6, 1), "32B": (5, 1)}, (1024,)
stages.attention(log)
stages.HEADS = {"1.5B": (12, 2)}
small = {"qkv": (2048, 1536, 1.0), "o": (1536, 1536, 1.0), "gate_up": (64, 1536, 1.0), "down": (1536, 32, 1.0)}
stages.SHAPES = {"1.5B": {**small, "lm_head": (48, 1536, 1.0)}}
stages.anchor(log)
stages.SHAPES = {model: {"qkv": (8, k, 1.0), "lm_head": (8, 256, 1.0)} for model, k in (("1.5B", 1536), ("32B", 1280))}
stages.gemv(log)
'''


def child(code: str, interpret: bool, *args: str) -> str:
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_spills() -> None:
    rows = json.loads(child(COMPILE, False).splitlines()[-1])
    names = [row[0] for row in rows]
    assert names.count("gemv_kernel") == 4 * 16
    assert {"read_kernel", "tick_kernel", "link_kernel", "attend_kernel", "merge_kernel"} < set(names)
    for name, regs, spilled, shared, wide, narrow, loads, (waits, launches, pdl) in rows:
        assert spilled == 0, (name, regs, shared)
        assert regs <= 128
        assert shared <= 64 << 10
        assert waits == launches == pdl
        if name in ("read_kernel", "gemv_kernel", "link_kernel"):
            assert narrow == 0, "what is streamed comes 16 bytes at a time"
            assert 2 * wide >= loads, "x may come in smaller loads"
        if name == "attend_kernel":
            assert loads - wide <= 4, "all but the length and the page numbers"


@pytest.mark.slow
def test_every_stage_runs_through_in_the_interpreter(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    child(REHEARSE, True, str(file))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    failed = [row for row in rows if "error" in row]
    assert failed
    assert all("PDL" in row["name"] for row in failed), "the interpreter has no dependent launch, all else is right"
    names = {row["name"] for row in rows if "error" not in row}
    for wanted in ("read 6 GiB", "copy 3 GiB, read + written", "node, 132 programs", "o_proj chain, one tile"):
        assert wanted in names
    for model in ("1.5B", "32B"):
        assert {f"{model} {name} best triton" for name in ("qkv", "lm_head")} < names
        assert {f"{model} linears of a token, the better", f"{model} 1k best split", f"{model} 1k SDPA"} < names
    assert {"eager step at 4k", "captured step at 4k"} < names


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_first.main([]) == 2
    assert gpu_first.main(["--only", "nothing"]) == 2
    no_device, unknown = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in no_device
    assert "--only takes" in unknown
    assert "triton" not in vars(gpu_first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_short_run_on_the_device(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_first.py"), "--limit", "60"]
    environment = {**os.environ, "OUT": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    small = json.loads(done.stdout.splitlines()[-1])
    found = json.loads((tmp_path / "h200-first.json").read_text())
    assert small["stages"] == found["stages"]
    assert set(found["stages"]) == {"bandwidth", "gap", "gemv", "attention", "anchor"}
    assert small["figures"]["read 6 GiB"] > 500
    assert str(ROOT) not in json.dumps(found), "results name no paths of the machine"
