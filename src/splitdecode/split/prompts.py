"""F5: what a caller may give as a prompt, and the ids each lane begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from splitdecode.errors import RequestError
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import HINT, PairTokens

Prompt = str | Sequence[int] | Mapping[str, Any]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; one prompt (a flat list of ids is ONE) becomes a list of one. Raises RequestError."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise RequestError(f"prompts: found {_short(prompts)}, expected a str, a list of token ids, "
                           '{"prompt": str}, {"prompt_token_ids": ids}, or a non-empty list of these')  # fmt: skip
    if all(isinstance(item, int) for item in prompts):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def prompt_ids(tokens: PairTokens, prompt: Prompt, other: Prompt | None, limits: Pair[int]) -> Pair[list[int]]:
    """The ids each lane begins with: `prompt` in both, or `other` in the large one. Raises RequestError."""
    first = _encode(tokens, Role.SMALL, prompt, limits[Role.SMALL])
    if other is not None:
        return Pair(first, _encode(tokens, Role.LARGE, other, limits[Role.LARGE]))
    text = _text(prompt)
    if text is not None:
        return Pair(first, _encode(tokens, Role.LARGE, text, limits[Role.LARGE]))
    return Pair(first, _encode(tokens, Role.LARGE, _handed_over(tokens, first), limits[Role.LARGE]))


def cache_salt(prompt: Prompt) -> bytes:
    """The tenant whose cached prefixes this request may share: {"cache_salt": str}. Raises RequestError."""
    salt = prompt.get("cache_salt", "") if isinstance(prompt, Mapping) else ""
    if not isinstance(salt, str):
        raise RequestError(f"cache_salt: found {_short(salt)}, expected a str")
    try:
        return salt.encode()
    except UnicodeError:
        raise RequestError(f"cache_salt: found {_short(salt)}, expected text that can be written as UTF-8") from None


def with_hint(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conversation as the small model sees it: the hint sentence behind the last user message."""
    said = list(messages)
    for index in range(len(said) - 1, -1, -1):
        message = said[index]
        if isinstance(message, Mapping) and message.get("role") == "user" and isinstance(message.get("content"), str):
            said[index] = {**message, "content": f"{message['content']}\n{HINT}"}
            break
    return said


def _handed_over(tokens: PairTokens, ids: list[int]) -> list[int]:
    """A prompt given in the small model's ids, in the large one's: its own BOS, if it has one, for the other's."""
    small, large = tokens.tokenizers
    if tokens.same or small.bos_id is None or ids[:1] != [small.bos_id]:
        return tokens.project(Role.SMALL, ids)
    return ([] if large.bos_id is None else [large.bos_id]) + tokens.project(Role.SMALL, ids[1:])


def _text(prompt: Prompt) -> str | None:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str):
        return str(prompt["prompt"])
    return None


def _encode(tokens: PairTokens, role: Role, prompt: Prompt, limit: int) -> list[int]:
    text = _text(prompt)
    given = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
    if text is not None:
        ids = tokens.tokenizers[role].encode(text)
    elif isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        ids = cast(list[int], list(given))
    else:
        raise RequestError(f'prompt: found {_short(prompt)}, expected a str, a list of token ids, {{"prompt": str}} or '
                           '{"prompt_token_ids": ids}')  # fmt: skip
    if not ids:
        raise RequestError(f"prompt: found no tokens for the {role} model, expected at least one")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < limit:
            raise RequestError(f"prompt: found token id {token!r}, expected ids from 0 to {limit - 1} "
                               f"(the {role} model's tokenizer)")  # fmt: skip
    return ids


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
