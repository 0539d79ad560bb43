"""The tokenizer of the embedded pair: bytes, and tags as text, the hard case."""

from __future__ import annotations

from oracles.embedded import PAIR
from transformers import AutoTokenizer

from splitdecode.models.tokenizer import Tokenizer


def test_the_embedded_pair_has_tags_as_text_that_merges_at_both_edges() -> None:
    tokenizer, theirs = Tokenizer.from_directory(PAIR / "small"), AutoTokenizer.from_pretrained(PAIR / "small")
    text = "32*51=<bigmodel>1632</bigmodel>\nthousands 5-0-0=5 ☃é"
    ids = tokenizer.encode(text)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == text
    pieces = [tokenizer.token_bytes[i] for i in ids]
    assert pieces[5:9] == [b"=<", b"big", b"model", b">"]
    assert pieces[13:17] == [b"</", b"big", b"model", b">\n"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_ids) == (None, 0, {0})
    assert tokenizer.id_of("<bigmodel>") is None
