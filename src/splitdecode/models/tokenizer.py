"""F3: text <-> token ids of one checkpoint, and the exact bytes each id stands for.

    encode(text)         a prompt: special tokens are recognised, one BOS where the checkpoint wants one
    encode_bytes(data)   a piece from the middle of a text: no BOS, no added space, no special tokens, and always
                         b"".join(token_bytes[i] for i in ids) == data
    encode_inserted(text)   a text put into the middle of another: the same, but special tokens are recognised

The second one is what seams need: a residue left by a tag, or another tokenizer's text, may begin inside a word and
even inside a UTF-8 character. It runs on a private copy of the tokenizer from which everything that acts on the
beginning of a text has been removed, and it checks itself; what that copy cannot say exactly is spelled with the
longest tokens that fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from splitdecode.errors import CheckpointError, RequestError
from splitdecode.models.checkpoint import read_json
from splitdecode.models.decoding import byte_token, token_to_bytes

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} when there is none. Raises CheckpointError naming the file."""
    return read_json(path) if path.is_file() else {}


def special_tokens(directory: Path) -> dict[str, str]:
    """bos_token, eos_token, ...: name -> text, from tokenizer_config.json and special_tokens_map.json."""
    config = read_object(directory / "special_tokens_map.json") | read_object(directory / "tokenizer_config.json")
    found = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found


class Tokenizer:
    """Text <-> ids of one checkpoint. Ids are ints below `size`; `token_bytes[id]` is what an id adds to a text."""

    def __init__(self, spec: dict[str, Any], specials: Mapping[str, str], add_bos: bool | None, file: str) -> None:
        """spec: a parsed tokenizer.json; specials: special_tokens(); add_bos: tokenizer_config's add_bos_token, None
        where it says nothing and the post-processor decides; file: for messages."""
        self._file = file
        whole = dict(spec, truncation=None, padding=None)  # either would change prompts silently
        self._whole = _load(whole, file)
        self._middle = _load(_for_the_middle(whole), file)
        self._middle.encode_special_tokens = True
        vocab = self._whole.get_vocab(with_added_tokens=True)
        self.size = max(vocab.values(), default=-1) + 1
        self._added = {str(token): index for index, token in self._whole.get_added_tokens_decoder().items()}
        self.special_ids = frozenset(i for i, t in self._whole.get_added_tokens_decoder().items() if t.special)
        self.special_ids |= {vocab[text] for text in specials.values() if text in vocab}
        self.bos_id = self._named("bos_token", specials, vocab)
        self.eos_id = self._named("eos_token", specials, vocab)
        self._template_bos = self.bos_id is not None and self._whole.encode("").ids[:1] == [self.bos_id]
        self._add_bos = self._template_bos if add_bos is None else add_bos and self.bos_id is not None
        self._unk_id = _unk_id(spec, vocab)
        self.token_bytes = self._bytes_of(spec, vocab)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and special_tokens_map.json of a checkpoint.

        Raises CheckpointError naming the file when tokenizer.json is missing or corrupt, or its decoder unsupported.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; a fast tokenizer is needed (tokenizer.json, not a .model file)")
        add_bos = read_object(directory / "tokenizer_config.json").get("add_bos_token")
        specials = special_tokens(directory)
        return cls(read_object(file), specials, add_bos if isinstance(add_bos, bool) else None, str(file))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A prompt's ids. With add_special_tokens the checkpoint's BOS leads, once, also where `text` begins with it.

        Raises RequestError when the text cannot be written as UTF-8, or holds characters that this tokenizer could
        only read as its end-of-text token.
        """
        try:
            ids: list[int] = self._whole.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError):
            raise RequestError(f"prompt: found {_short(text)}, expected text that can be written as UTF-8") from None
        if self._unk_id is not None and self._unk_id == self.eos_id:
            self._refuse_unknown(text, ids)
        if not add_special_tokens or self.bos_id is None:
            return ids
        if self._template_bos and not self._add_bos:
            return ids[1:]
        if self._add_bos:
            start = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
            return [self.bos_id, *ids[start:]]
        return ids

    def encode_bytes(self, data: bytes, *, avoid: Collection[int] = ()) -> list[int]:
        """Ids whose bytes are exactly `data`, a piece from the middle of a text; never special, never one of `avoid`.

        Raises RequestError naming the bytes that no token can spell.
        """
        ids: list[int] = []
        for piece, valid in _utf8_runs(data):
            plain = self._plain(piece, avoid) if valid else None
            ids.extend(self._spelled(piece, avoid) if plain is None else plain)
        return ids

    def encode_inserted(self, text: str, *, avoid: Collection[int] = ()) -> list[int]:
        """Ids whose bytes are exactly `text`, in which added tokens, special or not, are themselves as in a prompt,
        unless they are in `avoid`: those are spelled in others. Raises RequestError as encode_bytes does."""
        ids: list[int] = []
        at = 0
        for found in self._added_texts.finditer(text) if self._added else ():
            index = self._added[found[0]]
            if index not in avoid:
                ids += [*self.encode_bytes(text[at : found.start()].encode(), avoid=avoid), index]
                at = found.end()
        return ids + self.encode_bytes(text[at:].encode(), avoid=avoid)

    def decode(self, ids: Collection[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids in the middle of a text; incomplete characters become U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes[i] for i in ids if i not in skipped).decode("utf-8", "replace")

    def id_of(self, content: str) -> int | None:
        """The id of an added token (special or not) by its text, None when there is none."""
        return self._added.get(content)

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether both give the same bytes for every id below both sizes: ids can then be handed over as they are."""
        shared = min(self.size, other.size)
        return self.token_bytes[:shared] == other.token_bytes[:shared]

    def check_against_vocab(self, vocab_size: int, file: str | Path) -> None:
        """Raises CheckpointError when an id has no row in a model of `vocab_size` rows, described by `file`."""
        if self.size > vocab_size:
            raise CheckpointError(
                f"{self._file}: tokenizer larger than the vocabulary: {self.size} ids, but vocab_size is {vocab_size} "
                f"in {file}"
            )

    def _named(self, name: str, specials: Mapping[str, str], vocab: Mapping[str, int]) -> int | None:
        text = specials.get(name)
        if text is not None and text not in vocab:
            raise CheckpointError(f"{self._file}: {name} {text!r} is not in the vocabulary")
        return None if text is None else vocab[text]

    def _bytes_of(self, spec: Mapping[str, Any], vocab: Mapping[str, int]) -> list[bytes]:
        convert = token_to_bytes(spec, self._file)
        found = [b""] * self.size
        for token, index in vocab.items():
            found[index] = token.encode("utf-8", "surrogatepass") if token in self._added else convert(token)
        return found

    def _refuse_unknown(self, text: str, ids: list[int]) -> None:
        assert self._unk_id is not None
        if ids.count(self._unk_id) > text.count(self.token_bytes[self._unk_id].decode("utf-8", "replace")):
            known = {character for token in self.token_bytes for character in token.decode("utf-8", "ignore")}
            strange = [character for character in text if character not in known]
            shown = _short("".join(dict.fromkeys(strange)))
            raise RequestError(f"prompt: found {shown}, expected characters in the vocabulary of {self._file}")

    def _plain(self, piece: bytes, avoid: Collection[int]) -> list[int] | None:
        """The private copy's own tokenisation, None when it is not exactly `piece`."""
        ids: list[int] = self._middle.encode(piece.decode("utf-8"), add_special_tokens=False).ids
        if any(i in self.special_ids or i in avoid for i in ids):
            return None
        return ids if b"".join(self.token_bytes[i] for i in ids) == piece else None

    def _spelled(self, piece: bytes, avoid: Collection[int]) -> list[int]:
        """Greedy longest tokens; where that ends in a dead end, the fewest tokens that reach the end."""
        ids: list[int] = []
        at = 0
        while at < len(piece):
            found = self._longest(piece, at, avoid)
            if found is None:
                return self._fewest(piece, avoid)
            ids.append(found[0])
            at += found[1]
        return ids

    def _longest(self, piece: bytes, at: int, avoid: Collection[int]) -> tuple[int, int] | None:
        table, lengths = self._by_bytes
        for length in lengths:
            index = table.get(piece[at : at + length]) if at + length <= len(piece) else None
            if index is not None and index not in avoid:
                return index, length
        return None

    def _fewest(self, piece: bytes, avoid: Collection[int]) -> list[int]:
        table, lengths = self._by_bytes
        best: list[tuple[int, int, int] | None] = [None] * len(piece) + [(0, 0, 0)]  # tokens to the end, id, next start
        for at in range(len(piece) - 1, -1, -1):
            for length in lengths:
                index = table.get(piece[at : at + length])
                rest = best[at + length] if at + length <= len(piece) else None
                if index is None or index in avoid or rest is None:
                    continue
                here = best[at]
                if here is None or rest[0] + 1 < here[0]:
                    best[at] = (rest[0] + 1, index, at + length)
        if best[0] is None:
            lost = bytes(dict.fromkeys(byte for byte in piece if bytes([byte]) not in table)) or piece
            raise RequestError(f"{lost[:40]!r}: no plain token of {self._file} spells these bytes of {piece[:40]!r}")
        ids, at = [], 0
        while at < len(piece):
            entry = best[at]
            assert entry is not None
            ids.append(entry[1])
            at = entry[2]
        return ids

    @cached_property
    def _added_texts(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))))

    @cached_property
    def _by_bytes(self) -> tuple[dict[bytes, int], list[int]]:
        """bytes -> id of tokens that were not added, and the lengths that occur, longest first.

        Among equals the lowest id wins, but a byte-fallback token only where nothing else spells that byte: a model
        sees <0x41> for "A" nowhere.
        """
        added = set(self._added.values()) | self.special_ids
        table: dict[bytes, int] = {}
        fallback: dict[bytes, int] = {}
        for index, data in enumerate(self.token_bytes):
            if data and index not in added and index != self._unk_id:
                token = self._whole.id_to_token(index)
                known = fallback if token is not None and len(data) == 1 and byte_token(token) is not None else table
                known.setdefault(data, index)
        table = fallback | table
        return table, sorted({len(data) for data in table}, reverse=True)


def _load(spec: Mapping[str, Any], file: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file}: not a tokenizer this build can read: {error}") from None


def _for_the_middle(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that does not begin anything, and that must come back byte for byte."""
    middle = dict(spec, post_processor=None)
    middle["normalizer"] = _without_rewriting(spec.get("normalizer"))
    middle["pre_tokenizer"] = _without_prefix(spec.get("pre_tokenizer"))
    return middle


def _without_rewriting(part: Any) -> Any:
    """Of a normalizer only the replacement of strings: Prepend adds a space, NFC and its kin change bytes."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "Sequence":
        kept = [one for inner in part.get("normalizers", []) if (one := _without_rewriting(inner)) is not None]
        return {"type": "Sequence", "normalizers": kept} if kept else None
    return part if part.get("type") == "Replace" and set(part.get("pattern", {})) == {"String"} else None


def _without_prefix(part: Any) -> Any:
    """A pre-tokenizer that adds no space before the text."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "Sequence":
        return dict(part, pretokenizers=[_without_prefix(inner) for inner in part.get("pretokenizers", [])])
    changes = {"add_prefix_space": False} if "add_prefix_space" in part else {}
    return dict(part, **changes, **({"prepend_scheme": "never"} if part.get("type") == "Metaspace" else {}))


def _unk_id(spec: Mapping[str, Any], vocab: Mapping[str, int]) -> int | None:
    model = spec.get("model") or {}
    unk = model.get("unk_id") if model.get("type") == "Unigram" else vocab.get(str(model.get("unk_token")))
    return unk if isinstance(unk, int) else None


def _utf8_runs(data: bytes) -> list[tuple[bytes, bool]]:
    """`data` as runs of valid UTF-8 (True) and of bytes that are not (False)."""
    runs: list[tuple[bytes, bool]] = []
    while data:
        try:
            data.decode("utf-8")
            runs.append((data, True))
            return runs
        except UnicodeDecodeError as error:
            if error.start:
                runs.append((data[: error.start], True))
            bad, data = data[error.start : error.end], data[error.end :]
            if runs and not runs[-1][1]:
                runs[-1] = (runs[-1][0] + bad, False)
            else:
                runs.append((bad, False))
    return runs


def _short(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
