"""What only a CUDA device makes the runner do, against a device that is late and a torch.cuda that keeps a record.

The late device queues everything that is launched (copies out of pinned memory too) and does it when somebody waits,
or bit by bit when somebody asks. Streams must equal the oracle's all the same, and a pinned place that is refilled
before the device has read it is an error. What is called of torch.cuda is checked against torch's own signatures.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracles.tapes import tape_runner
from oracles.worlds import World, compare, expected, make_decoder, make_worlds, run_schedule
from torch import Tensor

from splitdecode import ControlTags, SamplingParams
from splitdecode.ops import StepOps, step_ops
from splitdecode.runtime import device, graphs
from splitdecode.runtime.device import DeviceFlight, DeviceRunner
from splitdecode.runtime.runner import Flight
from splitdecode.split.roles import Pair

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ENGINE = {"max_model_len": 128, "page_size": 4, "depth": 3}
PROMPT = [1 + i % 5 for i in range(9)]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


class LateDevice:
    """A queue of work. speed: up to so many pieces are done each time somebody asks whether some are."""

    def __init__(self, seed: int, speed: int) -> None:
        self.queue: deque[Callable[[], object]] = deque()
        self.issued, self.done, self.asked, self.waits = 0, 0, 0, 0
        self.broken: BaseException | None = None
        self._rng, self._speed = np.random.default_rng(seed), speed

    def add(self, work: Callable[..., object], *arguments: Any, **options: Any) -> None:
        self.queue.append(partial(work, *arguments, **options))
        self.issued += 1

    def run(self, upto: int) -> None:
        while self.done < upto:
            self.done += 1
            self.queue.popleft()()

    def finish(self) -> None:
        self.run(self.issued)

    def wait(self) -> None:
        self.waits += 1
        self.finish()

    def event(self, *arguments: Any, **options: Any) -> Any:
        """torch.cuda.Event"""
        inspect.signature(torch.cuda.streams.Event.__new__).bind(None, *arguments, **options)
        marked = [0]

        def record() -> None:
            marked[0] = self.issued

        def query() -> bool:
            self.asked += 1
            if self.broken is not None:
                raise self.broken
            self.run(min(self.issued, self.done + int(self._rng.integers(self._speed + 1))))
            return self.done >= marked[0]

        return SimpleNamespace(record=record, query=query, synchronize=lambda: self.run(marked[0]))


class Late:
    """Builds runners on a late device each, and watches which places of a ring are in the air."""

    def __init__(
        self, seed: int = 1, speed: int = 4, rings: int | None = None, same_params: bool = False, **ops: Any
    ) -> None:
        """same_params: every request has the same, so they may be written at any time.  ops: in place of step_ops'."""
        self.device, self.rings, self.changed, self.same_params = LateDevice(seed, speed), rings, ops, same_params
        self.runners: list[DeviceRunner] = []
        self.air: dict[int, set[int]] = {}
        self.flown = 0

    def ops(self) -> StepOps:
        plain = replace(step_ops(CPU), **self.changed)
        names = [field.name for field in fields(plain) if field.name not in graphs._MEMORY]
        return replace(plain, **{name: partial(self.device.add, getattr(plain, name)) for name in names})

    def make_runner(self, *arguments: Any, **ids: Any) -> DeviceRunner:
        """Stands in for runtime.runners.make_runner."""
        runner = tape_runner(*arguments, **ids)
        self.runners.append(runner)
        if self.rings is not None:
            runner._rings = self.rings
        air: set[int] = set()
        self.air[id(runner)] = air
        launch, land, sampler = runner.launch, runner.land, runner.sampler

        def launched(*arguments: Any) -> DeviceFlight:
            assert runner._turn not in air, "a place was refilled before its flight landed"
            flight = launch(*arguments)
            air.add(flight.place)
            self.flown += 1
            return flight

        def landed(flight: DeviceFlight) -> Flight:
            try:
                return land(flight)
            finally:
                air.discard(flight.place)

        def ordered(write: Callable[..., Any]) -> Callable[..., Any]:
            """Parameters are written in stream order, so after all that was launched."""

            def after(*arguments: Any) -> Any:
                if not self.same_params:
                    self.device.finish()
                return write(*arguments)

            return after

        hooks = {"launch": launched, "land": landed, "device": CUDA}
        for name, hook in hooks.items():
            setattr(runner, name, hook)
        for name in ("set", "clear", "_mark"):
            setattr(sampler, name, ordered(getattr(sampler, name)))
        return runner


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Late]:
    """Late(...), from which decoders then have their runners."""

    def install(**options: Any) -> Late:
        found, plain = Late(**options), torch.Tensor.copy_

        def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if not non_blocking:
                return plain(self, source)
            then = source.clone()

            def arrive() -> None:
                assert torch.equal(source, then), "pinned memory was written before the device had read it"
                plain(self, then)

            found.device.add(arrive)
            return self

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        monkeypatch.setattr(torch.cuda, "Event", found.device.event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: found.device.finish())
        stream = SimpleNamespace(synchronize=found.device.wait)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        monkeypatch.setattr("oracles.tapes.step_ops", lambda *_, **__: found.ops())
        monkeypatch.setattr("splitdecode.decoder.make_runner", found.make_runner)
        drop = DeviceFlight.dropped

        def dropped(flight: DeviceFlight) -> Any:
            found.air[id(flight.runner)].discard(flight.place)
            return drop(flight)

        monkeypatch.setattr(DeviceFlight, "dropped", dropped)
        return found

    return install


SCHEDULES = [("plain", 300, 1), ("unequal", 303, 6), ("added", 311, 40)]


@pytest.mark.parametrize(("name", "seed", "speed"), SCHEDULES)
def test_a_late_device_changes_no_token(
    worlds: dict[str, World], name: str, seed: int, speed: int, late: Callable[..., Late]
) -> None:
    found = late(seed=seed, speed=speed)
    for turn in range(3):
        run_schedule(worlds[name], seed + turn, depth=3, steps_per_graph=1 + turn, enforce_eager=turn == 2)
    assert found.flown > 20
    assert found.device.asked > found.flown / 4, "words were not there when they were first looked for"


def answer(worlds: dict[str, World], **more: Any) -> Any:
    """One request to a decoder, and what the oracle says."""
    world, params = worlds["plain"], SamplingParams(temperature=0.7, max_tokens=24, seed=4)
    decoder = make_decoder(world, ENGINE | more)

    def ask(prompt: list[int] = PROMPT) -> None:
        output = decoder.generate({"prompt_token_ids": prompt}, params)[0]
        compare(expected(world, decoder, Pair(prompt, prompt), params, ControlTags()), output.outputs[0])
        assert free_of_pages(decoder)

    return decoder, ask


def free_of_pages(decoder: Any) -> bool:
    return [runner.cache.pool.in_use for runner in decoder.engine.runners] == [0, 0]


def test_a_ring_that_is_too_small_is_noticed(worlds: dict[str, World], late: Callable[..., Late]) -> None:
    late(rings=1)
    _, ask = answer(worlds)
    with pytest.raises(AssertionError, match=r"place was refilled|pinned memory was written"):
        ask()


def test_more_edits_than_fit_wait_for_the_device(
    worlds: dict[str, World], late: Callable[..., Late], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "EDITS", 16)
    found = late(speed=1)
    decoder, ask = answer(worlds, page_size=2)
    ask([1 + i % 5 for i in range(90)])
    assert found.device.waits >= 2, "45 edits in three parts"
    for runner in decoder.engine.runners:
        assert (runner.table.numpy() == runner._known).all()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    with pytest.raises(AssertionError, match="pinned memory was written"):
        answer(worlds, page_size=2)[1]([1 + i % 5 for i in range(90)])


def test_a_step_that_ends_without_ids_is_an_error(worlds: dict[str, World], late: Callable[..., Late]) -> None:
    broken = [True]
    advance = step_ops(CPU).advance

    def sometimes(*arguments: Any, **options: Any) -> None:
        if not broken[0]:
            advance(*arguments, **options)

    late(advance=sometimes)
    decoder, ask = answer(worlds)
    with pytest.raises(RuntimeError, match="without writing its ids"):
        ask()
    assert free_of_pages(decoder)
    broken[0] = False
    ask()


def test_an_error_of_the_device_is_raised(worlds: dict[str, World], late: Callable[..., Late]) -> None:
    found = late(speed=1)
    decoder, ask = answer(worlds)
    ask()
    found.device.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ask()
    assert free_of_pages(decoder)


def test_what_an_interrupted_step_left_in_the_air_harms_nobody(
    worlds: dict[str, World], late: Callable[..., Late]
) -> None:
    found = late(speed=1, same_params=True)
    decoder, ask = answer(worlds)
    for _ in range(3):
        found.device.broken = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            ask()
        assert free_of_pages(decoder)
        found.device.broken = None
        ask()


def test_a_table_that_was_not_sent_is_sent_again(worlds: dict[str, World], late: Callable[..., Late]) -> None:
    plain, left = step_ops(CPU).patch, [1]

    def fails_once(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("out of memory")
        plain(*arguments)

    late(speed=40, patch=fails_once)
    decoder, ask = answer(worlds)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask()
    assert free_of_pages(decoder)
    ask()


class Record:
    """A torch.cuda in which nothing happens but what is written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Any] = []
        self.current: list[Any] = ["default"]
        for name in ("device", "stream", "Stream", "CUDAGraph", "graph", "synchronize", "graph_pool_handle"):
            real = getattr(torch.cuda, name)
            fake = partial(self.checked, getattr(self, name), inspect.signature(real))
            monkeypatch.setattr(torch.cuda, name, fake)

    @staticmethod
    def checked(fake: Callable[..., Any], signature: inspect.Signature, *arguments: Any, **options: Any) -> Any:
        """TypeError for what torch would not take."""
        signature.bind(*arguments, **options)
        return fake(*arguments, **options)

    def synchronize(self) -> None:
        self.events.append("synchronize")

    def graph_pool_handle(self) -> str:
        return "pool"

    def Stream(self) -> Any:
        return SimpleNamespace(synchronize=lambda: self.events.append("side synchronize"))

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.events.append("replay"))

    @contextmanager
    def device(self, where: torch.device) -> Iterator[None]:
        assert where == CUDA
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.current.append("side")
        yield
        self.current.pop()

    @contextmanager
    def graph(self, graph: Any, pool: Any = None) -> Iterator[None]:
        self.events.append(("capture into", pool))
        self.current.append("capture")
        yield
        self.current.pop()


def test_a_capture_follows_a_run_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(monkeypatch)
    ops = step_ops(CPU)

    def run(given: StepOps) -> None:
        assert given is ops, "on a device the launchers themselves run"
        record.events.append(record.current[-1])

    graph = graphs.GraphPool(CUDA).capture(run, ops)
    assert record.events == [
        "synchronize",
        "side",
        "side synchronize",
        ("capture into", "pool"),
        "capture",
        "synchronize",
    ]
    assert record.current == ["default"]
    graph.replay()
    assert record.events[-1] == "replay"


def test_elsewhere_a_capture_is_a_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(monkeypatch)
    assert isinstance(graphs.GraphPool(CPU).capture(lambda ops: None, step_ops(CPU)), graphs.Tape)
    assert record.events == []
