"""F6: one request, from what a caller asks for to what comes back.

Requests.choices   checked and cut into choices; RequestError here, or it can be served
Growth             what is certain of an answer while it is written
gathered, closing  answers as the caller gets them
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from splitdecode._C import Scheduler
from splitdecode.config import SamplingParams, request_key
from splitdecode.errors import RequestError
from splitdecode.split.engine import Choice
from splitdecode.split.outputs import CompletionOutput, Delta, ModelSpan, RequestMetrics, RequestOutput
from splitdecode.split.policies import ControlTags, HandoffPolicy
from splitdecode.split.prompts import Prompt, cache_salt, prompt_ids
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import PairTokens
from splitdecode.split.transcript import TextStream, _logprobs, spans


class Requests:
    """Makes choices of what is asked. Nothing of an engine is touched, so any thread may ask."""

    def __init__(self, tokens: PairTokens, vocab_limits: Pair[int], max_len: Pair[int], seed: int) -> None:
        """vocab_limits: ids each model knows; max_len: positions of each lane; seed: of requests without their own."""
        self.tokens, self.vocab_limits, self.max_len, self._seed = tokens, vocab_limits, max_len, seed
        self._seeds = count()

    def choices(
        self,
        prompt: Prompt,
        other: Prompt | None,
        params: SamplingParams,
        handoff: HandoffPolicy | None,
        *,
        streams: bool = False,
    ) -> list[Choice]:
        """The choices of one request; nothing is queued. Raises RequestError for what cannot be served, and what the
        policy raises when it is asked who writes first."""
        policy = handoff or ControlTags()
        if not isinstance(policy, HandoffPolicy):
            raise RequestError(f"handoff: found {type(policy).__name__}, expected a HandoffPolicy")
        prompts = prompt_ids(self.tokens, prompt, other, self.vocab_limits)
        salt = cache_salt(prompt)
        self._check(prompts, params, policy.owner(0) or Role.SMALL)
        seed = request_key(self._seed, next(self._seeds)) if params.seed is None else params.seed
        metrics = RequestMetrics()
        choices: list[Choice] = []
        for index in range(params.n):
            key = request_key(seed, index)
            choice = Choice(prompts, params, policy.bind(key), key, index, metrics, salt)
            choice.leader = choices[0] if choices else None
            choice.stream = TextStream(index) if streams else None
            choices.append(choice)
        return choices

    def _check(self, prompts: Pair[list[int]], params: SamplingParams, writes_first: Role) -> None:
        for role in Role:
            alone = role is Role.LARGE and writes_first is Role.SMALL  # then openings are refused, nothing else
            if len(prompts[role]) >= self.max_len[role] and not alone:
                raise RequestError(
                    f"prompt: found {len(prompts[role])} tokens for the {role} model, expected fewer than "
                    f"{self.max_len[role]} (its context, or its share of kv_cache_memory)"
                )
        for token in (*params.stop_ids, *(params.logit_bias or ())):
            if token >= min(self.vocab_limits):
                raise RequestError(f"stop_token_ids, logit_bias: found id {token}, expected ids below "
                                   f"{min(self.vocab_limits)}, which both models know")  # fmt: skip
            small, large = (known.token_bytes[token] for known in self.tokens.tokenizers)
            if small != large:
                raise RequestError(f"stop_token_ids, logit_bias: found id {token}, {small!r} to the small model and "
                                   f"{large!r} to the large one, expected ids that mean the same to both")  # fmt: skip


def default_params(said: Mapping[str, Any]) -> SamplingParams:
    """What a generation_config.json says of sampling. max_new_tokens is max_tokens; do_sample false: greedy."""
    drawn = () if said.get("do_sample") is False else ("temperature", "top_p", "top_k", "min_p")
    known = {name: said[name] for name in (*drawn, "repetition_penalty") if name in said}
    if not drawn:
        known["temperature"] = 0.0
    if "max_new_tokens" in said:
        known["max_tokens"] = said["max_new_tokens"]
    return SamplingParams(**known)


class Growth:
    """What is certain of one answer while it is written. A look costs what is new, not the answer over again.

    Token ids are content, which is never taken back. The text may end before them: bytes that may become a stop
    string or a whole character wait, as they do in a stream.
    """

    def __init__(self, choice: Choice, tags: tuple[str, ...]) -> None:
        """tags: texts by the scheduler's numbers, Engine.tags."""
        self._choice, self._tags = choice, tags
        self._text = self._raw = ""
        self._ids: list[int] = []
        self._spans: list[ModelSpan] = []
        self._logprobs: list[dict[int, float] | None] | None = None if choice.params.logprobs is None else []
        self._sum = 0.0
        self._bytes = self._tags_seen = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def extend(self, scheduler: Scheduler) -> bool:
        """Takes in what became certain since; False: nothing did, or the answer has ended and its handle is gone."""
        if self._choice.sequence is None or self._choice.output is not None:
            return False
        handle = self._choice.sequence.handle
        settled = scheduler.settled_bytes(handle)
        if settled <= self._bytes and scheduler.content_size(handle) == len(self._ids):
            return False
        self._take_tokens(scheduler, handle)
        for offset, pattern in scheduler.tags(handle)[self._tags_seen :]:
            if offset > settled:
                break
            self._take_text(scheduler, handle, offset)
            self._raw += self._tags[pattern]
            self._tags_seen += 1
        self._take_text(scheduler, handle, settled)
        return True

    def output(self) -> CompletionOutput:
        """The answer so far, or the whole one where it has ended."""
        if self._choice.output is not None:
            return self._choice.output
        known = self._logprobs
        return CompletionOutput(
            index=self._choice.index,
            text=self._text,
            raw_text=self._raw,
            token_ids=list(self._ids),
            spans=list(self._spans),
            finish_reason=None,
            stop_reason=None,
            logprobs=None if known is None else list(known),
            cumulative_logprob=None if known is None else self._sum,
        )

    def _take_tokens(self, scheduler: Scheduler, handle: int) -> None:
        start = len(self._ids)
        ids, authors, origins, logprobs, _ = scheduler.content(handle, start)
        self._ids += ids.tolist()
        for span in spans(authors):
            first = start + span.start
            if self._spans and self._spans[-1].model == span.model:
                first = self._spans.pop().start
            self._spans.append(ModelSpan(span.model, first, start + span.end))
        if self._logprobs is not None:
            top = self._choice.top
            self._logprobs += [_logprobs(*token, top) for token in zip(ids, authors, origins, logprobs, strict=True)]
            self._sum += float(np.nansum(logprobs))

    def _take_text(self, scheduler: Scheduler, handle: int, stop: int) -> None:
        if stop > self._bytes:
            piece = self._decoder.decode(scheduler.content_bytes(handle, self._bytes, stop))
            self._bytes = stop
            self._text += piece
            self._raw += piece


def gathered(
    request_id: str, prompt: Prompt, choices: Sequence[Choice], growths: Sequence[Growth] | None = None
) -> RequestOutput:
    """A request's answers. growths: it has not ended, and these say how far each choice is."""
    text = prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, dict) else None
    ids, metrics = choices[0].prompts[Role.SMALL], choices[0].metrics
    if growths is None:
        outputs = [choice.output for choice in choices if choice.output is not None]
        return RequestOutput(request_id, text, ids, outputs, True, metrics)
    models, rejections = metrics.models.map(replace), dict(metrics.budget_rejections)  # the engine counts on in its own
    metrics = replace(metrics, models=models, budget_rejections=rejections)
    return RequestOutput(request_id, text, ids, [growth.output() for growth in growths], False, metrics)


def closing(choices: Sequence[Choice]) -> list[Delta]:
    """The last delta of every choice, which carries its finish reason; all of them have ended."""
    out = []
    for choice in choices:
        assert choice.output is not None
        last = choice.output.spans[-1].model if choice.output.spans else str(Role.SMALL)
        out.append(Delta("", last, choice.index, choice.output.finish_reason))
    return out
