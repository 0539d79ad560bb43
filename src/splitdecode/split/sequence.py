"""F5: one request of a pair: its transcript, a lane per role, and the mechanics of changing hands.

    small lane   prompt+hint  text  <bigmodel>  L1 L2 L3 L4   . </  bigmodel  >\\n  text
                                                |- block -|   |---- confirm ----|
    large lane   prompt       text              L1 L2 L3 L4 ...          (tags never)

A span is what the large model writes between two tags. A block is the part of it that is provisional: written, not yet
passed by the small model reading along. The scheduler owns ids, bytes and pages; this file only decides and retargets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from splitdecode._C import Event, EventKind, Phase, Scheduler
from splitdecode.config import EngineConfig, SamplingParams, Stream
from splitdecode.split.actions import ControlAction
from splitdecode.split.block import Block
from splitdecode.split.budget import Budget
from splitdecode.split.handoff import Action, Handoff
from splitdecode.split.lanes import LARGE, SMALL, Lanes
from splitdecode.split.policies import CloseRule, HandoffPolicy, Opening
from splitdecode.split.roles import Role
from splitdecode.split.rollout import Closings
from splitdecode.split.tokens import PairTokens

OPENING, CLOSING = 0, 1


class SplitSequence(Lanes):
    """One request: transcript, a lane per role, hand-off state."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokens: PairTokens,
        policy: HandoffPolicy,
        config: EngineConfig,
        params: SamplingParams,
        handle: int,
        budget: Budget | None = None,
        actions: Sequence[ControlAction] = (),
    ) -> None:
        super().__init__(scheduler, tokens, handle)
        self.config, self.params = config, params
        self.budget, self.actions = budget or Budget(), actions
        self.handoff = Handoff(policy, self.budget)
        self.policy = policy
        self.mark: int | None = None  # content position at which the small model may have to give the pen away
        self.span_start = 0  # content tokens before the span
        self.span_base = 0  # large-lane position at which it starts
        self.read_interval = config.read_interval
        self.due: list[tuple[int, ControlAction]] = []  # content position, what is done there
        self.block: Block | None = None
        self.handoffs = 0
        self.rejected = 0
        self.unreturned = 0  # spans that ran into max_span
        self.closings: Closings | None = None  # of the small model's own, for those who train on them
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    # ---- the loop's two entries

    def start(self) -> list[Event]:
        """Gives the first pen; returns the events this raised."""
        if self.policy.owner(0) is not LARGE or not self._granted():
            return self._write_on()
        return self._turn_to_large() if self._fits() else self.finish("length")

    def on(self, event: Event) -> list[Event]:
        """Applies one event; returns the events the action raised."""
        if event.kind == EventKind.MARK and self.handoff.pen is SMALL and not self._at_mark():
            self._drop_held()  # only an action is due here: the policy is asked at its own marks
            return self._write_on()
        action = self.handoff.on(event, self._position(), self._fits, partial(self._granted, event))
        match action:
            case Action.SWITCH:
                return self._switch(event)
            case Action.REJECT:
                return self._reject(event)
            case Action.ACT:
                return self._act(event)
            case Action.TURN:
                self._drop_held()
                return self._turn_to_large()
            case Action.ASK:
                return self._ask()
            case Action.ACCEPT:
                return self._accept_block()
            case Action.CONFIRM:
                return self._try(event.a)
            case Action.CLOSE:
                return self._completed(event)
            case Action.RESUME:
                return self._resume()
            case Action.FORCE:
                return self._force()
            case Action.STAY if self.handoff.pen is SMALL:
                self._drop_held()
                return self._write_on()
            case Action.STAY:
                return self._write_span()
            case Action.FINISH:
                return self._finish_on(event)

    def finish(self, reason: str, stop_reason: int | str | None = None) -> list[Event]:
        """Nobody writes any more: 'stop', 'length', 'abort' or 'error'."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        return []

    # ---- SMALL writes

    def _write_on(self, scan_from: int = -1) -> list[Event]:
        self.handoff.pen = SMALL
        self.mark = self.policy.next_mark(self._position())
        if any(at <= self._position() for at, _ in self.due):
            if scan_from >= 0 and (events := self._scan(scan_from) or self.scheduler.flush(self.handle)):
                return events  # what follows the closing tag stands before what an action puts there
            now = sorted((at, n) for n, (at, _) in enumerate(self.due) if at <= self._position())
            actions = [self.due[n][1] for _, n in now]
            self.due = [due for due in self.due if due[0] > self._position()]
            return self._act_on(actions)
        return self._scan(scan_from, [mark for mark in (self.mark, *(at for at, _ in self.due)) if mark is not None])

    def _scan(self, scan_from: int, marks: Sequence[int] = ()) -> list[Event]:
        return self.scheduler.write(
            self.handle,
            SMALL,
            Phase.SCAN,
            Stream.WRITE0.word(),
            mark=min(marks, default=-1),
            scan_from=scan_from,
            open_is_event=self.policy.opening is not Opening.IGNORE,
        )

    def _at_mark(self) -> bool:
        return self.mark is not None and self._position() >= self.mark

    def _go_on(self) -> list[Event]:
        """Behind text that no mark was counted in: it may have reached a position that the policy gives away."""
        if self._at_mark() and self.policy.owner(self._position()) is LARGE and self._granted():
            return self._turn_to_large() if self._fits() else self.finish("length")
        return self._write_on()

    def _switch(self, event: Event) -> list[Event]:
        """The opening tag ends inside token c: what follows in it is dropped, the lane healed."""
        self._retarget(SMALL, event.c, self._cut(event.c, event.d), in_tag=True)
        return self._begin_span()

    def _reject(self, event: Event) -> list[Event]:
        written = self._lane_bytes(SMALL, event.b, event.c) + self._lane_bytes(SMALL, event.c, event.c + 1)[: event.d]
        residue = written[: len(written) - len(self.tokens.tags[OPENING].encode())]
        self._retarget(SMALL, event.b, self.tokens.encode(SMALL, residue) if residue else [])
        self.scheduler.refuse(self.handle, SMALL)
        self.rejected += 1
        return self._go_on()

    def _act(self, event: Event) -> list[Event]:
        self._retarget(SMALL, event.c, self._cut(event.c, event.d), in_tag=True)
        return self._act_on([self.actions[event.a - 2]])

    def _act_on(self, actions: Sequence[ControlAction]) -> list[Event]:
        for action in actions:
            if (events := action.apply(self)) or self.finish_reason is not None:
                return events
        return self._go_on()

    def say(self, text: str) -> list[Event]:
        """Puts text into the answer in the small model's name, for an action. Events: the answer ends with it."""
        events = self._say(text)
        return self.finish("length") if events is None else events

    def later(self, tokens: int, action: ControlAction) -> None:
        """Applies an action so many content tokens from here, or when the small model next holds the pen after that."""
        self.due.append((self._position() + tokens, action))

    def _turn_to_large(self) -> list[Event]:
        """A switch by position: the policy says so, not a tag."""
        if self.policy.tags:
            if self.scheduler.room(self.handle, SMALL) <= len(self.tokens.tag_ids[OPENING]):
                return self.finish("length")
            self._retarget(SMALL, self._size(SMALL), self.tokens.tag_ids[OPENING], in_tag=True)
            self.scheduler.log_tag(self.handle, OPENING)
        return self._begin_span()

    # ---- LARGE writes

    def _begin_span(self) -> list[Event]:
        self.scheduler.set_projected(self.handle, SMALL, self._position())
        self._catch_up(LARGE)
        self.handoff.pen = LARGE
        self.handoffs += 1
        self.span_start, self.span_base = self._position(), self._size(LARGE)
        self.budget.open(self.span_start)
        return self._write_span()

    def _write_span(self) -> list[Event]:
        position = self._position()
        if not self.policy.reads_along:
            border = self.budget.border(position, self.read_interval)
            mark = self._nearest(self.policy.next_mark(position), border)
            return self.scheduler.write(self.handle, LARGE, Phase.DIRECT, Stream.WRITE1.word(), mark=mark)
        waiting = len(self.scheduler.provisional(self.handle))
        room = self.scheduler.room(self.handle, SMALL)
        if room <= 0 or (waiting and self.scheduler.has_ending(self.handle)):
            return self.finish("length")
        if self.scheduler.room(self.handle, LARGE) <= 0:
            return self._force()
        # A policy's own end is for the reader to find, as a closing tag is: a forced trace pays for what lies beyond.
        end = self.span_start + self.config.max_span if self.policy.owner(position) is None else None
        return self.scheduler.write(
            self.handle,
            LARGE,
            Phase.PROVISIONAL,
            Stream.WRITE1.word(),
            interval=waiting + min(self.read_interval, room),
            mark=self._nearest(end),
        )

    def _ask(self) -> list[Event]:
        """The small lane reads the provisional tokens; as many as its context has room for."""
        ids = [int(i) for i in self.scheduler.provisional(self.handle)]
        if not ids:
            return self.scheduler.accept(self.handle, 0, ends=True)  # EOS behind nothing: it ends the answer
        final = self.scheduler.has_ending(self.handle) or self.scheduler.at_limit(self.handle, LARGE)
        stretches = self.tokens.stretches(LARGE, ids, final=final)
        if not stretches:
            return self._write_span()
        room = self.scheduler.room(self.handle, SMALL)
        fitting: list[tuple[int, list[int]]] = []
        for count, part in stretches:
            room -= len(part)
            if room < 0:
                break
            fitting.append((count, part))
        if not fitting:
            return self.finish("length")
        base = self._size(SMALL)
        flat = [i for _, part in fitting for i in part]
        opened = self._position() == self.span_start
        first = base + len(fitting[0][1]) - 1 if opened else base
        by_stretch = self.policy.close_rule is CloseRule.CONTINUE
        self.block = Block(base, flat, fitting, first, self._position(), by_stretch)
        self._retarget(SMALL, base, flat)
        if by_stretch and self.policy.owner(self._position()) is None:
            return self._try(0)
        self.scheduler.read(self.handle, SMALL, self.block.first, Stream.CLOSE.word())
        return []

    # ---- LARGE has written, SMALL decides

    def _try(self, candidate: int) -> list[Event]:
        block = self._block()
        block.candidate = candidate
        prefix = block.prefix(candidate)
        steps, draw, waits = self.policy.trial(candidate)
        if not waits and (events := self._accept(block.whole(prefix)[0])):
            return events
        if block.base + prefix >= self._limit(SMALL):
            return self._decided() if waits else self.finish("length")
        stream = Stream.CONFIRM.word()
        return self.scheduler.confirm(self.handle, SMALL, block.base + prefix, draw, steps, stream)

    def _completed(self, event: Event) -> list[Event]:
        block = self._block()
        steps, _, waits = self.policy.trial(block.candidate)
        if not steps:
            return self._close(block.candidate)
        start = block.base + block.prefix(block.candidate)
        ids = [int(i) for i in self.scheduler.lane_ids(self.handle, SMALL, start, event.c)]
        block.found.append((block.candidate, ids + self._cut(event.c, event.d)))
        return self._resume() if waits else self._decided()

    def _resume(self) -> list[Event]:
        """The candidate is settled for now: restore what was read, go on at the next prefix."""
        block = self._block()
        if self.closings is not None:
            at = block.base + block.prefix(block.candidate)
            self.closings.dead.append((at, self.scheduler.lane_ids(self.handle, SMALL, at).tolist()))
        self._retarget(SMALL, block.base, block.ids)
        following = block.candidate + 1
        if self.policy.close_rule is CloseRule.CONTINUE:
            return self._try(following) if following < len(block.stretches) else self._decided()
        draws = self.scheduler.draws(self.handle)
        while following < len(draws):
            if self.scheduler.enters(SMALL, CLOSING, draws[following]):
                return self._try(following)
            following += 1
        return self._accept_block()

    def _decided(self) -> list[Event]:
        """CONTINUE: every prefix was tried; the last match (or the only one) wins, or there was none."""
        block = self._block()
        self._retarget(SMALL, block.base, block.ids)
        if not block.found:
            return self._accept_block()
        candidate, ids = block.found[-1]
        prefix = block.prefix(candidate)
        if events := self._accept(block.whole(prefix)[0]):
            return events
        self._retarget(SMALL, block.base + prefix, ids)
        return self._close(candidate)

    def _accept(self, tokens: int, *, ends: bool = False) -> list[Event]:
        """The block's first `tokens` large tokens are content; `ends`: so is an EOS behind the last of them."""
        block = self._block()
        fresh, block.accepted = tokens - block.accepted, tokens
        events = self.scheduler.accept(self.handle, fresh, ends)
        limited = bool(events) and events[0].kind != EventKind.END
        if self.closings is not None and (limited or ends):
            self.closings.read(block, self._position() - block.start if limited else None)
        return events

    def _accept_block(self) -> list[Event]:
        block = self._block()
        if self.policy.owner(self.span_start) is not None:  # a forced span ends where the policy says
            self.scheduler.set_mark(self.handle, self._nearest(self.policy.next_mark(self.span_start)))
        if self.scheduler.room(self.handle, SMALL) <= 0:
            self.scheduler.drop_ending(self.handle)  # the small context is full before the EOS would be read
        if events := self._accept(block.tokens(), ends=True):
            return events
        return self._force() if self.budget.cut(self._position()) else self._write_span()

    # ---- back to SMALL

    def _close(self, candidate: int) -> list[Event]:
        """The small lane holds the closing tag behind the candidate's prefix; the rest of the large text is dropped."""
        block = self._block()
        if self.closings is not None:
            self.closings.closed(block, candidate)
        prefix = block.prefix(candidate)
        _, ids = block.whole(prefix)
        self.scheduler.drop_provisional(self.handle)
        keep = self.span_base + self._position() - self.span_start
        cut = self.tokens.bytes_of(SMALL, block.ids[ids:prefix])  # a large token cut inside: unequal tokenizers only
        residue = self.tokens.encode(LARGE, cut) if cut else []
        self._retarget(LARGE, keep, residue)
        if residue and (events := self.scheduler.emit(self.handle, LARGE, residue)):
            return events
        return self._return_pen(block.base + prefix)

    def _force(self) -> list[Event]:
        """The span ends here, asked or not."""
        written = self._position() - self.span_start
        if self.policy.reads_along:
            self.scheduler.drop_provisional(self.handle)
            self._retarget(LARGE, self.span_base + written, [])
            if self.block is not None:
                self._retarget(SMALL, self.block.base, self._kept_ids(self.block))
        else:
            if not self._catch_up(SMALL):
                return self.finish("length")
        start = self._size(SMALL)
        if self.policy.tags:
            if self.scheduler.room(self.handle, SMALL) < len(self.tokens.tag_ids[CLOSING]):
                return self.finish("length")
            self._retarget(SMALL, start, self.tokens.tag_ids[CLOSING])
        self.unreturned += written >= self.config.max_span
        return self._return_pen(start)

    def _return_pen(self, scan_from: int) -> list[Event]:
        self.block = None
        self.budget.close(self._position())
        for role in Role:
            self.scheduler.set_projected(self.handle, role, self._position())
        return self._write_on(scan_from)

    def _finish_on(self, event: Event) -> list[Event]:
        kind = event.kind
        if kind == EventKind.BROKEN:
            return self.finish("error", "no token could be drawn: NaN logits, or every id excluded")
        if kind == EventKind.END:
            return self.finish("stop", event.a if event.a in self.params.stop_ids else None)
        if kind == EventKind.STOP:
            return self.finish("stop", self.params.stop_strings[event.a])
        if kind == EventKind.FULL and self.handoff.pen is SMALL:
            for last in self.scheduler.flush(self.handle):
                return self._finish_on(last)  # what was held may complete a stop string
        return self.finish("length")

    # ---- small words

    def _block(self) -> Block:
        assert self.block is not None
        return self.block

    def _granted(self, event: Event | None = None) -> bool:
        """Whether the budget has a span left; `event`: the opening tag that asks, if it is none of the policy's."""
        if event is None or event.kind != EventKind.TAG:
            return self.budget.grants(self._position(), self._position())
        logprobs = self.scheduler.lane_logprobs(self.handle, SMALL, event.b, event.c + 1).tolist()
        return self.budget.grants(self._position(), event.b, sum(p for p in logprobs if p == p))

    def _nearest(self, *marks: int | None) -> int:
        """The first content position at which the running span may have to end; -1: there is none."""
        return min((mark for mark in (*marks, self.budget.stop) if mark is not None), default=-1)
