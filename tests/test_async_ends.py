"""The end of a request at any moment, and of an engine: nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from oracles.flaky import PROMPT, build, pages
from oracles.serving import GREEDY, LONG, Watch, collect, last, run, serving, settled, tagged

from splitdecode import AsyncSplitDecoder, RequestError, RequestOutput, SamplingParams, SplitDecoder
from splitdecode._C import Phase
from splitdecode.split.roles import Role

SHORT = SamplingParams(temperature=0.0, max_tokens=14)

# ---- the end of a request, at any moment


def moment(decoder: SplitDecoder) -> str:
    """Where the only request stands before a tick."""
    engine = decoder.engine
    if engine.waiting:
        return "waits"
    if not engine.running:
        return "over"
    (handle,) = engine.running
    state = engine.scheduler.lane_state(handle, Role.SMALL)
    if state["cached"] < state["prompt_len"]:
        return "prefill" if state["cached"] else "starts"
    return str(engine.scheduler.phase(handle).name)


class Ending:
    """Ends a request while tick `at` is held back, and lets that tick run once the engine has been told."""

    def __init__(self, engine: AsyncSplitDecoder, watch: Watch, how: str, at: int) -> None:
        self.engine, self.how, self.at = engine, how, at
        self.loop, self.posted = asyncio.get_running_loop(), threading.Event()
        self.moment = ""
        self.following = engine.generate(PROMPT * 4, SHORT, request_id="victim")
        watch.ticks, watch.before = 0, self.before
        self.tasks: list[asyncio.Task[Any]] = [self.loop.create_task(collect(self.following))]

    def before(self, tick: int) -> None:
        if tick == self.at:
            self.moment = moment(self.engine.decoder)
            self.loop.call_soon_threadsafe(self.end)
            assert self.posted.wait(10)

    def end(self) -> None:
        if self.how == "cancel":
            self.tasks[0].cancel()
            self.tasks[0].add_done_callback(lambda _: self.posted.set())
        else:
            ends = self.engine.abort("victim") if self.how == "abort" else self.following.aclose()
            self.tasks.append(self.loop.create_task(ends))
            self.loop.call_soon(self.posted.set)  # behind the first step of that task


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("how", ["abort", "cancel", "aclose"])
def test_a_request_may_end_before_any_tick(how: str, depth: int) -> None:
    """Ended while tick k runs, both lanes are free before tick k + 1: there is none."""
    decoder = tagged(depth=depth)
    watch, moments, reasons = Watch(decoder), set(), set()

    async def main() -> None:
        async with serving(decoder) as engine:
            whole = (await last(engine.generate(PROMPT * 4, SHORT))).outputs[0]
            assert [span.model for span in whole.spans] == ["small", "large", "small"]
            for k in range(watch.ticks):
                ending = Ending(engine, watch, how, k)
                got, *_ = await asyncio.gather(*ending.tasks, return_exceptions=True)
                await asyncio.gather(*ending.tasks[1:])
                await settled(engine)
                assert watch.ticks == k + 1
                moments.add(ending.moment)
                assert isinstance(got, asyncio.CancelledError) == (how == "cancel")
                if how == "abort":
                    answer = got[-1].outputs[0]
                    reasons.add(answer.finish_reason)
                    assert whole.raw_text.startswith(answer.raw_text)  # a tag half written is text then
                    assert all(answer.raw_text.startswith(output.outputs[0].raw_text) for output in got)
            watch.before = lambda tick: None
            assert (await last(engine.generate(PROMPT * 4, SHORT))).outputs == [whole]

    run(main())
    phases = {phase.name for phase in (Phase.SCAN, Phase.PROVISIONAL, Phase.READ, Phase.CONFIRM)}
    assert moments >= {"waits", "prefill", *phases}
    if how == "abort":
        assert reasons == {"abort", "length"}, "the last tick ends it by itself"


@pytest.mark.parametrize("seats", [1, 2])
@pytest.mark.parametrize("how", ["abort", "cancel", "aclose"])
def test_the_others_go_on(how: str, seats: int) -> None:
    """One that waits (one seat) or runs (two) is ended; the engine has it no longer at the next tick."""
    decoder = tagged(max_num_seqs=seats)
    prompt = PROMPT * 4
    alone = tagged().generate(prompt, LONG)[0].outputs
    asked, told = threading.Event(), threading.Event()
    left: list[int] = []

    def before(tick: int) -> None:
        left.append(decoder.engine.unfinished)
        if tick in (5, 8):
            assert (asked if tick == 5 else told).wait(10)

    async def main() -> None:
        Watch(decoder, before)
        async with serving(decoder) as engine:
            other = asyncio.create_task(last(engine.generate(prompt, LONG)))
            await asyncio.sleep(0)
            victim = engine.generate(prompt, LONG, request_id="victim")
            task = asyncio.create_task(collect(victim))
            await asyncio.sleep(0)
            asked.set()
            while len(left) <= 8:
                await asyncio.sleep(0)
            if how == "cancel":
                task.cancel()
                await asyncio.wait([task])
            else:
                end = asyncio.create_task(engine.abort("victim") if how == "abort" else victim.aclose())
                await asyncio.sleep(0)
            told.set()
            (got,) = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(got, list) == (how != "cancel")
            if how != "cancel":
                await end
            assert (await other).outputs == alone
            assert left[8] == 2
            assert set(left[9:]) == {1}

    run(main())


@pytest.mark.parametrize("kind", ["generate", "stream"])
@pytest.mark.parametrize("how", ["break", "raise", "drop", "cycle", "cancel in the body"])
def test_a_request_that_nobody_follows_ends(kind: str, how: str) -> None:
    decoder = tagged()
    left = threading.Event()
    watch = Watch(decoder, lambda tick: tick < 15 or left.wait(10))

    async def main() -> None:
        async with serving(decoder) as engine:
            ask: Any = getattr(engine, kind)
            inside = asyncio.Event()

            async def body() -> None:
                async for _ in ask(PROMPT * 4, LONG):
                    inside.set()
                    if how == "raise":
                        raise KeyError
                    if how == "cancel in the body":
                        await asyncio.sleep(60)
                    break

            if how in ("drop", "cycle"):
                following = ask(PROMPT * 4, LONG)
                await anext(following)
                if how == "cycle":
                    following.itself = following
                del following
                gc.collect()
            else:
                task = asyncio.create_task(body())
                await inside.wait()
                if how == "cancel in the body":
                    task.cancel()
                (got,) = await asyncio.gather(task, return_exceptions=True)
                assert type(got) is {"raise": KeyError, "break": type(None)}.get(how, asyncio.CancelledError)
            left.set()
            await settled(engine)
            assert watch.ticks <= 16

    run(main())


def test_one_that_was_never_asked_for_anything_is_not_there() -> None:
    async def main() -> None:
        decoder = build()
        watch = Watch(decoder)
        async with serving(decoder) as engine:
            async with aclosing(engine.generate(PROMPT, LONG)) as following:
                pass
            assert await collect(following) == []
            engine.stream([-1])
            assert watch.ticks == 0

    run(main())


def test_two_tasks_do_not_share_an_iterator() -> None:
    async def main() -> None:
        async with serving(build()) as engine:
            following = engine.generate(PROMPT, SamplingParams(**GREEDY))
            first = asyncio.create_task(anext(following))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task is already waiting"):
                await anext(following)
            assert (await first).outputs[0].token_ids
            assert (await last(following)).finished

    run(main())


def test_a_loop_that_closed_leaves_no_request() -> None:
    """Its consumers can neither be woken nor come back: what they asked for is aborted."""
    go = threading.Event()
    decoder = build()
    watch = Watch(decoder, lambda tick: go.wait(10))
    engine = AsyncSplitDecoder(decoder)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)
    following = engine.generate(PROMPT, LONG)
    coroutine = following.__anext__()
    task = loop.create_task(coroutine)
    loop.run_until_complete(asyncio.sleep(0.02))
    loop.close()
    go.set()
    while engine._thread._live:
        time.sleep(0.001)
    run(settled(engine))
    assert watch.ticks < 10
    coroutine.close()
    engine.close()
    del task


# ---- the end of an engine


def test_a_decoder_is_taken_over_whole() -> None:
    decoder = build()
    held = decoder.stream(PROMPT, SamplingParams(**GREEDY))
    with pytest.raises(RequestError, match="found 1 unfinished answers, expected one at rest"):
        AsyncSplitDecoder(decoder)
    assert len(list(held)) > 1
    engine = AsyncSplitDecoder(decoder)
    for ask in (decoder.generate, decoder.stream):
        with pytest.raises(RequestError, match="driven by an AsyncSplitDecoder"):
            ask(PROMPT)
    with pytest.raises(RequestError, match="driven by an AsyncSplitDecoder"):
        AsyncSplitDecoder(decoder)
    decoder.close()
    assert run(last(engine.generate(PROMPT, SamplingParams(**GREEDY)))).finished
    engine.close()


@pytest.mark.parametrize("how", ["shutdown", "close", "exit"])
def test_shutting_down_aborts_everything(how: str) -> None:
    async def main() -> None:
        decoder = build(max_num_seqs=2)

        def before(tick: int) -> None:
            while tick > 5 and not engine._thread._stopping:
                time.sleep(0.001)

        Watch(decoder, before)
        async with AsyncSplitDecoder(decoder) as engine:
            following: list[Any] = [engine.generate(PROMPT, LONG) for _ in range(3)] + [engine.stream(PROMPT, LONG)]
            assert not (await anext(following[0])).finished
            tasks = [asyncio.create_task(last(one)) for one in following]
            await asyncio.sleep(0)
            if how == "shutdown":
                await asyncio.gather(engine.shutdown(), engine.shutdown())
                await engine.shutdown()
            elif how == "close":
                engine.close()
                engine.close()
        reasons = [getattr(item, "outputs", [item])[0].finish_reason for item in await asyncio.gather(*tasks)]
        assert reasons == ["abort"] * 4
        assert not engine._thread.thread.is_alive()
        assert (decoder.engine.unfinished, pages(decoder)) == (0, [0, 0])
        for ask in (engine.generate, engine.stream):
            with pytest.raises(RequestError, match="this engine is shut down"):
                await anext(ask(PROMPT))  # type: ignore[arg-type]
        await engine.abort("nobody")
        await following[0].aclose()

    run(main())


def test_a_request_on_its_way_when_the_engine_ends_is_answered() -> None:
    """Reserved before the thread ended, submitted after it."""

    async def main() -> None:
        engine = AsyncSplitDecoder(build())
        post = engine._thread.submit

        def late(ticket: Any) -> None:
            engine.close()
            post(ticket)

        engine._thread.submit = late  # type: ignore[method-assign]
        with pytest.raises(RequestError, match="this engine is shut down"):
            await anext(engine.generate(PROMPT, LONG))

    run(main())


def test_an_engine_that_nobody_holds_ends() -> None:
    engine = AsyncSplitDecoder(build())
    thread = engine._thread.thread

    async def main(following: AsyncIterator[RequestOutput]) -> None:
        await anext(following)
        gc.collect()
        assert thread.is_alive(), "an iterator holds its engine"
        assert (await last(following)).outputs[0].finish_reason == "length"

    following = engine.generate(PROMPT, LONG)
    del engine
    run(main(following))
    del following
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_on_delta_may_close_the_engine() -> None:
    async def main() -> None:
        engine = AsyncSplitDecoder(build())
        output = await last(engine.generate(PROMPT, LONG, on_delta=lambda delta: engine.close()))
        assert output.outputs[0].finish_reason == "abort"
        await engine.shutdown()
        assert not engine._thread.thread.is_alive()

    run(main())


def test_the_interpreter_exits_while_an_engine_works() -> None:
    code = (
        "import asyncio, splitdecode as s\n"
        "engine = s.AsyncSplitDecoder.demo()\n"
        "async def main():\n"
        "    following = engine.generate('Work out 41*30.', s.SamplingParams(ignore_eos=True, max_tokens=400))\n"
        "    print((await anext(following)).finished)\n"
        "    globals()['kept'] = following\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
