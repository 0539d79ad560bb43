"""F7: who writes where: the rows of an evaluation.

    row          the small lane is written by    and the large model writes
    small        the tuned small model           nothing; the tags are left out of the text
    large        -                               everything
    split        the tuned small model           what the small one hands over (under a budget, where one is asked for)
    accept       the tuned small model           what the small one hands over, whatever the budget
    reject       the tuned small model           nothing: each opening is rewound and drawn again without the tag
    random       the tuned small model           chunks of tokens at random, as much of the text as in the split row
    forced       the tuned small model           the labelled spans, tags around them in the small lane

small-base, random-base and forced-base are the same with the small model as it was before it was taught the tags, and
no tag in its lane: SFT erodes what a small model knows by itself, so the baselines without tags are the base model's.

Labels are ranges of characters of a reference solution; a policy by position speaks of content tokens. `positions`
encodes the reference piece by piece, each with the tokenizer of the model that is to write it. These positions mean the
labelled steps as long as the answer is, token for token, the reference. An answer that departs from it is still cut at
the same positions, whatever stands there by then: `kept` says which spans began on the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitdecode.errors import RequestError
from splitdecode.evaluate.tasks import Item
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.outputs import CompletionOutput
from splitdecode.split.policies import (
    ControlTags,
    ForcedSpans,
    HandoffPolicy,
    LargeOnly,
    Opening,
    RandomSwitch,
    SmallOnly,
)
from splitdecode.split.roles import Role
from splitdecode.split.tokens import PairTokens

KINDS = ("small", "large", "split", "accept", "reject", "random", "forced")
ON_BASE = ("small", "random", "forced")
BASE = "-base"
RATE_FROM = "add split to --policies, or give a share and a length (--p, --chunk)"


class RejectAll(HandoffPolicy):
    """The small model alone, and it must do without its tags: every opening is rewound and drawn again."""

    opening = Opening.REJECT


@dataclass(frozen=True, slots=True)
class Row:
    """One policy of an evaluation. base: with the small model as it was before it was taught the tags."""

    kind: str
    base: bool = False

    @property
    def name(self) -> str:
        """As asked for on the command line."""
        return self.kind + (BASE if self.base else "")

    @property
    def checkpoint(self) -> str:
        """Which small model: "tuned" or "base"; "" where none runs."""
        return "" if self.kind == "large" else "base" if self.base else "tuned"

    @property
    def hint(self) -> bool:
        """Whether the small model's prompt carries the sentence that invites the tags."""
        return not self.base and self.kind in ("split", "accept", "reject", "forced")


@dataclass(frozen=True, slots=True)
class Rate:
    """How a random row switches: the large model's share of the tokens, tokens per chunk."""

    share: float
    chunk: int


def parse_rows(text: str) -> list[Row]:
    """Rows by name, separated by commas, without repeats. Raises RequestError for an unknown one."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    known = {row.name: row for row in (*map(Row, KINDS), *(Row(kind, True) for kind in ON_BASE))}
    for name in names:
        if name not in known:
            raise RequestError(f"--policies: found {name!r}, expected some of {', '.join(known)}")
    if not names:
        raise RequestError(f"--policies: found none, expected some of {', '.join(known)}")
    return [known[name] for name in names]


def policies_of(row: Row, items: Sequence[Item], tokens: PairTokens, rate: Rate | None) -> list[HandoffPolicy]:
    """One policy per item. Raises RequestError where a random row has no rate, or a forced one no labels."""
    match row.kind:
        case "forced":
            return [ForcedSpans(positions(tokens, item)[0], tags=not row.base) for item in items]
        case "random":
            if rate is None:
                raise RequestError(f"{row.name}: no share to switch at: {RATE_FROM}")
            return [RandomSwitch(rate.share, rate.chunk)] * len(items)
        case "small":
            return [SmallOnly()] * len(items)
        case "large":
            return [LargeOnly()] * len(items)
        case "reject":
            return [RejectAll()] * len(items)
    return [ControlTags()] * len(items)


def positions(tokens: PairTokens, item: Item) -> tuple[list[tuple[int, int]], list[int]]:
    """The labelled spans of an item in content tokens of its reference, and the ids of the reference before the last.

    Raises RequestError where the item has no labels.
    """
    if item.reference is None or item.hard is None:
        raise RequestError(f"forced: {item.id} has no labelled solution, expected 'trace' and 'hard'")
    spans, ids, at = [], [], 0
    for start, stop in item.hard:
        ids += _piece(tokens.tokenizers[Role.SMALL], item.reference[at:start])
        inside = _piece(tokens.tokenizers[Role.LARGE], item.reference[start:stop])
        spans.append((len(ids), len(ids) + len(inside)))
        ids += inside
        at = stop
    return spans, ids


def kept(tokens: PairTokens, item: Item, answer: CompletionOutput) -> int:
    """How many of the item's labelled spans began, in this answer, on the reference as it is up to there."""
    spans, ids = positions(tokens, item)
    return sum(answer.token_ids[:start] == ids[:start] for start, _ in spans)


def large_ranges(tokens: PairTokens, answer: CompletionOutput) -> list[tuple[int, int]]:
    """The half-open ranges of characters of an answer's text that the large model wrote.

    A character whose bytes both models wrote is the one's who began it.
    """
    tables = tokens.tokenizers.map(lambda tokenizer: tokenizer.token_bytes)
    data = answer.text.encode("utf-8")
    ranges, at = [], 0
    for span in answer.spans:
        role = Role.LARGE if span.model == str(Role.LARGE) else Role.SMALL
        end = min(len(data), at + sum(len(tables[role][token]) for token in answer.token_ids[span.start : span.end]))
        if role is Role.LARGE:
            edges = [len(data[:edge].decode("utf-8", "replace")) for edge in (at, end)]
            if edges[0] < edges[1]:
                ranges.append((edges[0], edges[1]))
        at = end
    return ranges


def _piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a piece of a solution: with special tokens such as <think> where the tokenizer has them as such."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    data = text.encode("utf-8")
    return ids if b"".join(tokenizer.token_bytes[i] for i in ids) == data else tokenizer.encode_bytes(data)
