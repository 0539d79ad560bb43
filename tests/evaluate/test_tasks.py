"""Where questions come from: families, JSON lines with everything that can be wrong in them, a stand-in for the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from splitdecode import MissingExtraError, RequestError
from splitdecode.evaluate.tasks import HUB, family_task, file_task, gsm8k_gold, hub_task
from splitdecode.families import problems


def written(folder: Path, *rows: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", "utf-8")
    return file


def test_a_family() -> None:
    task = family_task("one-product", 5, 3)
    wanted = problems(5, 3, "one-product", "held-out")
    assert [(item.prompt, item.answer, item.reference, item.hard) for item in task.items] == [
        (p.prompt, str(p.answer), p.trace, p.hard) for p in wanted
    ]
    assert (task.labelled, task.chat) == (True, False)
    assert task.labels is not None
    assert all(task.labels(p.trace) == p.hard for p in wanted)
    assert all(task.score(p.trace, str(p.answer)) for p in wanted)
    assert len({item.id for item in task.items}) == 5
    with pytest.raises(RequestError, match="--n: found 0"):
        family_task("one-product", 0, 0)


def test_lines_of_questions(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    file = written(
        tmp_path,
        {"question": "One and one?", "answer": "2"},
        "",
        {"problem": "Half?", "answer": 0.5, "id": "half"},
        {"question": "12?", "answer": 12, "trace": "so 12", "hard": [[3, 5]]},
    )
    task = file_task("mine", file)
    assert [(i.id, i.prompt, i.answer) for i in task.items] == [
        ("mine/1", "One and one?", "2"),
        ("half", "Half?", "0.5"),
        ("mine/4", "12?", "12"),
    ]
    assert (task.chat, task.labelled, task.source) == (True, False, "questions.jsonl")
    assert (task.items[2].reference, task.items[2].hard) == ("so 12", ((3, 5),))
    assert task.score("\\boxed{\\frac{1}{2}}", "0.5")
    assert len(file_task("mine", file, 2).items) == 2
    assert not file_task("aime24", file).score("\\boxed{\\frac{1}{2}}", "0.5")
    assert file_task("mine", file, how="integer").score("\\boxed{012}", "12")


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\r"])
def test_a_line_ends_with_a_newline_alone(odd: str, tmp_path: Path) -> None:
    raw = odd if odd > "\x1f" else json.dumps(odd)[1:-1]  # below, a string may hold it only escaped
    file = written(
        tmp_path, f'{{"question": "One{raw}two?", "answer": "2"}}\r', "\ufeff" + '{"question": "3?", "answer": 3}'
    )
    first, second = file_task("mine", file, how="integer").items
    assert (first.prompt, second.prompt, second.id) == (f"One{odd}two?", "3?", "mine/2")


def test_a_local_file_of_a_set_of_the_hub(tmp_path: Path) -> None:
    """AIME 2024 has its fields in capitals."""
    row = {"ID": "2024-II-4", "Problem": "Let x be?", "Solution": "Because.", "Answer": 33}
    (item,) = file_task("aime24", written(tmp_path, row), how="integer").items
    assert (item.id, item.prompt, item.answer, item.reference) == ("2024-II-4", "Let x be?", "33", None)
    (item,) = file_task("mine", written(tmp_path, {**row, "answer": "34"}), how="integer").items
    assert item.answer == "34"  # the very name comes first


def test_gsm8k(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    assert gsm8k_gold("Two and two #### are four.\n#### 1,234 ") == "1234"
    file = written(tmp_path, {"question": "?", "answer": "so\n#### 1,234"}, {"question": "?", "answer": "7"})
    assert [item.answer for item in file_task("gsm8k", file).items] == ["1234", "7"]
    assert file_task("mine", file).items[0].answer == "so\n#### 1,234"
    for answer in ("no mark", "mark ####  "):
        with pytest.raises(RequestError, match="expected a GSM8K solution that ends in '#### number'"):
            gsm8k_gold(answer)


LABELS = "'trace' .text. and 'hard'"
BAD = {
    "not JSON": ("{", "--data mine: questions.jsonl line 1: found no JSON"),
    "no object": ("[1]", "questions.jsonl line 1: found list, expected an object"),
    "no answer": ({"question": "?"}, "found 'question', expected 'question' .or 'problem'. and 'answer'"),
    "nothing": ({}, "found no fields"),
    "no text": ({"question": 1, "answer": "1"}, "expected 'question'"),
    "true": ({"question": "?", "answer": True}, "expected 'question'"),
    "half a label": ({"question": "?", "answer": "1", "trace": "x"}, LABELS),
    "labels beyond": ({"question": "?", "answer": "1", "trace": "abc", "hard": [[1, 4]]}, r"hard: found \[1, 4\]"),
    "labels overlap": ({"question": "?", "answer": "1", "trace": "abcd", "hard": [[0, 2], [1, 3]]}, "hard: found"),
    "labels empty": ({"question": "?", "answer": "1", "trace": "abcd", "hard": [[1, 1]]}, "hard: found"),
    "labels no pairs": ({"question": "?", "answer": "1", "trace": "abcd", "hard": [1]}, "hard: found 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    row, said = BAD[case]
    with pytest.raises(RequestError, match=said):
        file_task("mine", written(tmp_path, row), how="integer")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--data mine: .*nowhere: found no text to read \(No such file"):
        file_task("mine", tmp_path / "nowhere")
    with pytest.raises(RequestError, match="found no questions"):
        file_task("mine", written(tmp_path, ""), how="integer")
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    with pytest.raises(RequestError, match="not UTF-8"):
        file_task("mine", tmp_path / "bytes", how="integer")


def stand_in(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize("name", HUB)
def test_the_hub_by_a_stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    asked: list[Any] = []
    hub = HUB[name]

    def load(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        return [{hub.question: f"q{i}", hub.answer: f"so #### {i}" if name == "gsm8k" else i} for i in range(3)]

    stand_in(monkeypatch, load)
    task = hub_task(name, 2)
    assert asked == [(hub.path, hub.config, hub.split)]
    assert [(item.prompt, item.answer) for item in task.items] == [("q0", "0"), ("q1", "1")]
    assert task.sampling == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 16384}


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")

    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nmore")

    stand_in(monkeypatch, load)
    with pytest.raises(RequestError) as caught:
        hub_task("aime24")
    assert "could not be loaded from the hub (no route); a local file does without: --data aime24=FILE" in str(
        caught.value
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="loading aime24 from the hub needs datasets"):
        hub_task("aime24")
