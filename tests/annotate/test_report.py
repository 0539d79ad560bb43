"""Figures of annotated traces: by hand where they are few, by a brute-force twin where they are many."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitdecode import cli
from splitdecode.annotate import report
from splitdecode.annotate.records import Tagged, read_tagged
from splitdecode.annotate.spans import normalise, tag
from splitdecode.errors import MissingExtraError, RequestError

TEXT = "abcdefghijklmnopqrst" * 2  # 40 characters


def tagged(name: str, *spans: tuple[int, int], text: str = TEXT) -> Tagged:
    return Tagged(name, text, list(spans), {})


def test_statistics_by_hand() -> None:
    found = report.statistics(
        [tagged("a", (0, 4), (20, 30)), tagged("b"), tagged("c", (36, 40))], lambda t: len(t) // 2
    )
    assert (found["traces"], found["characters"]) == (3, 120)
    assert found["share"] == pytest.approx(18 / 120)
    assert found["without_spans"] == pytest.approx(1 / 3)
    assert found["above_wanted_share"] == pytest.approx(1 / 3)
    assert found["share_per_trace"]["max"] == pytest.approx(14 / 40)
    assert (found["spans_per_trace"]["mean"], found["spans_per_trace"]["min"]) == (1.0, 0.0)
    assert (found["span_characters"]["median"], found["span_tokens"]["max"]) == (4.0, 5.0)
    assert found["first_span_at"]["mean"] == pytest.approx(0.45)
    assert found["positions"] == pytest.approx([4 / 12, 0, 0, 0, 0, 4 / 12, 4 / 12, 2 / 12, 0, 4 / 12], abs=1e-6)


def test_short_texts_and_none() -> None:
    found = report.statistics([tagged("a", (0, 1), text="xyz")])
    assert found["share"] == pytest.approx(1 / 3)
    assert "span_tokens" not in found
    assert report.statistics([tagged("a")])["span_characters"]["mean"] is None
    assert "| - |" in report.as_markdown({"statistics": report.statistics([tagged("a")])})
    with pytest.raises(RequestError, match="traces: found none"):
        report.statistics([])


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5).map(
    lambda s: normalise(TEXT, s, merge=1)
)


@given(st.lists(st.tuples(SPANS, SPANS), min_size=1, max_size=4))
def test_agreement_is_a_count_of_characters(pairs: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]) -> None:
    mine = [tagged(str(n), *a) for n, (a, _) in enumerate(pairs)]
    theirs = {str(n): tagged(str(n), *b) for n, (_, b) in enumerate(pairs)}
    found = report.agreement(mine, theirs)
    a = {(n, i) for n, (spans, _) in enumerate(pairs) for s, e in spans for i in range(s, e)}
    b = {(n, i) for n, (_, spans) in enumerate(pairs) for s, e in spans for i in range(s, e)}
    size = 40 * len(pairs)
    if a | b:
        assert found["iou"] == pytest.approx(len(a & b) / len(a | b))
        assert found["f1"] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
    else:
        assert found["iou"] == found["f1"] == 1.0
    assert found["precision"] == (pytest.approx(len(a & b) / len(a)) if a else None)
    assert found["recall"] == (pytest.approx(len(a & b) / len(b)) if b else None)
    chance = len(a) * len(b) / size**2 + (size - len(a)) * (size - len(b)) / size**2
    same = (size - len(a ^ b)) / size
    if chance < 1:
        assert found["kappa"] == pytest.approx((same - chance) / (1 - chance))
    back = report.agreement(theirs.values(), {trace.id: trace for trace in mine})
    assert (back["f1"], back["precision"], back["spans_met"]) == (
        found["f1"], found["recall"], found["their_spans_met"]
    )  # fmt: skip


def test_f1_by_chance_is_what_chance_gives() -> None:
    rng = np.random.default_rng(0)
    text = "x" * 200_000

    def thrown(share: float) -> list[tuple[int, int]]:
        starts = rng.choice(20_000, int(20_000 * share), replace=False)
        return [(int(10 * s), int(10 * s) + 10) for s in sorted(starts)]

    mine, theirs = tagged("a", *thrown(0.1), text=text), tagged("a", *thrown(0.3), text=text)
    found = report.agreement([mine], {"a": theirs})
    assert found["f1_by_chance"] == pytest.approx(0.15)
    assert found["f1"] == pytest.approx(0.15, abs=0.03)
    assert found["kappa"] == pytest.approx(0, abs=0.03)


def test_files_with_different_traces() -> None:
    others = {"a": tagged("a", (0, 4)), "c": tagged("c")}
    found = report.agreement([tagged("a", (0, 4)), tagged("b")], others)
    assert (found["traces"], found["only_here"], found["only_there"], found["f1"]) == (1, 1, 1, 1.0)
    with pytest.raises(RequestError, match="--against: found no trace that is in both files"):
        report.agreement([tagged("b")], others)
    with pytest.raises(RequestError, match="trace 'a': found different texts"):
        report.agreement([tagged("a", text="other")], others)


def test_markdown_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [tagged("a", (0, 4), (20, 30)), tagged("b")]
    found = {"statistics": report.statistics(mine), "against": "x.jsonl"}
    found["agreement"] = report.agreement(mine, {"a": tagged("a", (0, 8)), "b": tagged("b")})
    text = report.as_markdown(found)
    assert "# Annotation of 2 traces" in text
    assert "| share of a trace, % | 17.5 | 0 |" in text
    assert "## Against x.jsonl" in text
    assert "| 0.175 | 0.1 | 0.286 | 0.5 | 0.364 |" in text
    report.plot(found["statistics"], tmp_path / "deep" / "report.png")
    assert (tmp_path / "deep" / "report.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'splitdecode\[plot\]'"):
        report.plot(found["statistics"], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "tagged": "x<bigmodel>"}, "f.jsonl line 1: tagged text: found its end after <bigmodel>"),
        ({"id": "a", "tagged": "ab", "spans": [[0, 1]]}, r"f.jsonl line 1: found spans \[\[0, 1\]\], expected \[\]"),
        ({"id": "a", "tagged": ""}, "f.jsonl line 1: found an empty trace"),
        ({"id": 3, "tagged": "x"}, "f.jsonl line 1: expected an annotated trace"),
    ],
)
def test_files_are_checked(row: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RequestError, match=message):
        list(read_tagged(tmp_path / "f.jsonl"))


def test_the_last_line_needs_no_end_but_must_be_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, rows = tmp_path / "f.jsonl", [json.dumps({"id": name, "tagged": "abc\u2028def"}) for name in "ab"]
    file.write_text("\n\n".join(rows))
    assert [trace.id for trace in read_tagged(file)] == ["a", "b"]
    for torn in (rows[1][:-1], rows[1][:5]):
        file.write_text(f"{rows[0]}\n{torn}")
        assert [trace.id for trace in read_tagged(file)] == ["a"]
    lines = [{"id": name, "digest": "", "reason": "x", "cost": 0.0, "left_out": out} for name, out in
             (("c", True), ("d", False), ("c", True))]  # fmt: skip
    (tmp_path / "f.jsonl.failed").write_text("\n".join(map(json.dumps, lines)) + '\n{"id"')
    assert cli.main(["annotate-report", str(file)]) == 0
    assert "Traces that were left out: 1." in capsys.readouterr().out


def test_a_file_of_another_make_is_read(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps({"id": "a", "tagged": tag("abcdef", [(1, 3)])}) + "\n")
    assert [(t.id, t.text, t.spans) for t in read_tagged(tmp_path / "f.jsonl")] == [("a", "abcdef", [(1, 3)])]
