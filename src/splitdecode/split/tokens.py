"""F5: text <-> ids for a pair: what one model wrote, as the other must read it.

Equal tokenizers hand ids over as they are. Unequal ones re-encode: what the small model wrote is encoded at the seam,
in one piece; what the large one writes is encoded in stretches, the shortest runs of its tokens that end on a UTF-8
boundary, so that the small lane's ids never depend on how often one reads along.

    large tokens   [ Fran ][ çois \xe2 ][ \x80\x94 ][ but ]
    stretches      |------||-------------------- ||------|      each is encoded on its own

Special tokens that both have under one text are handed over as such.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import groupby

from splitdecode import _C
from splitdecode.errors import RequestError
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.roles import Pair, Role

OPEN_TAG, CLOSE_TAG = "<bigmodel>", "</bigmodel>"
HINT = "You always use <bigmodel>...</bigmodel> to mark parts of the reasoning process that are important."


class PairTokens:
    """Both tokenizers of a pair, and the way from the one's ids to the other's."""

    def __init__(
        self, tokenizers: Pair[Tokenizer], tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG), others: Iterable[str] = ()
    ) -> None:
        """others: further tags the small model may write. Raises RequestError when a tag cannot be written in the small
        model's tokens."""
        self.tokenizers = tokenizers
        self.tags = tags
        self.same = tokenizers[Role.SMALL].same_ids(tokenizers[Role.LARGE])
        self.vocabularies = tokenizers.map(_vocabulary)
        self._twins = Pair.of(lambda r: _twins(tokenizers[r], tokenizers[r.other]))
        self.tag_ids = [_tag_ids(tokenizers[Role.SMALL], tag) for tag in tags]
        self._own_tags = [i for i in map(tokenizers[Role.SMALL].id_of, (*tags, *others)) if i is not None]
        self._never_said = self._unsayable((*tags, *others))
        self._check_residues((*tags, *others))

    def _unsayable(self, tags: Sequence[str]) -> frozenset[int]:
        """Ids of the small model that a text put into an answer is not written in: those that hold a tag, which
        would be one to the model that reads it, and those that cannot be handed over."""
        table = self.tokenizers[Role.SMALL].token_bytes
        shared = min(tokenizer.size for tokenizer in self.tokenizers) if self.same else len(table)
        holding = (i for i, text in enumerate(table) if any(tag.encode() in text for tag in tags))
        return frozenset((*holding, *range(shared, len(table))))

    def _check_residues(self, tags: Sequence[str]) -> None:
        """Whatever a tag leaves over of a small-model token must be writable, or a hand-off would fail midway."""
        tokenizer = self.tokenizers[Role.SMALL]
        for tag in (tag.encode() for tag in tags):
            heads = tuple(tag[:n] for n in range(1, len(tag) + 1))
            tails = tuple(tag[n:] for n in range(len(tag)))
            for text in tokenizer.token_bytes:
                left = [text[: -len(cut)] for cut in heads if text.endswith(cut)] if text.endswith(heads) else []
                if text.startswith(tails):
                    left += [text[len(cut) :] for cut in tails if text.startswith(cut)]
                for residue in filter(None, left):
                    try:
                        tokenizer.encode_bytes(residue)
                    except RequestError as error:
                        raise RequestError(f"token {text!r} of the small model may be cut by {tag!r}, and {residue!r} "
                                           "cannot be written in its other tokens") from error  # fmt: skip

    def bytes_of(self, role: Role, ids: Sequence[int]) -> bytes:
        """The bytes `ids` of that role's tokenizer stand for."""
        table = self.tokenizers[role].token_bytes
        return b"".join(table[i] for i in ids)

    def encode(self, role: Role, data: bytes) -> list[int]:
        """A piece of mid-stream text in that role's ids."""
        return self.tokenizers[role].encode_bytes(data)

    def say(self, text: str) -> list[int]:
        """A text put into an answer, in the small model's ids: its added tokens, `</think>` say, are themselves as in a
        prompt, but a tag is spelled in plain tokens."""
        return self.tokenizers[Role.SMALL].encode_inserted(text, avoid=self._never_said)

    def project(self, author: Role, ids: Sequence[int]) -> list[int]:
        """Finished text by `author`, as the other model reads it."""
        if self.same:
            return list(ids)
        out: list[int] = []
        for special, run in groupby(ids, self._twins[author].get):
            part = list(run)
            if special is None:
                out += self.encode(author.other, self.bytes_of(author, part))
            else:
                out += [special] * len(part)
        return out

    def stretches(self, author: Role, ids: Sequence[int], *, final: bool) -> list[tuple[int, list[int]]]:
        """Text that still grows: [(tokens of the author, the other model's ids)], one entry per stretch.

        final: an incomplete character at the end is a stretch too; else it waits.
        """
        if self.same:
            return [(1, [i]) for i in ids]
        table, out, start = self.tokenizers[author].token_bytes, [], 0
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for index, token in enumerate(ids):
            special = self._twins[author].get(token)
            if special is not None:
                if start < index:  # a character that nothing completes
                    out.append((index - start, self.encode(author.other, self.bytes_of(author, ids[start:index]))))
                    decoder.reset()
                out.append((1, [special]))
                start = index + 1
                continue
            decoder.decode(table[token])
            if decoder.getstate()[0] == b"" or (final and index + 1 == len(ids)):
                piece = self.bytes_of(author, ids[start : index + 1])
                out.append((index + 1 - start, self.encode(author.other, piece)))
                start = index + 1
        return out

    def containing_tag(self, role: Role) -> list[int]:
        """Ids whose text holds a whole control tag: the large model must not write them."""
        tags = [tag.encode() for tag in self.tags]
        return [i for i, text in enumerate(self.tokenizers[role].token_bytes) if any(tag in text for tag in tags)]

    def drawable(self, role: Role, limit: int) -> tuple[int, list[int]]:
        """What a model may draw where both share ids below `limit`: a limit of its own, and the banned ids below that.

        A tag that is an added token of the small model alone lies beyond what both share, and is never handed over.
        """
        if role is Role.LARGE:
            return limit, self.containing_tag(role)
        own = set(self._own_tags)
        most = max([limit, *(i + 1 for i in own)])
        return most, [i for i in range(limit, most) if i not in own]

    def entering(self, role: Role, tag: str) -> list[int]:
        """Ids that hold `tag` or end in a part of it, read on their own."""
        matcher = _C.ByteMatcher([tag])
        return [i for i, text in enumerate(self.tokenizers[role].token_bytes) if text and matcher.enters(text)]


def _vocabulary(tokenizer: Tokenizer) -> _C.Vocabulary:
    table = tokenizer.token_bytes
    flags = bytes(1 if i in tokenizer.special_ids else 0 for i in range(len(table)))
    return _C.Vocabulary(table, flags, tokenizer.encode_bytes)


def _twins(tokenizer: Tokenizer, other: Tokenizer) -> dict[int, int]:
    """Special ids of one tokenizer -> those of the other that have the same text."""
    texts = {i: tokenizer.token_bytes[i].decode("utf-8", "replace") for i in tokenizer.special_ids}
    twins = {i: other.id_of(text) for i, text in texts.items()}
    return {i: twin for i, twin in twins.items() if twin is not None and twin in other.special_ids}


def _tag_ids(tokenizer: Tokenizer, tag: str) -> list[int]:
    added = tokenizer.id_of(tag)
    if added is not None:
        return [added]
    try:
        return tokenizer.encode_bytes(tag.encode())
    except RequestError as error:
        raise RequestError(f"the control tag {tag!r} cannot be written by the small model's tokenizer") from error
