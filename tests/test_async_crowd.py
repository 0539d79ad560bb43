"""Sixty requests on the embedded pair that come at random moments, half of which go at random moments, in every way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from oracles.serving import run, serving
from oracles.tiny import TAGS

from splitdecode import (
    AsyncSplitDecoder,
    CompletionOutput,
    Delta,
    HandoffPolicy,
    SamplingParams,
    SmallOnly,
    SplitDecoder,
)
from splitdecode.families import problems

NUMBER = 60
FATES = ["abort", "cancel", "break", "close", "fault"]
ENGINE: dict[str, Any] = {"dtype": "float64", "page_size": 4, "max_num_seqs": 9}


@dataclass
class Guest:
    """One request. It meets its fate, unless that is "stay", when `patience` items have come."""

    name: str
    prompt: str
    params: SamplingParams
    policy: HandoffPolicy | None
    kind: str
    fate: str
    delay: float
    patience: int
    wanted: list[CompletionOutput] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)

    async def comes(self, engine: AsyncSplitDecoder) -> None:
        await asyncio.sleep(self.delay)
        ask: Any = getattr(engine, self.kind)
        following = ask(
            self.prompt, self.params, handoff=self.policy, request_id=self.name, on_delta=Deaf(self.fate, self.patience)
        )
        if not self.patience:
            self.leaving.set()
        try:
            async for item in following:
                self.items.append(item)
                if len(self.items) >= self.patience:
                    self.leaving.set()
                    if self.fate in ("break", "close"):
                        break
            if self.fate == "close":
                await following.aclose()
        finally:
            self.leaving.set()

    async def goes(self, engine: AsyncSplitDecoder, coming: asyncio.Task[None]) -> None:
        await self.leaving.wait()
        if self.fate == "abort":
            await engine.abort(self.name)
        elif self.fate == "cancel":
            coming.cancel()

    def got(self) -> tuple[list[str], list[str | None]]:
        """Text and finish reason of each choice, as far as they came."""
        if self.kind == "stream":
            own = [[d for d in self.items if d.index == index] for index in range(self.params.n)]
            return ["".join(d.text for d in deltas) for deltas in own], [
                d[-1].finish_reason if d else None for d in own
            ]
        outputs = self.items[-1].outputs if self.items else []
        return [output.text for output in outputs], [output.finish_reason for output in outputs]


@dataclass
class Deaf:
    """An on_delta that raises once it has heard enough."""

    fate: str
    left: int

    def __call__(self, delta: Delta) -> None:
        self.left -= 1
        if self.fate == "fault" and self.left < 0:
            raise ValueError("no more of this")


def guests(rng: np.random.Generator) -> list[Guest]:
    found = []
    for i, task in enumerate(problems(NUMBER, 5)):
        params = SamplingParams(
            temperature=float(rng.choice([0.0, 1.0, 3.0])),
            max_tokens=int(rng.integers(4, 60)),
            n=int(rng.choice([1, 1, 2])),
            seed=i,
        )
        policy = SmallOnly() if rng.random() < 0.2 else None
        fate = str(rng.choice(FATES)) if rng.random() < 0.5 else "stay"
        kind = str(rng.choice(["generate", "stream"]))
        delay, patience = float(rng.random() * 0.3), int(rng.integers(0, 6))
        found.append(Guest(f"r{i}", task.prompt, params, policy, kind, fate, delay, patience))
    return found


def begins(text: str, whole: str) -> bool:
    """Whether `whole` begins with `text`, but for a half-written tag at its end: that is text when an answer is cut."""
    for n in range(len(TAGS[1]) + 1):
        head, tail = text[: len(text) - n], text[len(text) - n :]
        if whole.startswith(head) and any(tag.startswith(tail) for tag in TAGS):
            return True
    return False


def test_a_crowd_that_comes_and_goes() -> None:
    """Whoever stays gets what it gets alone; whoever goes gets a beginning of it, and leaves nothing behind."""
    crowd = guests(np.random.default_rng(7))
    with SplitDecoder.demo(**ENGINE) as alone:
        for guest in crowd:
            guest.wanted = alone.generate(guest.prompt, guest.params, handoff=guest.policy)[0].outputs

    async def main() -> list[Any]:
        async with serving(SplitDecoder.demo(**ENGINE)) as engine:
            coming = [asyncio.create_task(guest.comes(engine)) for guest in crowd]
            going = [guest.goes(engine, task) for guest, task in zip(crowd, coming, strict=True)]
            return (await asyncio.gather(*coming, *going, return_exceptions=True))[:NUMBER]

    ended = dict.fromkeys([*FATES, "stay"], 0)
    for guest, result in zip(crowd, run(main()), strict=True):
        texts, reasons = guest.got()
        assert result is None or (guest.fate == "cancel" and isinstance(result, asyncio.CancelledError)), result
        if reasons == [output.finish_reason for output in guest.wanted]:
            assert texts == [output.text for output in guest.wanted]
            if guest.kind == "generate":
                assert guest.items[-1].outputs == guest.wanted
            ended["stay"] += guest.fate == "stay"
            continue
        ended[guest.fate] += 1
        assert guest.fate != "stay"
        assert all(begins(text, want.text) for text, want in zip(texts, guest.wanted, strict=False))
        if guest.fate == "fault":
            assert reasons == ["error"] * guest.params.n
    assert ended["stay"] == sum(guest.fate == "stay" for guest in crowd) > 20
    assert min(ended.values()) > 1, ended
