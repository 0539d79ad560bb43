"""F3: the bytes each token id adds to a text, as the tokenizer's own decoder would put them there.

    ByteLevel      "Ġthe"    every character stands for one byte (GPT-2's table)
    Metaspace      "▁the"    ▁ is a space
    Replace        "▁the"    a string, by another string
    ByteFallback   "<0xA9>"  one byte
    Fuse, and Strip after it: act on a whole text, not in the middle of one
    Sequence       one after the other
    none           the token's own characters

"In the middle of a text" is the point: what a decoder does only at the beginning (drop the first space) is not here.
Decoders whose output for one token depends on its neighbours (WordPiece, BPEDecoder, CTC) are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from splitdecode.errors import CheckpointError

Step = Callable[[str | bytes], str | bytes]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of_character() -> dict[str, int]:
    """GPT-2's table, inverted: printable Latin-1 characters stand for themselves, the rest for 256 and up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def byte_token(token: str) -> int | None:
    """The byte of a byte-fallback token such as <0xA9>, or None."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


def token_to_bytes(spec: Mapping[str, Any], file: str) -> Callable[[str], bytes]:
    """From a parsed tokenizer.json to the function token -> bytes.

    Raises CheckpointError naming `file` and the decoder when it is one that cannot be followed.
    """
    decoder = spec.get("decoder")
    pre = spec.get("pre_tokenizer") or {}
    if decoder is None and "ByteLevel" in _types(pre):
        decoder = {"type": "ByteLevel"}  # ids still stand for bytes, decoder or not
    if decoder is None and (spec.get("model") or {}).get("type") == "WordPiece":
        raise CheckpointError(f"{file}: a WordPiece model without a decoder is not supported")
    steps = _steps(decoder, file) if decoder is not None else []

    def convert(token: str) -> bytes:
        value: str | bytes = token
        for step in steps:
            value = step(value)
        return value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")

    return convert


def _types(part: Mapping[str, Any]) -> set[str]:
    """The types in a component and, for a Sequence, in its members."""
    inner = part.get("pretokenizers") or part.get("decoders") or part.get("normalizers") or []
    return {str(part.get("type"))}.union(*(_types(one) for one in inner))


def _steps(decoder: Mapping[str, Any], file: str) -> list[Step]:
    """The per-token steps of a decoder, in order. Whole-text parts add none and must come last."""
    steps: list[Step] = []
    fused = False
    for part in _flat(decoder):
        kind = part.get("type")
        if kind == "Fuse":
            fused = True
        elif kind == "Strip":
            if not fused or part.get("stop"):
                raise CheckpointError(
                    f"{file}: decoder Strip is supported only after Fuse and at the start of the text"
                )
        elif fused:
            raise CheckpointError(f"{file}: decoder {kind} after Fuse is not supported")
        else:
            steps.append(_step(part, file))
    return steps


def _flat(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [part for inner in decoder.get("decoders", []) for part in _flat(inner)]


def _step(part: Mapping[str, Any], file: str) -> Step:
    kind = part.get("type")
    if kind == "ByteLevel":
        table = byte_of_character()
        return _on_text(lambda text: _byte_level(text, table))
    if kind == "ByteFallback":
        return _on_text(lambda text: text if (byte := byte_token(text)) is None else bytes([byte]))
    if kind == "Metaspace":
        mark = part.get("replacement", "▁")
        return _on_text(lambda text: text.replace(mark, " "))
    if kind == "Replace" and set(part.get("pattern", {})) == {"String"}:
        old, new = part["pattern"]["String"], part["content"]
        return _on_text(lambda text: text.replace(old, new))
    name = f"{kind} with a regular expression" if kind == "Replace" else kind
    raise CheckpointError(
        f"{file}: decoder {name} is not supported, expected ByteLevel, Metaspace, Replace of a string, ByteFallback, "
        "Fuse, Strip after Fuse, a Sequence of these, or none"
    )


def _on_text(change: Callable[[str], str | bytes]) -> Step:
    """A step that leaves alone what an earlier one has turned into bytes."""
    return lambda value: value if isinstance(value, bytes) else change(value)


def _byte_level(text: str, table: Mapping[str, int]) -> bytes:
    """As the ByteLevel decoder: a token with a character outside the table stands for its own UTF-8."""
    found = [table.get(character) for character in text]
    whole = [byte for byte in found if byte is not None]
    return bytes(whole) if len(whole) == len(found) else text.encode("utf-8", "surrogatepass")
