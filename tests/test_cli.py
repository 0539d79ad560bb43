"""The command line: what each subcommand prints, and one clear line with exit code 2 for wrong input."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracles.scripted import scripted_pair
from oracles.tiny import PIECES

from splitdecode import SplitDecoder, cli
from splitdecode.families import boxed, problems
from splitdecode.split.health import BOUNDS, MIN_ANSWERS

ROOT = Path(__file__).resolve().parents[1]
TASKS = problems(2, 11)
PROMPTS = [task.prompt.strip() for task in TASKS]
SHORT = ["--max-tokens", "6", "--temperature", "0"]
LEGEND = "written by the small model and the large model\n"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever terminal the tests run in."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


def answers(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# ---- demo


def test_demo_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--problems", "2", "--seed", "11"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(LEGEND)
    assert all(
        prompt in out and f"\\boxed{{{task.answer}}}" in out for prompt, task in zip(PROMPTS, TASKS, strict=True)
    )
    assert "2 of 2 right" in out
    assert "wrong" not in out
    assert "bigmodel" not in out
    assert "\x1b" not in out


def test_demo_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--problems", "2", "--seed", "11", "--json"]) == 0
    (found,) = answers(capsys.readouterr().out)
    assert found["right"] == 2
    assert [boxed(answer["raw_text"]) for answer in found["answers"]] == [task.answer for task in TASKS]
    assert [answer["prompt"] for answer in found["answers"]] == [task.prompt for task in TASKS]
    assert all("<bigmodel>" in answer["raw_text"] for answer in found["answers"])
    summary = found["summary"]
    assert summary["handoffs"] >= 2
    share = summary["tokens"]["large"] / sum(summary["tokens"].values())
    assert summary["offload_fraction"] == pytest.approx(share)


def test_a_wrong_answer_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    demo = SplitDecoder.demo
    monkeypatch.setattr(SplitDecoder, "demo", lambda: demo(small="small-base"))  # it never opens, and adds badly
    assert cli.main(["demo", "--problems", "4", "--json"]) == 1
    (found,) = answers(capsys.readouterr().out)
    assert found["right"] < 4
    assert found["summary"]["handoffs"] == 0


# ---- generate


def test_one_prompt_streams(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", TASKS[0].prompt]) == 0
    out = capsys.readouterr().out
    assert out.startswith(LEGEND)
    assert boxed(out) == TASKS[0].answer
    assert "\x1b" not in out
    assert "<bigmodel>" not in out
    assert "<|endoftext|>" not in out
    assert cli.main(["generate", TASKS[0].prompt, "--keep-special"]) == 0
    assert capsys.readouterr().out == out, "the only special token of the pair ends its answers"


def test_many_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", *(task.prompt for task in TASKS)]) == 0
    out = capsys.readouterr().out
    assert [out.count(repr(task.prompt)) for task in TASKS] == [1, 1]
    assert [f"\\boxed{{{task.answer}}}" in out for task in TASKS] == [True, True]


def test_seams_are_watched_where_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(BOUNDS, "seam", (-99.0, True, "whatever it is"))
    asked = ["generate", "--json", *(task.prompt for task in problems(MIN_ANSWERS, 11))]
    for flags, said in ((["--watch-seams", "4"], True), ([], False)):
        assert cli.main([*asked, *flags]) == 0
        assert (", above -99: whatever it is\n" in capsys.readouterr().err) is said


def test_a_prompt_ends_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_bytes("one\u2028still one\r\n\ntwo".encode())
    assert cli._lines(tmp_path / "prompts") == ["one\u2028still one\n", "two\n"]


def test_json_is_one_object_per_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--json", "--stop", "zz", *(task.prompt for task in TASKS)]) == 0
    for found, task in zip(answers(capsys.readouterr().out), TASKS, strict=True):
        (answer,) = found["outputs"]
        assert found["prompt"] == task.prompt
        assert boxed(answer["text"]) == task.answer
        assert {span["model"] for span in answer["spans"]} == {"small", "large"}
        assert found["metrics"]["handoffs"] > 0
        assert 0 < found["metrics"]["offload_fraction"] < 1


@pytest.mark.parametrize(
    ("policy", "models"), [("small", {"small"}), ("large", {"large"}), ("random", {"small", "large"})]
)
def test_policies(policy: str, models: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--policy", policy, "--p", "0.5", "--chunk", "2", "--seed", "1", "--max-tokens", "24"]
    assert cli.main(["generate", "--json", TASKS[0].prompt, *flags]) == 0
    (found,) = answers(capsys.readouterr().out)
    assert {span["model"] for span in found["outputs"][0]["spans"]} == models


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_prompts_by_the_line(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{PROMPTS[0]}\n\n  \n{PROMPTS[1]}"
    flags = ["generate", "--json", *SHORT]
    if source == "file":
        (tmp_path / "prompts.txt").write_text(text)
        flags += ["--file", str(tmp_path / "prompts.txt")]
    else:
        typed(monkeypatch, text)
    assert cli.main(flags) == 0
    assert [found["prompt"] for found in answers(capsys.readouterr().out)] == [f"{prompt}\n" for prompt in PROMPTS]


def test_colours_on_demand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    cli.main(["generate", "x", *SHORT])
    coloured = capsys.readouterr().out
    assert "\x1b[36m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["generate", "x", *SHORT])
    said = capsys.readouterr().out
    assert "\x1b[3" not in said  # no colour; rich keeps bold


@pytest.mark.parametrize("prompts", [["x"], ["x", "y"]])
def test_an_answer_that_failed_is_an_exit_code(prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, models, _ = scripted_pair([*PIECES, "x", "y"])
    models.small.table[:] = float("nan")
    monkeypatch.setattr(SplitDecoder, "demo", lambda **_: decoder)
    assert cli.main(["generate", *prompts, *SHORT]) == 1


# ---- chat


def test_chat_without_a_template_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("splitdecode chat: ")
    assert "no chat template; use generate()" in said.err


@pytest.mark.parametrize("as_json", [True, False])
def test_chat_remembers(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Path(cli.__file__).parent / "data" / "tiny-pair"
    for name in ("small", "large"):
        shutil.copytree(pair / name, tmp_path / name)
        template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
        (tmp_path / name / "chat_template.jinja").write_text(template)
    typed(monkeypatch, "hello\nagain\n\nnever read\n")
    where = ["--small", str(tmp_path / "small"), "--large", str(tmp_path / "large"), "--kv-cache-memory", "16MiB"]
    assert cli.main(["chat", "--system", "be kind", *where, *SHORT, *(["--json"] if as_json else [])]) == 0
    out = capsys.readouterr().out
    if not as_json:
        assert out.startswith(LEGEND)
        assert len(out) > len(LEGEND) + 4
        assert "never read" not in out
        return
    first, second = answers(out)
    assert first["prompt"].startswith("system=be kind;user=hello\nYou always use <bigmodel>")
    said = first["outputs"][0]["text"]
    assert second["prompt"].startswith(f"system=be kind;user=hello;assistant={said};user=again\nYou always")


def test_chat_goes_on_behind_what_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("small", "large"):
        shutil.copytree(Path(cli.__file__).parent / "data" / "tiny-pair" / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    typed(monkeypatch, f"hello\n{'x' * 600}\nagain\n\n")
    where = ["--small", str(tmp_path / "small"), "--large", str(tmp_path / "large"), "--kv-cache-memory", "16MiB"]
    assert cli.main(["chat", *where, *SHORT, "--json"]) == 0
    said = capsys.readouterr()
    first, second = answers(said.out)
    assert said.err.startswith("splitdecode chat: prompt: found ")
    assert second["prompt"].startswith(f"hello;{first['outputs'][0]['text']};again\nYou always")


# ---- plan, doctor


def test_plan_and_doctor_are_wired(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--json", "--small", "1.5b", "--large", "32b"]) == 0
    (found,) = answers(capsys.readouterr().out)
    assert (found["small"]["name"], found["large"]["name"]) == ("1.5b", "32b")
    assert cli.main(["doctor", "--json"]) == 0
    (checks,) = answers(capsys.readouterr().out)
    assert "torch" in [check["name"] for check in checks]


# ---- wrong input

WRONG = {
    "generate x --small .": "--small and --large: found one of them",
    "generate x --small nowhere --large nowhere": "nowhere: expected a directory or a hub id",
    "generate x --temperature -1": "temperature: found -1.0, expected a finite number from 0",
    "generate x --top-p 0": "top_p: found 0.0",
    "generate x --max-tokens 0": "max_tokens: found 0",
    "generate x --policy random --p 2": "p: found 2.0, expected a probability",
    "generate x --policy random --chunk 0": "chunk: found 0",
    "generate x --kv-cache-memory lots": "kv_cache_memory: found 'lots'",
    "generate x --kv-cache-memory 1kB": "kv_cache_memory: found 1000 bytes, expected at least",
    "generate x --device nonsense": "device: found 'nonsense', expected one torch can use here",
    "generate --file nowhere.txt": "--file: found no file nowhere.txt",
    "generate --file .": "--file: found no file .",
    "generate": "prompts: found none, expected arguments, --file, or lines on standard input",
    "demo --problems 0": "--problems: found 0, expected at least 1",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    typed(monkeypatch, "\n")
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"splitdecode {line.split()[0]}: {WRONG[line]}")
    assert err.count("\n") == 1


def test_a_file_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_bytes(b"ab\xff\n")
    assert cli.main(["generate", "--file", str(tmp_path / "prompts")]) == 2
    assert "prompts: found bytes that are not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["", "nonsense", "generate x --nonsense", "generate x --dtype int8", "demo --problems a"]
)
def test_wrong_flags_are_the_parsers(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: splitdecode")


def test_interruptions_end_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((KeyboardInterrupt, 130), (BrokenPipeError, 0)):

        def fail(_: Any, error: type[BaseException] = error) -> None:
            raise error

        monkeypatch.setattr(cli, "_decoder", fail)
        assert cli.main(["generate", "x"]) == code
    assert capsys.readouterr().err == ""


def test_as_a_program() -> None:
    """The module, in a process of its own, with what it prints going into a pipe."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    found = subprocess.run(
        [sys.executable, "-m", "splitdecode", "generate", "--json", "--temperature", "0"],
        input=TASKS[0].prompt, capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")
    assert boxed(answers(found.stdout)[0]["outputs"][0]["text"]) == TASKS[0].answer
