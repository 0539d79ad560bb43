"""F5: a registry of control actions: what a tag of the small model may mean besides handing the pen over.

    SplitDecoder(..., actions={"<enough>": StopThinking(), "<brief>": ThinkingBudget(64), "<far>": DraftLength(16)})

    small lane   ... so far <enough>  </think>\\n  The answer ...
                            |         put there by the action: content of the small model
                            left out of the text, kept in raw_text and in the small lane

An action's tag is found as the hand-off tags are: by bytes, under every tokenisation, and what follows it in its last
token is dropped. Only the small model's own text is read for them; the large model may write them as plain text.
What an action puts into the answer is encoded as a prompt is: a checkpoint's own `</think>` is that token, and left out
of the text where it is special. A tag in it is spelled in plain tokens and starts nothing.
Without actions nothing is looked for, and every token is what it was. Another precision of the same model needs no
action: it is a pair of one checkpoint with itself, `from_pretrained(path, path, dtype=("bfloat16", "float32"))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitdecode._C import Event
from splitdecode.errors import RequestError

if TYPE_CHECKING:
    from splitdecode.split.sequence import SplitSequence

MOST = 6  # tags a scheduler looks for, beside the two of the hand-off


class ControlAction:
    """What a tag does. Subclass it and register an instance under a tag."""

    def apply(self, sequence: SplitSequence) -> list[Event]:
        """Called when the tag is complete and the small lane ends with it; the small model writes on behind it, unless
        the events returned say otherwise. What it raises ends the request with finish_reason "error"."""
        raise NotImplementedError


@dataclass(frozen=True)
class StopThinking(ControlAction):
    """Ends the reasoning here: `text` is put into the answer, unless it is there already."""

    text: str = "</think>\n"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise RequestError(f"text: found {self.text!r}, expected a text that is not empty")

    def apply(self, sequence: SplitSequence) -> list[Event]:
        mark = self.text.strip() or self.text
        return [] if mark.encode() in sequence.written else sequence.say(self.text)


@dataclass(frozen=True)
class ThinkingBudget(ControlAction):
    """Ends the reasoning `tokens` content tokens from here, when the small model next holds the pen."""

    tokens: int
    text: str = "</think>\n"

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 1:
            raise RequestError(f"tokens: found {self.tokens!r}, expected a number of tokens, at least 1")
        StopThinking(self.text)

    def apply(self, sequence: SplitSequence) -> list[Event]:
        sequence.later(self.tokens, StopThinking(self.text))
        return []


@dataclass(frozen=True)
class DraftLength(ControlAction):
    """The large model may be `tokens` ahead of its reader from here on: fewer steps of the small model, more tokens
    written in vain at the end of a span. The text stays the same."""

    tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or not 1 <= self.tokens <= 4096:
            raise RequestError(f"tokens: found {self.tokens!r}, expected a number of tokens from 1 to 4096")

    def apply(self, sequence: SplitSequence) -> list[Event]:
        sequence.read_interval = self.tokens
        return []


def check_actions(actions: Mapping[str, ControlAction], tags: tuple[str, str]) -> None:
    """Raises RequestError naming a tag, one of the two or a further one, that is no text, holds or is held by another
    one, or has no ControlAction."""
    if not isinstance(tags, (tuple, list)) or len(tags) != 2 or not all(isinstance(t, str) and t for t in tags):
        raise RequestError(f"tags: found {tags!r}, expected two texts that are not empty")
    if tags[0] in tags[1] or tags[1] in tags[0]:
        raise RequestError(f"tags: found {tags[0]!r} beside {tags[1]!r}, expected that neither holds the other")
    if not isinstance(actions, Mapping):
        raise RequestError(f"actions: found {type(actions).__name__}, expected a mapping of tags to ControlActions")
    if len(actions) > MOST:
        raise RequestError(f"actions: found {len(actions)}, expected at most {MOST}")
    for tag in actions:
        if not isinstance(tag, str) or not tag:
            raise RequestError(f"actions: found the tag {tag!r}, expected a text that is not empty")
    for tag, action in actions.items():
        if not isinstance(action, ControlAction):
            raise RequestError(f"actions[{tag!r}]: found {type(action).__name__}, expected a ControlAction")
        for other in (*tags, *(t for t in actions if t != tag)):
            if tag in other or other in tag:
                raise RequestError(
                    f"actions: found the tag {tag!r} beside {other!r}, expected that neither holds the other"
                )
