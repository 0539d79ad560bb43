"""F3: messages -> the prompt a checkpoint was trained on, by its chat template.

A template is a program that came with the weights. It runs in models/sandbox.py, sees plain data only, and its output
is bounded. Users' text passes through it literally: what a message says is not made safe here, because the prompt is
never scanned for control tags (only sampled tokens can hand over the pen).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from splitdecode.errors import CheckpointError, RequestError
from splitdecode.models.sandbox import MAX_TEXT, Meter, Sandbox
from splitdecode.models.tokenizer import read_object, special_tokens

MAX_SOURCE = 1 << 20  # characters of a template
_RESERVED = frozenset({"messages", "add_generation_prompt", "tools", "documents"})
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' mark, cut off again after rendering


class ChatTemplate:
    """One chat template. `source` is None for a checkpoint that has none."""

    def __init__(self, source: str | None, file: str, variables: Mapping[str, str] | None = None) -> None:
        """file: where the template comes from, for messages; variables: bos_token, eos_token, ..."""
        if source is not None and len(source) > MAX_SOURCE:
            raise CheckpointError(f"{file}: chat template of {len(source)} characters, expected at most {MAX_SOURCE}")
        self.source = source
        self.file = file
        self._variables = dict(variables or {})
        self._sandbox = Sandbox()
        self._lock = threading.Lock()  # the sandbox counts one rendering at a time

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate:
        """chat_template.jinja, else chat_template.json, else tokenizer_config.json (where a list names several, the one
        called "default"). Raises CheckpointError naming the file when it cannot be read."""
        directory = Path(path)
        file = directory / "chat_template.jinja"
        variables = special_tokens(directory)
        if file.is_file():
            try:
                return cls(file.read_text("utf-8"), str(file), variables)
            except (OSError, UnicodeError) as error:
                raise CheckpointError(f"{file}: not readable as text: {error}") from None
        for name in ("chat_template.json", "tokenizer_config.json"):
            source = _chosen(read_object(directory / name).get("chat_template"), str(directory / name))
            if source is not None:
                return cls(source, str(directory / name), variables)
        return cls(None, str(directory), variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, as transformers' apply_chat_template(tokenize=False) would write it.

        messages: dicts with "role" and "content" (str), and whatever else of plain data the template knows.
        continue_final_message: the prompt ends inside the last message, to be continued.
        Raises RequestError when there is no template, the messages are malformed or the template refuses them, and
        CheckpointError when the template cannot be compiled or exceeds its bounds. Both name the template's file.
        """
        if self.source is None:
            raise RequestError(f"{self.file}: no chat template; use generate() with a prompt of your own")
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message: found True, expected False where add_generation_prompt is True")
        kwargs = dict(template_kwargs or {})
        for name in kwargs:
            if not isinstance(name, str) or name in _RESERVED or name in self._variables:
                raise RequestError(f"template_kwargs: found {name!r}, which the template gets from elsewhere")
        chat = _checked(messages)
        if continue_final_message:
            chat[-1]["content"] += _CONTINUE
        variables = {"tools": None, "documents": None, **self._variables, **_plain(kwargs, "template_kwargs")}
        text = self._rendered(variables | {"messages": chat, "add_generation_prompt": add_generation_prompt})
        return _cut(text, self.file) if continue_final_message else text

    @cached_property
    def _template(self) -> jinja2.Template:
        try:
            return self._sandbox.compiled(self.source or "")
        except Exception as error:  # Jinja's errors, and Python's on what Jinja generated (nesting, recursion)
            raise CheckpointError(f"{self.file}: chat template: {_reason(error)}") from None

    def _rendered(self, variables: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        length = 0
        with self._lock:
            template = self._template
            self._sandbox.meter = Meter()
            try:
                for piece in template.generate(**variables):
                    length += len(piece)
                    if length > MAX_TEXT:
                        raise SecurityError(f"an output of more than {MAX_TEXT} characters")
                    pieces.append(piece)
            except (SecurityError, MemoryError) as error:
                raise CheckpointError(f"{self.file}: chat template: {_reason(error)}") from None
            except Exception as error:  # raise_exception, or template code that these messages broke
                raise RequestError(f"{self.file}: chat template: {_reason(error)}") from None
        return "".join(pieces)


def _chosen(value: object, file: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        default = named.get("default")
        if isinstance(default, str):
            return default
        raise CheckpointError(f'{file}: chat_template: found {sorted(map(str, named))}, expected one named "default"')
    raise CheckpointError(f"{file}: chat_template: found {type(value).__name__}, expected a string or a list")


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A deep copy in plain types."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("messages: expected a non-empty list of dicts with role and content")
    chat = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{name}: found {type(message).__name__}, expected a dict with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(f"{name}[{key!r}]: found {type(message.get(key)).__name__}, expected a string")
        chat.append(_plain(message, name))
    return chat


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """`value` rebuilt from plain types, so that a template finds no methods of the caller's objects."""
    if depth > 32:
        raise RequestError(f"{name}: found data nested more than 32 deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}[{str(key)!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise RequestError(f"{name}: found {type(value).__name__}, expected plain data")


def _cut(text: str, file: str) -> str:
    """Ends the text inside the last message. Source: transformers, render_jinja_template."""
    at = text.rfind(_CONTINUE.strip())
    if at < 0:
        raise RequestError(f"{file}: continue_final_message: the template does not write the last message")
    kept_spacing = text[at : at + len(_CONTINUE)] == _CONTINUE
    return text[:at] if kept_spacing else text[:at].rstrip()


def _reason(error: BaseException) -> str:
    line = getattr(error, "lineno", None)
    where = f"line {line}: " if isinstance(line, int) else ""
    return f"{where}{str(error)[:500] or type(error).__name__}"
