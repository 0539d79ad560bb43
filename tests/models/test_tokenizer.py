"""Tokenizers of every supported decoder, built here: bytes of ids, one BOS, and exact pieces from the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

import splitdecode
from splitdecode.errors import CheckpointError, RequestError
from splitdecode.models.decoding import byte_of_character
from splitdecode.models.tokenizer import Tokenizer

PAIR = Path(splitdecode.__file__).parent / "data" / "tiny-pair"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def special(text: str, **changes: Any) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **changes)


def byte_level() -> tokenizers.Tokenizer:
    """Qwen's pre-tokenizer over merges that cross the edges of a tag."""
    alphabet = sorted(byte_of_character())
    merges = [
        tuple(pair.split())
        for pair in ["T h", "Th e", "> The", ". <", ".< /", "( <", "Ċ Ċ", "> ĊĊ", "Ġ t", "h e", "Ġt he", "Ã ©", "â Ģ"]
    ]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    built = tokenizers.Tokenizer(models.BPE(vocab, merges))
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([special("<|endoftext|>"), special("<｜begin▁of▁sentence｜>"), special("é!")])
    built.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return built


def llama2() -> tokenizers.Tokenizer:
    """▁ by a normalizer, bytes by fallback, a decoder of four parts."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeftxyzT.,<>/()0123456789"]
    merges = [tuple(pair.split()) for pair in ["▁ a", "a b", "▁a b", "t e", "te x", "tex t", "▁ text", "▁ ▁"]]
    vocab = {token: i for i, token in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    built = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens([special("<unk>"), special("<s>"), special("</s>")])
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return built


def unigram() -> tokenizers.Tokenizer:
    """Unigram with a Metaspace pre-tokenizer and decoder, as T5 and XLM-R have it."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -6.0) for c in "▁abcdehlort.,<>/"), ("▁the", -2.0), ("lo", -3.0)]
    built = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.add_special_tokens([special("<unk>"), special("</s>")])
    return built


def undecoded() -> tokenizers.Tokenizer:
    """Byte-level ids without a decoder."""
    built = byte_level()
    spec = json.loads(built.to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(spec | {"decoder": None}))


BUILT = {"byte_level": byte_level, "llama2": llama2, "unigram": unigram, "undecoded": undecoded}
CONFIGS: dict[str, dict[str, Any]] = {
    "byte_level": {"eos_token": "<|endoftext|>", "bos_token": {"content": "<｜begin▁of▁sentence｜>"}},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
    "unigram": {"eos_token": "</s>"},
    "undecoded": {},
}


@cache
def made(name: str) -> Tokenizer:
    if name == "words":
        return Tokenizer.from_directory(Path(__file__).resolve().parents[1] / "oracles" / "unigram")
    specials = {key: value["content"] if isinstance(value, dict) else value for key, value in CONFIGS[name].items()}
    return Tokenizer(json.loads(BUILT[name]().to_str()), specials, None, name)


def saved(folder: Path, built: tokenizers.Tokenizer, config: dict[str, Any]) -> Tokenizer:
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return Tokenizer.from_directory(folder)


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes[i] for i in ids)


@pytest.mark.parametrize("name", ["byte_level", "llama2", "unigram", "undecoded", "words"])
def test_bytes_follow_the_decoder(name: str) -> None:
    """Against the library: an id between two copies of a plain token adds exactly its bytes."""
    tokenizer = made(name)
    if name == "undecoded":  # the library would put spaces between the tokens
        assert tokenizer.token_bytes == made("byte_level").token_bytes
        return
    library = tokenizer._whole
    mark = library.token_to_id("a")
    assert len(tokenizer.token_bytes) == tokenizer.size == library.get_vocab_size()
    compared = 0
    for index in range(tokenizer.size):
        text = library.decode([mark, index, mark], skip_special_tokens=False)
        if "\ufffd" not in text and index not in tokenizer._added.values():
            assert tokenizer.token_bytes[index] == text.encode()[1:-1], library.id_to_token(index)
            compared += 1
    assert compared > tokenizer.size / 3


def test_added_tokens_are_literal() -> None:
    tokenizer = made("byte_level")
    for text in ("<|endoftext|>", "<｜begin▁of▁sentence｜>", "é!", "<think>"):
        index = tokenizer.id_of(text)
        assert index is not None
        assert tokenizer.token_bytes[index] == text.encode()
        assert (index in tokenizer.special_ids) == (text != "<think>")
    assert tokenizer.id_of("The") is None
    assert tokenizer.eos_id == tokenizer.id_of("<|endoftext|>")


def test_holes_are_empty() -> None:
    spec = json.loads(byte_level().to_str())
    spec["added_tokens"][-1]["id"] += 5
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 2**31]
    built = tokenizers.Tokenizer.from_str(json.dumps(spec))
    vocab = built.get_vocab()
    tokenizer = Tokenizer(spec, {}, None, "holes")
    assert tokenizer.size == max(vocab.values()) + 1
    for index in set(range(tokenizer.size)) - set(vocab.values()):
        assert tokenizer.token_bytes[index] == b""


def test_edges_of_tags_merge() -> None:
    """The hard case of the method: what follows a tag and what precedes it share tokens with it."""
    tokenizer = made("byte_level")
    whole = {tokenizer.token_bytes[i] for i in tokenizer.encode("a.</b (<b>The end>\n\n")}
    assert {b">The", b".</", b"(<", b">\n\n"} <= whole
    assert [tokenizer.token_bytes[i] for i in tokenizer.encode_bytes(b">The")] == [b">The"]
    assert [tokenizer.token_bytes[i] for i in tokenizer.encode_bytes(b"The")] == [b"The"]


@pytest.mark.parametrize("name", ["byte_level", "llama2", "undecoded"])
@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=40) | st.text(max_size=20).map(str.encode) | st.sampled_from([b"", b" a", b"\xe2\x80"]))
def test_any_bytes_come_back(name: str, data: bytes) -> None:
    tokenizer = made(name)
    ids = tokenizer.encode_bytes(data)
    assert joined(tokenizer, ids) == data
    assert not tokenizer.special_ids & set(ids)
    assert len(ids) <= len(data)


@settings(max_examples=150, deadline=None)
@given(text=st.text("Tthe .</>\n(ab é<|endoftext|><think>", max_size=30))
def test_in_the_middle_as_in_the_model(text: str) -> None:
    """Where the checkpoint's own tokenisation is exact and not special, it is the one that is used."""
    tokenizer = made("byte_level")
    own = tokenizer.encode(text, add_special_tokens=False)
    if joined(tokenizer, own) == text.encode() and not tokenizer.special_ids & set(own):
        assert tokenizer.encode_bytes(text.encode()) == own


@pytest.mark.parametrize("name", ["unigram", "words"])
@settings(max_examples=100, deadline=None)
@given(data=st.text("abchelo rt.,<>/ 01x\n", max_size=20) | st.text(max_size=5))
def test_text_comes_back_or_is_refused(name: str, data: str) -> None:
    tokenizer = made(name)
    plain = [token for i, token in enumerate(tokenizer.token_bytes) if i not in tokenizer.special_ids]
    alphabet = {part for token in plain for part in token.decode()}
    refused = None
    try:
        ids = tokenizer.encode_bytes(data.encode())
    except RequestError as error:
        refused = str(error)
    if refused is None:
        assert joined(tokenizer, ids) == data.encode()
        assert not tokenizer.special_ids & set(ids)
    else:
        assert set(data) - alphabet
        assert "no plain token of" in refused


def test_no_prefix_space_in_the_middle() -> None:
    tokenizer = made("llama2")
    texts = {
        data: [tokenizer.token_bytes[i] for i in tokenizer.encode_bytes(data)] for data in (b"text", b" text", b"ab")
    }
    assert texts == {b"text": [b"text"], b" text": [b" text"], b"ab": [b"ab"]}
    assert tokenizer.encode("text") == [1, tokenizer.encode_bytes(b" text")[0]]


@pytest.mark.parametrize("name", ["byte_level", "llama2"])
def test_plain_text_never_becomes_special(name: str) -> None:
    tokenizer = made(name)
    for index in tokenizer.special_ids:
        data = tokenizer.token_bytes[index]
        assert tokenizer.encode(data.decode(), add_special_tokens=False) != tokenizer.encode_bytes(data)
        assert joined(tokenizer, tokenizer.encode_bytes(data)) == data


def test_added_tokens_that_are_not_special_cross_unless_avoided() -> None:
    tokenizer = made("byte_level")
    think = tokenizer.id_of("<think>")
    assert think is not None
    assert tokenizer.encode_bytes(b"a<think>b")[1] == think
    spelled = tokenizer.encode_bytes(b"a<think>b", avoid={think})
    assert think not in spelled
    assert joined(tokenizer, spelled) == b"a<think>b"


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["T", "he", " a", "é", "\n", "<", ".</", *"!>", "<|endoftext|>", "<think>", "é!"]))
)
def test_an_inserted_text_is_tokenised_as_a_prompt_is(parts: list[str]) -> None:
    tokenizer = made("byte_level")
    text = "".join(parts)
    ids = tokenizer.encode_inserted(text)
    assert joined(tokenizer, ids) == text.encode()
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    spelled = tokenizer.encode_inserted(text, avoid=tokenizer.special_ids)
    assert joined(tokenizer, spelled) == text.encode()
    assert not tokenizer.special_ids & set(spelled)


def test_an_inserted_text_begins_nothing() -> None:
    tokenizer = made("llama2")
    plain = tokenizer.encode_bytes(b"text")
    assert tokenizer.encode_inserted("text</s>text") == [*plain, tokenizer.id_of("</s>"), *plain]


def test_greedy_dead_ends_are_left_again() -> None:
    """Longest first takes "ab" and is stuck at "c"; the fewest tokens that reach the end are "a", "bc"."""
    built = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("ab", -1.0), ("bc", -1.0)], unk_id=0))
    built.decoder = decoders.Fuse()
    tokenizer = Tokenizer(json.loads(built.to_str()), {}, None, "dead end")
    assert tokenizer._spelled(b"abc", ()) == [1, 3]
    with pytest.raises(RequestError, match=r"b'bd': no plain token of dead end"):
        tokenizer.encode_bytes(b"abd")


def test_byte_fallback_only_where_nothing_else_spells() -> None:
    tokenizer = made("llama2")
    table = tokenizer._by_bytes[0]
    assert tokenizer._whole.id_to_token(table[b"a"]) == "a"
    assert tokenizer._whole.id_to_token(table[b"\n"]) == "<0x0A>"


@pytest.mark.parametrize("text", ["", "text", "<s>text", "<s><s>text", "</s>"])
def test_one_bos(text: str, tmp_path: Path) -> None:
    config = CONFIGS["llama2"]
    for flag in (None, True):
        tokenizer = saved(tmp_path, llama2(), config if flag is None else config | {"add_bos_token": flag})
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert ids.count(1) == 1
    tokenizer = saved(tmp_path, llama2(), config | {"add_bos_token": False})
    assert tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text).count(1) == text.count("<s>")


def test_bos_from_the_config_alone(tmp_path: Path) -> None:
    """R1-Distill: the post-processor adds nothing, add_bos_token says true, chat templates write BOS as text."""
    tokenizer = saved(tmp_path, byte_level(), CONFIGS["byte_level"] | {"add_bos_token": True})
    bos = tokenizer.bos_id
    assert bos is not None
    assert tokenizer.encode("ab")[0] == tokenizer.encode("<｜begin▁of▁sentence｜>ab")[0] == bos
    assert tokenizer.encode("ab") == tokenizer.encode("<｜begin▁of▁sentence｜>ab")
    assert saved(tmp_path, byte_level(), CONFIGS["byte_level"]).encode("ab") == tokenizer.encode("ab")[1:]


def test_truncation_and_padding_are_off() -> None:
    built = byte_level()
    built.enable_truncation(4)
    built.enable_padding(length=8)
    tokenizer = Tokenizer(json.loads(built.to_str()), {}, None, "truncating")
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert len(tokenizer.encode("ab")) == 2


def test_same_ids() -> None:
    assert Tokenizer.from_directory(PAIR / "small").same_ids(Tokenizer.from_directory(PAIR / "large"))
    assert made("byte_level").same_ids(made("undecoded"))
    assert not made("byte_level").same_ids(made("llama2"))


def test_words_and_special_tags() -> None:
    tokenizer = made("words")
    text = "Work out 32*51+73*55-143.\n<think>\n32*51=<bigmodel>1632</bigmodel>\n"
    ids = tokenizer.encode(text)
    assert joined(tokenizer, ids) == text.encode()
    assert (tokenizer.size, tokenizer.bos_id, tokenizer.eos_id) == (150, None, 0)
    tags = {tokenizer.id_of("<bigmodel>"), tokenizer.id_of("</bigmodel>")}
    assert tags < set(ids) & tokenizer.special_ids
    assert joined(tokenizer, tokenizer.encode_bytes(b"51=16\n")) == b"51=16\n"
    with pytest.raises(RequestError, match=r"b'<>.*': no plain token of .*unigram"):
        tokenizer.encode_bytes(b"1<bigmodel>2")  # its vocabulary has the tags, but no < or > by itself
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Work out 32*51+73*55-143.\n\n32*51=1632\n"
    tokenizer.check_against_vocab(152, "config.json")
    with pytest.raises(CheckpointError, match=r"tokenizer larger than the vocabulary: 150 ids.*149 in config.json"):
        tokenizer.check_against_vocab(149, "config.json")


def test_unknown_characters_do_not_end_the_text() -> None:
    with pytest.raises(RequestError, match=r"prompt: found '\\u2603\\xe9', expected characters in the vocabulary"):
        made("words").encode("ab ☃é☃")
    assert made("unigram").encode("☃")  # a real <unk> is the checkpoint's business


@pytest.mark.parametrize("name", ["byte_level", "words"])
def test_text_that_is_no_text(name: str) -> None:
    with pytest.raises(RequestError, match="UTF-8"):
        made(name).encode("a\ud800b")


def _no_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _no_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", "utf-8")


def _no_object(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]", "utf-8")


def _no_model(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", "utf-8")


def _bad_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("nonsense", "utf-8")


def _strange_bos(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<nowhere>"}', "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_file, "tokenizer.json: missing"),
        (_no_json, "tokenizer.json"),
        (_no_object, "tokenizer.json"),
        (_no_model, "tokenizer.json: not a tokenizer"),
        (_bad_config, "tokenizer_config.json"),
        (_strange_bos, "bos_token '<nowhere>' is not in the vocabulary"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    saved(tmp_path, byte_level(), {})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(tmp_path)


STRANGE = {
    "WordPiece": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "BPEDecoder": {"type": "BPEDecoder", "suffix": "</w>"},
    "CTC": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    "Replace with a regular expression": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
    "Strip": {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    "ByteLevel after Fuse": {
        "type": "Sequence",
        "decoders": [
            {"type": "Fuse"},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        ],
    },
}


@pytest.mark.parametrize("name", STRANGE)
def test_other_decoders_are_refused_by_name(name: str) -> None:
    spec = json.loads(byte_level().to_str()) | {"decoder": STRANGE[name]}
    with pytest.raises(CheckpointError, match=f"odd: decoder {name}"):
        Tokenizer(spec, {}, None, "odd")
