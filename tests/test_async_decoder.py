"""AsyncSplitDecoder: what each consumer gets, fast or slow, alone or in a crowd, and what it is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.flaky import IDS, PROMPT, build, opened
from oracles.scripted import scripted_pair
from oracles.serving import GREEDY, LONG, UNPACED, Watch, collect, last, merged, paused, run, serving, settled
from oracles.tiny import PIECES
from oracles.worlds import World, make_decoder, make_world, random_engine, random_params, random_policy

from splitdecode import (
    AsyncSplitDecoder,
    CapacityError,
    Delta,
    RequestError,
    RequestOutput,
    SamplingParams,
    SplitDecoder,
)
from splitdecode.families import problems
from splitdecode.requests import Growth

# ---- what a consumer gets


def mixed_params() -> list[SamplingParams]:
    """Requests that differ in everything; every other one leaves its seed to the engine."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 3.0, "n": 3},
        {"temperature": 1.5, "stop": ["carry", "\n"]},
        {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.2},
        {"temperature": 2.0, "min_p": 0.05, "min_tokens": 5},
    ]
    return [SamplingParams(max_tokens=24, **kind, **({"seed": i} if i % 2 else {})) for i, kind in enumerate(kinds * 2)]


def test_outputs_are_those_of_the_synchronous_decoder() -> None:
    """The same tokens whatever else runs; requests without a seed are numbered as they arrive."""
    prompts = [task.prompt for task in problems(12, 3)]
    params = mixed_params()
    with SplitDecoder.demo(dtype="float64", page_size=4) as alone:
        wanted = [alone.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]

    async def main() -> tuple[list[RequestOutput], list[list[Delta]]]:
        async with serving(SplitDecoder.demo(dtype="float64", page_size=4, max_num_seqs=5)) as engine:
            asked = [engine.generate(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
            outputs = await asyncio.gather(*[last(one) for one in asked])
            seeded = [i for i, one in enumerate(params) if one.seed is not None]
            return outputs, await asyncio.gather(*[collect(engine.stream(prompts[i], params[i])) for i in seeded])

    outputs, streams = run(main())
    for output, want in zip(outputs, wanted, strict=True):
        assert output.finished
        assert (output.outputs, output.prompt) == (want.outputs, want.prompt)
        assert output.prompt_token_ids == want.prompt_token_ids
        assert (output.metrics.tokens, output.metrics.handoffs) == (want.metrics.tokens, want.metrics.handoffs)
        assert output.metrics.finished_time is not None
        assert 0 < output.metrics.arrival_time < output.metrics.finished_time
    assert len({output.request_id for output in outputs}) == len(prompts)
    for deltas, want in zip(streams, [w for w, one in zip(wanted, params, strict=True) if one.seed], strict=True):
        for answer in want.outputs:
            own = [delta for delta in deltas if delta.index == answer.index]
            assert "".join(delta.text for delta in own) == answer.text
            assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + [answer.finish_reason]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("pair"), ("qwen2", "qwen2"), (PIECES, PIECES), 1)


def test_snapshots_only_ever_grow(world: World) -> None:
    """Taken after every tick, each is a beginning of the next and of the answer: text, tags, ids, spans, log-probs."""
    looks = tags = 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        decoder = make_decoder(world, random_engine(rng))
        prompt = [int(i) for i in rng.integers(1, 6, size=int(rng.integers(1, 16)))]
        params = replace(random_params(rng, world.tokenizers), logprobs=[None, 2][seed % 2], n=1 + seed % 2)
        choices = decoder._request(prompt, None, params, random_policy(rng))
        decoder._queue(choices, None)
        growths = [Growth(choice, decoder.tokens.tags) for choice in choices]
        seen: list[list[Any]] = [[growth.output()] for growth in growths]
        while decoder.engine.unfinished:
            decoder.engine.tick()
            for growth, outputs in zip(growths, seen, strict=True):
                if growth.extend(decoder.engine.scheduler):
                    outputs.append(growth.output())
        for choice, outputs in zip(choices, seen, strict=True):
            answer = choice.output
            assert answer is not None
            outputs.append(answer)
            looks += len(outputs)
            tags += any("<bigmodel>" in output.raw_text for output in outputs[1:-1])
            for one, two in pairwise(outputs):
                assert (one.finish_reason, one.stop_reason) == (None, None)
                for text, longer in ((one.text, two.text), (one.raw_text, two.raw_text)):
                    assert longer.startswith(text)
                assert two.token_ids[: len(one.token_ids)] == one.token_ids
                assert authors(two)[: len(one.token_ids)] == authors(one)
                assert all(left.model != right.model for left, right in pairwise(one.spans))
                if params.logprobs is not None:
                    assert two.logprobs[: len(one.logprobs)] == one.logprobs
                    assert one.cumulative_logprob == pytest.approx(
                        sum(found[token] for found, token in zip(one.logprobs, one.token_ids, strict=True) if found),
                        abs=1e-4,
                    )
    assert looks > 300
    assert tags > 5


def authors(output: Any) -> list[str]:
    return [span.model for span in output.spans for _ in range(span.start, span.end)]


def test_nothing_uncertain_is_in_a_snapshot() -> None:
    decoder, models, _ = scripted_pair(PIECES, page_size=2)
    at = len(PIECES)
    models.small.says(3, [IDS["a"], at, at + 1, IDS["b"], IDS["c"], IDS["b"], IDS["c"], IDS["T"], 0])
    (choice,) = decoder._request(PROMPT, None, SamplingParams(temperature=0.0, stop=["bcT"]), None)
    decoder._queue([choice], None)
    growth, texts = Growth(choice, decoder.tokens.tags), []
    while choice.output is None:
        decoder.engine.tick()
        if growth.extend(decoder.engine.scheduler):
            texts.append((growth.output().text, len(growth.output().token_ids)))
    assert texts == [("a", 1), ("a", 2), ("aé", 3), ("aé", 4), ("aé", 5), ("aébc", 6), ("aébc", 7)]


def test_a_tag_behind_uncertain_text_waits_with_it() -> None:
    """`b` may begin the stop string, so neither it nor the tag behind it is shown before the large model's `ca`."""
    decoder, models, _ = scripted_pair(PIECES, page_size=2, read_interval=1)
    models.small.says(3, [IDS[piece] for piece in ("a", "b", "<", "big", "model", ">", "a", "a", "a", "a")])
    models.large.says(5, [IDS[piece] for piece in ("c", "a", "a", "a")])
    (choice,) = decoder._request(PROMPT, None, SamplingParams(temperature=0.0, stop=["bcT"], max_tokens=5), None)
    decoder._queue([choice], None)
    growth, seen = Growth(choice, decoder.tokens.tags), []
    while choice.output is None:
        decoder.engine.tick()
        if growth.extend(decoder.engine.scheduler):
            seen.append((growth.output().text, growth.output().raw_text))
    assert seen == [("a", "a"), ("a", "a"), ("a", "a"), ("abca", "ab<bigmodel>ca")]


def test_a_slow_consumer_gets_the_latest_and_holds_nobody_up() -> None:
    """One that stops to look after its first snapshot finds the finished answer next; the other ran meanwhile."""

    async def main() -> None:
        decoder = build()
        alone = build().generate(PROMPT, LONG)[0].outputs
        async with serving(decoder) as engine:
            slow = engine.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=30))
            with paused(engine):
                asked = asyncio.create_task(anext(slow))
                await asyncio.sleep(0)
                submitted = decoder.engine.clock()
            first = await asked
            assert first.metrics.arrival_time <= submitted, "it arrived when it was asked for, not when it was seen to"
            assert not first.finished
            assert first.outputs[0].finish_reason is None
            assert (await last(engine.generate(PROMPT, LONG))).outputs == alone
            assert (first.metrics.tokens, first.metrics.finished_time) == (0, None), "a snapshot is nobody else's"
            rest = await collect(slow)
            assert [output.finished for output in rest] == [True]
            assert rest[0].outputs[0].text == "c" * 30
            assert rest[0].metrics.tokens == 30
            assert await collect(slow) == []

    run(main())


@pytest.mark.parametrize("most", [1, 3, 100])
def test_deltas_of_a_slow_consumer_grow_together(most: int) -> None:
    """Whatever is asked late comes whole, in few pieces: `most`, and one per change of author."""
    decoder, sync = build(read_interval=2, **UNPACED), build(read_interval=2, **UNPACED)
    for one in (decoder, sync):
        opened(one)
        one.models.small.says(14, [IDS[piece] for piece in ("</", "big", "model", ">")])
    params = SamplingParams(temperature=0.0, max_tokens=60)
    every = list(sync.stream(PROMPT, params))
    assert len(every) > 40

    async def main() -> list[Delta]:
        async with serving(decoder, max_buffered=most) as engine:
            stream = engine.stream(PROMPT, params)
            got = [await anext(stream)]
            await last(engine.generate(PROMPT, LONG))  # longer: when it ends the stream has ended
            return got + await collect(stream)

    got = run(main())
    assert merged(got) == merged(every)
    changes = len(list(groupby(every, key=lambda delta: delta.model)))
    assert len(got) <= min(most, len(every)) + changes + 2
    assert (len(got) == len(every)) == (most == 100)


def test_on_delta_hears_on_the_engines_thread_what_a_stream_yields() -> None:
    decoder = build()
    opened(decoder)
    every = list(build_opened().stream(PROMPT, SamplingParams(n=2, **GREEDY)))
    heard: dict[str, list[Delta]] = {"generate": [], "stream": []}
    threads = set()

    def note(name: str) -> Callable[[Delta], None]:
        def on_delta(delta: Delta) -> None:
            threads.add(threading.current_thread())
            heard[name].append(delta)

        return on_delta

    async def main() -> None:
        async with serving(decoder) as engine:
            for name in heard:
                ask: Any = getattr(engine, name)
                await last(ask(PROMPT, SamplingParams(n=2, **GREEDY), on_delta=note(name)))
            assert threads == {engine._thread.thread}

    run(main())
    assert merged(heard["generate"]) == merged(heard["stream"]) == merged(every)
    assert [delta.finish_reason for delta in heard["generate"]][-2:] == ["length"] * 2


def build_opened() -> SplitDecoder:
    decoder = build()
    opened(decoder)
    return decoder


def test_an_idle_engine_sleeps() -> None:
    async def main() -> None:
        decoder = build()
        watch = Watch(decoder)
        async with serving(decoder) as engine:
            await last(engine.generate(PROMPT, SamplingParams(**GREEDY)))
            await settled(engine)
            ident = engine._thread.thread.ident
            assert ident is not None
            clock = time.pthread_getcpuclockid(ident)
            ticks, before = watch.ticks, time.clock_gettime(clock)
            await asyncio.sleep(0.2)
            assert watch.ticks == ticks > 0
            assert time.clock_gettime(clock) - before < 0.002
            assert (await last(engine.generate(PROMPT, SamplingParams(**GREEDY)))).finished

    run(main())


def test_several_loops_share_an_engine() -> None:
    engine = AsyncSplitDecoder(build_opened(), max_waiting=64)
    alone = build_opened().generate(PROMPT, LONG)[0].outputs
    found: list[Any] = []

    async def main() -> None:
        found.extend(await asyncio.gather(*[last(engine.generate(PROMPT, LONG)) for _ in range(4)]))

    threads = [threading.Thread(target=run, args=(main(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [output.outputs for output in found] == [alone] * 12
    assert len({output.request_id for output in found}) == 12
    run(settled(engine))
    engine.close()


def test_the_documented_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text("utf-8")
    example = text.partition("```python\n")[2].partition("```")[0]
    assert 5 < len(example.splitlines()) <= 20
    exec(compile(example, "docs/serving.md", "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert "small" in said
    assert "boxed" in said


# ---- what cannot be served


def test_wrong_requests_are_the_callers_error_and_leave_nothing() -> None:
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (([-1],), {}, "token id -1"),
        (([],), {}, "prompts: found"),
        ((["a", "b"],), {}, "prompt: found 2 prompts, expected one"),
        ((PROMPT, [SamplingParams()]), {}, "sampling_params: found list"),
        ((PROMPT,), {"handoff": "tags"}, "handoff: found str"),
        ((PROMPT,), {"request_id": 3}, "request_id: found int"),
        ((PROMPT,), {"on_delta": 3}, "on_delta: found int"),
        (({"prompt_token_ids": PROMPT, "cache_salt": 3},), {}, "cache_salt: found 3"),
        ((PROMPT, SamplingParams(stop_token_ids=[10**6])), {}, "found id 1000000"),
    ]
    noisy = SamplingParams(temperature=1.0, max_tokens=8)
    with build() as alone:
        for model in alone.models:
            model.table.zero_()
        wanted = alone.generate(PROMPT, noisy)[0].outputs

    async def main() -> None:
        decoder = build()
        for model in decoder.models:
            model.table.zero_()
        async with serving(decoder) as engine:
            for args, more, said in wrong:
                for ask in (engine.generate, engine.stream):
                    following: Any = ask(*args, **more)
                    with pytest.raises(RequestError, match=said):
                        await anext(following)
                    assert await collect(following) == []
            assert decoder.engine.scheduler.unfinished == 0
            assert (await last(engine.generate(PROMPT, noisy))).outputs == wanted, "no seed was taken by the wrong ones"

    run(main())


def test_names_are_unique_while_they_run() -> None:
    async def main() -> None:
        decoder = build()
        go = threading.Event()
        Watch(decoder, lambda tick: go.wait(10))
        async with serving(decoder) as engine:
            first = asyncio.create_task(last(engine.generate(PROMPT, SamplingParams(**GREEDY), request_id="one")))
            made = asyncio.create_task(last(engine.generate(PROMPT, SamplingParams(**GREEDY), request_id="request-0")))
            free = asyncio.create_task(last(engine.generate(PROMPT, SamplingParams(**GREEDY))))
            await asyncio.sleep(0)
            with pytest.raises(RequestError, match="request_id: 'one' is in use"):
                await anext(engine.stream(PROMPT, request_id="one"))
            go.set()
            names = [output.request_id for output in await asyncio.gather(first, made, free)]
            assert names == ["one", "request-0", "request-1"]
            again = await last(engine.generate(PROMPT, SamplingParams(**GREEDY), request_id="one"))
            assert again.outputs == first.result().outputs

    run(main())


def test_the_queue_is_bounded() -> None:
    """Requests that have not started count, wherever they wait; those that run do not."""

    async def main() -> None:
        decoder = build(max_num_seqs=2)
        hold = threading.Event()
        watch = Watch(decoder, lambda tick: tick < 1 or hold.wait(10))
        async with serving(decoder, max_waiting=3) as engine:

            def ask(number: int) -> asyncio.Task[RequestOutput]:
                return asyncio.create_task(last(engine.generate(PROMPT, LONG, request_id=str(number))))

            with paused(engine):
                tasks = [ask(number) for number in range(2)]
                await asyncio.sleep(0)
            while not watch.ticks or engine._thread._not_started:
                await asyncio.sleep(0)
            tasks += [ask(number) for number in range(2, 5)]
            await asyncio.sleep(0)
            for refused in (engine.generate(PROMPT, LONG), engine.stream(PROMPT, LONG)):
                with pytest.raises(CapacityError, match=r"max_waiting: found 3 requests .* expected fewer than 3"):
                    await anext(refused)  # type: ignore[arg-type]
            tasks[3].cancel()
            hold.set()
            await asyncio.wait([tasks[3]])
            await engine.abort("2")
            more = [ask(9)]
            done = await asyncio.gather(*tasks[:3], tasks[4], *more)
            assert [output.outputs[0].finish_reason for output in done] == ["length"] * 2 + ["abort"] + ["length"] * 2

    run(main())


@pytest.mark.parametrize("bound", [{"max_waiting": 0}, {"max_buffered": True}, {"max_waiting": "9"}])
def test_bounds_are_checked(bound: dict[str, Any]) -> None:
    with build() as decoder:
        with pytest.raises(RequestError, match=f"{next(iter(bound))}: found .*, expected an integer of at least 1"):
            AsyncSplitDecoder(decoder, **bound)
        assert decoder.generate(PROMPT, SamplingParams(**GREEDY))
