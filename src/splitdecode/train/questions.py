"""F7: what reinforcement asks: JSON lines with a question or a prompt, and the right answer.

{"question", "answer"}                     put to each model by split/questions.py: the usual case
{"prompt", "answer", "large_prompt"?}      as they stand; without a large_prompt both models are given the prompt
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitdecode.errors import RequestError
from splitdecode.jsonl import read_objects
from splitdecode.models.chat import ChatTemplate
from splitdecode.models.checkpoint import resolve
from splitdecode.split.questions import asked_by, check_large, question_prompts
from splitdecode.split.roles import Pair, Role


@dataclass(frozen=True, slots=True)
class Question:
    """A text and the right answer to it. bare: a question alone, which asked() makes prompts of; else the small model's
    prompt, and large_prompt the large one's, None where it is the same."""

    text: str
    answer: str
    bare: bool = False
    large_prompt: str | None = None


def read_questions(path: Path, flag: str = "--data") -> list[Question]:
    """Questions of a file, each once. Raises RequestError naming the flag and the line for anything missing, of another
    type, asked again with another answer, or with a tag in what the large model is given."""
    found: dict[tuple[str, bool], Question] = {}
    for where, row in read_objects(path, flag):
        question = _question(where, row)
        if found.setdefault((question.text, question.bare), question) != question:
            raise RequestError(f"{where}: found the question of an earlier line with another answer or large_prompt, "
                               "expected each question once")  # fmt: skip
    if not found:
        raise RequestError(f"{flag}: {path}: found no questions, expected at least one")
    return list(found.values())


def asked(questions: Iterable[Question], checkpoints: Pair[str | Path]) -> tuple[dict[str, str], dict[str, str]]:
    """{small prompt: right answer} and {small prompt: large prompt} where the two differ.

    checkpoints: directories or hub ids, whose chat templates bare questions are put in. Raises CheckpointError or
    RequestError for a template that cannot be used.
    """
    questions = list(questions)
    templates = None
    if any(question.bare for question in questions):
        templates = checkpoints.map(lambda point: ChatTemplate.from_directory(resolve(point)))
    answers: dict[str, str] = {}
    others: dict[str, str] = {}
    for question in questions:
        prompts = Pair(question.text, question.large_prompt or question.text)
        if question.bare:
            prompts = question_prompts(question.text, templates)
        answers[prompts[Role.SMALL]] = question.answer
        if prompts[Role.LARGE] != prompts[Role.SMALL]:
            others[prompts[Role.SMALL]] = prompts[Role.LARGE]
    return answers, others


def _question(where: str, row: Mapping[str, Any]) -> Question:
    name = asked_by(row, where)
    text, answer, other = row[name], row.get("answer"), row.get("large_prompt")
    if not isinstance(text, str) or not text or not isinstance(answer, (str, int, float)) or isinstance(answer, bool):
        raise RequestError(f"{where}: found {', '.join(map(repr, row))}, expected an object with {name!r}, a text, and "
                           "'answer', a text or a number")  # fmt: skip
    if other is not None and (name == "question" or not isinstance(other, str) or not other):
        raise RequestError(f"{where}: large_prompt: found {other!r} beside {name!r}, expected a text beside 'prompt', "
                           "or none")  # fmt: skip
    check_large(text if other is None else other, where)
    return Question(text, str(answer), name == "question", other)
