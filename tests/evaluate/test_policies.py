"""Rows by name, and labels turned into positions: with one tokenizer, with two, and with answers that depart."""

from __future__ import annotations

import pytest
from oracles.scripted import Stage
from oracles.tiny import PIECES, ToyTokenizer

from splitdecode import ControlTags, LargeOnly, RandomSwitch, RequestError, SamplingParams, SmallOnly, SplitDecoder
from splitdecode.evaluate.policies import (
    Rate,
    RejectAll,
    Row,
    kept,
    large_ranges,
    parse_rows,
    policies_of,
    positions,
)
from splitdecode.evaluate.tasks import Item, family_task
from splitdecode.split.outputs import CompletionOutput, ModelSpan
from splitdecode.split.policies import ForcedSpans
from splitdecode.split.roles import Pair
from splitdecode.split.tokens import PairTokens

GREEDY = SamplingParams(temperature=0.0, max_tokens=300, skip_special_tokens=False)


class Letters(ToyTokenizer):
    """Every letter a token of its own."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode_bytes(text.encode())


def tokens_of(*pieces: list[str]) -> PairTokens:
    made = [Letters(one) for one in pieces]
    return PairTokens(Pair(made[0], made[-1]))  # type: ignore[arg-type]


def answer(text: str, ids: list[int], *spans: tuple[str, int, int]) -> CompletionOutput:
    return CompletionOutput(0, text, text, ids, [ModelSpan(*span) for span in spans], "stop", None)


def test_rows_by_name() -> None:
    rows = parse_rows(" split, small-base,split ,large")
    assert rows == [Row("split"), Row("small", True), Row("large")]
    assert [row.name for row in rows] == ["split", "small-base", "large"]
    assert [row.checkpoint for row in rows] == ["tuned", "base", ""]
    assert {row.kind: row.hint for row in parse_rows("split,accept,reject,forced,small,large,random")} == {
        "split": True, "accept": True, "reject": True, "forced": True, "small": False, "large": False, "random": False,
    }  # fmt: skip
    assert not Row("forced", True).hint


@pytest.mark.parametrize("text", ["", " , ", "small,nobody", "split-base", "large-base"])
def test_unknown_rows_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"--policies: found .*expected some of small, large, split"):
        parse_rows(text)


def test_a_policy_each() -> None:
    tokens = tokens_of(PIECES)
    items = [Item("one", "", "", "abcab", ((1, 3),)), Item("two", "", "", "aab", ((0, 1), (2, 3)))]
    for name, kind in (("small-base", SmallOnly), ("large", LargeOnly), ("reject", RejectAll), ("accept", ControlTags)):
        found = policies_of(parse_rows(name)[0], items, tokens, None)
        assert [type(policy) for policy in found] == [kind, kind]
    random = policies_of(Row("random"), items, tokens, Rate(0.25, 4))
    assert random == [RandomSwitch(0.25, 4)] * 2
    forced = policies_of(Row("forced"), items, tokens, None)
    assert all(isinstance(policy, ForcedSpans) and policy.tags for policy in forced)
    assert [policy.spans for policy in forced if isinstance(policy, ForcedSpans)] == [[(1, 3)], [(0, 1), (2, 3)]]
    assert not policies_of(Row("forced", True), items, tokens, None)[0].tags
    with pytest.raises(RequestError, match="random-base: no share to switch at: add split to --policies"):
        policies_of(Row("random", True), items, tokens, None)
    with pytest.raises(RequestError, match="forced: three has no labelled solution"):
        policies_of(Row("forced"), [Item("three", "", "")], tokens, None)


def test_positions_are_counted_in_the_tokens_of_whoever_writes() -> None:
    """The small model has "el", "mod" and "big" as tokens; the large one spells every letter."""
    letters = ["<|eos|>", *"abcdeéglmoigT.<>/|s(\n"]
    item = Item("x", "", "", "abig.model", ((1, 4), (5, 8)))
    same = tokens_of(PIECES)
    spans, ids = positions(same, item)
    assert spans == [(1, 2), (3, 4)]  # a [big] . [mod] el
    assert b"".join(same.tokenizers.small.token_bytes[i] for i in ids) == b"abig.mod"
    apart = tokens_of(PIECES, letters)
    spans, ids = positions(apart, item)
    assert spans == [(1, 4), (5, 8)]
    assert [apart.tokenizers.large.token_bytes[i] for i in ids[1:4]] == [b"b", b"i", b"g"]
    assert positions(same, Item("none", "", "", "abc", ())) == ([], [])


def test_which_forced_spans_began_on_the_reference() -> None:
    tokens = tokens_of(PIECES)
    item = Item("x", "", "", "abcabc", ((1, 2), (4, 5)))
    ids = [tokens.tokenizers.small.encode_bytes(text.encode()) for text in ("abcabc", "accabc", "bbcabc", "ab")]
    assert [kept(tokens, item, answer("", one)) for one in ids] == [2, 1, 0, 1]


def test_characters_of_the_large_model() -> None:
    """Bytes become characters, an é cut between two authors is the first one's, an EOS has no text."""
    tokens = tokens_of(PIECES)
    table = tokens.tokenizers.small.token_bytes
    halves = [table.index(b"\xc3"), table.index(b"\xa9")]
    a, whole = table.index(b"a"), table.index("é".encode())
    text = "aééa"
    ids = [a, whole, *halves, a, 0]
    first = answer(text, ids, ("small", 0, 1), ("large", 1, 3), ("small", 3, 6))
    assert large_ranges(tokens, first) == [(1, 3)]
    second = answer(text, ids, ("small", 0, 3), ("large", 3, 6))
    assert large_ranges(tokens, second) == [(3, 4)]
    everything = answer(text, ids, ("large", 0, 6))
    assert large_ranges(tokens, everything) == [(0, 4)]
    assert large_ranges(tokens, answer("", [])) == []


def test_reject_all_draws_again_without_the_tag() -> None:
    stage = Stage()
    stage.small(0, "a", "<", "big", "model", ">", "<|eos|>")
    output = stage.run(RejectAll())
    assert output.metrics.rejected_openings >= 1
    assert (output.metrics.handoffs, output.metrics.large.tokens) == (0, 0)
    assert "<bigmodel>" not in output.outputs[0].raw_text


def test_forced_labels_own_exactly_what_is_labelled() -> None:
    """The embedded pair, one policy per prompt: every labelled character and no other is the large model's. The small
    model is the one before SFT: the tuned one has never seen a product without tags around it."""
    task = family_task("two-products", 3, 4)
    with SplitDecoder.demo(small="small-base") as decoder:
        policies = policies_of(Row("forced", True), task.items, decoder.tokens, None)
        prompts = [item.prompt for item in task.items]
        outputs = decoder.generate(prompts, GREEDY, handoff=policies)
        for item, output in zip(task.items, outputs, strict=True):
            (one,) = output.outputs
            assert one.text == item.reference
            assert tuple(large_ranges(decoder.tokens, one)) == item.hard
            assert kept(decoder.tokens, item, one) == 2
        with pytest.raises(RequestError, match="handoff: found 2 for 3 prompts, expected one each"):
            decoder.generate(prompts, GREEDY, handoff=policies[:2])
