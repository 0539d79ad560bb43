"""F5: a bare question -> the prompts it is put to both models with: one place for annotation, training and evaluation.

    small   question, the hint, the demand for a box, in its checkpoint's chat template
    large   question, the demand for a box, in its own checkpoint's chat template

A checkpoint without a chat template reads the same as plain text. The hint and the tags are the small model's alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from splitdecode.errors import RequestError
from splitdecode.models.chat import ChatTemplate
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import CLOSE_TAG, HINT, OPEN_TAG

INSTRUCTION = "\n Put your final answer within \\boxed{}."  # as the published checkpoints were trained
THINK = "<think>"
_OPENING = re.compile(rf"{THINK}\s*\Z")


def question_prompt(question: str, template: ChatTemplate | None, *, hint: bool) -> str:
    """What one model is given of a question. template: of its checkpoint, None or without a source: it has none; hint:
    with the sentence that invites the tags, for a small model alone. Raises what ChatTemplate.render does."""
    said = f"{question}\n{HINT if hint else ''}\n{INSTRUCTION}"
    if template is None or template.source is None:
        return said + "\n"
    return template.render([{"role": "user", "content": said}])


def question_prompts(question: str, templates: Pair[ChatTemplate] | None, *, hint: bool = True) -> Pair[str]:
    """What each model is given of a question, in the template of its own checkpoint. hint: in the small model's."""
    templated = Pair(None, None) if templates is None else templates
    return Pair.of(lambda r: question_prompt(question, templated[r], hint=hint and r is Role.SMALL))


def opening(prompt: str) -> str:
    """What of the answer a prompt has begun: `<think>` and the white space behind it, where it ends so; else ""."""
    found = _OPENING.search(prompt)
    return found[0] if found else ""


def asked_by(row: Mapping[str, Any], where: str, *, prompt: str = "prompt", question: str = "question") -> str:
    """Which of two fields a line has: `question`, put to a model by question_prompt(), or `prompt`, put as it stands.

    None is a field that is not there. Raises RequestError naming `where` for a line with both or neither.
    """
    held = [name for name in dict.fromkeys((question, prompt)) if row.get(name) is not None]
    if len(held) != 1:
        found = ", ".join(map(repr, held or row)) or "no fields"
        raise RequestError(f"{where}: found {found}, expected either {question!r} or {prompt!r}")
    return held[0]


def check_large(text: str, where: str, tags: Sequence[str] = (OPEN_TAG, CLOSE_TAG)) -> None:
    """Raises RequestError naming `where` for a prompt of the large model that holds a control tag, as the hint does."""
    for tag in tags:
        if tag in text:
            raise RequestError(f"{where}: found {tag} in what the large model is given, expected neither tags nor the "
                               "sentence that invites them: a 'question', or a 'large_prompt' without")  # fmt: skip
