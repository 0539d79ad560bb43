"""latency.py, run as a user runs it: its last line is one JSON document, and what it cannot do it says in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import latency
import pairs
import pytest
from traces import make_trace

from splitdecode.errors import CapacityError, RequestError
from splitdecode.models.geometry import parameters
from splitdecode.split.roles import Pair, Role

ROOT = Path(__file__).resolve().parents[2]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "latency.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check_figures(found: dict[str, Any]) -> None:
    for clock in ("cpu", "wall"):
        spread = found[f"{clock}_ms_per_token"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert found["tokens_per_second"] > 0
    assert found["roofline_share"] == pytest.approx(
        found["floor_ms_per_token"] / found["cpu_ms_per_token"]["median"], rel=0.01
    )


def test_the_embedded_pair_against_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = (
        "--problems",
        "1",
        "--num-iters",
        "1",
        "--num-iters-warmup",
        "0",
        "--modes",
        "small,split",
        "--compare",
        "transformers",
    )
    found = document(run(*flags, "--output-json", str(file), "--plot", str(picture)))
    assert found == json.loads(file.read_text())
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert found["machine"]["bandwidth_gbps"]["read"] > 0
    assert str(ROOT) not in file.read_text(), "results name no paths of the machine"
    assert set(found["modes"]) == {"small", "split"}
    assert set(found["peers"]["transformers"]) == {"small, alone", "split, told", "split, probing"}
    assert set(found["times_faster_than_peer"]) == set(found["peers"]["transformers"])
    for one in (*found["modes"].values(), *found["peers"]["transformers"].values()):
        check_figures(one)
    split = found["modes"]["split"]
    assert split["handoffs"] == split["seam_stall_ms"]["count"] == 2
    assert split["tokens"] == sum(model["tokens"] for model in split["models"].values())
    assert found["peers"]["transformers"]["split, probing"]["same_tokens"], "both loops write the same text"


def test_forced_hand_offs_on_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--small", "random-1m", "--large", "random-1m", "--trace", "stress", "--max-tokens", "32")
    assert latency.main([*flags, "--num-iters", "1", "--num-iters-warmup", "0", "--modes", "split"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    trace = make_trace("stress").scaled(32)
    split = found["modes"]["split"]
    check_figures(split)
    assert found["trace"]["segments"] == trace.lengths
    assert split["offload_fraction"] == pytest.approx(trace.offload)
    assert split["models"]["large"]["tokens"] == sum(trace.lengths)
    assert split["models"]["small"]["read_tokens"] > 0, "a forced trace pays for reading along"
    assert list(found["modes"]) == ["split"]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--small", "1.6b"), "expected a checkpoint directory or one of demo, random-1m"),
        (("--small", "72b", "--large", "72b", "--dtype", "float64"), "see: splitdecode plan --small 72b --large 72b"),
        (("--trace", "aime", "--max-tokens", "0"), "its context is 512"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    flags: tuple[str, ...], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(flags) == 2
    said = capsys.readouterr()
    assert wanted in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""


def test_a_refusal_is_the_exit_code() -> None:
    done = run("--modes", "tiny")
    assert done.returncode == 2
    assert done.stderr == "latency.py: --modes: found 'tiny', expected some of small,large,split\n"


def test_geometries_have_the_size_of_their_names() -> None:
    for name in pairs.RANDOM:
        assert parameters(pairs.random_config(name)) == pytest.approx(1e6 * int(name[7:-1]), rel=0.15), name


def test_sizes_are_checked_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Pair.of(lambda r: pairs.resolve("random-100m", r, "auto"))
    monkeypatch.setattr(pairs, "free_memory", lambda device: 10**9)
    pairs.check_fits(sources, 512, "cpu")
    with pytest.raises(CapacityError, match=r"random-100m 0\.4 GB \+ random-100m 0\.4 GB, 2 copies"):
        pairs.check_fits(sources, 512, "cpu", copies=2)


@pytest.mark.parametrize("split_tags", [False, True])
def test_the_random_vocabulary(split_tags: bool) -> None:
    words = pairs.RandomVocabulary(500, split_tags)
    assert len(set(words.token_bytes)) == words.size == 500
    ids = [3, 0, 494, 17]
    assert words.encode_bytes(b"".join(words.token_bytes[i] for i in ids)) == ids
    for tag in ("<bigmodel>", "</bigmodel>"):
        spelled = words.encode(tag)
        assert len(spelled) == (4 if split_tags else 1)
        assert (words.id_of(tag) is None) == split_tags
    assert words.id_of("3 ") is None
    with pytest.raises(RequestError, match="no word spells"):
        words.encode("hello")


def test_modes_and_roles_are_checked() -> None:
    with pytest.raises(RequestError, match="--large: found 'nothing'"):
        pairs.resolve("nothing", Role.LARGE, "auto")
