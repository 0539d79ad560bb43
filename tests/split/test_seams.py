"""Seams: whatever tokens a tag is written in, and whatever they merge with, no byte is lost and none goes astray.

small lane   a X<  big  model  >Y  | b c |  X'</  big  model  >Y'  d <bigmodel> | b |
content      a X                     b c    X'                 Y'  d              b
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from random import Random
from typing import Any

import pytest
import tokenizers
from oracles.scripted import NEVER, Recorder, Scripted
from oracles.tiny import PIECES, TAGS, WHOLE, ToyTokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from splitdecode import EngineConfig, SamplingParams, SplitDecoder
from splitdecode.models.decoding import byte_of_character
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.prompts import prompt_ids
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import PairTokens

OPEN, CLOSE = (tag.encode() for tag in TAGS)
WORDS = [
    ">The",
    ">\n\n",
    ">.\n",
    ">>",
    "><",
    "></",
    "> the",
    ">é",
    ">,",
    ">)",
    ">1",
    ">\t",
    ">a b",
    ">\r\n",
    ">'s",
    ">—",
]
WORDS += [
    ".</",
    "(<",
    " <",
    " </",
    "\n</",
    "\n\n</",
    "e</",
    "é<",
    "<<",
    "</</",
    ").</",
    ".\n</",
    "1<",
    ",</",
    "th <",
    "é</",
]
WORDS += [
    "<big",
    "</big",
    "ig",
    "big",
    "igm",
    "gm",
    "mod",
    "model",
    "odel",
    "el>",
    "model>The",
    "l>\n",
    "bigmodel",
    "big ",
]
REST = {b"\xc3": b"\xa9", b"\xe2": b"\x80\x94", b"\xe2\x80": b"\x94"}  # what completes a character cut short
CHARACTER = {byte: character for character, byte in byte_of_character().items()}


@cache
def byte_level(added: str = "", first: int = 0, special: tuple[str, ...] = (), bos: str = "") -> Tokenizer:
    """Byte-level BPE whose merges cross the edges of tags in dozens of ways; `added`: the tags are ids of their own.

    first: which of WORDS; another number gives another tokenizer. special: further special tokens, bos among them.
    """
    vocab = dict.fromkeys(CHARACTER.values())
    merges = []
    for word in WORDS[first:]:
        text = "".join(CHARACTER[byte] for byte in word.encode())
        for end in range(2, len(text) + 1):
            if text[:end] not in vocab:
                vocab[text[:end]] = None
                merges.append((text[: end - 1], text[end - 1]))
    built = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken("<|eos|>", special=True, normalized=False)])
    if added:
        built.add_tokens([AddedToken(tag, special=added == "special", normalized=False) for tag in TAGS])
    built.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    named = {"eos_token": "<|eos|>", **({"bos_token": bos} if bos else {})}
    return Tokenizer(json.loads(built.to_str()), named, False, "test")


TOKENIZERS: dict[str, Any] = {
    "byte-level": lambda: (byte_level(), byte_level()),
    "added": lambda: (byte_level("plain"), byte_level("plain")),
    "special": lambda: (byte_level("special"), byte_level("special")),
    "toy": lambda: (ToyTokenizer(PIECES), ToyTokenizer(PIECES)),
    "toy-added": lambda: (ToyTokenizer(PIECES + WHOLE), ToyTokenizer(PIECES + WHOLE)),
    "unequal": lambda: (byte_level(), byte_level(first=9)),
}


@dataclass(frozen=True)
class Cut:
    """One way to write a tag: tokens, and the bytes before and behind it in the first and the last of them."""

    ids: tuple[int, ...]
    before: bytes
    behind: bytes


def splits(table: Sequence[bytes], data: bytes) -> list[tuple[int, ...]]:
    """Every way to write `data` in whole tokens."""
    if not data:
        return [()]
    starts = [i for i, token in enumerate(table) if token and data.startswith(token)]
    return [(i, *rest) for i in starts for rest in splits(table, data[len(table[i]) :])]


def cuts(table: Sequence[bytes], tag: bytes, rng: Random) -> list[Cut]:
    """All chunkings of the tag, and for every token that merges with an edge of it a chunking of the rest."""
    found = [Cut(ids, b"", b"") for ids in splits(table, tag)]
    inner = {length: splits(table, tag[length:]) for length in range(len(tag))}
    heads = [
        (i, token[:-length], length)
        for i, token in enumerate(table)
        for length in range(1, len(tag))
        if token.endswith(tag[:length]) and token != tag[:length]
    ]
    tails = [
        (i, token[length:], length)
        for i, token in enumerate(table)
        for length in range(1, len(tag))
        if token.startswith(tag[-length:]) and token != tag[-length:]
    ]
    assert heads
    assert tails
    for first, before, length in heads:
        found.append(Cut((first, *rng.choice(inner[length])), before, b""))
    for last, behind, length in tails:
        found.append(Cut((*rng.choice(splits(table, tag[:-length])), last), b"", behind))
        first, before, start = rng.choice([head for head in heads if head[2] + length <= len(tag)])
        middle = splits(table, tag[start : len(tag) - length])
        found.append(Cut((first, *rng.choice(middle), last), before, behind))
    return [cut for cut in found if tag not in cut.before + cut.behind]


@dataclass
class Run:
    """One scripted request and what it must come to: pieces of content by author, and both lanes' bytes."""

    opening: Cut
    closing: Cut

    def on(self, tokens: Pair[Any], decoder: SplitDecoder, models: Pair[Scripted]) -> None:
        small, large = tokens
        one = {
            byte: small.token_bytes.index(bytes([byte]))
            for byte in b"abcd\xc3\xa9" + (b"\x80\x94" if small.size > 100 else b"")
        }
        prompt = [one[byte] for byte in b"abc"]
        halved = self.opening.before[:1] == b"\xa9"  # the rest of a character whose first byte came before
        self.first = [one[0xC3 if halved else 0x61], *encoded(small, self.opening.before)]
        healed = list(self.opening.ids)
        if self.opening.behind:
            whole = small.token_bytes[healed[-1]]
            healed[-1:] = small.encode_bytes(whole[: len(whole) - len(self.opening.behind)])
        after = [one[byte] for byte in REST.get(self.closing.behind[-2:], REST.get(self.closing.behind[-1:], b"d"))]
        tag = decoder.tokens.tag_ids[0]
        self.small_head = [*prompt, self.first[0], *healed]
        base = len(self.small_head)
        for model in models:
            model.table[:] = NEVER
        models.small.says(3, [self.first[0], *self.opening.ids])
        models.small.says(base + 1, [one[0x61], *self.closing.ids, *after, *tag])
        models.small.says(base + 2 + len(self.closing.ids) + len(after) + len(tag) + 1, [one[0x61]])
        self.second = [*encoded(small, self.closing.before), *encoded(small, self.closing.behind), *after]
        write = {byte: large.token_bytes.index(bytes([byte])) for byte in b"bc"}
        before = 3 + len(self.owed(tokens, self.first))
        models.large.says(before, [write[0x62], write[0x63]])
        models.large.says(before + 2 + len(self.owed(tokens, self.second)), [write[0x62], large.eos_id])
        words = [b"".join(small.token_bytes[i] for i in ids) for ids in (self.first, self.second)]
        self.content = [("small", words[0]), ("large", b"bc"), ("small", words[1]), ("large", b"b")]
        self.prompt = prompt
        place = len(self.closing.before)
        self.raw = [words[0], OPEN, b"bc", words[1][:place], CLOSE, words[1][place:], OPEN, b"b"]

    def owed(self, tokens: Pair[Any], ids: list[int]) -> list[int]:
        if tokens.small.same_ids(tokens.large):
            return ids
        found: list[int] = tokens.large.encode_bytes(b"".join(tokens.small.token_bytes[i] for i in ids))
        return found

    def check(self, answer: Any, lanes: Pair[list[int]], tokens: Pair[Any]) -> None:
        table = tokens.map(lambda tokenizer: tokenizer.token_bytes)
        lane_bytes = Pair.of(lambda r: b"".join(table[r][i] for i in lanes[r]))
        plain = b"".join(piece for _, piece in self.content)
        assert answer.text == plain.decode("utf-8", "replace")
        assert answer.raw_text == b"".join(self.raw).decode("utf-8", "replace")
        assert stripped(answer.raw_text) == answer.text
        assert lane_bytes.small == b"abc" + b"".join(self.raw)
        assert lane_bytes.large == b"abc" + plain + tokens.large.token_bytes[tokens.large.eos_id]
        assert lanes.small[: len(self.small_head)] == self.small_head
        assert lanes.large[3:-1] == [
            *self.owed(tokens, self.first), *(table.large.index(bytes([b])) for b in b"bc"),
            *self.owed(tokens, self.second), table.large.index(b"b"),
        ]  # fmt: skip
        edges = [edge for span in answer.spans for edge in (span.start, span.end)]
        assert edges == [
            0,
            *(edge for span in answer.spans[:-1] for edge in (span.end, span.end)),
            len(answer.token_ids),
        ]
        ids = answer.token_ids[:-1]
        by_author = [
            (s.model, b"".join(table[Role[s.model.upper()]][i] for i in ids[s.start : s.end])) for s in answer.spans
        ]
        assert by_author == self.content
        assert answer.token_ids[-1] == tokens.large.eos_id


def encoded(tokenizer: Any, data: bytes) -> list[int]:
    ids: list[int] = tokenizer.encode_bytes(data) if data else []
    return ids


def stripped(text: str) -> str:
    for tag in TAGS:
        text = text.replace(tag, "")
    return text


def make(name: str) -> tuple[Pair[Any], SplitDecoder, Pair[Scripted], Recorder]:
    tokens = Pair(*TOKENIZERS[name]())
    models = tokens.map(lambda tokenizer: Scripted(tokenizer.size, 128))
    config = EngineConfig(kv_cache_memory="1MiB", read_interval=2, enable_prefix_caching=False)
    eos = tokens.map(lambda tokenizer: (tokenizer.eos_id,))
    decoder = SplitDecoder(models, tokens, eos_ids=eos, config=config)  # type: ignore[arg-type]
    return tokens, decoder, models, Recorder(decoder)


def run_case(run: Run, made: tuple[Pair[Any], SplitDecoder, Pair[Scripted], Recorder]) -> None:
    """One request; no tick leaves a byte of a tag in the large lane."""
    tokens, decoder, models, recorder = made
    run.on(tokens, decoder, models)
    params = SamplingParams(temperature=0.0, max_tokens=60, seed=0)
    large = tokens.large.encode_bytes(b"abc")
    (choice,) = decoder._request({"prompt_token_ids": run.prompt}, large, params, None)
    decoder._queue([choice], None)
    clean = b"abc" + b"".join(piece for _, piece in run.content)
    while choice.output is None:
        decoder.engine.tick()
        if choice.sequence is not None and choice.output is None:
            lane = decoder.engine.scheduler.lane_ids(choice.sequence.handle, Role.LARGE)
            seen = b"".join(tokens.large.token_bytes[i] for i in lane)
            assert clean.startswith(seen.removesuffix(tokens.large.token_bytes[tokens.large.eos_id]))
    decoder._requests.clear()
    run.check(choice.output, recorder.lanes[choice.key], tokens)


def cases(name: str, seed: int) -> list[Run]:
    """Every cut of the opening tag beside some cut of the closing one and the other way round; merged edges first."""
    rng = Random(seed)
    table = TOKENIZERS[name]()[0].token_bytes
    openings, closings = cuts(table, OPEN, rng)[::-1], cuts(table, CLOSE, rng)[::-1]
    return [Run(o or rng.choice(openings), c or rng.choice(closings)) for o, c in zip_longest(openings, closings)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_token_that_merges_with_a_tag(name: str) -> None:
    made = make(name)
    runs = cases(name, 1)
    merged = max(i for i, run in enumerate(runs) if any(c.before + c.behind for c in (run.opening, run.closing)))
    for run in runs[: min(merged, 240) + 1] + Random(2).sample(runs, 20):
        run_case(run, made)
    assert [runner.cache.pool.in_use for runner in made[1].engine.runners] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_way_to_write_a_tag(name: str) -> None:
    made = make(name)
    for seed in range(3):
        for run in cases(name, seed):
            run_case(run, made)


def test_the_vocabulary_holds_dozens_of_merged_edges() -> None:
    table = byte_level().token_bytes
    assert sum(token.startswith(b">") for token in table) > 30
    assert sum(token.endswith((b"<", b"</")) for token in table) > 25
    assert len(splits(table, OPEN)) > 200
    assert len(splits(table, CLOSE)) > 400


def test_special_tokens_that_both_have_are_handed_over() -> None:
    small, large = byte_level(special=("<|one|>", "<|note|>")), byte_level(first=9, special=("<|note|>",))
    tokens = PairTokens(Pair(small, large))
    assert not tokens.same
    here, there, alone = small.id_of("<|note|>"), large.id_of("<|note|>"), small.id_of("<|one|>")
    assert isinstance(here, int) and isinstance(there, int) and isinstance(alone, int)  # noqa: PT018
    text = small.encode_bytes(b"ab")
    assert tokens.project(Role.SMALL, [*text, here, here, *text, alone]) == [
        *large.encode_bytes(b"ab"), there, there, *large.encode_bytes(b"ab<|one|>")
    ]  # fmt: skip
    half = large.encode_bytes("é".encode()[:1])
    found = tokens.stretches(Role.LARGE, [there, *half, there, *large.encode_bytes(b"a")], final=False)
    assert found == [(1, [here]), (1, small.encode_bytes("é".encode()[:1])), (1, [here]), (1, small.encode_bytes(b"a"))]


def test_a_prompt_in_ids_begins_with_each_models_own_bos() -> None:
    small = byte_level(special=("<s>", "<|note|>"), bos="<s>")
    text, note = small.encode_bytes(b"ab"), small.id_of("<|note|>")
    for large, lead in (
        (byte_level(first=9, special=("<|note|>", "<bos>"), bos="<bos>"), ["<bos>"]),
        (byte_level(first=9, special=("<|note|>",)), []),
    ):
        tokens = PairTokens(Pair(small, large))
        pair = prompt_ids(tokens, [small.bos_id, note, *text], None, Pair(small.size, large.size))  # type: ignore[list-item]
        assert pair[Role.LARGE] == [*map(large.id_of, [*lead, "<|note|>"]), *large.encode_bytes(b"ab")]


def test_a_tag_inside_a_character_stands_before_it() -> None:
    """The small model writes the first byte of a character, opens, and the large one writes the rest."""
    tokens, decoder, models, _ = make("byte-level")
    small = tokens.small
    halves = [small.token_bytes.index(byte) for byte in (b"\xc3", b"\xa9")]
    tag = decoder.tokens.tag_ids[0]
    models.small.says(3, [halves[0], *tag])
    models.large.says(4, [halves[1], small.eos_id])
    answer = decoder.generate([[5, 6, 7]], SamplingParams(temperature=0.0))[0].outputs[0]
    assert (answer.text, answer.raw_text) == ("é", "<bigmodel>é")
    assert [(span.model, span.start, span.end) for span in answer.spans] == [("small", 0, 1), ("large", 1, 3)]
