"""`splitdecode annotate` and `annotate-report`: what they print, and one line with exit code 2 for wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracles.chat_server import ChatServer, completion, trace_in

from splitdecode import cli
from splitdecode.annotate.records import read_tagged
from splitdecode.annotate.traces import family_traces

RULES = ["annotate", "--family", "two-products", "--n", "4", "--by", "rules"]
TINY = Path(cli.__file__).parent / "data" / "tiny-pair"


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_rules_then_gap_then_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules, gap = tmp_path / "rules.jsonl", tmp_path / "gap.jsonl"
    assert cli.main([*RULES, "--out", str(rules)]) == 0
    assert capsys.readouterr().out.startswith("4 traces annotated, 0 were already, 0 failed, 0 left out; 2.")
    assert cli.main([*RULES, "--out", str(rules), "--json"]) == 0
    (summary,) = lines(capsys.readouterr().out)
    assert (summary["annotated"], summary["already"], summary["traces"]) == (0, 4, 4)
    flags = ["--by", "gap", "--share", "0.05", "--window", "5", "--merge", "1", "--out", str(gap)]
    assert cli.main([*RULES[:5], *flags]) == 0
    capsys.readouterr()
    report = ["annotate-report", str(gap), "--against", str(rules), "--tokenizer", str(TINY / "small")]
    assert cli.main([*report, "--output-dir", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "report" / "report.md").read_text()
    assert "tokens per span" in out
    assert "## Against rules.jsonl" in out
    assert (tmp_path / "report" / "report.png").is_file()
    assert cli.main([*report, "--json"]) == 0
    (found,) = lines(capsys.readouterr().out)
    assert found["agreement"]["f1"] > 0.5
    assert "histograms" not in found["statistics"]
    kept = json.loads((tmp_path / "report" / "report.json").read_text())
    assert kept["agreement"] == found["agreement"]
    assert len(kept["histograms"]["shares"]) == 4


def test_other_models_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"n": i, "q": f"Work out 2{i}.\n", "a": "<think>\n1+1=2"} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--id-field", "n", "--prompt-field", "q", "--trace-field", "a", "--n", "2", "--by", "gap"]
    pair = ["--small", str(TINY / "small"), "--large", str(TINY / "large"), "--dtype", "float32"]
    out = tmp_path / "out.jsonl"
    assert cli.main(["annotate", str(tmp_path / "in.jsonl"), "--out", str(out), *flags, *pair]) == 0
    assert [trace.id for trace in read_tagged(out)] == ["0", "1"]
    assert json.loads(out.read_text().splitlines()[0])["by"]["large"] == str(TINY / "large")


def test_rules_on_other_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"t{i}", "prompt": "p", "trace": "thoughts"} for i in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # they stay left out, and nothing stops
        assert cli.main(["annotate", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "o"), "--by", "rules"]) == 1
        said = capsys.readouterr()
        assert said.out.startswith("0 traces annotated, 0 were already, 0 failed, 30 left out")
        err = said.err.splitlines()
        assert err[0].startswith("splitdecode annotate: left out: t0: found no line a*b=value")
        assert err[10:] == ["splitdecode annotate: 20 more left out"]
    rows.append({"id": "t30", "prompt": "p", "trace": "21*50=1050"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["annotate", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "o"), "--by", "rules"]) == 0
    assert capsys.readouterr().out.startswith("1 traces annotated, 0 were already, 0 failed, 30 left out")


def test_a_server_that_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes none of the first 22 traces; what it says of the others is not held up by them."""
    out, refused = tmp_path / "out.jsonl", True
    first = {trace.text for trace in family_traces("two-products", 22, 0)}

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if refused and trace_in(body) in first:
            return 400, {}, "no"
        return 200, {}, completion(json.dumps({"snippets": trace_in(body).splitlines()[2:9:3]}))

    with ChatServer(answer) as server:
        line = ["annotate", "--family", "two-products", "--n", "26", "--by", "endpoint", "--base-url", server.url]
        line += ["--model", "m", "--concurrency", "1", "--out", str(out)]
        assert cli.main(line) == 1
        said = capsys.readouterr()
        assert said.out.startswith("0 traces annotated, 0 were already, 20 failed, 0 left out")
        assert said.err.splitlines()[-1] == (
            "splitdecode annotate: stopped: 20 traces failed in a row: the same command goes on, those come last"
        )
        assert cli.main(line) == 1
        assert capsys.readouterr().out.startswith("4 traces annotated, 0 were already, 22 failed")
        refused = False
        assert cli.main(line) == 0
        assert capsys.readouterr().out.startswith("22 traces annotated, 4 were already, 0 failed")
    assert len(list(read_tagged(out))) == 26


def test_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        rows = trace_in(body).splitlines()
        if rows[1].startswith("47*23"):
            return 400, {}, "no"
        return 200, {}, completion(json.dumps({"snippets": [rows[2], rows[5], rows[9]]}), 1000, 100)

    monkeypatch.setenv("SOME_KEY", "very-secret")
    out = tmp_path / "out.jsonl"
    with ChatServer(answer) as server:
        flags = ["--by", "endpoint", "--base-url", server.url, "--model", "m", "--api-key-env", "SOME_KEY"]
        flags += ["--price-in", "2", "--price-out", "10", "--out", str(out), "--json"]
        assert cli.main([*RULES[:5], *flags]) == 1
    said = capsys.readouterr()
    (summary,) = lines(said.out)
    assert (summary["annotated"], len(summary["failed"])) == (3, 1)
    assert summary["cost"] == pytest.approx(3 * 0.003)
    assert said.err == "splitdecode annotate: failed: two-products-0-0: refused with 400 (no)\n"
    assert "very-secret" not in said.out + said.err + out.read_text()
    assert "Bearer very-secret" in server.headers[0] or "bearer very-secret" in server.headers[0].lower()


def test_a_server_that_takes_no_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChatServer(lambda body: (401, {}, "bad key")) as server:
        flags = ["--by", "endpoint", "--base-url", server.url, "--model", "m", "--out", str(tmp_path / "o")]
        assert cli.main([*RULES[:5], *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"splitdecode annotate: {server.url}/chat/completions: answered 401 (bad key)")
    assert err.count("\n") == 1


ENDPOINT = "annotate --family one-product --out o --by endpoint"
WRONG = {
    "annotate --out o --by rules": "traces: found None and --family None, expected one of them",
    "annotate x --family one-product --out o --by rules": "traces: found x and --family one-product",
    "annotate nowhere --out o --by rules": "nowhere: found no such file",
    "annotate empty --out o --by rules": "traces: found none, expected at least one",
    "annotate text --out text --by rules": "--out: found text, the traces themselves",
    "annotate text --out folder --by rules": "folder: cannot be written",
    "annotate --family one-product --n 0 --out o --by rules": "--n: found 0",
    "annotate --family one-product --out o --by gap --window 4": "window: found 4, expected an odd number",
    "annotate --family one-product --out o --by gap --share 2": "share: found 2.0",
    "annotate --family one-product --out o --by gap --small x": "--small and --large: found one of them",
    ENDPOINT: "--by endpoint: found no --base-url",
    f"{ENDPOINT} --base-url http://x": "--by endpoint: found no --model",
    f"{ENDPOINT} --base-url x --model m": "--base-url: found 'x', expected http(s)://host/v1",
    f"{ENDPOINT} --base-url http://x --model m --api-key-env NOT_SET_HERE": "--api-key-env: found no variable",
    f"{ENDPOINT} --base-url http://x --model m --temperatures warm": "--temperatures: found 'warm'",
    f"{ENDPOINT} --base-url http://x --model m --concurrency 0": "--concurrency: found 0",
    f"{ENDPOINT} --base-url http://x --model m --retries -1": "--retries: found -1",
    f"{ENDPOINT} --base-url http://x --model m --timeout 0": "--timeout: found 0.0",
    f"{ENDPOINT} --base-url http://x --model m --max-cost 5": "--max-cost: found no price",
    "annotate-report nowhere": "nowhere: found no such file",
    "annotate-report text": "text line 1: expected an annotated trace",
    "annotate-report empty": "traces: found none",
    "annotate-report good --output-dir text": "--output-dir: found text, a file",
    "annotate-report good --against other": "--against: found no trace that is in both files",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    (tmp_path / "empty").write_text("")
    (tmp_path / "text").write_text('{"id": 1, "prompt": "p", "trace": "thoughts"}\n')
    (tmp_path / "good").write_text('{"id": "1", "tagged": "thoughts"}\n')
    (tmp_path / "other").write_text('{"id": "2", "tagged": "thoughts"}\n')
    (tmp_path / "folder").mkdir()
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"splitdecode {line.split()[0]}: {WRONG[line]}")
    assert err.count("\n") == 1


def test_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert cli.main(f"{ENDPOINT} --base-url http://x --model m".split()) == 2
    assert "httpx: pip install 'splitdecode[annotate]'" in capsys.readouterr().err


def test_importing_is_light() -> None:
    code = (
        "import sys; import splitdecode.cli; "
        "assert not {'httpx', 'rapidfuzz', 'datasets', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
