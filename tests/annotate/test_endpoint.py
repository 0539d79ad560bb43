"""Asking an endpoint: limits by a turned clock, retries, what is fatal, and answers of every quality."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import httpx
import pytest
from oracles.chat_server import ChatServer, completion, trace_in
from oracles.turned import TurnedClock

from splitdecode.annotate.client import Client, EndpointError, Server, key_from
from splitdecode.annotate.endpoint import EndpointAnnotator, Recipe
from splitdecode.annotate.limits import Pace
from splitdecode.annotate.records import Annotation, Failure
from splitdecode.annotate.traces import Trace
from splitdecode.errors import MissingExtraError, RequestError

SENTENCES = [f"Step {n}: we multiply {17 * n} by {n + 3} and carry the rest over." for n in range(20)]
TRACE = Trace("t", "What is it?", " ".join(SENTENCES))
QUOTES = [SENTENCES[2], SENTENCES[9], SENTENCES[15]]
SERVER = Server("http://x/v1/", "model-m", retries=3)
MESSAGES = [{"role": "user", "content": "x" * 300}]


def said(*snippets: str) -> dict[str, Any]:
    return completion(json.dumps({"snippets": snippets}))


def asking(
    *replies: Any, server: Server = SERVER, clock: TurnedClock | None = None
) -> tuple[Callable[[Server], Client], list[httpx.Request]]:
    """A maker of clients that are answered with `replies` in turn, the last one ever after; and what they asked."""
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        reply = replies[min(len(asked), len(replies)) - 1]
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, tuple):
            return httpx.Response(reply[0], headers=reply[1], text=reply[2])
        return httpx.Response(200, json=reply)

    turned = clock or TurnedClock()
    return lambda s: Client(s, transport=httpx.MockTransport(answer), clock=turned), asked


async def ask(make: Callable[[Server], Client], server: Server = SERVER, times: int = 1) -> Any:
    client = make(server)
    try:
        return [await client.ask(MESSAGES, 0.3) for _ in range(times)]
    finally:
        await client.close()


# ---- limits


@pytest.mark.parametrize("idle", [0.0, 100.0])
def test_no_minute_holds_more_than_its_rate(idle: float) -> None:
    """Neither the first one, nor one behind a rest: nothing is saved up."""
    clock = TurnedClock()

    async def crowd() -> list[float]:
        pace = Pace(60, clock)
        seen: list[float] = []

        async def one() -> None:
            await pace.take()
            seen.append(clock.now())

        await one()
        await clock.sleep(idle)
        await asyncio.gather(*(one() for _ in range(130)))
        return seen

    seen = asyncio.run(crowd())
    assert max(sum(start <= at < start + 60 - 1e-6 for at in seen) for start in seen) == 60
    assert seen[1:] == pytest.approx([max(idle, 1.0) + k for k in range(130)])


def test_a_pace_with_large_amounts_and_corrections() -> None:
    clock = TurnedClock()

    async def by_turns() -> None:
        pace = Pace(600, clock)  # 10 a second
        await pace.take(100)
        assert clock.now() == 0
        await pace.take(10)
        assert clock.now() == pytest.approx(10)
        pace.settle(10, 60)  # it was 50 more
        await pace.take(20)
        assert clock.now() == pytest.approx(16)
        pace.settle(20, 0)
        await pace.take(10)
        assert clock.now() == pytest.approx(16)
        free = Pace(None, clock)
        await free.take(1e9)
        assert clock.now() == pytest.approx(16)

    asyncio.run(by_turns())


def test_tokens_are_settled_by_usage() -> None:
    clock = TurnedClock()
    server = Server("http://x/v1", "m", tokens_per_minute=6000)  # 100 a second; a request is guessed at 100
    make, _ = asking(completion("x", 500, 100), clock=clock)
    asyncio.run(ask(make, server, times=3))
    assert clock.now() == pytest.approx(6 + 6)


# ---- one request


def test_a_request() -> None:
    make, asked = asking(completion("hello", 7, 3))
    (reply,) = asyncio.run(ask(make, Server("http://x/v1/", "model-m", key="secret-key")))
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("hello", 7, 3)
    (request,) = asked
    assert str(request.url) == "http://x/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer secret-key"
    body = json.loads(request.content)
    assert (body["model"], body["temperature"], body["messages"]) == ("model-m", 0.3, MESSAGES)
    assert "secret-key" not in repr(Server("http://x/v1/", "model-m", key="secret-key"))


NOT_YET = {
    "429": (429, {}, "slow down"),
    "500": (500, {}, "oops"),
    "503": (503, {}, ""),
    "no JSON": (200, {}, "<html>"),
    "no completion": {"object": "error"},
    "no choice": {"choices": []},
    "odd usage": {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}},
    "endless usage": (200, {}, '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e999}}'),
    "huge usage": {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 10**400}},
    "usage below 0": {"choices": [{"message": {"content": "x"}}], "usage": {"completion_tokens": -5}},
    "deep": (200, {}, '{"choices": ' + "[" * 100_000),
    "timeout": httpx.ReadTimeout("too slow"),
    "lost": httpx.ConnectError("gone"),
}


@pytest.mark.parametrize("case", NOT_YET)
def test_it_is_asked_again(case: str) -> None:
    clock = TurnedClock()
    make, asked = asking(NOT_YET[case], NOT_YET[case], NOT_YET[case], completion("x"), clock=clock)
    assert asyncio.run(ask(make))[0].text == "x"
    assert len(asked) == 4
    assert all(half <= wait <= 2 * half for wait, half in zip(clock.slept, (0.5, 1, 2), strict=True))
    make, asked = asking(NOT_YET[case])
    with pytest.raises(EndpointError, match="no answer after 4 tries, the last one: "):
        asyncio.run(ask(make))
    assert len(asked) == 4


def test_retry_after_is_kept() -> None:
    clock = TurnedClock()
    dates = (429, {"Retry-After": formatdate(time.time() + 30, usegmt=True)}, "")
    make, _ = asking((429, {"Retry-After": "7.5"}, ""), dates, (503, {"Retry-After": "soon"}, ""), completion("x"),
                     clock=clock)  # fmt: skip
    asyncio.run(ask(make))
    assert clock.slept[0] == 7.5
    assert 25 < clock.slept[1] <= 30
    assert 2 <= clock.slept[2] <= 4  # not understood: as if it were not there


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_is_hopeless_for_all(code: int) -> None:
    make, asked = asking((code, {}, "no such key"))
    with pytest.raises(RequestError, match=rf"answered {code} \(no such key\) for model 'model-m'"):
        asyncio.run(ask(make))
    assert len(asked) == 1


def test_what_is_hopeless_for_one() -> None:
    make, asked = asking((400, {}, "context too long"))
    with pytest.raises(EndpointError, match=r"refused with 400 \(context too long\)"):
        asyncio.run(ask(make))
    assert len(asked) == 1


def test_keys_and_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", " k ")
    assert (key_from("A_KEY"), key_from(None)) == ("k", "")
    monkeypatch.delenv("A_KEY")
    with pytest.raises(RequestError, match="found no variable A_KEY"):
        key_from("A_KEY")
    with pytest.raises(RequestError, match="--base-url: found 'host/v1'"):
        asyncio.run(ask(Client, Server("host/v1", "m")))
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtraError, match=r"needs httpx: pip install 'splitdecode\[annotate\]'"):
        asyncio.run(ask(Client))


@pytest.mark.parametrize("date", ["Mon, 01 Jan 0001 00:00:00 +2359", "Mon, 99 Jan 2026 00:00:00", "Mon"])
def test_a_date_that_is_none_is_no_wait(date: str) -> None:
    clock = TurnedClock()
    make, _ = asking((429, {"Retry-After": date}, ""), completion("x"), clock=clock)
    asyncio.run(ask(make))
    assert len(clock.slept) == 1
    assert clock.slept[0] <= 1


# ---- one trace


def annotated(*replies: Any, recipe: Recipe | None = None, **options: Any) -> tuple[Annotation | Failure, list[Any]]:
    make, asked = asking(*replies)
    (found,) = EndpointAnnotator(SERVER, recipe, client=make, **options).annotate([TRACE])
    return found, [json.loads(request.content)["temperature"] for request in asked]


def passages(found: Annotation | Failure) -> list[str]:
    assert isinstance(found, Annotation)
    return [found.trace.text[start:stop] for start, stop in found.spans]


def test_snippets_become_spans() -> None:
    found, temperatures = annotated(said(*QUOTES), prices=(3.0, 15.0))
    assert passages(found) == QUOTES
    assert temperatures == [0.0]
    assert found.cost == pytest.approx((100 * 3 + 20 * 15) / 1e6)
    assert isinstance(found, Annotation)
    assert found.details["cost"] == found.cost
    assert [match["exact"] for match in found.details["matches"]] == [True] * 3


def test_neighbours_are_one_span() -> None:
    found, _ = annotated(said(SENTENCES[4], SENTENCES[5], SENTENCES[11]))
    assert passages(found) == [f"{SENTENCES[4]} {SENTENCES[5]}", SENTENCES[11]]


def test_it_is_asked_at_other_temperatures() -> None:
    invented = "never said anywhere at all, xyz"
    found, temperatures = annotated(completion("I would rather not."), said(QUOTES[0], invented), said(*QUOTES))
    assert temperatures == [0.0, 0.3, 0.6]
    assert passages(found) == QUOTES
    assert isinstance(found, Annotation)
    assert [(a["snippets"], a["found"]) for a in found.details["attempts"]] == [(0, 0), (2, 1), (3, 3)]
    assert found.details["prompt_tokens"] == 300


def test_the_best_attempt_is_kept() -> None:
    found, temperatures = annotated(said(*QUOTES[:2]), said(QUOTES[2]), said())
    assert temperatures == [0.0, 0.3, 0.6]
    assert passages(found) == QUOTES[:2]
    found, _ = annotated(said(QUOTES[0]), (400, {}, "no"))
    assert passages(found) == QUOTES[:1]


def test_a_trace_of_which_nothing_was_found_failed() -> None:
    found, _ = annotated(said("never said anywhere at all, xyz"), prices=(1.0, 0.0))
    assert found == Failure(TRACE, "no snippet found in the trace in 3 attempts", 300 / 1e6)
    found, _ = annotated((400, {}, "too long"))
    assert found == Failure(TRACE, "refused with 400 (too long)", 0.0)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 7}])
def test_what_cannot_be_counted_has_no_price(usage: Any) -> None:
    reply = {**said(*QUOTES), "usage": usage}
    with pytest.raises(RequestError, match="--price-in and --price-out: found an answer without usage, expected one"):
        annotated(reply, prices=(0.0, 1.0))
    found, _ = annotated(reply)
    assert passages(found) == QUOTES


def test_the_cap() -> None:
    found, _ = annotated(said(*QUOTES), recipe=Recipe(cap=0.11))
    assert passages(found) == QUOTES[:2]


@pytest.mark.parametrize("options", [{"share": 0}, {"cap": 1.5}, {"least": 0}, {"temperatures": ()}, {"merge": -1}])
def test_recipes_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"found"):
        Recipe(**options)


# ---- many traces


def many(number: int) -> list[Trace]:
    return [Trace(f"t{n}", "p", f"Trace number {n}. {TRACE.text}") for n in range(number)]


def test_traces_overlap_up_to_the_limit() -> None:
    working, most = 0, 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal working, most
        working += 1
        most = max(most, working)
        await asyncio.sleep(0.01)
        working -= 1
        return httpx.Response(200, json=said(*QUOTES))

    taken = 0

    def traces() -> Iterator[Trace]:
        nonlocal taken
        for trace in many(20):
            taken += 1
            yield trace

    annotator = EndpointAnnotator(
        SERVER, concurrency=4, client=lambda s: Client(s, transport=httpx.MockTransport(answer))
    )
    results = annotator.annotate(traces())
    first = next(results)
    assert taken == 4  # a trace is taken when it is begun
    found = [first, *results]
    assert most == 4
    assert sorted(f.trace.id for f in found) == sorted(t.id for t in many(20))
    assert all(passages(f) == QUOTES for f in found)


def test_over_a_real_connection_with_faults() -> None:
    number = 0

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        nonlocal number
        number += 1
        if number % 5 == 1:
            return 429, {"retry-after": "0.01"}, "slow down"
        if number % 5 == 2:
            return 500, {"retry-after": "0"}, "oops"
        if number % 7 == 3:
            return 200, {"retry-after": "0"}, '{"choices": [{"mess'
        assert trace_in(body).endswith(TRACE.text)
        return 200, {}, said(*QUOTES)

    with ChatServer(answer) as server:
        annotator = EndpointAnnotator(Server(server.url, "m", key="k", retries=20))
        found = list(annotator.annotate(many(30)))
    assert sorted(f.trace.id for f in found) == sorted(t.id for t in many(30))
    assert all(passages(f) == QUOTES for f in found)
    assert all("authorization: bearer k" in head.lower() for head in server.headers)
