"""What goes wrong under AsyncSplitDecoder: a request's own faults end it alone, a step's end all that runs, a thread's
death leaves nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from oracles.flaky import PROMPT, Broken, build, opened, pages
from oracles.serving import LONG, UNPACED, Watch, collect, last, paused, run, serving, settled

from splitdecode import (
    AsyncSplitDecoder,
    CompletionOutput,
    Delta,
    DraftLength,
    EngineError,
    HandoffPolicy,
    RequestOutput,
    SamplingParams,
    SplitDecoder,
)
from splitdecode.families import problems
from splitdecode.split.roles import Role

TWENTY = SamplingParams(temperature=0.0, max_tokens=20)


def build_opened(**engine: Any) -> SplitDecoder:
    decoder = build(**UNPACED, **engine)
    opened(decoder)
    return decoder


def answer(output: RequestOutput) -> CompletionOutput:
    return output.outputs[0]


# ---- of one request


@pytest.mark.parametrize("role", Role)
def test_nan_logits_end_their_request(role: Role) -> None:
    """Position 10 of either lane is poisoned: who gets there fails, who does not is as it is alone."""
    decoder = build_opened()
    alone = {n: answer(decoder.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=n))[0]) for n in (1, 4, 20)}
    decoder.models[role].nan_at = 10  # type: ignore[attr-defined]

    async def main() -> None:
        async with serving(decoder) as engine:
            params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (1, 20, 1, 20)]
            found = await asyncio.gather(*[last(engine.generate(PROMPT, one)) for one in params])
            for output, one in zip(found, params, strict=True):
                assert output.finished
                if one.max_tokens == 1:
                    assert answer(output) == alone[1]
                else:
                    assert answer(output).finish_reason == "error"
                    assert "NaN" in str(answer(output).stop_reason)
                    assert alone[20].token_ids[: len(answer(output).token_ids)] == answer(output).token_ids
            deltas = await collect(engine.stream(PROMPT, TWENTY))
            assert deltas[-1].finish_reason == "error"
            decoder.models[role].nan_at = -1  # type: ignore[attr-defined]
            assert answer(await last(engine.generate(PROMPT, TWENTY))) == alone[20]

    run(main())


@pytest.mark.parametrize("fault", [("owner", 1), ("next_mark", 0), ("owner", 5)])
def test_a_policy_that_raises_ends_its_own_request(fault: tuple[str, int]) -> None:
    decoder = build_opened()
    alone = decoder.generate(PROMPT, TWENTY)[0].outputs

    async def main() -> None:
        async with serving(decoder) as engine:
            policies: list[HandoffPolicy | None] = [None, Broken(*fault), None, Broken(*fault)]
            found = await asyncio.gather(
                *[last(engine.generate(PROMPT, TWENTY, handoff=policy)) for policy in policies]
            )
            for output, policy in zip(found, policies, strict=True):
                if policy is None:
                    assert output.outputs == alone
                else:
                    assert answer(output).finish_reason == "error"
                    assert str(answer(output).stop_reason).startswith("ZeroDivisionError: no such")
            with pytest.raises(ZeroDivisionError):
                await anext(engine.generate(PROMPT, handoff=Broken("owner", 0)))

    run(main())


def raising_at(call: int, heard: list[Delta]) -> Callable[[Delta], None]:
    def on_delta(delta: Delta) -> None:
        heard.append(delta)
        if len(heard) > call:
            raise ValueError("enough")

    return on_delta


@pytest.mark.parametrize("kind", ["generate", "stream"])
def test_an_on_delta_that_raises_ends_its_own_request(kind: str) -> None:
    """At whichever call, the last included; it is not called again, and the consumer misses nothing of the text."""
    decoder = build_opened()
    params = SamplingParams(temperature=0.0, max_tokens=6, n=2)
    every = list(decoder.stream(PROMPT, params))
    alone = decoder.generate(PROMPT, params)[0].outputs
    others = decoder.generate(PROMPT, TWENTY)[0].outputs
    assert len(every) > 6

    async def main() -> None:
        async with serving(decoder) as engine:
            ask: Any = getattr(engine, kind)
            for call in range(len(every) + 1):
                heard: list[Delta] = []
                beside = asyncio.create_task(last(engine.generate(PROMPT, TWENTY)))
                items: list[Any] = await collect(ask(PROMPT, params, on_delta=raising_at(call, heard)))
                assert len(heard) == min(call + 1, len(every))
                for index in range(2):
                    own = [delta for delta in every if delta.index == index]
                    assert [delta for delta in heard if delta.index == index] in [own[:n] for n in range(len(own) + 1)]
                assert (await beside).outputs == others
                if kind == "stream":
                    reasons = [item.finish_reason for item in items if item.finish_reason]
                    texts = ["".join(item.text for item in items if item.index == i) for i in range(2)]
                else:
                    reasons = [output.finish_reason for output in items[-1].outputs]
                    texts = [output.text for output in items[-1].outputs]
                    said = {output.stop_reason for output in items[-1].outputs}
                    assert said == ({None} if call == len(every) else {"ValueError: enough"})
                assert reasons == ([one.finish_reason for one in alone] if call == len(every) else ["error"] * 2)
                for index, text in enumerate(texts):
                    assert text.startswith("".join(delta.text for delta in heard if delta.index == index))
                if call >= len(every) - 2:
                    assert texts == [output.text for output in alone]
                await settled(engine)

    run(main())


def test_an_on_delta_that_is_cancelled_is_a_fault_like_any_other() -> None:
    """CancelledError and SystemExit are no Exceptions: neither may end the engine's thread."""
    decoder = build_opened()
    alone = decoder.generate(PROMPT, TWENTY)[0].outputs

    async def main() -> None:
        async with serving(decoder) as engine:
            for kind in (asyncio.CancelledError, SystemExit):

                def on_delta(delta: Delta, kind: type[BaseException] = kind) -> None:
                    raise kind("at once")

                asked = [engine.generate(PROMPT, TWENTY, on_delta=on_delta), engine.generate(PROMPT, TWENTY)]
                faulty, good = await asyncio.gather(*map(last, asked))
                assert (answer(faulty).finish_reason, answer(faulty).stop_reason) == (
                    "error",
                    f"{kind.__name__}: at once",
                )
                assert good.outputs == alone

    run(main())


# ---- of a step


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("role", "steps"), [(Role.SMALL, 0), (Role.SMALL, 3), (Role.SMALL, 7), (Role.LARGE, 1)])
def test_a_step_that_fails_ends_all_that_runs_and_no_more(role: Role, steps: int, depth: int) -> None:
    decoder = build_opened(depth=depth, max_num_seqs=2)
    alone = decoder.generate(PROMPT, TWENTY)[0].outputs
    model: Any = decoder.models[role]

    async def main() -> None:
        async with serving(decoder) as engine:
            model.raises_at = len(model.forwards) + steps
            following: list[Any] = [engine.generate(PROMPT, TWENTY) for _ in range(4)]
            following += [engine.stream(PROMPT, TWENTY) for _ in range(2)]
            with paused(engine):
                together = asyncio.gather(*map(last, following), return_exceptions=True)
                await asyncio.sleep(0)
            found = await together
            for error in found:
                assert isinstance(error, EngineError)
                assert str(error) == "a step failed: RuntimeError: the device is gone"
                assert isinstance(error.__cause__, RuntimeError)
            assert len({id(error) for error in found}) == 6, "each has a traceback of its own"
            await settled(engine)
            assert [await collect(one) for one in following] == [[]] * 6
            again = await asyncio.gather(*[last(engine.generate(PROMPT, TWENTY)) for _ in range(3)])
            assert [output.outputs for output in again] == [alone] * 3

    run(main())


def test_what_ended_before_the_step_failed_keeps_its_answer() -> None:
    """One ends by itself in the first half of a tick, in whose second half the other is lost."""
    decoder = build_opened()
    short = SamplingParams(temperature=0.0, max_tokens=1)
    alone = decoder.generate(PROMPT, short)[0].outputs
    land, landed = decoder.engine._land, []

    def lands_once(role: Role) -> None:
        land(role)
        landed.append(role)
        if len(landed) == 1:
            raise RuntimeError("the device is gone")

    async def main() -> None:
        async with serving(decoder) as engine:
            decoder.engine._land = lands_once  # type: ignore[method-assign]
            with paused(engine):
                tasks = [asyncio.create_task(last(engine.generate(PROMPT, one))) for one in (short, TWENTY)]
                await asyncio.sleep(0)
            done, lost = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(done, RequestOutput)
            assert done.outputs == alone
            assert isinstance(lost, EngineError)

    run(main())


# ---- of the thread


def dying(decoder: SplitDecoder, at: int, error: BaseException) -> Watch:
    def before(tick: int) -> None:
        if tick == at:
            raise error

    return Watch(decoder, before)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 4])
def test_a_thread_that_dies_leaves_nobody_waiting(kind: type[BaseException], at: int) -> None:
    async def main() -> None:
        error = kind("at once")
        decoder = build_opened(max_num_seqs=2)
        dying(decoder, at, error)
        async with AsyncSplitDecoder(decoder) as engine:
            following: list[Any] = [engine.generate(PROMPT, LONG) for _ in range(3)] + [engine.stream(PROMPT, LONG)]
            for found in await asyncio.gather(*map(last, following), return_exceptions=True):
                assert isinstance(found, EngineError)
                assert str(found).startswith(f"the engine's thread died: {type(error).__name__}")
                assert found.__cause__ is error
            for ask in (engine.generate, engine.stream):
                with pytest.raises(EngineError, match="the engine's thread died"):
                    await anext(ask(PROMPT))  # type: ignore[arg-type]
            await engine.abort("nobody")
        assert not engine._thread.thread.is_alive()

    run(main())


def test_an_engine_that_cannot_be_tidied_up_is_not_used_again() -> None:
    """A step fails, and so does freeing what it left."""

    async def main() -> None:
        decoder = build_opened()

        def fail(*_: Any) -> None:
            raise OSError("and nor can this")

        decoder.engine._abandon = fail  # type: ignore[method-assign]
        decoder.engine.abort = fail  # type: ignore[method-assign]
        decoder.models.small.raises_at = 3  # type: ignore[attr-defined]
        engine = AsyncSplitDecoder(decoder)
        for found in await asyncio.gather(
            *[last(engine.generate(PROMPT, LONG)) for _ in range(3)], return_exceptions=True
        ):
            assert isinstance(found, EngineError)
            assert "and nor can this" in str(found)
        with pytest.raises(EngineError, match="the engine's thread died: OSError"):
            await anext(engine.generate(PROMPT, LONG))
        await engine.shutdown()

    run(main())


def test_a_sequence_that_fails_to_start_leaves_nothing_behind() -> None:
    """Half-way the scheduler holds what no request names yet."""

    async def main() -> None:
        decoder = build_opened()

        def fail(*_: Any) -> None:
            raise OSError("no slot")

        decoder.engine.runners.small.sampler.set = fail  # type: ignore[method-assign]
        engine = AsyncSplitDecoder(decoder)
        with pytest.raises(EngineError, match="OSError: no slot"):
            await last(engine.generate(PROMPT, LONG))
        assert (decoder.engine.unfinished, decoder.engine.scheduler.unfinished) == (0, 0)
        del decoder.engine.runners.small.sampler.set
        assert (await last(engine.generate(PROMPT, LONG))).finished
        await engine.shutdown()
        assert pages(decoder) == [0, 0]

    run(main())


def test_further_tags_stand_in_raw_text() -> None:
    """A tag that means something else, in the text of one of two requests: neither ends for it."""
    prompts, greedy = [task.prompt for task in problems(2, 3)], SamplingParams(temperature=0.0, max_tokens=40)

    async def main() -> list[RequestOutput]:
        async with serving(SplitDecoder.demo(actions={"+": DraftLength(16)})) as engine:
            asked = [engine.generate(prompt, greedy) for prompt in prompts]
            return await asyncio.gather(*[last(one) for one in asked])

    with SplitDecoder.demo(actions={"+": DraftLength(16)}) as alone:
        wanted = [output.outputs[0] for output in alone.generate(prompts, greedy)]
    assert "+" in wanted[0].raw_text
    assert "+" not in wanted[0].text
    assert [output.outputs[0] for output in run(main())] == wanted
