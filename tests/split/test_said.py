"""Texts that actions put into an answer, in a checkpoint's tokens: its own `</think>` where it has one, no tag ever."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from oracles.scripted import Recorder, Scripted
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from splitdecode import CompletionOutput, EngineConfig, RequestOutput, SamplingParams, SplitDecoder, StopThinking
from splitdecode.demo import problems
from splitdecode.models.decoding import byte_of_character
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.roles import Pair

TAGS = ("<bigmodel>", "</bigmodel>")


def tokenizer(special: bool | None, *, tags: bool = False, **changes: bool) -> Tokenizer:
    """A token per byte, `</s>`, and `</think>`: special, added as text (as Qwen3 and R1-Distill have it), or none at
    all; tags: they and `<end>` are added tokens too; changes: AddedToken's."""
    vocab = {character: index for index, character in enumerate(sorted(byte_of_character()))}
    built = tokenizers.Tokenizer(models.BPE(vocab, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    if tags:
        built.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in (*TAGS, "<end>")])
    if special is not None:
        built.add_tokens([AddedToken("</think>", special=special, normalized=False, **changes)])
    return Tokenizer(json.loads(built.to_str()), {"eos_token": "</s>"}, None, "built")


class Said:
    """A small model that writes `so<end>`, reads what is put there, opens a span of one token, and ends."""

    def __init__(self, small: Tokenizer, large: Tokenizer, text: str) -> None:
        self.small = small
        self.models = Pair(Scripted(small.size), Scripted(large.size))
        self.decoder = SplitDecoder(
            self.models,  # type: ignore[arg-type]
            Pair(small, large),
            eos_ids=Pair((small.eos_id or 0,), (large.eos_id or 0,)),
            config=EngineConfig(kv_cache_memory="4MiB"),
            actions={"<end>": StopThinking(text)},
        )
        self.lanes = Recorder(self.decoder).lanes
        self.put = self.decoder.tokens.say(text)
        before = self.ids("ab", "so<end>")
        behind = len(before) + len(self.put)
        self.models.small.says(2, before[2:])
        self.models.small.says(behind, [*self.ids("x<bigmodel>"), *self.ids("yyyyyy")])
        self.models.large.says(0, [large.eos_id or 0] * 200)

    def ids(self, *texts: str) -> list[int]:
        return [i for text in texts for i in self.small.encode(text, add_special_tokens=False)]

    def run(self, **params: Any) -> RequestOutput:
        wanted = SamplingParams(temperature=0.0, max_tokens=80, seed=1, **params)
        return self.decoder.generate("ab", wanted)[0]


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_is_itself_and_its_text_is_skipped_where_special_tokens_are(skip: bool) -> None:
    one = tokenizer(True)
    it = Said(one, one, "</think>\n")
    think = one.id_of("</think>")
    assert it.put == [think, *it.ids("\n")]
    output = it.run(skip_special_tokens=skip)
    answer = output.outputs[0]
    assert answer.text == "so" + "</think>" * (not skip) + "\nx"
    assert answer.token_ids == [*it.ids("so"), think, *it.ids("\nx"), one.eos_id]
    assert output.metrics.handoffs == 1
    (lanes,) = it.lanes.values()
    assert lanes.small.count(think) == lanes.large.count(think) == 1
    assert lanes.large[: len(it.ids("abso")) + 3] == [*it.ids("abso"), think, *it.ids("\nx")]


def test_an_added_token_that_is_text_is_itself_and_shown() -> None:
    one = tokenizer(False)
    it = Said(one, one, "</think>\n")
    answer = it.run().outputs[0]
    assert it.put == [one.id_of("</think>"), *it.ids("\n")]
    assert answer.text == "so</think>\nx"
    assert one.id_of("</think>") in answer.token_ids


@pytest.mark.parametrize("special", [True, False])
def test_no_blanks_are_lost_to_a_token_that_takes_them_in_a_prompt(special: bool) -> None:
    """Its own bytes would not bring them back."""
    one = tokenizer(special, lstrip=True, rstrip=True)
    ids = one.encode_inserted("a  </think>\nb")
    assert b"".join(one.token_bytes[i] for i in ids) == b"a  </think>\nb"
    assert ids.count(one.id_of("</think>") or -1) == 1


@pytest.mark.parametrize("large", [True, False, None])
def test_a_token_the_large_model_lacks_reaches_nobody(large: bool | None) -> None:
    """Where ids are handed over as they are, both must know them; else the large model reads the text."""
    small, other = tokenizer(True), tokenizer(large)
    it = Said(small, other, "</think>\n")
    assert (small.id_of("</think>") in it.put) == (large is not None)
    answer = it.run(skip_special_tokens=False).outputs[0]
    assert (answer.text, answer.finish_reason) == ("so</think>\nx", "stop")
    (lanes,) = it.lanes.values()
    assert b"".join(other.token_bytes[i] for i in lanes.large).startswith(b"abso</think>\nx")


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize(
    "text", ["(<bigmodel>)", "</bigmodel>.", "<end><end>", "</think><bigmodel>", "<big", "-</bigmodel"]
)
def test_a_tag_in_the_text_is_text(text: str, tags: bool) -> None:
    """It begins no span and no action, not even together with what the model writes behind it; and it is written in
    plain tokens, which are not the model's own tag where that is one token."""
    one = tokenizer(True, tags=tags)
    it = Said(one, one, text)
    assert b"".join(one.token_bytes[i] for i in it.put) == text.encode()
    assert not set(it.put) & {one.id_of(tag) for tag in (*TAGS, "<end>")}
    output = it.run(skip_special_tokens=False)
    answer = output.outputs[0]
    assert answer.text == f"so{text}x"
    assert answer.raw_text == f"so<end>{text}x<bigmodel>"
    assert output.metrics.handoffs == 1


def test_a_tag_that_was_begun_in_the_text_is_not_completed_behind_it() -> None:
    one = tokenizer(None)
    it = Said(one, one, "<big")
    it.models.small.says(len(it.ids("abso<end>")) + len(it.put), [*it.ids("model>z"), one.eos_id or 0])
    output = it.run()
    assert output.outputs[0].text == "so<bigmodel>z"
    assert output.metrics.handoffs == 0


def test_what_was_written_is_not_put_there_again() -> None:
    one = tokenizer(True)
    it = Said(one, one, "</think>\n")
    it.models.small.says(2, [one.id_of("</think>") or 0, *it.ids("<end>x"), one.eos_id or 0])
    answer = it.run().outputs[0]
    assert answer.text == "x"
    assert answer.raw_text == "<end>x"


def carried(text: str) -> CompletionOutput:
    """The embedded pair, where the small model writes the word."""
    params = SamplingParams(temperature=0.0, max_tokens=160, skip_special_tokens=False)
    with SplitDecoder.demo(actions={"carry": StopThinking(text)}) as decoder:
        return decoder.generate(problems(1, 7)[0].prompt, params)[0].outputs[0]


def test_the_embedded_pair_ends_its_thinking() -> None:
    answer = carried("</think>\n")
    assert answer.finish_reason in ("stop", "length")
    assert "carry</think>\n" in answer.raw_text


def test_a_text_that_cannot_be_spelled_ends_its_answer_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tokenizer(True)
    it = Said(one, one, "<bigmodel>")
    spell = one.encode_inserted
    lacking = [i for i, data in enumerate(one.token_bytes) if data == b"<"]
    monkeypatch.setattr(one, "encode_inserted", lambda text, avoid=(): spell(text, avoid=[*avoid, *lacking]))
    answer = it.run().outputs[0]
    assert answer.finish_reason == "error"
    assert "no plain token" in str(answer.stop_reason)
