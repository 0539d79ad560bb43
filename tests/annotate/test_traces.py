"""Reading traces: every field by name, every mistake by its place, no trace twice, none that is tagged already."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from splitdecode.annotate.traces import Fields, Trace, family_traces, read_traces
from splitdecode.errors import MissingExtraError, RequestError


def written(tmp_path: Path, *rows: Any) -> Path:
    file = tmp_path / "traces.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_json_lines(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        {"id": "a", "prompt": "p", "trace": "t é", "more": 1},
        "",
        {"id": 7, "prompt": "p", "trace": "u"},
        {"prompt": "q", "trace": "t"},
    )
    found = list(read_traces(file))
    assert [(t.id, t.prompt, t.text) for t in found[:2]] == [("a", "p", "t é"), ("7", "p", "u")]
    assert found[2].id == found[2].digest == Trace("other", "q", "t").digest != found[0].digest


def test_other_names_and_several_texts(tmp_path: Path) -> None:
    file = written(tmp_path, {"uuid": "x", "problem": "p", "generations": ["one", "two"]})
    found = list(read_traces(file, Fields("uuid", "problem", "generations")))
    assert [(t.id, t.text) for t in found] == [("x#0", "one"), ("x#1", "two")]


def test_a_bare_question_stays_one(tmp_path: Path) -> None:
    rows = {"question": "q", "trace": "t"}, {"prompt": "q", "question": None, "trace": "t"}
    bare, prompt = read_traces(written(tmp_path, *rows))
    assert (bare.prompt, bare.bare, prompt.prompt, prompt.bare) == ("q", True, "q", False)
    assert bare.id == bare.digest != prompt.digest == prompt.id
    assert prompt.digest == sha256(b'["q", "t"]').hexdigest()[:16], "as files that were begun have it"
    (other,) = read_traces(written(tmp_path, {"problem": "q", "trace": "t"}), Fields(question="problem"))
    assert other.bare
    (named,) = read_traces(written(tmp_path, {"question": "q", "trace": "t"}), Fields(prompt="question"))
    assert not named.bare, "--prompt-field question: a prompt of that name"
    (named,) = read_traces(written(tmp_path, {"prompt": "q", "trace": "t"}), Fields(question="prompt"))
    assert named.bare, "--question-field prompt: a question of that name"


WRONG = {
    "both": ({"prompt": "p", "question": "q", "trace": "t"}, "line 2: found 'question', 'prompt', expected either"),
    "neither": ({"id": "b", "trace": "t"}, "line 2: found 'id', 'trace', expected either 'question' or 'prompt'"),
    "no question": ({"question": 3, "trace": "t"}, "line 2: found 3 as 'question', expected a text"),
    "no JSON": ("nonsense", "line 2: found no JSON"),
    "no object": ([1], "line 2: found list, expected an object"),
    "no trace": ({"prompt": "p"}, "line 2: found None as 'trace', expected a text; it has prompt"),
    "empty": ({"prompt": "p", "trace": " "}, "line 2: found ' ' as 'trace'"),
    "no text": ({"prompt": 3, "trace": "t"}, "line 2: found 3 as 'prompt'"),
    "odd id": ({"id": [1], "prompt": "p", "trace": "t"}, r"line 2: found \[1\] as 'id'"),
    "same id": ({"id": "a", "prompt": "q", "trace": "t"}, "line 2: found id 'a' of traces.jsonl line 1 again"),
    "open tag": ({"prompt": "p", "trace": "x <bigmodel> y"}, "line 2: trace '[0-9a-f]{16}' holds <bigmodel> already"),
    "closing tag": ({"id": "b", "prompt": "p", "trace": "</bigmodel>"}, "line 2: trace 'b' holds </bigmodel> already"),
    "half a pair": ('{"prompt": "p", "trace": "\\ud800"}', "line 2: found half a surrogate pair in 'trace'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(case: str, tmp_path: Path) -> None:
    row, message = WRONG[case]
    file = written(tmp_path, {"id": "a", "prompt": "p", "trace": "t"}, row)
    with pytest.raises(RequestError, match=message):
        list(read_traces(file))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\xff", "trace": "t"}\n')
    with pytest.raises(RequestError, match=r"x.jsonl line 1: found bytes that are not UTF-8"):
        list(read_traces(tmp_path / "x.jsonl"))
    with pytest.raises(RequestError, match="nowhere: found no such file"):
        list(read_traces(tmp_path / "nowhere"))


def test_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"id": "a", "prompt": "p", "trace": "t"}, {"id": "b", "prompt": "p", "trace": "u"}]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "one")
    assert [t.id for t in read_traces(tmp_path / "one")] == ["a", "b"]
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "two")
    assert [t.id for t in read_traces(tmp_path / "two", split="test")] == ["b"]
    with pytest.raises(RequestError, match="split: found None, expected one of train, test"):
        list(read_traces(tmp_path / "two"))
    (tmp_path / "three").mkdir()
    with pytest.raises(RequestError, match="three: found no saved data set"):
        list(read_traces(tmp_path / "three"))


def test_a_directory_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"needs datasets: pip install 'splitdecode\[annotate\]'"):
        list(read_traces(tmp_path))


def test_families() -> None:
    found = list(family_traces("two-products", 3, 5))
    assert found == list(family_traces("two-products", 3, 5))
    assert [t.id for t in found] == [f"two-products-5-{i}" for i in range(3)]
    assert all(t.text.startswith("<think>\n") for t in found)
    with pytest.raises(RequestError, match="family: found 'x'"):
        list(family_traces("x", 1, 0))
