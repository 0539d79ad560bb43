"""The rules of the hand-off, one test each, on scripted models: what is written is known, so is what must follow."""

from __future__ import annotations

import pytest
from oracles.scripted import EOS, IDS, Stage, ids
from oracles.tiny import PIECES, WHOLE

from splitdecode import ControlTags, ForcedSpans, LargeOnly, SamplingParams, SmallOnly


def test_opening_drops_the_rest_of_its_last_token_and_keeps_what_precedes_it() -> None:
    stage = Stage().small(0, "a", "(<", "big", "model", ">T").large(0, "a", "(", "b", "<|eos|>")
    stage.small(5, "d")
    output = stage.run()
    answer = output.outputs[0]
    assert answer.raw_text == "a(<bigmodel>b"
    assert answer.token_ids == [*ids("a", "(", "b"), EOS]
    assert (ids("a", "(<", "big", "model", ">", "b"), ids("a", "(", "b", "<|eos|>")) in stage.lanes
    assert not any(IDS["T"] in lane for pair in stage.lanes for lane in pair)


def test_closing_inside_a_merged_token_keeps_its_content_as_the_small_models() -> None:
    stage = Stage().small(0, "a", "<", "big", "model", ">").large(0, "a", "b", "e.", "c", "d", "c", "c")
    stage.small(5, "b", ".</", "big", "model", ">\n\n", "T", "<|eos|>")
    answer = stage.run().outputs[0]
    assert answer.raw_text == "a<bigmodel>b.</bigmodel>\n\nT"
    assert [(s.model, s.start, s.end) for s in answer.spans] == [("small", 0, 1), ("large", 1, 2), ("small", 2, 6)]
    assert stage.lanes[-1][1] == ids("a", "b")  # the large lane was cut back to what stands


def test_a_span_holds_at_least_one_large_token() -> None:
    stage = Stage().small(0, "<", "big", "model", ">", "</", "big").large(0, "b", "c")
    stage.small(5, "</", "big", "model", ">", "T", "<|eos|>")
    assert stage.run().outputs[0].raw_text == "<bigmodel>b</bigmodel>T"


@pytest.mark.parametrize("interval", [1, 2, 4, 8])
def test_the_first_closing_prefix_counts_whatever_the_interval(interval: int) -> None:
    stage = Stage(read_interval=interval).small(0, "<", "big", "model", ">").large(0, "b", "c", "b", "c", "b", "c")
    stage.small(4, "T", "c")
    stage.models.small.says(3 + 6, ids("</", "big", "model", ">", "a", "<|eos|>"))
    answer = stage.run().outputs[0]
    assert answer.raw_text == "<bigmodel>bc</bigmodel>a"


def test_a_candidate_that_dies_leaves_the_large_text_standing() -> None:
    stage = Stage(read_interval=4).small(0, "<", "big", "model", ">")
    stage.large(0, "b", "c", "b", "c", "<|eos|>")
    stage.small(4, "T", "</", "a", "T", "T", "T")  # at prefix 1: `</`, then `a`
    answer = stage.run().outputs[0]
    assert answer.raw_text == "<bigmodel>bcbc"
    assert answer.finish_reason == "stop"


def test_the_close_draw_precedes_a_large_eos() -> None:
    stage = Stage(read_interval=8).small(0, "<", "big", "model", ">").large(0, "b", "<|eos|>")
    stage.small(4, "T", "</", "big", "model", ">", "a", "<|eos|>")
    assert stage.run().outputs[0].raw_text == "<bigmodel>b</bigmodel>a"


def test_a_large_eos_ends_the_answer() -> None:
    stage = Stage().small(0, "<", "big", "model", ">").large(0, "<|eos|>")
    answer = stage.run().outputs[0]
    assert (answer.raw_text, answer.finish_reason, answer.token_ids) == ("<bigmodel>", "stop", [EOS])


def test_a_small_eos_while_reading_is_not_closing() -> None:
    stage = Stage().small(0, "<", "big", "model", ">").large(0, "b", "c", "<|eos|>")
    stage.small(4, "T", "<|eos|>", "<|eos|>")
    assert stage.run().outputs[0].raw_text == "<bigmodel>bc"


@pytest.mark.parametrize("cap", [1, 3, 5])
def test_a_span_is_closed_by_force_at_max_span(cap: int) -> None:
    stage = Stage(max_span=cap, read_interval=2).small(0, "<", "big", "model", ">").large(0, *"bcbcbcbc")
    stage.models.small.says(3 + 4, ids(*"TTTTTTTTTTTTT"))
    stage.models.small.says(3 + 4 + cap + 4, ids("a", "<|eos|>"))
    answer = stage.run().outputs[0]
    assert answer.raw_text == f"<bigmodel>{'bcbcbcbc'[:cap]}</bigmodel>a"
    assert stage.lanes[-1][0][: 8 + cap] == [
        *ids("<", "big", "model", ">"),
        *ids(*"bcbcbcbc"[:cap]),
        *ids("</", "big", "model", ">"),
    ]


def test_a_stray_closing_tag_is_not_content_and_never_reaches_the_large_lane() -> None:
    stage = (
        Stage().small(0, "a", ".</", "big", "model", "></", "b", "<", "big", "model", ">").large(0, "a", ".", ">", "</")
    )
    stage.models.large.says(3, ids("a", ".", "</", "b", "c", "<|eos|>"))
    stage.models.small.says(3 + 10, ids("T", "T", "T"))
    answer = stage.run().outputs[0]
    assert answer.raw_text == "a.</bigmodel></b<bigmodel>c"
    assert answer.text == "a.</bc"
    assert stage.lanes[-1][1][:4] == ids("a", ".", "</", "b")


def test_tag_text_the_large_model_writes_is_content() -> None:
    stage = (
        Stage()
        .small(0, "<", "big", "model", ">")
        .large(0, "<", "big", "model", ">", "</", "big", "model", ">", "<|eos|>")
    )
    stage.models.small.says(3 + 4, ids(*"TTTTTTTTTTTT"))
    answer = stage.run().outputs[0]
    assert answer.text == "<bigmodel></bigmodel>"
    assert answer.raw_text == "<bigmodel>" + answer.text


def test_whole_tag_ids_are_masked_in_the_large_model() -> None:
    stage = Stage(PIECES + WHOLE).small(0, "<bigmodel>").large(0, "b")
    stage.models.large.draws(3 + 0, {IDS["</bigmodel>"]: 5.0, IDS["<bigmodel>"]: 4.0, IDS["b"]: 1.0})
    stage.models.small.says(3 + 2, ids("</bigmodel>", "a", "<|eos|>"))
    answer = stage.run().outputs[0]
    assert answer.raw_text == "<bigmodel>b</bigmodel>a"


def test_an_opening_without_room_in_the_large_context_is_refused_and_drawn_again() -> None:
    stage = Stage(page_size=1, max_model_len=32).small(0, "a", "<", "big", "model", ">", "<|eos|>")
    stage.models.small.draws(3 + 1, {IDS["<"]: 9.0, IDS["</"]: 8.0, IDS["b"]: 1.0})  # </ may begin a closing tag only
    made = stage.decoder._request(stage.prompt, ids(*["a"] * 31), SamplingParams(temperature=0.0, max_tokens=9), None)
    stage.decoder._queue(made, None)
    while made[0].output is None:
        stage.decoder.engine.tick()
    assert made[0].output.raw_text == "a</bigmodel>"
    assert made[0].output.text == "a"
    assert made[0].metrics.rejected_openings == 1
    assert made[0].metrics.large.forwards == 0


def test_a_refused_opening_keeps_what_precedes_it_in_its_first_token() -> None:
    stage = Stage(page_size=1, max_model_len=32).small(0, "a", "(<", "big", "model", ">", "<|eos|>")
    made = stage.decoder._request(stage.prompt, ids(*["a"] * 30), SamplingParams(temperature=0.0, max_tokens=9), None)
    stage.decoder._queue(made, None)
    while made[0].output is None:
        stage.decoder.engine.tick()
    assert made[0].output.raw_text == "a(bigmodel>"  # position 2 says `big` whatever came before


def test_a_full_small_context_finishes_with_length() -> None:
    stage = Stage(max_model_len=8)
    stage.models.small.says(3, ids(*"aaaaaaaaaaaaaaaa"))
    answer = stage.run().outputs[0]
    assert (answer.text, answer.finish_reason) == ("aaaaa", "length")


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_in_what_a_full_context_released_is_a_stop(include: bool) -> None:
    """The context is full inside a possible tag: its bytes were text after all, and hold a stop string."""
    stage = Stage(max_model_len=8).small(0, "a", "a", "<", "big", "model")
    answer = stage.run(stop=["od", "mode", "zz"], include_stop_str_in_output=include).outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "od")
    assert answer.text == ("aa<bigmod" if include else "aa<bigm")


def test_stop_strings_cross_authors_and_beat_the_close_draw() -> None:
    stage = Stage(read_interval=4).small(0, "a", "<", "big", "model", ">").large(0, "a", "b", "c", "b", "c")
    stage.small(6, "</", "big", "model", ">", "T", "<|eos|>")
    answer = stage.run(stop=["ab"]).outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("", "stop", "ab")
    assert answer.raw_text == ""


def test_max_tokens_counts_both_models_tokens() -> None:
    stage = Stage(read_interval=8).small(0, "a", "<", "big", "model", ">").large(0, "a", *"bcbcbcbc")
    stage.models.small.says(3 + 5, ids(*"TTTTTTTTTTT"))
    answer = stage.run(max_tokens=4).outputs[0]
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("abcb", "length", 4)


def test_catch_up_is_batched_and_never_token_by_token() -> None:
    stage = (
        Stage(max_num_batched_tokens=16, max_model_len=128)
        .small(0, *["a"] * 60, "<", "big", "model", ">")
        .large(60, "b", "<|eos|>")
    )
    stage.models.small.says(3 + 64, ids("T", "T"))
    output = stage.run(max_tokens=100)
    assert stage.models.large.forwards == [16, 16, 16, 15, 1]  # ceil(63 / 16) forwards catch up, one decodes
    assert output.metrics.large.catch_up_tokens == 60
    assert output.metrics.large.catch_up_forwards == 4


def test_forced_spans_own_exactly_their_positions() -> None:
    stage = Stage()
    stage.models.small.says(3, ids(*"abcabcabcabc"))
    stage.models.large.says(3, ids(*"TTTTTTTTTTTT"))
    answer = stage.run(ForcedSpans([(2, 4), (4, 5), (7, 8)]), max_tokens=10).outputs[0]
    assert answer.text == "abTTTcaTca"
    assert answer.raw_text == answer.text
    assert [(s.start, s.end) for s in answer.spans if s.model == "large"] == [(2, 5), (7, 8)]
    assert stage.lanes[-1][0][:8] == ids(*"abTTTcaT")


def test_forced_spans_reading_along_drop_what_was_written_beyond() -> None:
    stage = Stage(read_interval=4)
    stage.models.small.says(3, ids(*"ab", *"cccccccccccccccccccc"))
    stage.models.large.says(3, ids(*"TTTTTTTTTTTTTTTT"))
    output = stage.run(ForcedSpans([(2, 7)], tags=True, reads_along=True), max_tokens=11)
    answer = output.outputs[0]
    assert answer.raw_text == "ab<bigmodel>TTTTT</bigmodel>cccc"
    assert output.metrics.large.discarded_tokens == 3
    assert output.metrics.small.read_tokens >= 8


def test_small_only_ignores_tags_and_large_only_never_runs_the_small_model() -> None:
    stage = Stage().small(0, "a", "<", "big", "model", ">", "b", ".</", "big", "model", ">", "<|eos|>")
    stage.models.large.says(3, ids("T", "T", "<|eos|>"))
    answer = stage.run(SmallOnly()).outputs[0]
    assert (answer.raw_text, answer.text) == ("a<bigmodel>b.</bigmodel>", "ab.")
    assert stage.models.large.forwards == []
    output = stage.run(LargeOnly())
    assert output.outputs[0].text == "TT"
    assert output.metrics.small.forwards == 0


def test_an_unfinished_tag_at_the_end_was_text_after_all() -> None:
    stage = Stage().small(0, "a", "<", "big", "<|eos|>")
    assert stage.run().outputs[0].text == "a<big"


def test_provisional_tokens_and_partial_tags_are_not_streamed() -> None:
    stage = Stage(read_interval=4).small(0, "a", "<", "big", "model", ">").large(0, "a", "b", "c", "b", "c")
    stage.small(6, "</", "big", "model", ">", "T", "<", "big", "<|eos|>")
    seen = ""
    for delta in stage.decoder.stream(stage.prompt, SamplingParams(temperature=0.0, max_tokens=30)):
        seen += delta.text
        assert "ab" + "c" not in seen  # the large model wrote `bc`, the small one closed after `b`
        assert "abT<big".startswith(seen)
    assert seen == "abT<big"


def test_policies_are_checked() -> None:
    stage = Stage()
    with pytest.raises(Exception, match="handoff"):
        stage.run("tags")
    with pytest.raises(Exception, match="spans"):
        ForcedSpans([(3, 2)])
    with pytest.raises(Exception, match="probe_tokens"):
        ControlTags(probe_tokens=0)
