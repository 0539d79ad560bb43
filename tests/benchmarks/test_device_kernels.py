"""device_kernels.py without a GPU: every contest runs through in Triton's interpreter and passes its own check.

A process of its own, because Triton chooses between compiling and interpreting when it is imported. What a contest and
its table do with errors is checked here, without Triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import device_kernels
import kernels
import pytest
import torch
from device_kernels import Contest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
REHEARSE = '''
import json
import torch
import gpu_timing

class Rehearsal:
    """A Replay that runs its work once and makes the time up."""
    def __init__(self, work):
        work()

    def us(self, parts=1):
        return 2.0

gpu_timing.DEVICE, gpu_timing.Replay = "cpu", Rehearsal
torch.cuda.synchronize = lambda: None
torch.compile = lambda function, **_: function
import device_kernels, gpu_kernels, harness
from splitdecode.kernels import attend
from splitdecode.models import geometry
from splitdecode.models.config import ModelConfig, RopeConfig

sizes = dict(vocab_size=333, hidden_size=96, intermediate_size=40, num_layers=1, max_positions=512)
tiny = ModelConfig(model_type="qwen2", num_heads=6, num_kv_heads=2, head_dim=16, rope=RopeConfig(theta=1e4),
                   tied=True, qkv_bias=True, **sizes)
geometry.preset = {"tiny": tiny}.__getitem__
attend.splits_for = lambda *_: 4
device_kernels.MODELS, device_kernels.ROTATION, device_kernels.CATCH_UP = ("tiny",), 1.0, 50
device_kernels.CONTEXTS, device_kernels.ROWS = (100, 300), (5, 20)
harness._MOST_CUDA, gpu_kernels.READS = 1 << 19, gpu_kernels.READS[::3]
with torch.inference_mode():
    torch.manual_seed(0)
    kept = []
    assert device_kernels.run("", lambda found: kept.append([*found]))
    rows, alone = kept[-1], []
    assert device_kernels.run("tiny skinny 5", alone.extend)
print(device_kernels.table(rows))
told = {"rows": rows, "kept": [len(found) for found in kept], "alone": alone}
print(json.dumps(told | {"read": harness.read_bandwidth(0, "cuda")}))
'''


@pytest.mark.slow
def test_every_contest_passes_its_check_in_the_interpreter() -> None:
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REHEARSE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = found["rows"]
    assert not [row for row in rows if "error" in row]
    assert not [(row, peer) for row in rows for peer in row["peers"].values() if "error" in peer]
    assert [(row["kernel"], row["shape"]) for row in rows] == [
        ("qkv", "160 x 96"),
        ("attend", "100, 1 token"),
        ("attend", "300, 1 token"),
        ("attend", "300, 5 tokens"),
        ("linear (o)", "96 x 96"),
        ("gate_up", "80 x 96"),
        ("linear (down)", "96 x 40"),
        ("head", "333 x 96"),
        ("skinny", "5: 80 x 96"),
        ("skinny", "20: 80 x 96"),
        ("extend", "50 behind 300"),
    ]
    assert found["kept"] == list(range(1, 12)), "rows are kept as they come"
    assert [row["kernel"] for row in found["alone"]] == ["skinny"]
    assert found["read"] == pytest.approx(4e-3 * (1 << 17) / 2.0)
    head = rows[7]
    assert head["bytes"] == 2 * 333 * 96
    assert head["gbps"] == pytest.approx(head["bytes"] / 2.0 / 1e3)
    assert head["share"] == pytest.approx(head["gbps"] / found["read"])
    assert rows[-1]["tflops"] > 0


class Rehearsal:
    """A Replay that runs its work once and makes the time up."""

    def __init__(self, work: Any) -> None:
        work()

    def us(self, parts: int = 1) -> float:
        return 2.0


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU."""
    monkeypatch.setattr(device_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(device_kernels, "Replay", Rehearsal)
    monkeypatch.setattr(device_kernels, "read_bandwidth", lambda size, device: 100.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def contest(wrong: float = 0.0, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Contest:
    """Writes `wrong` more than wanted into its last copy."""
    out = [torch.full((3,), 5, dtype=dtype) for _ in range(2)]

    def call(i: int) -> None:
        out[i].copy_(torch.tensor([100.0, 200.0, 300.0 + wrong * i]))

    def wanted(i: int) -> Tensor:
        return torch.tensor([100.0, 200.0, 300.0])

    return Contest("double", "tiny", "3", 4000, call, out, wanted, **more)


def test_what_fails_is_a_row_and_costs_no_other(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> Contest:
        raise RuntimeError("no such\nkernel")

    def refuses(i: int) -> None:
        raise NotImplementedError("not here")

    def every(_: object) -> Any:
        yield "tiny absent", absent
        yield "tiny double", lambda: contest(peers={"itself": lambda i: None, "other": refuses})
        yield "tiny wrong", lambda: contest(wrong=20.0)

    monkeypatch.setattr(device_kernels, "all_contests", every)
    rows: list[dict[str, Any]] = []
    assert device_kernels.run("", partial(rows.__setitem__, slice(None)))
    assert rows[0] == {"kernel": "tiny absent", "error": "RuntimeError: no such\nkernel"}
    assert rows[1]["gbps"] == 2.0
    assert rows[1]["share"] == 0.02
    assert rows[1]["peers"]["other"] == {"error": "NotImplementedError: not here"}
    assert rows[2]["error"].startswith("ArithmeticError: wrong by")
    assert device_kernels.table(rows) == [
        ["tiny absent", "", "", "RuntimeError: no such\nkernel", "", "", ""],
        ["double", "tiny", "3", "2.00", "2", "2 %", "itself 2.0 (1.00x), other: failed"],
        ["tiny wrong", "", "", rows[2]["error"][:60], "", "", ""],
    ]
    assert device_kernels.run("sampler", lambda found: pytest.fail("nothing has that name"))


def test_a_check_can_fail(here: None) -> None:
    device_kernels.verify(contest(wrong=1.0))  # of 300, and bf16 has steps of two there
    with pytest.raises(ArithmeticError):
        device_kernels.verify(contest(wrong=8.0))
    device_kernels.verify(contest(dtype=torch.int32))
    with pytest.raises(ArithmeticError):
        device_kernels.verify(contest(wrong=1.0, dtype=torch.int32))
    idle = contest()
    with pytest.raises(ArithmeticError):
        device_kernels.verify(Contest("idle", "tiny", "3", 1, lambda i: None, idle.out, idle.wanted))
    added = contest(residual=True)
    device_kernels.verify(added)
    assert added.out[0].tolist() == [100.0, 200.0, 300.0]


@pytest.mark.parametrize("context", [1, 40])
def test_the_truth_of_attention_is_torchs(context: int) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 3, 2, 16), torch.randn(2, 40, 16), torch.randn(2, 40, 16)
    found = device_kernels.attention(q, k, v, torch.tensor([context - 1]))
    rows = q[0].transpose(0, 1)  # [2, 3, 16]: a kv head's queries
    wanted = torch.nn.functional.scaled_dot_product_attention(rows, k[:, :context], v[:, :context])
    torch.testing.assert_close(found, wanted.transpose(0, 1).reshape(1, -1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--what", "gpu"]) == 2
    said = capsys.readouterr()
    assert said.err == "kernels.py: --what gpu: no CUDA device here\n"
    assert said.out == ""


def test_the_document_holds_every_row(
    here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(device_kernels, "all_contests", lambda _: iter([("tiny double", contest)]))
    file = tmp_path / "out.json"
    flags = ["--what", "gpu", "--output-json", str(file)]
    assert kernels.main(flags) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(file.read_text())
    assert found["machine"]["gpu"] == "a device"
    assert [row["kernel"] for row in found["contests"]] == ["double"]
    assert kernels.main([*flags, "--only", "softmax"]) == 2
    assert "--only: found 'softmax'" in capsys.readouterr().err


def test_behind_an_illegal_address_another_process_goes_on(
    here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken: list[str] = []

    def crashes() -> Contest:
        broken.append("an illegal memory access was encountered")
        raise RuntimeError(*broken)

    def synchronize() -> None:
        if broken:
            raise RuntimeError(*broken)

    def replaced(*command: Any) -> None:
        raise SystemExit(command)

    every = [("tiny one", contest), ("tiny two", crashes), ("tiny three", contest)]
    monkeypatch.setattr(device_kernels, "all_contests", lambda _: iter(every))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "execv", replaced)
    flags = ["--what", "gpu", "--output-json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["kernels.py", *flags])
    with pytest.raises(SystemExit) as end:
        kernels.main(flags)
    assert end.value.code == (sys.executable, [sys.executable, "kernels.py", *flags, "--resume"])
    broken.clear()
    assert kernels.main([*flags, "--resume"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["contests"]
    assert [row["kernel"] for row in found] == ["double", "tiny two", "double"]
    assert found[1]["error"] == "RuntimeError: an illegal memory access was encountered"
