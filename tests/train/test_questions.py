"""What reinforcement asks: lines of every kind, mistakes by their place, both models' prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitdecode.errors import RequestError
from splitdecode.split.roles import Pair
from splitdecode.split.tokens import HINT
from splitdecode.train.questions import Question, asked, read_questions

BOX = "\n\n Put your final answer within \\boxed{}."


def written(folder: Path, *rows: Any) -> Path:
    file = folder / "q.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("\n".join(lines), "utf-8")
    return file


def test_lines_of_every_kind(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c\x0bd\x0ce"  # each a line's end to str.splitlines(), none to JSON lines
    file = written(
        tmp_path,
        {"question": odd, "answer": 2, "trace": "t"},
        "",
        {"prompt": "2+2", "answer": "4", "question": None},
        "  ",
        {"prompt": f"3 {HINT}", "answer": 6.5, "large_prompt": "3"},
        {"question": "2+2", "answer": "4"},
        {"prompt": "2+2", "answer": 4},
        "",
    )
    assert "\x0b" not in file.read_text("utf-8"), "JSON escapes it"
    assert read_questions(file) == [
        Question(odd, "2", bare=True),
        Question("2+2", "4"),
        Question(f"3 {HINT}", "6.5", large_prompt="3"),
        Question("2+2", "4", bare=True),
    ]


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "line 3: found no JSON"),
    "no object": ([1], "line 3: found list, expected an object"),
    "neither": ({"answer": 1}, "line 3: found 'answer', expected either 'question' or 'prompt'"),
    "both": ({"prompt": "p", "question": "q", "answer": 1}, "line 3: found 'question', 'prompt', expected either"),
    "no answer": ({"prompt": "p"}, "line 3: found 'prompt', expected an object with 'prompt', a text, and 'answer'"),
    "odd answer": ({"question": "p", "answer": True}, "line 3: found 'question', 'answer', expected an object with"),
    "no text": ({"question": 3, "answer": 1}, "line 3: found 'question', 'answer', expected an object with 'question'"),
    "empty": ({"prompt": "", "answer": 1}, "line 3: found 'prompt', 'answer', expected"),
    "other answer": ({"question": "1+1", "answer": 3}, "line 3: found the question of an earlier line with another"),
    "two prompts": (
        {"question": "q", "answer": 1, "large_prompt": "p"},
        "line 3: large_prompt: found 'p' beside 'ques",
    ),
    "odd large": ({"prompt": "q", "answer": 1, "large_prompt": 3}, "line 3: large_prompt: found 3 beside 'prompt'"),
    "hint": ({"prompt": HINT, "answer": 1}, "line 3: found <bigmodel> in what the large model is given"),
    "tag": ({"prompt": "p", "answer": 1, "large_prompt": "</bigmodel>"}, "line 3: found </bigmodel> in what"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(case: str, tmp_path: Path) -> None:
    row, said = WRONG[case]
    with pytest.raises(RequestError, match=rf"q\.jsonl {said}"):
        read_questions(written(tmp_path, {"question": "1+1", "answer": 2}, "", row))


def test_files_without_questions(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"q\.jsonl: found no questions"):
        read_questions(written(tmp_path, "", ""))
    with pytest.raises(RequestError, match="nowhere: found no text to read"):
        read_questions(tmp_path / "nowhere")


def test_each_model_is_given_its_own(tmp_path: Path) -> None:
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(f"{name}[{{{{ messages[0].content }}}}]")
    questions = [Question("1+1?", "2", bare=True), Question("2+2", "4"), Question("3+3 !", "6", large_prompt="3+3")]
    first = f"small[1+1?\n{HINT}{BOX}]"
    answers, others = asked(questions, Pair(tmp_path / "small", tmp_path / "large"))
    assert answers == {first: "2", "2+2": "4", "3+3 !": "6"}
    assert others == {first: f"large[1+1?\n{BOX}]", "3+3 !": "3+3"}
    nowhere = tmp_path / "nowhere"
    assert asked(questions[1:], Pair(nowhere, nowhere))[0] == {"2+2": "4", "3+3 !": "6"}, "no template is needed"
