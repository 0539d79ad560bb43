"""Requests on scripted pairs: sampling parameters one by one, streams, aborts, and faults that end only their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from oracles.flaky import EOS, IDS, PROMPT, A, B, Broken, C, build, opened, pages
from oracles.tiny import TAGS

from splitdecode import ControlTags, HandoffPolicy, LargeOnly, RequestError, SamplingParams, SmallOnly, SplitDecoder
from splitdecode.requests import default_params
from splitdecode.split import engine
from splitdecode.split.roles import Pair, Role

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}


def always(model: Any, logits: Mapping[int, float]) -> None:
    for position in range(len(model.table)):
        model.draws(position, logits)


def text(decoder: SplitDecoder, handoff: HandoffPolicy | None = None, **params: Any) -> str:
    found: str = decoder.generate(PROMPT, SamplingParams(**{**GREEDY, **params}), handoff=handoff)[0].outputs[0].text
    return found


# ---- parameters


def test_what_the_checkpoint_says_is_the_default() -> None:
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05, "max_new_tokens": 7}
    found = default_params(said)
    assert found == SamplingParams(temperature=0.6, top_p=0.9, repetition_penalty=1.05, max_tokens=7)
    assert default_params({**said, "do_sample": False}) == SamplingParams(
        temperature=0.0, repetition_penalty=1.05, max_tokens=7
    )
    assert default_params({}) == SamplingParams()


def test_a_name_in_use_is_not_given_again() -> None:
    decoder = build()
    stream = decoder.stream(PROMPT, SamplingParams(**GREEDY), request_id="request-1")
    assert len(decoder.generate([PROMPT] * 3, SamplingParams(**GREEDY))) == 3
    with pytest.raises(RequestError, match="request_id: 'request-1' is in use"):
        decoder.stream(PROMPT, request_id="request-1")
    assert "".join(delta.text for delta in stream) == text(decoder)
    assert decoder.engine.unfinished == 0


def test_a_salt_that_is_no_text() -> None:
    with pytest.raises(RequestError, match="cache_salt: found"):
        build().generate({"prompt_token_ids": PROMPT, "cache_salt": "\ud800"})


@pytest.mark.parametrize("tags", [("<a>", "<a>"), ("<a", "<a>"), ("", "x"), ("x",), "xy", ("x", 1)])
def test_tags_are_checked(tags: Any) -> None:
    with pytest.raises(RequestError, match="tags: found "):
        SplitDecoder.demo(tags=tags)


@pytest.mark.parametrize("wrong", [{"dtype": ("float32",)}, {"revisions": (None, None, None)}])
def test_one_for_each_model(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(RequestError, match=f"{name}: found {len(wrong[name])}, expected one for each"):
        SplitDecoder.demo(**wrong)


@pytest.mark.parametrize("policy", [SmallOnly(), LargeOnly()])
def test_penalties_count_what_was_written(policy: HandoffPolicy) -> None:
    decoder = build()
    letter, other = IDS["T"], IDS["("]
    for model in decoder.models:
        always(model, {letter: 1.0, other: 0.9})
    wanted = {"max_tokens": 4, "handoff": policy}
    assert text(decoder, **wanted) == "TTTT"
    assert text(decoder, presence_penalty=0.5, **wanted) == "T(TT"  # both are lowered once, T still leads
    assert text(decoder, frequency_penalty=0.3, **wanted) == "T(T("
    assert text(decoder, repetition_penalty=1.5, **wanted) == "T(TT"
    for model in decoder.models:
        always(model, {A: 1.0, other: 0.9})
    assert text(decoder, repetition_penalty=1.5, **wanted) == "(aaa"  # the prompt counts for this one
    assert text(decoder, presence_penalty=0.5, **wanted) == "a(aa"


def test_logit_bias_min_tokens_and_ignore_eos() -> None:
    decoder = build()
    always(decoder.models.small, {EOS: 3.0, A: 2.0, B: 1.0})
    assert text(decoder) == ""
    assert text(decoder, min_tokens=3) == "aaa"
    assert text(decoder, min_tokens=3, logit_bias={A: -10.0}) == "bbb"
    (output,) = decoder.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    answer = output.outputs[0]
    assert (answer.token_ids, answer.text, answer.finish_reason) == ([EOS] * 3, "", "length")
    (output,) = decoder.generate(
        PROMPT, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, skip_special_tokens=False)
    )
    assert output.outputs[0].text == "<|eos|>" * 2


def test_ids_that_mean_two_things_are_refused() -> None:
    decoder = build()
    table = decoder.tokenizers.large.token_bytes
    table[A], table[B] = table[B], table[A]
    pair = SplitDecoder(decoder.models, decoder.tokenizers, eos_ids=Pair((EOS,), (EOS,)), config=decoder.config)
    assert not pair.tokens.same
    for wrong in ({"stop_token_ids": [A]}, {"logit_bias": {A: 1.0}}):
        with pytest.raises(RequestError, match="found id 1, b'a' to the small model and b'b' to the large one"):
            pair.generate(PROMPT, SamplingParams(**wrong))
    assert pair.generate(PROMPT, SamplingParams(stop_token_ids=[C], max_tokens=1))
    assert decoder.engine.unfinished == pair.engine.unfinished == 0


@pytest.mark.parametrize("policy", [SmallOnly(), LargeOnly(), ControlTags()])
def test_ids_only_one_model_knows_are_never_sampled(policy: HandoffPolicy) -> None:
    decoder = build(padding=Pair(11, 5), more=["ab", "abc"])
    limit, known = (tokenizer.size for tokenizer in decoder.tokenizers)
    assert known == limit + 2
    assert list(decoder.vocab_limits) == [limit, limit]
    for model in decoder.models:
        model.table[:, limit:] = 50.0
    seen = decoder.generate(
        [PROMPT] * 6, [SamplingParams(temperature=t, max_tokens=9, seed=i) for i, t in enumerate([0, 0, 1, 2, 2, 9])],
        handoff=policy,
    )  # fmt: skip
    assert all(token < limit for output in seen for token in output.outputs[0].token_ids)
    for wrong in ({"stop_token_ids": [limit]}, {"logit_bias": {limit: 1.0}}):
        with pytest.raises(RequestError, match=f"found id {limit}, expected ids below {limit}, which both models know"):
            decoder.generate(PROMPT, SamplingParams(**wrong), handoff=policy)


# ---- streams and aborts


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_closing_a_stream_aborts(depth: int, after: int) -> None:
    decoder = build(depth=depth)
    opened(decoder)
    deltas = decoder.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=100), request_id="one")
    for _ in range(after):
        assert next(deltas).text
    with pytest.raises(RequestError, match="request_id: 'one' is in use"):
        decoder.stream(PROMPT, request_id="one")
    deltas.close()  # type: ignore[attr-defined]
    assert decoder.engine.unfinished == 0
    assert pages(decoder) == [0, 0]
    again = decoder.stream(PROMPT, SamplingParams(**GREEDY), request_id="one")
    assert "".join(delta.text for delta in again).startswith("ac")


def test_a_stream_that_is_forgotten_aborts() -> None:
    decoder = build()
    decoder.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=100))
    assert decoder.engine.unfinished == 0


@pytest.mark.parametrize("ticks", [0, 1, 4, 12])
def test_abort_by_name(ticks: int) -> None:
    decoder = build(max_num_seqs=1)
    opened(decoder)
    deltas = decoder.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=100), request_id="one")
    waiting = decoder.stream(PROMPT, SamplingParams(**GREEDY), request_id="two")
    for _ in range(ticks):
        decoder.engine.tick()
    decoder.abort("one")
    decoder.abort("nobody")
    last = list(deltas)
    assert last[-1].finish_reason == "abort"
    said = "".join(delta.text for delta in last)
    # An unfinished tag was text after all; behind a whole one come the large tokens that were read.
    assert said == {0: "", 1: "a", 4: "a<bigmodel", 12: "acccc"}[ticks]
    assert "".join(delta.text for delta in waiting) == "accccccc"
    assert pages(decoder) == [0, 0]


def test_aborting_what_waits() -> None:
    decoder = build(max_num_seqs=1)
    first = decoder.stream(PROMPT, SamplingParams(**GREEDY), handoff=SmallOnly())
    second = decoder.stream(PROMPT, SamplingParams(**GREEDY), request_id="two")
    decoder.engine.tick()
    decoder.abort("two")
    assert [delta.finish_reason for delta in second] == ["abort"]
    assert "".join(delta.text for delta in first) == "cccccccc"


def test_a_closed_decoder_takes_nothing() -> None:
    with build() as decoder:
        deltas = decoder.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=100))
        next(deltas)
    assert [delta.finish_reason for delta in deltas][-1] == "abort"
    assert pages(decoder) == [0, 0]
    for ask in (decoder.generate, decoder.stream):
        with pytest.raises(RequestError, match="this decoder is closed"):
            ask(PROMPT)


def test_the_context_manager_closes_on_errors() -> None:
    decoder = build()
    with pytest.raises(KeyError), decoder:
        raise KeyError
    with pytest.raises(RequestError, match="closed"):
        decoder.generate(PROMPT)


# ---- faults


@pytest.mark.parametrize("fault", [("owner", 1), ("next_mark", 0), ("owner", 5)])
def test_a_policy_that_raises_ends_its_own_request(fault: tuple[str, int]) -> None:
    decoder = build()
    opened(decoder)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    whole = decoder.generate(PROMPT, params)[0].outputs
    good = [decoder._request(PROMPT, None, params, None)[0] for _ in range(2)]
    (bad,) = decoder._request(PROMPT, None, params, Broken(*fault))
    for choice in (good[0], bad, good[1]):
        decoder._queue([choice], None)
    while decoder.engine.unfinished:
        decoder.engine.tick()
    assert bad.output is not None
    assert bad.output.finish_reason == "error"
    assert str(bad.output.stop_reason).startswith("ZeroDivisionError: no such")
    assert [[choice.output] for choice in good] == [whole, whole]
    assert pages(decoder) == [0, 0]


def test_a_policy_that_raises_at_once_is_the_callers_error() -> None:
    decoder = build()
    with pytest.raises(ZeroDivisionError):
        decoder.generate([PROMPT, PROMPT], SamplingParams(**GREEDY), handoff=Broken("owner", 0))
    assert decoder.engine.unfinished == 0
    assert text(decoder) == "cccccccc"


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("role", "at"), [(Role.SMALL, 5), (Role.LARGE, 6), (Role.SMALL, 10)])
def test_nan_logits_end_their_request(role: Role, at: int, depth: int) -> None:
    decoder = build(depth=depth)
    opened(decoder)
    decoder.models[role].nan_at = at  # type: ignore[attr-defined]
    params = [SamplingParams(temperature=t, seed=1, max_tokens=n) for t, n in [(0.0, 1), (0.0, 20), (1.0, 20)]]
    short, long, drawn = decoder.generate([PROMPT] * 3, params)
    assert short.outputs[0].finish_reason == "length"
    for output in (long, drawn):
        assert output.outputs[0].finish_reason == "error"
        assert "NaN" in str(output.outputs[0].stop_reason)
    assert pages(decoder) == [0, 0]
    decoder.models[role].nan_at = -1  # type: ignore[attr-defined]
    assert text(decoder) == text(build_opened(), **GREEDY)  # nothing corrupt was kept in the prefix cache


def build_opened() -> SplitDecoder:
    decoder = build()
    opened(decoder)
    return decoder


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("place", ["completion", "count_models"])
def test_what_fails_while_an_answer_ends_gives_its_pages_back(
    place: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = build(depth=depth)
    opened(decoder)
    wanted, real = text(decoder), getattr(engine, place)
    faults = [KeyboardInterrupt()]

    def failing(*args: Any) -> Any:
        if faults:
            raise faults.pop()
        return real(*args)

    monkeypatch.setattr(engine, place, failing)
    other = decoder.stream(PROMPT, SamplingParams(**GREEDY))
    with pytest.raises(KeyboardInterrupt):
        decoder.generate([PROMPT] * 2, SamplingParams(**GREEDY))
    assert decoder.engine.unfinished == decoder.engine.scheduler.unfinished == 0
    assert pages(decoder) == [0, 0]
    assert [delta.finish_reason for delta in other][-1] in ("abort", "length")
    assert text(decoder) == wanted


def test_a_seam_that_cannot_be_measured_costs_no_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = build(watch_seams=1)
    opened(decoder)

    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine, "token_logprobs", failing)
    assert text(decoder) == "acccccccc"[:8]
    assert "seam: not measured: no memory left" in caplog.text
    assert pages(decoder) == [0, 0]


def test_what_fails_while_an_answer_begins_gives_its_handle_back(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = build()
    sampler = decoder.engine.runners[Role.LARGE].sampler
    real = sampler.set
    monkeypatch.setattr(sampler, "set", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        text(decoder)
    assert decoder.engine.unfinished == decoder.engine.scheduler.unfinished == 0
    monkeypatch.setattr(sampler, "set", real)
    assert text(decoder)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("steps", range(0, 8, 2))
def test_a_forward_that_raises_leaves_the_decoder_usable(role: Role, steps: int, depth: int) -> None:
    decoder = build(depth=depth, max_num_seqs=2)
    opened(decoder)
    wanted = text(decoder)
    model: Any = decoder.models[role]
    model.raises_at = len(model.forwards) + min(steps, 1 if role is Role.LARGE else 8)
    other = decoder.stream(PROMPT, SamplingParams(**GREEDY))
    with pytest.raises(RuntimeError, match="the device is gone"):
        decoder.generate([PROMPT] * 4, SamplingParams(**GREEDY))
    assert decoder.engine.unfinished == 0
    assert pages(decoder) == [0, 0]
    assert decoder.engine.scheduler.unfinished == 0
    assert [delta.finish_reason for delta in other][-1] == "abort"
    assert text(decoder) == wanted == "acccccccc"[:8]
    assert TAGS[0] in decoder.generate(PROMPT, SamplingParams(**GREEDY))[0].outputs[0].raw_text
