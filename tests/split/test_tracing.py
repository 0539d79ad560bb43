"""A Chrome trace is true: it is JSON, slices on a track never overlap, and its sums are the engine's own counters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.tapes import tape_runner
from oracles.worlds import World, make_decoder, make_worlds, random_engine, random_params, random_policy

from splitdecode import SamplingParams, SplitDecoder, cli
from splitdecode.families import problems
from splitdecode.split.engine import Choice
from splitdecode.split.roles import Role
from splitdecode.split.tracing import ChromeTrace, Tracer

Event = dict[str, Any]
TRACKS = {1: "small", 2: "large", 3: "catch-up", 4: "queue"}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


def ticking() -> Callable[[], float]:
    """A clock that moves on by a millisecond whenever it is read."""
    beats = count(1)
    return lambda: next(beats) / 1e3


def steps(events: list[Event], track: int) -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["tid"] == track]


def check_form(events: list[Event]) -> None:
    """Every track is named; slices do not overlap; async slices nest within each request and are all closed."""
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == TRACKS
    assert {event["pid"] for event in events} == {1}
    for track in TRACKS:
        for one, following in pairwise(steps(events, track)):
            assert one["dur"] >= 0
            assert one["ts"] + one["dur"] <= following["ts"] + 1e-3
    stacks: dict[tuple[str, int], list[Event]] = {}
    for event in events:
        if event["ph"] not in "ben" or event["ph"] == "M":
            continue
        stack = stacks.setdefault((event["cat"], event["id"]), [])
        assert not stack or event["ts"] >= stack[-1]["ts"]
        if event["ph"] == "b":
            stack.append(event)
        elif event["ph"] == "e":
            assert stack.pop()["name"] == event["name"]
        else:
            assert stack, "an instant belongs to a request that is there"
    assert not any(stacks.values())


def check_sums(events: list[Event], choices: list[Choice]) -> None:
    """Steps against the engine's counters, requests against their outputs."""
    metrics = list({id(choice.metrics): choice.metrics for choice in choices}.values())
    for role in Role:
        own = [event["args"] for event in steps(events, role + 1)]
        models = [m.models[role] for m in metrics]
        for name, counter in (
            ("forwards", "forwards"),
            ("prefill_tokens", "prompt_tokens"),
            ("catch_up_tokens", "catch_up_tokens"),
            ("read_tokens", "read_tokens"),
        ):
            assert sum(args[name] for args in own) == sum(getattr(model, counter) for model in models)
        apart = [event["args"] for event in steps(events, 3) if event["name"] == str(role)]
        rest = sum(args[f"{kind}_tokens"] for args in own for kind in ("prefill", "catch_up", "read"))
        assert sum(value for args in apart for key, value in args.items() if key.endswith("tokens")) == rest
    requests = {event["id"]: event for event in events if event["ph"] == "e" and event["name"].startswith("request")}
    assert len(requests) == len(choices)
    for number, choice in enumerate(choices):
        check_request([event for event in events if event.get("id") == number], choice)
    written = {r: sum(e["args"]["tokens"][str(r)] for e in requests.values()) for r in Role}
    assert written == {role: sum(m.models[role].tokens for m in metrics) for role in Role}
    seams = Counter(event["name"] for event in events if event["ph"] == "n")
    assert seams["opening"] == sum(m.handoffs for m in metrics)
    assert seams["closing"] <= seams["opening"]


def check_request(events: list[Event], choice: Choice) -> None:
    """Arrival, start, pens, finish: in that order, with the tokens of its output."""
    output = choice.output
    assert output is not None
    first, last = events[0], events[-1]
    assert first["ts"] == pytest.approx(1e6 * choice.metrics.arrival_time, abs=1e-3)
    assert last["args"]["finish_reason"] == output.finish_reason
    starts = [event["ts"] for event in events if event["ph"] == "e" and event["name"] == "waiting"]
    assert len(starts) == 1
    assert first["ts"] <= starts[0] <= last["ts"]
    pens = [event for event in events if event["cat"] == "request" and event["name"] in ("small", "large")]
    assert sum(event["args"]["tokens"] for event in pens if event["ph"] == "e") == len(output.token_ids)
    assert bool(pens) == (choice.sequence is not None)


def schedule(world: World, seed: int, **more: Any) -> tuple[list[Event], list[Choice]]:
    """A few requests on one engine with little room, some of them given up on, all of it recorded."""
    rng = np.random.default_rng(seed)
    engine = random_engine(rng) | more
    per_lane = -(-engine["max_model_len"] // engine["page_size"])
    decoder = make_decoder(world, engine, pages=per_lane + int(rng.integers(0, 3)))
    decoder.engine.clock = ticking()
    choices: list[Choice] = []
    with ChromeTrace(decoder) as trace:
        for _ in range(int(rng.integers(2, 6))):
            ids = [int(i) for i in rng.integers(1, 6, size=int(rng.integers(1, 20)))]
            made = decoder._request(ids, None, random_params(rng, world.tokenizers), random_policy(rng))
            decoder._queue(made, None)
            choices += made
        while decoder.engine.unfinished:
            decoder.engine.tick()
            if rng.random() < 0.02:
                decoder.engine.abort(choices[int(rng.integers(len(choices)))])
    assert decoder.engine.tracer is None
    return trace.events, choices


@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
def test_sums_are_the_engines_own(worlds: dict[str, World], name: str) -> None:
    ends: Counter[str | None] = Counter()
    preempted = 0
    for seed in range(16):
        events, choices = schedule(worlds[name], seed)
        check_form(events)
        check_sums(events, choices)
        ends.update(choice.output.finish_reason for choice in choices if choice.output)
        preempted += sum(event["args"]["preemptions"] for event in events if "finish_reason" in event.get("args", {}))
    assert ends["abort"] > 3
    assert preempted > 0


def test_steps_in_flight_do_not_overlap(worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitdecode.decoder.make_runner", tape_runner)
    several = 0
    for seed in range(6):
        events, choices = schedule(worlds["plain"], seed, depth=2 + seed % 2, steps_per_graph=3)
        check_form(events)
        check_sums(events, choices)
        several += sum(event["args"]["steps"] > 1 for role in Role for event in steps(events, role + 1))
    assert several > 3


def test_a_request_that_never_starts(worlds: dict[str, World]) -> None:
    decoder = make_decoder(worlds["plain"], {"max_num_seqs": 1, "max_model_len": 40, "page_size": 4})
    made = [decoder._request([1, 2], None, SamplingParams(max_tokens=4), None)[0] for _ in range(2)]
    with ChromeTrace(decoder.engine) as trace:
        for choice in made:
            decoder.engine.add(choice)
        decoder.engine.abort(made[1])
        while decoder.engine.unfinished:
            decoder.engine.tick()
    check_form(trace.events)
    check_sums(trace.events, [made[0], made[1]])
    waiting = [event["args"]["value"] for event in trace.events if event["name"] == "waiting" and event["ph"] == "C"]
    assert waiting == [1, 2, 1, 0]


def test_a_step_that_fails_ends_every_request(worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(worlds["plain"], {"max_num_seqs": 1, "max_model_len": 40, "page_size": 4})
    trace = ChromeTrace()
    decoder.engine.tracer = trace

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(decoder.engine.runners.small, "launch", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            decoder.generate([[1, 2]] * 3, SamplingParams(max_tokens=4))
    check_form(trace.events)
    ends = [event["args"]["finish_reason"] for event in trace.events if "finish_reason" in event.get("args", {})]
    assert ends == ["abort"] * 3
    decoder.generate([[1, 2]], SamplingParams(max_tokens=4))
    check_form(trace.events)


def test_a_trace_that_begins_late(worlds: dict[str, World]) -> None:
    decoder = make_decoder(worlds["plain"], {"max_model_len": 40, "page_size": 4})
    (choice,) = decoder._request([1, 2], None, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True), None)
    decoder.engine.add(choice)
    decoder.engine.tick()
    decoder.engine.tick()
    with ChromeTrace(decoder) as trace:
        while decoder.engine.unfinished:
            decoder.engine.tick()
    check_form(trace.events)
    (pen, *_) = (event for event in trace.events if event["name"] == "small" and event["ph"] == "b")
    assert pen["ts"] >= 1e6 * choice.metrics.arrival_time
    with pytest.raises(ValueError, match="found no engine"), ChromeTrace():
        pass


def test_tracers_that_only_listen_change_nothing(worlds: dict[str, World]) -> None:
    params = SamplingParams(max_tokens=24, seed=4)
    decoder = make_decoder(worlds["plain"], {"max_model_len": 64, "page_size": 4})
    plain = decoder.generate([1, 2, 3], params)[0].outputs
    decoder.engine.tracer = Tracer()
    assert decoder.generate([1, 2, 3], params)[0].outputs == plain
    with ChromeTrace(decoder):
        assert decoder.generate([1, 2, 3], params)[0].outputs == plain


@pytest.fixture
def demo() -> Iterator[SplitDecoder]:
    with SplitDecoder.demo(max_num_seqs=2) as decoder:
        yield decoder


def test_the_embedded_pair(demo: SplitDecoder, tmp_path: Path) -> None:
    with ChromeTrace(demo) as trace:
        outputs = demo.generate([task.prompt for task in problems(3, 5)], SamplingParams(temperature=0.0))
    trace.save(tmp_path / "trace.json")
    document = json.loads((tmp_path / "trace.json").read_text())
    events = document["traceEvents"]
    assert events == trace.events
    check_form(events)
    tokens = {str(role): sum(output.metrics.models[role].tokens for output in outputs) for role in Role}
    ends = [event["args"]["tokens"] for event in events if "finish_reason" in event.get("args", {})]
    assert tokens == {name: sum(end[name] for end in ends) for name in tokens}
    assert sum(output.metrics.handoffs for output in outputs) > 0
    assert {event["name"] for event in steps(events, 1)} >= {"decode", "prefill", "read"}
    assert {event["name"] for event in steps(events, 2)} >= {"decode", "prefill"}


def test_the_command_line_writes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    text = problems(1, 5)[0].prompt
    assert cli.main(["generate", "--json", text, "--max-tokens", "6", "--chrome-trace", str(file)]) == 0
    check_form(json.loads(file.read_text())["traceEvents"])
    assert cli.main(["generate", text, "--chrome-trace", str(tmp_path / "no" / "out.json")]) == 2
    assert "chrome trace: found no folder" in capsys.readouterr().err
