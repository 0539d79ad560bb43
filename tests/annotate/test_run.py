"""The growing file: kill -9 at any moment loses nothing that was finished and repeats nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from oracles.chat_server import ChatServer, completion, trace_in

from splitdecode import cli
from splitdecode.annotate import run
from splitdecode.annotate.output import Output
from splitdecode.annotate.records import Annotation, Failure, read_tagged
from splitdecode.annotate.rules import RuleAnnotator
from splitdecode.annotate.spans import parse
from splitdecode.annotate.traces import Trace, family_traces
from splitdecode.errors import RequestError

ROOT = Path(__file__).resolve().parents[2]
TRACES = list(family_traces("two-products", 12, 1))


class Scripted:
    """Marks the first word; fails where `failing` says so, by order or by id; notes which traces it took. What is in
    `hopeless` it leaves out."""

    settings: Mapping[str, Any] = {"annotator": "scripted", "ends": (1, 2)}

    def __init__(self, failing: Iterable[int | str] = (), cost: float = 0.0, hopeless: Iterable[str] = ()) -> None:
        self.failing, self.cost, self.hopeless = set(failing), cost, set(hopeless)
        self.took: list[str] = []

    def annotate(self, traces: Iterable[Trace]) -> Iterator[Annotation | Failure]:
        for number, trace in enumerate(traces):
            self.took.append(trace.id)
            if trace.id in self.hopeless:
                yield Failure(trace, "too long", self.cost, left_out=True)
            elif number in self.failing or trace.id in self.failing:
                yield Failure(trace, "no luck", self.cost)
            else:
                yield Annotation(trace, [(0, 7)], {"cost": self.cost}, self.cost)


def ids(file: Path) -> list[str]:
    return [trace.id for trace in read_tagged(file)]


def test_a_line_per_trace(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.jsonl"
    summary = run.annotate(TRACES, RuleAnnotator(), out)
    assert (summary.annotated, summary.already, summary.failed, summary.stopped) == (12, 0, [], "")
    for trace, line in zip(TRACES, out.read_text().splitlines(), strict=True):
        row = json.loads(line)
        text, spans = parse(row["tagged"])
        assert (row["id"], row["prompt"], text, row["digest"]) == (trace.id, trace.prompt, trace.text, trace.digest)
        assert row["by"] == {"annotator": "rules"}
        assert [list(span) for span in spans] == row["spans"]
        assert row["share"] == pytest.approx(sum(b - a for a, b in spans) / len(text), abs=1e-6)
        assert "=<bigmodel>" in row["tagged"]
    assert 0.02 < summary.share < 0.04
    again = run.annotate(TRACES, RuleAnnotator(), out)
    assert (again.annotated, again.already) == (0, 12)


def test_failures_are_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first = run.annotate(TRACES, Scripted(failing=[3, 4]), out)
    assert first.annotated == 10
    assert first.failed == [f"{TRACES[3].id}: no luck", f"{TRACES[4].id}: no luck"]
    second = Scripted()
    assert run.annotate(TRACES, second, out).annotated == 2
    assert second.took == [TRACES[3].id, TRACES[4].id]
    assert sorted(ids(out)) == sorted(trace.id for trace in TRACES)


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run.annotate(TRACES, Scripted(), out)
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    rng = random.Random(0)
    cuts = {0, 1, ends[0], ends[0] - 1, ends[3] + 1, len(whole) - 1, *rng.sample(range(len(whole)), 20)}
    for cut in sorted(cuts):
        out.write_bytes(whole[:cut])
        done = sum(end - 1 <= cut for end in ends)  # a line that lacks nothing but its end is whole
        assert len(ids(out)) == done  # a reader does not trip over it
        again = Scripted()
        summary = run.annotate(TRACES, again, out)
        assert (summary.already, summary.annotated) == (done, 12 - done)
        assert summary.cut_bytes == max(0, cut - [0, *ends][done])
        assert again.took == [trace.id for trace in TRACES[done:]]
        assert out.read_bytes() == whole


def test_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Output(out, {}), pytest.raises(RequestError, match="another run is writing it"):
        Output(out, {})
    Output(out, {}).close()


def test_other_settings_and_other_traces_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run.annotate(TRACES[:3], Scripted(), out)
    before = out.read_bytes()
    with pytest.raises(RequestError, match=r"out.jsonl line 1: made by .*scripted.*, expected .*rules.* another file"):
        run.annotate(TRACES, RuleAnnotator(), out)
    changed = Trace(TRACES[1].id, "other", TRACES[1].text)
    with pytest.raises(RequestError, match=f"trace '{changed.id}': found other text"):
        run.annotate([changed], Scripted(), out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [("nonsense", "line 4: found no JSON"), ("[]", "line 4: found list, expected an object"), ("first", "again")],
)
def test_a_whole_line_that_is_wrong_is_not_thrown_away(line: str, message: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run.annotate(TRACES[:3], Scripted(), out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines) + (lines[0] if line == "first" else f"{line}\n"))
    before = out.read_bytes()
    for attempt in (lambda: run.annotate(TRACES, Scripted(), out), lambda: list(read_tagged(out))):
        with pytest.raises(RequestError, match=message):
            attempt()
    assert out.read_bytes() == before


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    written = 0
    real = os.write

    def write(file: int, data: bytes) -> int:
        nonlocal written
        if written > 1500:
            raise OSError(28, "No space left on device")
        count = real(file, data[:100])  # by pieces, as the kernel may
        written += count
        return count

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(RequestError, match="No space left on device"):
        run.annotate(TRACES, Scripted(), out)
    monkeypatch.undo()
    assert out.read_bytes().endswith(b"\n")
    kept = ids(out)
    assert kept == [trace.id for trace in TRACES[: len(kept)]] != []
    assert run.annotate(TRACES, Scripted(), out).already == len(kept)
    assert ids(out) == [trace.id for trace in TRACES]


def test_progress_and_cost_are_shown_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.annotate(TRACES, Scripted(failing=[2], cost=0.25), tmp_path / "out.jsonl", total=12)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run.annotate(TRACES, Scripted(cost=0.25), tmp_path / "out.jsonl", total=12)
    err = capsys.readouterr().err
    assert "12/12" in err
    assert "$3.2500" in err  # of the file: eleven and a failure before, one now


def test_it_stops_where_the_money_ends(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    summary = run.annotate(TRACES, Scripted(cost=0.25), out, max_cost=1.0)
    assert (summary.annotated, summary.cost) == (4, 1.0)
    assert summary.stopped == "spent $1.0000, the limit is $1: a higher one goes on"
    again = run.annotate(TRACES, Scripted(cost=0.25), out, max_cost=1.5)  # of the file, not of the run
    assert (again.already, again.annotated, again.cost) == (4, 2, 0.5)


def test_what_failed_is_paid_for_good(tmp_path: Path) -> None:
    """Three runs under one limit: what failed in the first two was paid, and does not become free by a new start."""
    out = tmp_path / "out.jsonl"
    first = run.annotate(TRACES[:4], Scripted(failing=range(4), cost=0.25), out, max_cost=2.0)
    assert (first.cost, first.stopped) == (1.0, "")
    with (tmp_path / "out.jsonl.failed").open("ab") as file:
        file.write(b'{"id": "torn", "cost": 100')  # as a kill leaves it: it was never reported
    second = run.annotate(TRACES, Scripted(failing=[0, 1], cost=0.25), out, max_cost=2.0)
    assert (second.annotated, len(second.failed), second.cost) == (2, 2, 1.0)
    assert second.stopped.startswith("spent $2.0000, the limit is $2")
    third = run.annotate(TRACES, Scripted(cost=0.25), out, max_cost=2.0)
    assert (third.already, third.annotated, third.cost) == (2, 0, 0.0)
    assert third.stopped.startswith("spent $2.0000, the limit is $2")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl.failed").read_text().splitlines()]
    assert [(row["reason"], row["cost"], row["left_out"]) for row in rows] == [("no luck", 0.25, False)] * 6
    assert sorted(ids(out)) == sorted(trace.id for trace in TRACES[6:8])


def test_it_stops_when_everything_fails_and_goes_on_with_the_others(tmp_path: Path) -> None:
    many, out = list(family_traces("two-products", 50, 2)), tmp_path / "out.jsonl"
    names = [trace.id for trace in many]
    failing = names[5:30]
    first = run.annotate(many, Scripted(failing=failing), out)
    assert (first.annotated, len(first.failed)) == (5, run.FAILURES_IN_A_ROW)
    assert first.stopped == "20 traces failed in a row: the same command goes on, those come last"
    second = Scripted(failing=failing)
    summary = run.annotate(many, second, out)
    assert second.took == [*names[25:50], *names[5:25]]  # what never was tried, then what failed
    assert (summary.already, summary.annotated, len(summary.failed)) == (5, 20, 25)
    third = Scripted(failing=failing)
    assert run.annotate(many, third, out).stopped.startswith("20 traces failed in a row")
    assert third.took == [*names[25:30], *names[5:20]]  # what failed least often comes first
    fourth = Scripted()
    assert run.annotate(many, fourth, out).annotated == 25
    assert fourth.took == [*names[20:30], *names[5:20]]
    assert sorted(ids(out)) == sorted(names)


def test_what_never_can_be_is_left_out(tmp_path: Path) -> None:
    many, out = list(family_traces("two-products", 40, 2)), tmp_path / "out.jsonl"
    hopeless = [trace.id for trace in many[5:35]]
    summary = run.annotate(many, Scripted(hopeless=hopeless), out)
    assert (summary.annotated, summary.failed, summary.stopped) == (10, [], "")
    assert summary.left_out == [f"{name}: too long" for name in hopeless]
    again = Scripted(hopeless=hopeless)
    summary = run.annotate(many, again, out)
    assert (again.took, summary.already, len(summary.left_out)) == ([], 10, 30)
    changed = Trace(hopeless[0], "p", "other text")  # another trace under the same id is tried
    assert run.annotate([changed], again, out).left_out == [f"{changed.id}: too long"]
    assert again.took == [changed.id]


def test_failures_under_other_settings_say_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first = Scripted(hopeless=[TRACES[0].id], cost=0.25)
    first.settings = {"annotator": "other"}
    assert run.annotate(TRACES[:1], first, out).left_out
    second = Scripted(cost=0.25)
    summary = run.annotate(TRACES, second, out, max_cost=0.5)
    assert (second.took, summary.annotated, summary.left_out) == ([TRACES[0].id], 1, [])
    assert summary.stopped.startswith("spent $0.5000")


def test_failures_are_checked(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.failed").write_text('{"id": 3}\n')
    with pytest.raises(RequestError, match=r"out.jsonl.failed line 1: expected the record of a failure"):
        run.annotate(TRACES, Scripted(), tmp_path / "out.jsonl")


def test_progress_is_a_line_now_and_then_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += run.SECONDS / 4
        return now

    monkeypatch.setattr(run.time, "monotonic", clock)
    run.annotate(TRACES, Scripted(failing=[2], cost=0.25), tmp_path / "out.jsonl", total=12)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"splitdecode annotate: {done} of 12 traces" for done in (4, 8, 12)
    ]
    assert lines[0].endswith(", $1.0000, 1 failed")


def test_rules_leave_other_traces_out() -> None:
    (found,) = RuleAnnotator().annotate([Trace("x", "p", "Some thoughts.")])
    assert isinstance(found, Failure)
    assert found.left_out
    assert found.reason.startswith("found no line a*b=value")


# ---- kill -9


def hardest(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """A server that always gives the same answer about the same trace."""
    lines = [line for line in trace_in(body).splitlines() if len(line) >= 10]
    return 200, {}, completion(json.dumps({"snippets": [lines[1], lines[4], lines[-3]]}))


def interruptible() -> None:
    """A shell's background jobs, and what they start, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("most", "delay"), [(3, 0.05), pytest.param(15, 0.3, marks=pytest.mark.slow)])
def test_killed_and_gone_on_with(most: int, delay: float, tmp_path: Path) -> None:
    """Real processes, SIGKILL at random moments of runs that are not let end: the file is that of an unbroken run."""
    number = 120
    source, out = tmp_path / "traces.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": t.id, "prompt": t.prompt, "trace": t.text} for t in family_traces("two-products", number, 3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    rng = random.Random(5)
    with ChatServer(hardest, delay=delay) as server:
        flags = ["--by", "endpoint", "--base-url", server.url, "--model", "m", "--concurrency", "3"]

        def start(file: Path) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "splitdecode", "annotate", str(source), "--out", str(file), *flags]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            return subprocess.Popen(command, env=environment, preexec_fn=interruptible, **pipes)

        kills = 0
        while kills < most:
            before = out.stat().st_size if out.exists() else 0
            server.limit = len(server.asked) + number // (most + 2)
            process = start(out)
            while process.poll() is None and (not out.exists() or out.stat().st_size <= before):
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 2.5 * delay))
            sent = signal.SIGKILL if kills else signal.SIGINT  # Ctrl-C is the gentle one: it ends without a word
            process.send_signal(sent)
            _, errors = process.communicate(timeout=300)
            assert (process.returncode, errors) == (130 if sent is signal.SIGINT else -signal.SIGKILL, b"")
            kills += 1
        server.limit = None
        asked_before = len(server.asked)
        assert len(ids(out)) < number, "killed too late to prove anything"
        process = start(out)
        said, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, b"")
        assert f"{number - (len(server.asked) - asked_before)} were already, 0 failed, 0 left out".encode() in said
        whole = tmp_path / "whole.jsonl"
        server.delay = 0.0
        assert cli.main(["annotate", str(source), "--out", str(whole), *flags]) == 0
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    assert sorted(ids(out)) == sorted(row["id"] for row in rows)
    assert len(server.asked) <= 2 * number + 3 * kills  # beyond those: only what was in flight at a kill
