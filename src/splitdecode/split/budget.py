"""F5: offload budgets: how much of an answer, and of all answers together, the large model may write.

    Budget    one answer: its caps, its deadline, its seat at an account; asked before every span, told when one ends
    Account   one target for the share of large tokens: a closed loop over all answers that have this target
    Budgets   one engine: its own limits beside each request's, the stricter one holds

Caps depend on the answer alone. A deadline depends on the clock, an account on the answers that ran before and beside.

Thinning. A logit bias b on the event "the opening tag is written", of probability p, makes it p e^b / (1 - p + p e^b):
the log-odds move by b. The tag is several tokens that other text shares, so no token is biased. The tag is drawn as
ever, and stands with probability

    alpha(p, b) = e^b / (1 - p + p e^b),        so that p alpha is what the bias would have made of p.

As b falls, openings the small model is least certain of go first; a certain one (p = 1) always stands.

Steering. Averaged over openings, alpha(p, b) rises with b. The b at which the average is the wanted q is found by
b <- b + step (q - alpha(p, b)) after each opening, the step falling as 1/n: Robbins and Monro, "A stochastic
approximation method", Annals of Mathematical Statistics 22 (1951). It stops falling where b would no longer follow what
is asked; neighbouring openings are alike, and a large step would follow those instead. What has come together in the
account meanwhile eases b at once.

Account. Answer r has the share s_r = large tokens / tokens; wanted is the mean of s_r = target. The balance

    balance = target * sum of released_r - sum of s_r

counts finished answers exactly (released_r = 1). Of an answer that runs, released_r = openings seen / openings an
answer has on average, at most 1: so an allowance comes due with the openings it is meant for, not at arrival, where the
first openings of each answer would take it all. Its s_r is expected: large tokens so far, and of a span that runs the
mean length of a span, over the mean length of an answer (or its own, once it is longer): an early opening is not
charged as if the answer ended there. An opening that survived thinning and would cost c stands if balance / c > u, u
uniform. So no opening stands that overdraws the balance by more than its own cost; what was granted too much or too
little is carried to the next opening (error diffusion: Floyd and Steinberg, "An adaptive algorithm for spatial
greyscale", 1976), and u keeps a rhythm of the answers from favouring, say, each one's first (a random threshold:
Ulichney, "Dithering with blue noise", Proc. IEEE 76, 1988). A span that outgrows the mean is charged as it grows; it is
closed by force once that overdraws the balance by SLACK openings. Where the balance stays between -(1 + SLACK) c and c,
the mean share of n answers is within (1 + SLACK) c / n of the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TypeVar

from splitdecode.config import EngineConfig, SamplingParams, Stream, philox_uniform
from splitdecode.split.outputs import CompletionOutput, RequestMetrics
from splitdecode.split.roles import Role

Limit = TypeVar("Limit", int, float)

ACCOUNTS = 1024  # targets an engine remembers
MEMORY = 256  # answers, openings, spans: how far back means look, and for how many answers a balance is saved up
STEPS = (1.0, 0.05)  # of the bias, per opening, in log-odds: at first, and at last
STEADY = 16  # openings after which it is half of what it was at first
PULL = 0.1  # how much more of the openings is wanted per opening in the account
EASE = 0.25  # log-odds by which each opening in the account beyond the first eases the bias at once
SLACK = 2.0  # openings an account may be overdrawn before spans that run on are closed
LOWEST_BIAS = -16.0  # more certain than 1 - 1e-7 is certain: float32 log-probs tell no further


def acceptance(logprob: float, bias: float) -> float:
    """alpha(p, b): the chance that an opening of log-probability `logprob` stands under a bias <= 0 on its tag."""
    if bias >= 0:
        return 1.0
    weight = math.exp(bias)
    logprob = min(logprob, 0.0)
    return weight / (-math.expm1(logprob) + math.exp(logprob) * weight)


@dataclass(slots=True)
class Mean:
    """A running mean over the last MEMORY values, roughly; what it was made with before there are any."""

    value: float
    count: int = 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, MEMORY)
        self.value += (value - self.value) / self.count


@dataclass(slots=True)
class Seat:
    """One answer at an account: what of its allowance is released, and its expected share."""

    most: float = math.inf  # tokens it may have at all
    offers: int = 0
    spent: int = 0  # large tokens of the spans that ended
    released: float = 0.0
    share: float = 0.0


class Account:
    """The answers of an engine that have one target."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.bias = 0.0
        self.balance = 0.0
        self.asked = 0  # openings of all answers
        self.answer = Mean(256.0)  # tokens; the three guesses count until an answer (or a span) has ended
        self.span = Mean(8.0)  # tokens
        self.offers = Mean(1.0)  # openings an answer asks for

    def grants(self, seat: Seat, content: int, logprob: float, draws: tuple[float, float]) -> bool:
        """Whether an opening stands: drawn with `logprob` behind `content` tokens; draws: two uniforms of its own."""
        seat.offers += 1
        self._enter(seat, min(1.0, seat.offers / max(self.offers.value, 1.0)), self._share(seat, seat.spent, content))
        span = max(self.span.value, 1.0)
        share = self._share(seat, seat.spent + span, content + span)
        cost = max(share - seat.share, 1e-9)
        credit = self.balance / cost
        chance = acceptance(logprob, self.bias + EASE * max(credit - 1.0, 0.0))
        wanted = self.target / (max(self.offers.value, 1.0) * cost) + PULL * (credit - 1.0)
        wanted = min(max(wanted, 0.0), 1.0)
        step = max(STEPS[0] / (1 + self.asked / STEADY), STEPS[1])
        self.asked += 1
        self.bias = min(max(self.bias + step * (wanted - chance), LOWEST_BIAS), 0.0)
        if draws[0] >= chance or credit <= draws[1]:
            return False
        self._enter(seat, seat.released, share)
        return True

    def overdrawn(self, seat: Seat, tokens: int, content: int) -> bool:
        """A span is `tokens` long behind `content` tokens: whether it outran both what it was charged and the slack."""
        if tokens <= self.span.value:
            return False
        self._enter(seat, seat.released, self._share(seat, seat.spent + tokens, content))
        return self.balance < -SLACK * self._share(seat, self.span.value, content)

    def close(self, seat: Seat, tokens: int, content: int) -> None:
        """A span of `tokens` ended behind `content` tokens."""
        self.span.add(tokens)
        seat.spent += tokens
        self._enter(seat, seat.released, self._share(seat, seat.spent, content))

    def settle(self, seat: Seat, written: int, content: int) -> None:
        """The answer ended: `written` of its `content` tokens are the large model's."""
        self.answer.add(content)
        self.offers.add(seat.offers)
        self._enter(seat, 1.0, written / content)
        self.balance = min(self.balance, MEMORY * self.target)

    def leave(self, seat: Seat) -> None:
        """The answer was not ended by itself: it counts for nothing."""
        self._enter(seat, 0.0, 0.0)

    def _share(self, seat: Seat, tokens: float, content: float) -> float:
        return tokens / max(min(self.answer.value, seat.most), content, 1.0)

    def _enter(self, seat: Seat, released: float, share: float) -> None:
        self.balance += self.target * (released - seat.released) - (share - seat.share)
        seat.released, seat.share = released, share


class Budget:
    """One answer. Without arguments: no limit, nothing is counted but spans."""

    def __init__(
        self,
        *,
        tokens: int | None = None,
        offloads: int | None = None,
        deadline: float | None = None,
        account: Account | None = None,
        seat: Seat | None = None,
        key: int = 0,
        clock: Callable[[], float] = monotonic,
        seconds: Mean | None = None,
    ) -> None:
        """deadline: on `clock`; key: the answer's random key; seconds: how long a span takes, shared by an engine."""
        self.tokens, self.offloads, self.deadline = tokens, offloads, deadline
        self.account, self.seat, self.key = account, seat or Seat(), key
        self.clock, self.seconds = clock, seconds or Mean(0.0)
        self.opened = 0  # spans
        self.spent = 0  # large tokens of the spans that ended
        self.stop: int | None = None  # content position at which the tokens of the running span are used up
        self.rejected: dict[str, int] = {}  # reason -> spans that were not opened for it
        self._start: int | None = None  # of the running span
        self._began = 0.0

    def grants(self, content: int, place: int, logprob: float = 0.0) -> bool:
        """Whether a span may begin behind `content` tokens. place: what the answer is asked at, never twice the same;
        logprob: of the opening tag there, 0 where a policy asks instead."""
        reason = self._refusal(content, place, logprob)
        if reason is not None:
            self.rejected[reason] = self.rejected.get(reason, 0) + 1
        return reason is None

    def _refusal(self, content: int, place: int, logprob: float) -> str | None:
        if self.offloads is not None and self.opened >= self.offloads:
            return "offloads"
        if self.tokens is not None and self.spent >= self.tokens:
            return "tokens"
        if self.deadline is not None and self.clock() + self.seconds.value >= self.deadline:
            return "deadline"
        if self.account is not None:
            word = Stream.POLICY.word()
            draws = (philox_uniform(self.key, (0, place, word, 1)), philox_uniform(self.key, (0, place, word, 2)))
            if not self.account.grants(self.seat, content, logprob, draws):
                return "fraction"
        return None

    def open(self, content: int) -> None:
        """A span begins behind `content` tokens."""
        self.opened += 1
        self._start = content
        self.stop = None if self.tokens is None else content + self.tokens - self.spent
        if self.deadline is not None:
            self._began = self.clock()

    def close(self, content: int) -> None:
        """The running span ended behind `content` tokens."""
        if self._start is None:
            return
        tokens, self._start, self.stop = content - self._start, None, None
        self.spent += tokens
        if self.account is not None:
            self.account.close(self.seat, tokens, content)
        if self.deadline is not None:
            self.seconds.add(self.clock() - self._began)

    def cut(self, content: int) -> bool:
        """Whether the running span, read up to `content` tokens, is closed here: it is late, or outran its account."""
        if self.deadline is not None and self.clock() >= self.deadline:
            return True
        if self.account is None or self._start is None:
            return False
        return self.account.overdrawn(self.seat, content - self._start, content)

    def over(self, content: int) -> bool:
        """Whether the running span may not go on behind `content` tokens."""
        return self._start is not None and ((self.stop is not None and content >= self.stop) or self.cut(content))

    def border(self, content: int, interval: int) -> int | None:
        """Where a span that nobody reads along is to be looked at again."""
        return None if self.deadline is None and self.account is None else content + interval

    def settle(self, output: CompletionOutput, metrics: RequestMetrics) -> None:
        """The answer is there, or was given up."""
        for reason, count in self.rejected.items():
            metrics.budget_rejections[reason] = metrics.budget_rejections.get(reason, 0) + count
        if self.account is None:
            return
        written = sum(span.end - span.start for span in output.spans if span.model == str(Role.LARGE))
        if output.finish_reason not in ("stop", "length") or not output.token_ids:
            self.account.leave(self.seat)
            return
        if self._start is not None:
            self.account.span.add(written - self.spent)
        self.account.settle(self.seat, written, len(output.token_ids))


@dataclass(slots=True)
class Budgets:
    """One engine's limits, its accounts, and how long its spans take."""

    config: EngineConfig
    clock: Callable[[], float]
    accounts: dict[float, Account] = field(default_factory=dict)  # by target
    seconds: Mean = field(default_factory=lambda: Mean(0.0))

    def of(self, params: SamplingParams, key: int, arrival: float) -> Budget:
        """The budget of one answer; arrival: on the engine's clock."""
        ms = _stricter(params.deadline_ms, self.config.deadline_ms)
        return Budget(
            tokens=_stricter(params.max_large_tokens, self.config.max_large_tokens),
            offloads=_stricter(params.max_offloads, self.config.max_offloads),
            deadline=None if ms is None else arrival + ms / 1e3,
            account=self._account(self._target(params)),
            seat=Seat(params.max_tokens or math.inf),
            key=key,
            clock=self.clock,
            seconds=self.seconds,
        )

    def sampling(self, params: SamplingParams, role: Role) -> SamplingParams:
        """What the sampler of `role` is given: an account needs the log-probs of the small model's tags, a trainer
        those of all its tokens."""
        needs = role is Role.SMALL and (params.rollout or self._target(params) is not None)
        return replace(params, logprobs=0) if needs and params.logprobs is None else params

    def _account(self, target: float | None) -> Account | None:
        if target is None:
            return None
        if target not in self.accounts and len(self.accounts) >= ACCOUNTS:
            del self.accounts[next(iter(self.accounts))]  # the oldest; answers that run keep theirs
        return self.accounts.setdefault(target, Account(target))

    def _target(self, params: SamplingParams) -> float | None:
        target = _stricter(params.max_offload_fraction, self.config.max_offload_fraction)
        return None if target is None or target >= 1 else float(target)


def _stricter(one: Limit | None, other: Limit | None) -> Limit | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)
