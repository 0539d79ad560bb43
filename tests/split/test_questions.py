"""A bare question as both models are given it: each in its own template, the hint in the small one's alone."""

from __future__ import annotations

import pytest

from splitdecode.errors import RequestError
from splitdecode.models.chat import ChatTemplate
from splitdecode.split.questions import asked_by, check_large, opening, question_prompts
from splitdecode.split.roles import Pair
from splitdecode.split.tokens import HINT

BOX = "\n\n Put your final answer within \\boxed{}."


def template(source: str | None) -> ChatTemplate:
    return ChatTemplate(source, "a file")


S, L = (template(f"{name}[{{{{ messages[0].role }}}} {{{{ messages[0].content }}}}]") for name in "SL")
OPENS = template("{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}")


@pytest.mark.parametrize(
    ("templates", "small", "large"),
    [
        (Pair(S, L), f"S[user 1+1?\n{HINT}{BOX}]", f"L[user 1+1?\n{BOX}]"),
        (Pair(OPENS, L), f"1+1?\n{HINT}{BOX}<think>\n", f"L[user 1+1?\n{BOX}]"),
        (None, f"1+1?\n{HINT}{BOX}\n", f"1+1?\n{BOX}\n"),
        (Pair(template(None), template(None)), f"1+1?\n{HINT}{BOX}\n", f"1+1?\n{BOX}\n"),
        (Pair(S, template(None)), f"S[user 1+1?\n{HINT}{BOX}]", f"1+1?\n{BOX}\n"),
    ],
    ids=["two", "one opens the answer", "unknown", "none", "small alone"],
)
def test_each_model_has_its_own(templates: Pair[ChatTemplate] | None, small: str, large: str) -> None:
    assert question_prompts("1+1?", templates) == Pair(small, large)
    bare = question_prompts("1+1?", templates, hint=False)
    assert bare == Pair(small.replace(HINT, ""), large)


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        ("q<think>\n", "<think>\n"),
        ("q<think>", "<think>"),
        ("<think>\n\n ", "<think>\n\n "),
        ("<think>\nq", ""),
        ("<think>a</think>\n", ""),
        ("", ""),
    ],
)
def test_what_a_prompt_has_begun_of_the_answer(prompt: str, begun: str) -> None:
    assert opening(prompt) == begun


def test_a_line_has_one_of_two_fields() -> None:
    assert asked_by({"question": 1}, "x") == asked_by({"prompt": None, "question": ""}, "x") == "question"
    assert asked_by({"prompt": "p", "answer": 1}, "x") == "prompt"
    assert asked_by({"q": "p"}, "x", prompt="q", question="q") == "q"
    for row, said in (
        ({"prompt": "p", "question": "q"}, "f:3: found 'question', 'prompt', expected either 'question' or 'prompt'"),
        ({"answer": 1}, "f:3: found 'answer', expected either 'question' or 'prompt'"),
        ({}, "f:3: found no fields, expected either"),
    ):
        with pytest.raises(RequestError, match=said):
            asked_by(row, "f:3")


@pytest.mark.parametrize("text", [HINT, "a <bigmodel>", "</bigmodel>"])
def test_the_large_model_is_given_no_tag(text: str) -> None:
    with pytest.raises(RequestError, match=r"f:3: found </?bigmodel> in what the large model is given"):
        check_large(text, "f:3")
    check_large("<big model>", "f:3")
    check_large(text, "f:3", tags=("<other>",))
