"""Tags of the registry, on scripted models: what each does to the text and to both lanes, and that unused ones cost
nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from oracles.scripted import EOS, Stage, ids
from oracles.tiny import PIECES
from oracles.worlds import make_decoder, make_worlds, random_params, random_policy

from splitdecode import (
    ControlAction,
    DraftLength,
    ForcedSpans,
    LargeOnly,
    RequestError,
    SamplingParams,
    SplitDecoder,
    StopThinking,
    ThinkingBudget,
)
from splitdecode._C import Event
from splitdecode.families import problems
from splitdecode.split.sequence import SplitSequence

OPEN = ("<", "big", "model", ">")
CLOSE = ("</", "big", "model", ">")
ACTIONS = {"<d>": StopThinking("|s"), "<i>": DraftLength(16), "<o>": ThinkingBudget(3, "|s")}


class Nothing(ControlAction):
    """A tag without a meaning."""

    def apply(self, sequence: SplitSequence) -> list[Event]:
        return []


class Broken(ControlAction):
    def apply(self, sequence: SplitSequence) -> list[Event]:
        raise ValueError("not today")


@dataclass(frozen=True)
class Later(ControlAction):
    """Does something else, so many tokens later."""

    tokens: int
    action: ControlAction

    def apply(self, sequence: SplitSequence) -> list[Event]:
        sequence.later(self.tokens, self.action)
        return []


def stage(actions: dict[str, ControlAction] | None = None, **engine: Any) -> Stage:
    return Stage(actions=ACTIONS if actions is None else actions, **engine)


@pytest.mark.parametrize("last", [">", ">T", ">\n\n", "></"])
@pytest.mark.parametrize(("first", "kept"), [("<", ()), ("(<", ("(",))])
def test_the_tag_is_left_out_and_what_follows_in_its_token_is_dropped(first: str, kept: tuple[str], last: str) -> None:
    it = stage().small(0, "a", first, "i", last, "b", "<|eos|>")
    answer = it.run().outputs[0]
    assert answer.text == "a" + "".join(kept) + "b"
    assert answer.raw_text == "a" + "".join(kept) + "<i>b"
    assert answer.token_ids == [*ids("a", *kept, "b"), EOS]
    assert it.lanes[-1][0][:5] == ids("a", first, "i", ">", "b")


def test_the_tag_never_reaches_the_large_lane_and_is_text_where_the_large_model_writes_it() -> None:
    it = stage().small(0, "a", "<", "i", ">", "b", *OPEN).large(0, "a", "b", "<", "d", ">", "<|eos|>")
    it.small(9, *"TTTT")
    answer = it.run().outputs[0]
    assert answer.text == "ab<d>"
    assert answer.raw_text == "a<i>b<bigmodel><d>"
    assert it.lanes[-1][1][:2] == ids("a", "b")


def test_stop_thinking_puts_its_text_once_and_the_large_model_reads_it() -> None:
    it = stage().small(0, "a", "<", "d", ">T").small(6, "b", "<", "d", ">", *OPEN).small(14, "T", "T")
    output = it.large(4, "c", "<|eos|>").run()
    answer = output.outputs[0]
    assert answer.raw_text == "a<d>|sb<d><bigmodel>c"
    assert answer.text == "a|sbc"
    assert [(s.model, s.start, s.end) for s in answer.spans] == [("small", 0, 4), ("large", 4, 6)]
    assert it.lanes[-1][1][:4] == ids("a", "|", "s", "b")


def test_stop_thinking_of_blanks_alone_puts_them_too() -> None:
    it = stage({"<d>": StopThinking("\n")}).small(0, "a", "<", "d", ">").small(5, "b", "<", "d", ">", "c", "<|eos|>")
    assert it.run().outputs[0].text == "a\nbc"


def test_a_special_token_counts_as_written_also_where_it_shows_no_text() -> None:
    mark = len(PIECES)
    it = Stage([*PIECES, "|s"], special=(0, mark), actions=ACTIONS).small(0, "a")
    it.models.small.says(3 + 1, [mark, *ids("<", "d", ">", "b", "<|eos|>")])
    assert it.run().outputs[0].text == "ab"


def test_a_text_without_room_ends_the_answer() -> None:
    it = stage(max_model_len=8).small(0, "a", "<", "d", ">").small(4, "T", "T")
    answer = it.run().outputs[0]
    assert (answer.text, answer.finish_reason) == ("a", "length")


def test_a_text_counts_for_stop_strings_and_max_tokens() -> None:
    it = stage().small(0, "a", "<", "d", ">").small(6, "b", "<|eos|>")
    answer = it.run(stop=["a|"]).outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("", "stop", "a|")
    answer = it.run(max_tokens=2).outputs[0]
    assert (answer.text, answer.finish_reason) == ("a|", "length")


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_a_budget_acts_exactly_so_many_content_tokens_later(tokens: int) -> None:
    it = stage({"<o>": ThinkingBudget(tokens, "|s")}).small(0, "a", "<", "o", ">", *"bcTbcTbc")
    it.small(4 + tokens + 2, "d", "<|eos|>")
    answer = it.run().outputs[0]
    assert answer.raw_text == "a<o>" + "bcTbcTbc"[:tokens] + "|sd"


def test_a_budget_acts_within_what_was_held_as_a_possible_tag() -> None:
    it = stage().small(0, "<", "o", ">", "a", "b", "<", "c").small(8, "d", "<|eos|>")
    assert it.run().outputs[0].raw_text == "<o>ab<|sd"


def test_two_actions_due_at_one_place_both_happen_in_their_order() -> None:
    actions = {"<o>": ThinkingBudget(2, "|s"), "<i>": ThinkingBudget(1, "|m")}
    it = stage(actions).small(0, "<", "o", ">", "a", "<", "i", ">", "b").small(12, "c", "<|eos|>")
    assert it.run().outputs[0].raw_text == "<o>a<i>b|s|mc"


def test_nothing_is_put_behind_an_answer_that_an_action_ended() -> None:
    actions = {"<o>": ThinkingBudget(2, "|s|s|s"), "<i>": ThinkingBudget(1, "|")}
    it = stage(actions, max_model_len=14).small(0, "<", "o", ">", "a", "<", "i", ">", "b", *"TTTT")
    answer = it.run().outputs[0]
    assert (answer.text, answer.finish_reason) == ("ab", "length")


@pytest.mark.parametrize("last", [">", ">\n\n", ">T"])
@pytest.mark.parametrize("interval", [1, 4])
def test_a_budget_that_ran_out_in_a_span_acts_when_the_pen_returns(last: str, interval: int) -> None:
    """The rest of the closing tag's token stands before the text, and once."""
    it = stage({"<o>": ThinkingBudget(2, "|s")}, read_interval=interval)
    it.small(0, "<", "o", ">", "a", *OPEN).large(0, "a", "b", "c", "b", "c", "c")
    it.small(9, "T", "T", *CLOSE[:3], last).small(17, "c", "<|eos|>")
    answer = it.run().outputs[0]
    assert answer.raw_text == f"<o>a<bigmodel>bcb</bigmodel>{last[1:]}|sc"
    assert it.lanes[-1][0][14:17] == ids(last, "|", "s")


def test_an_action_due_changes_nothing_about_the_policys_marks() -> None:
    """A span refused at its start belongs to the small model to its end: what is due inside asks for no other."""
    it = stage().small(0, "<", "o", ">", *"abc").small(8, *"TTTTTT")
    output = it.run(ForcedSpans([(1, 9)]), max_tokens=8, max_offloads=0)
    assert output.outputs[0].text == "abc|sTTT"
    assert output.metrics.budget_rejections == {"offloads": 1}
    assert it.models.large.forwards == []


def test_a_span_begins_where_what_precedes_the_tag_reaches_it() -> None:
    it = stage().small(0, "a", "(<", "i", ">", *"TTTTT").large(2, *"bcb")
    answer = it.run(ForcedSpans([(2, 4)]), max_tokens=6).outputs[0]
    assert answer.raw_text == "a(<i>bcTT"


def test_a_span_begins_behind_a_text_that_reaches_into_it() -> None:
    it = stage().small(0, "a", "<", "d", ">", *"TTTTTTTT").large(3, *"bcb")
    answer = it.run(ForcedSpans([(2, 5)]), max_tokens=7).outputs[0]
    assert answer.raw_text == "a<d>|sbcTT"


def test_draft_length_takes_fewer_steps_for_the_same_text() -> None:
    found = {}
    for name, action in {"plain": Nothing(), "longer": DraftLength(16)}.items():
        it = stage({"<i>": action}, read_interval=1).small(0, "<", "i", ">", *OPEN).large(0, *"bcbcbcbc", "<|eos|>")
        output = it.small(7, *"TTTTTTTTTTTT").run()
        found[name] = (output.outputs[0].raw_text, output.metrics.small.forwards)
    assert found["plain"][0] == found["longer"][0] == "<i><bigmodel>bcbcbcbc"
    assert found["longer"][1] <= found["plain"][1] - 6


def test_draft_length_is_its_own_requests() -> None:
    it = stage(read_interval=1).small(0, "<", "i", ">", "a", "<|eos|>")
    it.run()
    made = it.decoder._request(it.prompt, None, SamplingParams(temperature=0.0, max_tokens=1), None)
    it.decoder._queue(made, None)
    it.decoder.engine.tick()
    assert it.decoder.config.read_interval == 1
    assert made[0].sequence is not None
    assert made[0].sequence.read_interval == 1


@pytest.mark.parametrize("action", [Broken(), Later(1, Broken())])
def test_what_an_action_raises_ends_its_request_only(action: ControlAction) -> None:
    it = stage({"<d>": action}).small(0, "a", "<", "d", ">", "b", "c").small(20, "a", "b", "c", "<|eos|>")
    params = SamplingParams(temperature=0.0, max_tokens=20)
    bad, good = it.decoder.generate([it.prompt, ids(*"abcabcabcabcabcabcabcab")], params)
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].stop_reason == "ValueError: not today"
    assert bad.outputs[0].raw_text in ("a<d>", "a<d>b")
    assert (good.outputs[0].text, good.outputs[0].finish_reason) == ("abc", "stop")
    assert [runner.cache.pool.in_use for runner in it.decoder.engine.runners] == [0, 0]


def test_the_large_model_alone_acts_on_nothing() -> None:
    it = stage().large(0, "a", "<", "d", ">", "<|eos|>")
    assert it.run(LargeOnly()).outputs[0].raw_text == "a<d>"


def test_unused_actions_change_no_bit(tmp_path_factory: pytest.TempPathFactory) -> None:
    worlds = make_worlds(tmp_path_factory.mktemp("pairs"))
    unused = {"<a|s|": StopThinking("|s"), "</b|gs>": DraftLength(3), ">|iTs": ThinkingBudget(2, "|s")}
    engine = {"max_model_len": 64, "page_size": 4, "max_num_seqs": 3, "read_interval": 3}
    handoffs = 0
    for name, world in worlds.items():
        rng = np.random.default_rng(7)
        prompts = [{"prompt_token_ids": [int(i) for i in rng.integers(1, 6, size=6)]} for _ in range(5)]
        params = [random_params(rng, world.tokenizers) for _ in prompts]
        policies = [random_policy(rng) for _ in prompts]
        plain = make_decoder(world, engine)
        other = SplitDecoder(
            world.models,
            world.tokenizers,
            eos_ids=plain.models.map(lambda _: (0,)),
            config=plain.config,
            actions=unused,
        )
        for prompt, sampling, policy in zip(prompts, params, policies, strict=True):
            one, two = (d.generate(prompt, sampling, handoff=policy)[0] for d in (plain, other))
            assert not any(tag in one.outputs[0].raw_text for tag in unused), name
            assert one.outputs == two.outputs
            handoffs += one.metrics.handoffs
    assert handoffs > 5
    assert any(p.temperature for p in params)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({}, None),
        (["<d>"], "expected a mapping"),
        ({f"<{i}>": Nothing() for i in "abcdefg"}, "found 7, expected at most 6"),
        ({"": Nothing()}, "found the tag ''"),
        ({"<d>": Nothing(), 3: Nothing()}, "found the tag 3"),
        ({"<d>": "stop"}, r"actions\['<d>'\]: found str"),
        ({"<d>": Nothing(), "(<d>": Nothing()}, "neither holds the other"),
        ({"bigmodel": Nothing()}, "neither holds the other"),
        ({"x</bigmodel>": Nothing()}, "neither holds the other"),
    ],
)
def test_a_registry_is_checked(actions: Any, message: str | None) -> None:
    if message is None:
        Stage(actions=actions)
        return
    with pytest.raises(RequestError, match=message):
        Stage(actions=actions)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (StopThinking, ("",), "text"),
        (StopThinking, (3,), "text"),
        (ThinkingBudget, (0,), "tokens"),
        (ThinkingBudget, (True,), "tokens"),
        (ThinkingBudget, (3, ""), "text"),
        (DraftLength, (0,), "tokens"),
        (DraftLength, (4097,), "tokens"),
        (DraftLength, (2.0,), "tokens"),
    ],
)
def test_an_action_is_checked(kind: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}: found"):
        kind(*arguments)


def test_the_large_model_may_run_in_another_precision() -> None:
    prompt = problems(1, 7)[0].prompt
    params = SamplingParams(temperature=0.0, max_tokens=80)
    answers = []
    for dtype in ("float32", ("float32", "float64")):
        with SplitDecoder.demo(dtype=dtype) as decoder:
            output = decoder.generate(prompt, params)[0]
            answers.append(output.outputs[0].token_ids)
            precisions = [str(model.dtype) for model in decoder.models]
    assert precisions == ["torch.float32", "torch.float64"]
    assert output.metrics.handoffs > 0
    assert answers[0] == answers[1]
