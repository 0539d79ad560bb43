"""F5: what a caller gets back. Names follow vLLM; who wrote what is in `spans` and `metrics`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splitdecode.split.roles import Pair, Role

if TYPE_CHECKING:
    from splitdecode.split.rollout import Rollout


@dataclass(frozen=True, slots=True)
class ModelSpan:
    """Tokens [start, end) of an answer, written by one model: "small" or "large"."""

    model: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of streamed text and the model that wrote it; the last one carries the finish reason."""

    text: str
    model: str
    index: int = 0
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer.

    text           what was written, control tags left out
    raw_text       the same with the control tags where they stood
    token_ids      content ids, each of its author's tokenizer; an EOS or stop token that ended it is the last
    spans          half-open runs of token_ids by author, in order, covering all of them
    finish_reason  stop | length | abort | error
    stop_reason    the stop string or stop token id; None for EOS
    logprobs       per token {id: raw log-prob}, chosen and likeliest; None for a residue re-encoded at a seam
    rollout        with SamplingParams(rollout=True): the small model's lane, and who did what there
    """

    index: int
    text: str
    raw_text: str
    token_ids: list[int]
    spans: list[ModelSpan]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, float] | None] | None = None
    cumulative_logprob: float | None = None
    rollout: Rollout | None = None


@dataclass(slots=True)
class ModelMetrics:
    """One model's work for a request. ms: its share, by tokens, of the steps the request took part in.

    tokens            content tokens it wrote          discarded_tokens  written or drawn, then dropped
    forwards          steps with tokens of the request read_tokens       run with a closing draw at each
    prompt_tokens     prompt positions run             catch_up_tokens   run to catch up, in catch_up_forwards steps
    cached_tokens     prompt and text positions found in the prefix cache
    write_ms          of ms, the steps that drew one token of the answer each; `writes` of them
    """

    tokens: int = 0
    forwards: int = 0
    ms: float = 0.0
    prompt_tokens: int = 0
    catch_up_tokens: int = 0
    catch_up_forwards: int = 0
    read_tokens: int = 0
    discarded_tokens: int = 0
    cached_tokens: int = 0
    write_ms: float = 0.0
    writes: int = 0

    @property
    def ideal_ms(self) -> float:
        """What its tokens would have taken if writing them were all there was to do."""
        return self.tokens * self.write_ms / self.writes if self.writes else 0.0

    def add(self, other: ModelMetrics) -> None:
        """Sums every counter."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class RequestMetrics:
    """Where a request's time and tokens went; sums over its choices. Times are seconds of time.monotonic().

    rejected_openings   opening tags that were drawn again, whatever for
    budget_rejections   spans a budget kept from beginning, by reason: offloads, tokens, deadline, fraction
    """

    models: Pair[ModelMetrics] = field(default_factory=lambda: Pair(ModelMetrics(), ModelMetrics()))
    handoffs: int = 0
    rejected_openings: int = 0
    budget_rejections: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0
    arrival_time: float = 0.0
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def small(self) -> ModelMetrics:
        return self.models[Role.SMALL]

    @property
    def large(self) -> ModelMetrics:
        return self.models[Role.LARGE]

    @property
    def tokens(self) -> int:
        """Content tokens, whoever wrote them."""
        return self.small.tokens + self.large.tokens

    @property
    def offload_fraction(self) -> float:
        """Share of the content tokens that the large model wrote, 0 to 1."""
        return self.large.tokens / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class RequestOutput:
    """One request's answers, in the order of their index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
