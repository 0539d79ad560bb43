"""F5: two models taking turns over many sequences: tick() is the whole engine.

    add -> waiting -> (a handle is free) -> scheduler -> tick, tick, ... -> retired, pages and handle free

Flights are a FIFO per role: a step is launched, then landed when `depth` of them are in the air or nothing more can be
launched. On a CPU the depth is one; at depth d the host hears of a token d - 1 steps late, and nothing else changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic

import torch

from splitdecode._C import Arena, Event, Scheduler
from splitdecode.config import MAX_POSITIONS, EngineConfig, SamplingParams
from splitdecode.runtime.batch import Batch, StepBuffers
from splitdecode.runtime.device import DeviceFlight
from splitdecode.runtime.runner import Flight
from splitdecode.runtime.runners import Runner
from splitdecode.runtime.sampler import Array, Counts
from splitdecode.runtime.scoring import token_logprobs
from splitdecode.split.actions import ControlAction
from splitdecode.split.budget import Budgets
from splitdecode.split.health import Health, Seen, log, paired, seam_jump
from splitdecode.split.outputs import CompletionOutput, Delta, ModelMetrics, RequestMetrics
from splitdecode.split.policies import HandoffPolicy, Opening
from splitdecode.split.roles import Pair, Role
from splitdecode.split.rollout import Closings, rollout
from splitdecode.split.sequence import SplitSequence
from splitdecode.split.tokens import PairTokens
from splitdecode.split.tracing import Tracer
from splitdecode.split.transcript import TextStream, Top, completion, count_models, lane_owners


@dataclass(slots=True, eq=False)
class Choice:
    """One answer being written: what was asked, where it stands, what came of it."""

    prompts: Pair[list[int]]
    params: SamplingParams
    policy: HandoffPolicy
    key: int
    index: int
    metrics: RequestMetrics
    salt: bytes = b""
    leader: Choice | None = None
    stream: TextStream | None = None
    sequence: SplitSequence | None = None
    top: Top = field(default_factory=dict)
    deltas: list[Delta] = field(default_factory=list)
    output: CompletionOutput | None = None


class Engine:
    """Who steps next, what landed, what it means: `tick()` until nothing is unfinished."""

    def __init__(
        self,
        runners: Pair[Runner],
        tokens: PairTokens,
        config: EngineConfig,
        eos_ids: Pair[list[int]],
        max_len: Pair[int],
        arena: Arena | None = None,
        clock: Callable[[], float] = monotonic,
        actions: Mapping[str, ControlAction] | None = None,
    ) -> None:
        """arena: the memory the caches share, if they do; actions: by tag (split/actions.py).

        clock: seconds that never run backwards; arrival, first-token and finish times are read from it.
        """
        self.runners, self.tokens, self.config, self.max_len, self.clock = runners, tokens, config, max_len, clock
        self.depth = config.depth or 1
        specs = tuple(
            (runners[r].cache.pool, tokens.vocabularies[r], max_len[r], eos_ids[r], runners[r].cache.shelf_pool)
            for r in Role
        )
        self.actions = list((actions or {}).values())
        self.tags = (*tokens.tags, *(actions or {}))
        self.scheduler = Scheduler(specs, list(self.tags), config.max_num_seqs, self.depth)
        self.scheduler.pace(config.handoff_patience, config.handoff_max_wait_ms)
        if arena is not None and not config.second_stream:  # memory changes hands in the order of one stream
            self.scheduler.share(arena)
        for role in Role:
            chunk = config.catch_up_chunk if config.catch_up == "eager" else MAX_POSITIONS
            self.scheduler.fill(role, config.weight_bound_tokens or 0, chunk)
        self.ahead = config.catch_up != "lazy" and tokens.same
        if self.ahead and config.catch_up == "adaptive":
            writer = runners[Role.SMALL]
            writer.watched = torch.tensor(tokens.entering(Role.SMALL, tokens.tags[0]), device=writer.cache.kv.device)
        self.buffers = Pair.of(self._buffers)
        self.flights: Pair[deque[Flight | DeviceFlight]] = Pair(deque(), deque())
        self.waiting: deque[Choice] = deque()
        self.running: dict[int, Choice] = {}
        self._silent: dict[int, Choice] = {}  # those without a token, those that stream: a tick looks at no others
        self._streaming: dict[int, Choice] = {}
        self.tracer: Tracer | None = None
        self._penalised = 0
        self.budgets = Budgets(config, lambda: self.clock())
        self.health = Health()
        self._unwatched = 0  # answers with hand-offs since a seam was last noted down
        self.seams_wait = False  # seams are only noted down: score_seams() measures them, outside of what is timed

    def add(self, choice: Choice) -> None:
        """Queues an answer; it starts when a handle is free."""
        choice.metrics.arrival_time = choice.metrics.arrival_time or self.clock()
        self.waiting.append(choice)
        if self.tracer is not None:
            self.tracer.arrived(self, choice)

    @property
    def unfinished(self) -> int:
        """Answers waiting or being written."""
        return len(self.waiting) + len(self.running)

    def tick(self) -> None:
        """Launches one step per model that has pending tokens, lands what is due, applies what it means."""
        launched = Pair(False, False)
        try:
            self._start_waiting()
            for role in Role:
                batch = self.buffers[role].plan(self.scheduler, role, self.runners[role].steps, 1e3 * self.clock())
                self._transfer(role)
                if batch is not None:
                    launched[role] = True
                    self.flights[role].append(self._launch(role, batch))
            for role in Role:
                if self.flights[role] and (len(self.flights[role]) >= self.depth or not launched[role]):
                    self._land(role)
        except BaseException:
            self._abandon()
            raise
        if not self.unfinished:
            self._drain()

    def abort(self, choice: Choice) -> None:
        """Ends an answer where it stands; both lanes are freed."""
        self._end(choice)
        if not self.unfinished:
            self._drain()  # no tick may follow

    def _end(self, choice: Choice) -> None:
        if choice in self.waiting:
            self.waiting.remove(choice)
            choice.output = _nothing(choice)
            if self.tracer is not None:
                self.tracer.retired(self, choice)
        elif choice.sequence is not None and choice.output is None:
            self.scheduler.flush(choice.sequence.handle)
            choice.sequence.finish("abort")
            self._retire(choice)

    # ---- starting

    def _start_waiting(self) -> None:
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            self._start(self.waiting.popleft())

    def _start(self, choice: Choice) -> None:
        params, leader = choice.params, choice.leader
        leads = leader.sequence.handle if leader and leader.sequence and leader.output is None else -1
        handle = self.scheduler.add(
            list(choice.prompts),
            max_tokens=params.max_tokens if params.max_tokens is not None else sum(self.max_len),
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
            skip_special=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
            exact=params.penalised,
            stop_ids=list(params.stop_ids),
            stops=[stop.encode() for stop in params.stop_strings],
            salt=choice.salt,
            leader=leads,
        )
        self.running[handle] = choice  # from here on whatever fails gives the handle back
        for role in Role:
            self.runners[role].sampler.set(handle, self.budgets.sampling(params, role), choice.key)
        self._penalised += params.penalised
        budget = self.budgets.of(params, choice.key, choice.metrics.arrival_time)
        choice.sequence = SplitSequence(
            self.scheduler, self.tokens, choice.policy, self.config, params, handle, budget, self.actions
        )
        if params.rollout and choice.policy.closes_itself:
            choice.sequence.closings = Closings()
        self._silent[handle] = choice
        if choice.stream is not None:
            self._streaming[handle] = choice
        if self.ahead:
            self.scheduler.mirror(handle, Role.LARGE)
        if self.tracer is not None:
            self.tracer.started(self, choice)
        self._apply(self._guarded(choice.sequence, choice.sequence.start), started=choice)

    # ---- stepping

    def _launch(self, role: Role, batch: Batch) -> Flight | DeviceFlight:
        if self.tracer is not None:
            self.tracer.planned(self, role, batch)
        flight = self.runners[role].launch(batch, self._counts(role, batch) if self._penalised else ())
        if self.tracer is not None:
            self.tracer.launched(self, role, flight)
        return flight

    def _transfer(self, planned: Role) -> None:
        """Copies that the plan ordered: caches of idle lanes, to the shelf and back. The other model's first: its pages
        may be those that this one was given."""
        for role in (planned.other, planned):
            cache = self.runners[role].cache
            if cache.shelf is not None and len(moves := self.scheduler.take_transfers(role)):
                cache.transfer(torch.from_numpy(moves).view(-1, 3))

    def _counts(self, role: Role, batch: Batch) -> list[Counts]:
        """What penalties count, for the rows that have any: ids of the lane up to the row's token, tags left out."""
        out = []
        for row, (token, seq) in enumerate(batch.draws[:, :2].tolist()):
            if self.runners[role].sampler.needs_counts(seq):
                stop = int(batch.paged.positions[token]) + 1
                written = self.scheduler.counted_ids(seq, role, stop)
                out.append(Counts(row, self.running[seq].prompts[role], written))
        return out

    def _land(self, role: Role) -> None:
        launched = self.flights[role].popleft()
        flight = launched.land()
        if self.tracer is not None:
            self.tracer.landed(self, role, launched)
        if flight.top is not None and flight.draws is not None:
            for best, (_, seq, position, stream, _, _) in zip(flight.top, flight.draws.tolist(), strict=True):
                if best is not None and seq in self.running:
                    self.running[seq].top[role, position + (stream >> 8)] = best
        for seq in flight.likely:
            if seq in self.running:
                self.scheduler.hurry(seq)
        self._apply(self.scheduler.commit(role, flight.ids, flight.logprobs, flight.ms, 1e3 * self.clock()))
        self._look_out()

    def _apply(self, events: list[Event], started: Choice | None = None) -> None:
        queue = deque(events)
        if started is not None:
            if self.tracer is not None:
                self.tracer.applied(self, started)
            self._retire_if_done(started)
        while queue:
            event = queue.popleft()
            choice = self.running.get(event.seq)
            if choice is None or choice.sequence is None:
                continue
            queue.extend(self._guarded(choice.sequence, partial(choice.sequence.on, event)))
            if self.tracer is not None:
                self.tracer.applied(self, choice)
            self._retire_if_done(choice)

    def _guarded(self, sequence: SplitSequence, step: Callable[[], list[Event]]) -> list[Event]:
        """What `step` raised. A policy's or a tokenizer's fault ends its own request only."""
        try:
            return step()
        except Exception as error:
            return sequence.finish("error", f"{type(error).__name__}: {error}")

    def _drain(self) -> None:
        """Lands what is still in the air, so that every page is back."""
        for role in Role:
            while self.flights[role]:
                self._land(role)

    def _look_out(self) -> None:
        """First-token times, and the deltas of answers that stream."""
        now = self.clock()
        for handle, choice in list(self._silent.items()):
            if self.scheduler.content_size(handle):
                choice.metrics.first_token_time = choice.metrics.first_token_time or now
                del self._silent[handle]
        for handle, choice in self._streaming.items():
            assert choice.stream is not None
            choice.deltas += choice.stream.deltas(self.scheduler, handle, final=False)

    # ---- ending

    def _retire_if_done(self, choice: Choice) -> None:
        if choice.sequence is not None and choice.sequence.finish_reason is not None:
            self._retire(choice)

    def _retire(self, choice: Choice) -> None:
        sequence = choice.sequence
        assert sequence is not None
        handle, metrics = sequence.handle, choice.metrics
        finish = (sequence.finish_reason, sequence.stop_reason)
        choice.output = completion(self.scheduler, handle, choice.index, choice.params, self.tags, choice.top, finish)
        if choice.params.rollout:
            prompt, block, count = choice.prompts[Role.SMALL], sequence.block, len(choice.output.token_ids)
            kept = rollout(self.scheduler, handle, prompt, sequence.closings or Closings(), block, count)
            choice.output = replace(choice.output, rollout=kept)
        if choice.stream is not None:
            choice.deltas += choice.stream.deltas(self.scheduler, handle, final=True)
        written = choice.output.spans
        counted = Pair.of(lambda role: count_models(self.scheduler, handle, role, written))
        for role in Role:
            metrics.models[role].add(counted[role])
            self.runners[role].sampler.clear(handle)
        self._examine(choice, sequence, counted)
        metrics.handoffs += sequence.handoffs
        metrics.rejected_openings += sequence.rejected
        sequence.budget.settle(choice.output, metrics)
        metrics.preemptions += self.scheduler.preempted(handle)
        metrics.finished_time = self.clock()
        if metrics.first_token_time is None and choice.output.token_ids:
            metrics.first_token_time = metrics.finished_time
        self._penalised -= choice.params.penalised
        if self.tracer is not None:
            self.tracer.retired(self, choice)
        self._forget(handle)

    def _forget(self, handle: int) -> None:
        self.scheduler.finish(handle)
        for table in (self.running, self._silent, self._streaming):
            table.pop(handle, None)

    def _examine(self, choice: Choice, sequence: SplitSequence, counted: Pair[ModelMetrics]) -> None:
        """What an answer whose hand-offs the tags decided tells of the pair."""
        policy, reason = choice.policy, sequence.finish_reason
        if reason not in ("stop", "length") or policy.opening is not Opening.ACCEPT or policy.owner(0) is not None:
            return
        balanced = paired([kind for _, kind in self.scheduler.tags(sequence.handle)]) if reason == "stop" else None
        if self.config.watch_seams and sequence.handoffs:
            self._unwatched += 1
            if self._unwatched >= self.config.watch_seams:
                self._unwatched = 0
                self.health.unscored.append(Pair.of(partial(self._lane, choice, sequence.handle)))
                if not self.seams_wait:
                    self.score_seams()
        unreturned = sequence.unreturned + (sequence.handoff.pen is Role.LARGE)
        self.health.settle(Seen(counted, sequence.handoffs, unreturned, balanced))

    def _lane(self, choice: Choice, handle: int, role: Role) -> tuple[Array, Array]:
        owner = lane_owners(self.scheduler, handle, role, len(choice.prompts[role]))
        return self.scheduler.lane_ids(handle, role), owner

    def score_seams(self) -> None:
        """Measures the seams that were noted down, by two prefills each. Where a prefill finds no memory it is left
        out, with a warning: watching must not end what is watched."""
        for lanes in self.health.unscored:
            for role in Role:
                ids, owner = lanes[role]
                try:
                    jump = seam_jump(token_logprobs(self.runners[role].transformer, [ids.tolist()])[0], owner)
                except torch.OutOfMemoryError:
                    log.warning("seam: not measured: no memory left for a prefill of %d tokens", len(ids))
                    continue
                if jump is not None:
                    self.health.seams[role].append(jump)
        self.health.unscored.clear()

    def _abandon(self) -> None:
        """A step failed half-way: its cache is not to be trusted. Every answer ends, every page comes back."""
        for choice in [*self.waiting, *self.running.values()]:
            self._end(choice)
        for handle, choice in list(self.running.items()):  # what failed while it began or ended
            choice.output = choice.output or _nothing(choice)
            self._forget(handle)
        for role in Role:
            while self.scheduler.in_flight(role):
                flight = self.flights[role].popleft() if self.flights[role] else None
                if flight is None:
                    self.scheduler.discard_flight(role)
                else:
                    self.scheduler.commit(role, *flight.dropped(), 0.0)
            self.runners[role].cache.pool.clear_cache()

    def _buffers(self, role: Role) -> StepBuffers:
        config, page = self.config, self.config.page_size
        rows = config.max_num_seqs
        pages = rows * (-(-self.max_len[role] // page))
        return StepBuffers(page, config.max_num_batched_tokens, rows, pages, config.max_draws)


def _nothing(choice: Choice) -> CompletionOutput:
    """What an answer is that never began."""
    return CompletionOutput(choice.index, "", "", [], [], "abort", None)
