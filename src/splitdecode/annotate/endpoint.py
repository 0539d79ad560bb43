"""F7: traces annotated by a model behind an OpenAI-compatible endpoint.

    ask at temperature 0 -> snippets -> places in the trace -> enough of them? else again at 0.3, then 0.6

The attempt with most places found is kept; a trace of which no snippet was found at all is a Failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from splitdecode.annotate.align import MIN_RATIO, REFINE_BELOW, Match, locate_all
from splitdecode.annotate.client import Client, EndpointError, Server
from splitdecode.annotate.records import Annotation, Failure
from splitdecode.annotate.snippets import messages, parse_snippets
from splitdecode.annotate.spans import MERGE, normalise
from splitdecode.annotate.traces import Trace
from splitdecode.errors import RequestError


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is asked, and what becomes of the answer.

    share         of the trace that is asked for        least   snippets that must be found in it, or it is asked again
    temperatures  of the attempts                       cap     the largest share that is kept; None: all of it
    min_ratio     of a fuzzy match                      refine  below this ratio its ends are moved
    """

    share: float = 0.2
    least: int = 3
    temperatures: tuple[float, ...] = (0.0, 0.3, 0.6)
    min_ratio: float = MIN_RATIO
    refine: float = REFINE_BELOW
    merge: int = MERGE
    cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("share", "min_ratio", "cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise RequestError(f"{name}: found {value}, expected a share above 0 and up to 1")
        if self.least < 1 or self.merge < 0 or not self.temperatures or min(self.temperatures) < 0:
            raise RequestError(f"recipe: found least {self.least}, merge {self.merge}, temperatures "
                               f"{self.temperatures}, expected least >= 1, merge >= 0, temperatures >= 0")  # fmt: skip


@dataclass(slots=True)
class _Usage:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EndpointAnnotator:
    """Asks a server for the hardest snippets of each trace, several traces at a time."""

    def __init__(
        self,
        server: Server,
        recipe: Recipe | None = None,
        *,
        concurrency: int = 8,
        prices: tuple[float, float] = (0.0, 0.0),
        client: Callable[[Server], Client] = Client,
    ) -> None:
        """concurrency: traces in work at once; prices: dollars per million prompt and completion tokens; client: makes
        what asks, for tests. Raises RequestError for a concurrency below 1; so does annotate() where there are prices
        and the server counts no tokens."""
        if concurrency < 1:
            raise RequestError(f"--concurrency: found {concurrency}, expected at least 1")
        self._server, self._recipe, self._concurrency, self._prices = server, recipe or Recipe(), concurrency, prices
        self._make_client = client

    @property
    def settings(self) -> Mapping[str, Any]:
        """Where the model runs and how fast it is asked may change between runs; these may not."""
        return {"annotator": "endpoint", "model": self._server.model, **asdict(self._recipe)}

    def annotate(self, traces: Iterable[Trace]) -> Iterator[Annotation | Failure]:
        """Results as they are finished. Runs an event loop of its own: not to be called inside one."""
        with asyncio.Runner() as runner:
            pool = _Pool(self, iter(traces))
            try:
                while (found := runner.run(pool.next())) is not None:
                    yield found
            finally:
                runner.run(pool.close())

    async def one(self, client: Client, trace: Trace) -> Annotation | Failure:
        """Asks until enough snippets of the trace are found, or the temperatures are used up."""
        recipe, usage = self._recipe, _Usage()
        best: list[Match] = []
        attempts: list[dict[str, Any]] = []
        asked = messages(trace.prompt, trace.text, share=recipe.share, least=recipe.least)
        for temperature in recipe.temperatures:
            try:
                reply = await client.ask(asked, temperature)
            except EndpointError as error:
                if not best:
                    return Failure(trace, str(error), self._cost(usage))
                break
            if not reply.counted and any(self._prices):
                raise RequestError("--price-in and --price-out: found an answer without usage, expected one that says "
                                   "how many tokens it cost: without prices this server can be asked")  # fmt: skip
            usage.requests += 1
            usage.prompt_tokens += reply.prompt_tokens
            usage.completion_tokens += reply.completion_tokens
            snippets = parse_snippets(reply.text)
            found = locate_all(trace.text, snippets, minimum=recipe.min_ratio, refine=recipe.refine)
            attempts.append({"temperature": temperature, "snippets": len(snippets), "found": len(found)})
            if len(found) > len(best):
                best = found
            if len(best) >= recipe.least:
                break
        ranges = [(match.start, match.stop) for match in best]
        spans = normalise(trace.text, ranges, merge=recipe.merge, cap=recipe.cap)
        if not spans:
            return Failure(trace, f"no snippet found in the trace in {len(attempts)} attempts", self._cost(usage))
        cost = self._cost(usage)
        details = {"matches": [asdict(m) for m in best], "attempts": attempts, **asdict(usage), "cost": cost}
        return Annotation(trace, spans, details, cost)

    def new_client(self) -> Client:
        return self._make_client(self._server)

    @property
    def concurrency(self) -> int:
        return self._concurrency

    def _cost(self, usage: _Usage) -> float:
        return (usage.prompt_tokens * self._prices[0] + usage.completion_tokens * self._prices[1]) / 1e6


class _Pool:
    """Traces in work, in the event loop of whoever calls next()."""

    def __init__(self, annotator: EndpointAnnotator, traces: Iterator[Trace]) -> None:
        self._annotator, self._traces = annotator, traces
        self._client: Client | None = None
        self._working: set[asyncio.Task[Annotation | Failure]] = set()
        self._more = True

    async def next(self) -> Annotation | Failure | None:
        """The next finished trace; None when all are."""
        self._client = self._client or self._annotator.new_client()
        while self._more and len(self._working) < self._annotator.concurrency:
            trace = next(self._traces, None)
            if trace is None:
                self._more = False
            else:
                self._working.add(asyncio.create_task(self._annotator.one(self._client, trace)))
        if not self._working:
            return None
        done, _ = await asyncio.wait(self._working, return_when=asyncio.FIRST_COMPLETED)
        task = min(done, key=lambda one: one.exception() is not None)  # an error waits for what was finished with it
        self._working.remove(task)
        return task.result()

    async def close(self) -> None:
        """Drops what is still in work."""
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
