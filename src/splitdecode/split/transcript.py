"""F5: from what the scheduler holds of a sequence to text, spans and log-probs."""

from __future__ import annotations

import codecs
from itertools import groupby, pairwise

import numpy as np

from splitdecode._C import Scheduler
from splitdecode.config import SamplingParams
from splitdecode.runtime.sampler import Array
from splitdecode.split.outputs import CompletionOutput, Delta, ModelMetrics, ModelSpan
from splitdecode.split.roles import Role

Top = dict[tuple[int, int], tuple[Array, Array]]  # (role, position) -> likeliest ids and their log-probs


def completion(
    scheduler: Scheduler,
    handle: int,
    index: int,
    params: SamplingParams,
    tags: tuple[str, ...],
    top: Top,
    finish: tuple[str | None, int | str | None],
) -> CompletionOutput:
    """The answer as it stands."""
    ids, authors, origins, logprobs, ends = scheduler.content(handle)
    total = int(ends[-1]) if len(ends) else 0
    cut = scheduler.text_end(handle)
    data = scheduler.content_bytes(handle, 0, total if cut < 0 else cut)
    wanted = total_logprob = None
    if params.logprobs is not None:
        wanted = [_logprobs(*token, top) for token in zip(ids, authors, origins, logprobs, strict=True)]
        total_logprob = float(logprobs[~np.isnan(logprobs)].sum())
    return CompletionOutput(
        index=index,
        text=data.decode("utf-8", "replace"),
        raw_text=_with_tags(data, scheduler.tags(handle), tags),
        token_ids=ids.tolist(),
        spans=spans(authors),
        finish_reason=finish[0],
        stop_reason=finish[1],
        logprobs=wanted,
        cumulative_logprob=total_logprob,
    )


def _with_tags(data: bytes, places: list[tuple[int, int]], tags: tuple[str, ...]) -> str:
    """The text with its control tags back in; a tag inside a character moves before it, so that taking the tags
    out always gives the text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out, at = [], 0
    for offset, pattern in places:
        if offset <= len(data):
            out += [decoder.decode(data[at:offset]), tags[pattern]]
            at = offset
    return "".join([*out, decoder.decode(data[at:], True)])


def spans(authors: Array) -> list[ModelSpan]:
    """Runs of equal authors [n] (role numbers), half-open."""
    if not len(authors):
        return []
    edges = [0, *(np.flatnonzero(authors[1:] != authors[:-1]) + 1).tolist(), len(authors)]
    return [ModelSpan(str(Role(authors[start])), start, stop) for start, stop in pairwise(edges)]


def _logprobs(token: int, author: int, origin: int, logprob: float, top: Top) -> dict[int, float] | None:
    if np.isnan(logprob):
        return None
    best = top.get((int(author), int(origin)))
    found = {} if best is None else {int(i): float(p) for i, p in zip(*best, strict=True)}
    return {**found, int(token): float(logprob)}


def count_models(scheduler: Scheduler, handle: int, role: Role, written: list[ModelSpan]) -> ModelMetrics:
    """One model's counters for a sequence whose answer has the spans `written`."""
    stats = scheduler.stats(handle, role)
    return ModelMetrics(
        tokens=sum(span.end - span.start for span in written if span.model == str(role)),
        forwards=stats["forwards"],
        ms=stats["ms"],
        prompt_tokens=stats["prompt_tokens"],
        catch_up_tokens=stats["catchup_tokens"],
        catch_up_forwards=stats["catchup_forwards"],
        read_tokens=stats["read_tokens"],
        discarded_tokens=stats["discarded"],
        cached_tokens=stats["cached_tokens"],
        write_ms=stats["write_ms"],
        writes=stats["writes"],
    )


def lane_owners(scheduler: Scheduler, handle: int, role: Role, prompt: int) -> Array:
    """int8 [n] beside the ids of a lane: 1 its model wrote the token as content, 0 the other one did, -1 neither.

    Neither: the first `prompt` ids and those of control tags. A residue re-encoded at a seam counts as the other's.
    """
    owners = np.zeros(scheduler.size(handle, role), dtype=np.int8)
    _, authors, origins, _, _ = scheduler.content(handle)
    own = origins[(authors == role) & (origins >= 0)]
    owners[own[own < len(owners)]] = 1  # an EOS is content and may stand in no lane
    owners[:prompt] = -1
    owners[scheduler.lane_tags(handle, role) == 1] = -1
    return owners


class TextStream:
    """Cuts the settled text of one sequence into deltas, by author and at UTF-8 boundaries."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._sent = 0  # bytes
        self._token = 0  # the first content token not sent whole
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def deltas(self, scheduler: Scheduler, handle: int, *, final: bool) -> list[Delta]:
        """What became certain since the last call; with `final`, everything that is left."""
        stop = scheduler.settled_bytes(handle)
        if final and (cut := scheduler.text_end(handle)) < 0:
            ends = scheduler.content(handle, self._token)[4]
            stop = max(stop, int(ends[-1]) if len(ends) else 0)
        elif final:
            stop = cut
        if stop <= self._sent and not final:
            return []
        _, authors, _, _, ends = scheduler.content(handle, self._token)
        out: list[Delta] = []
        author = 0
        for author, end in zip(authors.tolist(), ends.tolist(), strict=True):
            upto = min(end, stop)
            if upto > self._sent:
                text = self._decoder.decode(scheduler.content_bytes(handle, self._sent, upto))
                self._sent = upto
                out.append(Delta(text, str(Role(author)), self.index))
            if end > stop:
                break
            self._token += 1
        if final:
            out.append(Delta(self._decoder.decode(b"", True), str(Role(author)), self.index))
        return _joined(out)


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbours by one author become one; empty ones vanish."""
    out = []
    for model, run in groupby((d for d in deltas if d.text), key=lambda d: d.model):
        pieces = list(run)
        out.append(Delta("".join(d.text for d in pieces), model, pieces[0].index))
    return out
