"""`splitdecode eval` and `claims`: what they write and print, and one line with exit code 2 for wrong input."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from oracles.embedded import LARGE, OFFLOAD, SMALL, TOKENS

from splitdecode import SplitDecoder, cli
from splitdecode.evaluate import command
from splitdecode.evaluate.claims import load_claims, measured, shipped_results
from splitdecode.evaluate.pareto import front, plot
from splitdecode.evaluate.report import command_line, transfer
from splitdecode.evaluate.tables import markdown, matrix

POLICIES = "random,small-base,small,large,split,reject,forced-base"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of everything but lm-eval."""
    out = tmp_path_factory.mktemp("ran") / "new" / "out"
    asked = f"--pair demo --families two-products,one-product --n 12 --policies {POLICIES} --seed 4 --max-tokens 240"
    assert cli.main(["eval", *asked.split(), "--output-dir", str(out), "--log-samples"]) == 0
    return out


@pytest.fixture
def document(ran: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ran / "results.json").read_text("utf-8"))
    return found


def row_of(document: dict[str, Any], task: str, policy: str) -> dict[str, Any]:
    (found,) = [row for row in document["rows"] if (row["task"], row["policy"]) == (task, policy)]
    return found


def test_the_document(document: dict[str, Any]) -> None:
    assert [row["policy"] for row in document["rows"]] == [*POLICIES.split(","), *POLICIES.split(",")]
    assert document["command"].startswith("splitdecode eval --pair demo --families two-products,one-product --n 12")
    assert document["command"].endswith("--output-dir out --log-samples")  # no paths
    assert {"splitdecode", "torch", "numpy"} <= set(document["provenance"]["versions"])
    assert document["settings"]["seed"] == 4
    assert document["pair"] == {"name": "embedded pair", "trained_on": "two-products"}
    split = row_of(document, "two-products", "split")
    assert (split["n"], split["samples"], split["checkpoint"]) == (12, 1, "tuned")
    assert split["accuracy"]["value"] == 1
    assert split["accuracy"]["low"] == pytest.approx(12 / (12 + 1.959964**2), abs=1e-6)
    assert (split["offload"], split["offload_mean"]) == pytest.approx((OFFLOAD, OFFLOAD))
    assert (split["spans"], split["span_tokens"], split["tokens"]) == (2, 4, {"small": SMALL, "large": LARGE})
    assert split["ms_per_answer"] == pytest.approx(sum(split["ms"].values()))
    assert split["ms_per_token"] == pytest.approx(split["ms_per_answer"] / TOKENS)
    assert split["wall_ms_per_answer"] > 0.5 * split["ms_per_answer"]
    assert split["finish"] == {"stop": 12}
    assert (split["decisions"]["f1"], split["decisions"]["kappa"], split["decisions"]["coverage"]) == (1, 1, 1)
    assert row_of(document, "two-products", "random")["rate"] == {"share": pytest.approx(OFFLOAD), "chunk": 4}
    assert row_of(document, "two-products", "forced-base")["kept"] == {"on_reference": 24, "spans": 24}
    assert row_of(document, "two-products", "large")["tokens"]["small"] == 0
    assert row_of(document, "one-product", "large")["accuracy"]["value"] == 1
    pairs = {(pair["task"], pair["minus"]): pair for pair in document["paired"]}
    assert len(pairs) == 12
    assert {pair["policy"] for pair in document["paired"]} == {"split"}
    equal = pairs["two-products", "large"]["accuracy"]
    assert (equal["value"], equal["method"], equal["high"]) == (0, "all equal", -equal["low"])
    assert equal["high"] == pytest.approx(1.959964**2 / (12 + 1.959964**2), abs=1e-6)


def test_the_tables(ran: Path, document: dict[str, Any]) -> None:
    text = (ran / "results.md").read_text("utf-8")
    assert text == markdown(document)
    split = row_of(document, "two-products", "split")
    assert split["health"]["offload"] == pytest.approx(OFFLOAD)
    alarm = "offload: 0.5, above 0.2: too much"
    alarmed = {**document, "rows": [{**row, "alarms": [alarm]} for row in document["rows"]]}
    assert f"Alarm, split: {alarm}." in markdown(alarmed).splitlines()
    watched = SplitDecoder.demo().health.figures()
    assert set(split["health"]) == set(watched)
    assert split["health"]["seam"] is not None
    figures = " | ".join("-" if value is None else f"{value:.3f}" for value in split["health"].values())
    assert f"| split | {figures} |" in text.splitlines()
    for said in (
        "| signs | offload <= 0.2 | tags <= 0.05 | no_return <= 0.1 | slow >= 0.3 | no_gain >= 1 | seam <= 3 |\n",
        "## two-products\n",
        f"| split | 100.0 [75.8, 100.0] | {100 * OFFLOAD:.2f} | 2.00 | {SMALL:.1f} / {LARGE:.1f} | ",
        "| split | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 24 / 24 |",
        "forced-base: 24 of 24 forced spans began on the labelled solution",
        "split - large: +0.0 [-24.2, +24.2]",
        f"| two-products | 100.0 [75.8, 100.0] at {100 * OFFLOAD:.1f} %, F1 1.00 | ",
    ):
        assert said in text, said
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.endswith(" |") for line in rows)


def test_the_answers(ran: Path) -> None:
    lines = [json.loads(line) for line in (ran / "answers.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 2 * 7 * 12
    split = [line for line in lines if (line["task"], line["policy"]) == ("two-products", "split")]
    assert all(line["right"] and f"\\boxed{{{line['answer']}}}" in line["raw_text"] for line in split)
    assert [[model for model, _, _ in line["spans"]] for line in split] == [["small", "large"] * 2 + ["small"]] * 12


def test_the_plot(ran: Path, document: dict[str, Any], tmp_path: Path) -> None:
    assert (ran / "pareto.png").read_bytes().startswith(b"\x89PNG")
    plot(document, tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").stat().st_size > 10_000


def test_json_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--n", "2", "--policies", "large", "--json", "--max-tokens", "200"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["policy"]) for row in found["rows"]] == [("two-products", "large")]
    assert found["paired"] == []


def test_questions_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions in words that the embedded pair can read; it has no chat template and answers them no better."""
    pytest.importorskip("math_verify")
    (tmp_path / "own.jsonl").write_text('{"question": "How many cups?", "answer": "2"}\n' * 3)
    asked = "--samples 2 --max-tokens 8 --policies small,split --json"
    assert cli.main(["eval", "--data", f"own={tmp_path / 'own.jsonl'}", *asked.split()]) == 0
    small, split = json.loads(capsys.readouterr().out)["rows"]
    assert (small["n"], small["samples"], small["accuracy"]["method"]) == (3, 2, "wilson")
    assert (split["accuracy"]["value"], sum(split["finish"].values())) == (0, 6)


def test_transfer(ran: Path, document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**document, "pair": {"name": "x", "trained_on": "one-product"}}
    other["rows"] = [row for row in document["rows"] if row["task"] == "one-product"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert cli.main(["eval", "--transfer", str(ran / "results.json"), str(tmp_path / "other.json")]) == 0
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head == "| trained on | two-products | one-product |"
    assert first.startswith("| two-products | 100.0 [")
    assert second.startswith("| one-product | - | ")
    assert cli.main(["eval", "--json", "--transfer", str(ran / "results.json")]) == 0
    cells = json.loads(capsys.readouterr().out)
    assert [(cell["trained_on"], cell["task"]) for cell in cells] == [
        ("two-products", "two-products"),
        ("two-products", "one-product"),
    ]
    assert matrix([]) == ["| trained on |", "| --- |"]
    other["pair"]["trained_on"] = "two-products"  # two results of the same: neither is dropped
    other["rows"] = [{**row, "offload": 0.5} for row in other["rows"]]
    twice = matrix(transfer([document, other]))
    assert len(twice) == 4
    assert twice[3].startswith("| two-products | - | ")
    assert " at 50.0 %" in twice[3]
    assert " at 50.0 %" not in twice[2]


def test_the_front() -> None:
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (1.0, 0.6), (4.0, 0.9), (0.5, 0.1), (1.0, 0.6)]
    assert front(points) == [5, 3, 0]
    assert front([]) == []


def test_commands_hold_no_paths() -> None:
    argv = ["eval", "--output-dir", "/home/me/out", "--data", "aime24=/data/a.jsonl", "--small", "org/name", "--n", "3"]
    assert command_line(argv) == "splitdecode eval --output-dir out --data aime24=a.jsonl --small org/name --n 3"
    assert command_line(["train", "ablate", "--sources", "file:/a/b.jsonl"]).endswith(" --sources file:b.jsonl")


# ---- wrong input

WRONG = {
    "--policies nobody": "--policies: found 'nobody', expected some of small, large, split",
    "--policies random": "random: no share to switch at: add split to --policies",
    "--policies random --p 0.1": "--p and --chunk: found one of them",
    "--policies random --p 2 --chunk 4": "p: found 2.0, expected a probability",
    "--policies random --p 0.1 --chunk 0": "chunk: found 0",
    "--families four-products": "family: found 'four-products', expected one of two-products",
    "--n 0": "--n: found 0, expected at least 1",
    "--samples 0": "--samples: found 0, expected at least 1",
    "--temperature -1": "temperature: found -1.0",
    "--max-offload-fraction 2": "max_offload_fraction: found 2.0",
    "--data x": "--data: found 'x', expected NAME=FILE",
    "--data x=nowhere": "--data x: nowhere: found no text to read (No such file",
    "--data x=file --data x=other": "--data: found 'x' twice, expected each name once",
    "--data one-product=file --families one-product": "--data: found 'one-product', which --families asks for too",
    "--data aime24=file --tasks aime24": "--data: found 'aime24', which --tasks asks for too",
    "--watch-seams -1": "watch_seams: found -1",
    "--data x=file --scorer exact": "scorer: found 'exact', expected one of integer, math, aime",
    "--data x=file --scorer integer --policies forced": "forced: x has questions without labels",
    "--small here": "--small and --large: found one, expected both",
    "--pair demo --small a --large b": "--pair: found demo beside --small and --large",
    "--small a --large b --policies small-base": "small-base: found no base model, expected --base",
    "--log-samples": "--log-samples: found no --output-dir",
    "--no-plot --output-dir file": "--output-dir: file cannot be written to (",
    "--transfer nowhere": "nowhere: found no results (FileNotFoundError)",
    "--transfer file": "file: found other JSON, expected the results.json",
    "--tasks some_task --policies forced": "forced: some_task is a task of lm-eval, which has no labels",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text('{"question": "?", "answer": "1"}\n')
    flags = [] if "--n" in line.split() else ["--n", "1"]
    assert cli.main(["eval", *line.split(), *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"splitdecode eval: {WRONG[line]}"), said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("package", "line", "extra"),
    [
        ("matplotlib", "--output-dir out", "a plot (--no-plot does without) needs matplotlib: pip install "),
        ("math_verify", "--data x=file", "scoring mathematics needs math-verify: pip install 'splitdecode[eval]'"),
        ("datasets", "--tasks gsm8k", "loading gsm8k from the hub needs datasets: pip install 'splitdecode[eval]'"),
        ("splitdecode.evaluate", "--tasks mmlu", "running tasks of lm-evaluation-harness needs lm_eval"),
    ],
)
def test_missing_extras_are_named(
    package: str,
    line: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("math_verify")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == package and (name != "splitdecode.evaluate" or (rest[2:] and rest[2] == ("lm_harness",))):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text('{"question": "?", "answer": "1"}\n')
    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["eval", *line.split(), "--n", "1", "--policies", "small"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"splitdecode eval: {extra}")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_usual_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [command.PairSource(), command.PairSource("a", "b"), command.PairSource("a", "b", "c")]
    usual = [command._usual_rows(source).split(",") for source in sources]
    assert usual[0] == ["small-base", "random-base", "small", "large", "split", "random", "reject", "forced"]
    assert usual[1] == ["small", "large", "split", "random", "reject"]
    assert usual[2] == ["small-base", "random-base", *usual[1]]


# ---- claims


def test_every_claim_has_a_source_and_a_caveat(capsys: pytest.CaptureFixture[str]) -> None:
    claims = load_claims()
    assert len(claims) >= 12
    assert all(one.claim and one.published and one.source and one.caveat for one in claims)
    text = " ".join(f"{one.claim} {one.published} {one.caveat}" for one in claims)
    for figure in ("17.3 / 31.3 / 52.0 / 64.0", "44.0 / 45.3 / 45.6", "37.3 / 37.9", "41.3", "683 / 1934 / 2090 / 3143",
                   "1190 / 1640 / 1805", "749 / 842 / 918", "1590 / 2154", "1128", "1.74x", "3.42x", "4-6x", "73.3",
                   "145 / 43 / 22 / 16.4", "withdrew", "RTX A6000"):  # fmt: skip
        assert figure in text, figure
    for one in claims:
        assert all(pointer.task == "aime24" for pointer in one.same)
        assert all(pointer.task != "aime24" for pointer in one.near)
        assert {pointer.figure for pointer in (*one.same, *one.near)} <= {"accuracy", "offload", "ms_per_answer"}
    assert cli.main(["claims"]) == 0
    out = capsys.readouterr().out
    assert out.count("  caveat     ") == len(claims)
    assert out.count("  ours       not measured") == len(claims)
    row = row_of(shipped_results()[0], "two-products", "split")
    assert f"  nearest    split: {100 * row['accuracy']['value']:.1f} % right [" in out


def test_nearest_figures_come_with_the_package() -> None:
    shipped = shipped_results()
    for one in load_claims():
        assert len(measured(one.near, shipped)) == len(one.near)
        assert measured(one.same, shipped) == []


def test_own_results_stand_beside_the_claims(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = {**document, "pair": {"name": "A + B", "trained_on": "x"}, "rows": []}
    for row in document["rows"]:
        if row["task"] == "two-products" and row["policy"] in ("large", "split"):
            mine["rows"].append({**row, "task": "aime24", "ms_per_answer": 30.0 if row["policy"] == "large" else 12.0})
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    assert cli.main(["claims", "--json", "--results", str(tmp_path / "mine.json")]) == 0
    found = {row["claim"]: row for row in json.loads(capsys.readouterr().out)}
    speed = found["Speed-up of 1.5B + 32B over the 32B model alone"]
    place = document["provenance"]
    (said,) = speed["ours"]
    assert said == f"large / split: 2.50x in ms per answer (aime24, A + B, n=12, {place['date']}, {place['cpu']})"
    assert found['"73.3 % against 52.3 %"']["ours"] == "not measured"


def test_claims_refuse_what_is_no_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("[]")
    assert cli.main(["claims", "--results", str(tmp_path / "x.json")]) == 2
    assert "found other JSON, expected the results.json of `splitdecode eval`" in capsys.readouterr().err
