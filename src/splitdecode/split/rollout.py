"""F5: what a trainer of the small model needs of an answer: its lane as it was read and written, and who did what.

    ids       prompt | 32*51=<bigmodel> 1 6 3 2 </bigmodel> ...      the small lane, behind the prompt
    sampled            1 1 1 1 1 1      0 0 0 0 1           1        the policy's own tokens, its tags included
    passed                             ^ ^ ^ ^                       prefixes at which it read on: not closing is an act

Not closing. At each prefix it reads, the small model closes with its own probability h of drawing a token that enters
the closing tag and of then completing it. Where it closed, the tokens of the tag are in `ids`, sampled. Where it did
not, that has probability 1 - h, and so log(1 - h) belongs to the answer's log-probability, once for each of `passed`.
A tag that was begun there and died (`dead`) is one of the ways not to close; it is told apart for those who count.

What was retargeted is nobody's: a residue re-encoded at a seam, a tag put there by force. It is 0 in `sampled`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from splitdecode._C import Scheduler
from splitdecode.split.block import Block
from splitdecode.split.roles import Role
from splitdecode.split.transcript import lane_owners


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer as the small model saw it.

    prompt_token_ids   of the small model
    ids                [n] what stands behind them in its lane: both models' text, tags, an EOS it drew
    sampled            bool [n] the small model drew this token
    authors            int8 [n] 1 text of the small model, 0 of the large one, -1 neither: a tag
    logprobs           float32 [n] raw log-probabilities (temperature 1, no penalties) of sampled tokens, else NaN
    passed             positions in ids (0 to n): it read ids[:p] and did not close there
    dead               of these, where it began a closing tag that did not complete, with the ids it drew
    """

    prompt_token_ids: list[int]
    ids: list[int]
    sampled: npt.NDArray[np.bool_]
    authors: npt.NDArray[np.int8]
    logprobs: npt.NDArray[np.float32]
    passed: list[int]
    dead: list[tuple[int, list[int]]]


@dataclass(slots=True)
class Closings:
    """The outcomes of the draws by which the small model closes, as they come: lane positions, prompt included."""

    passed: list[int] = field(default_factory=list)
    dead: list[tuple[int, list[int]]] = field(default_factory=list)

    def read(self, block: Block, limit: int | None = None) -> None:
        """A block was read to its end. limit: after so many of its tokens a limit ended the span, before the draw."""
        for k in range(len(block.ids) - (block.first - block.base)):
            if limit is None or block.whole(block.prefix(k))[0] < limit:
                self.passed.append(block.base + block.prefix(k))

    def closed(self, block: Block, candidate: int) -> None:
        """A block was read up to the candidate that closed."""
        self.passed += [block.base + block.prefix(k) for k in range(candidate)]


def rollout(
    scheduler: Scheduler, handle: int, prompt: list[int], closings: Closings, block: Block | None, content: int
) -> Rollout:
    """The rollout of a sequence that has ended with `content` tokens; block: what was being read, if anything was."""
    stop = scheduler.size(handle, Role.SMALL)
    if block is not None:  # only the first of its tokens became content, and a candidate may stand behind them
        stop = min(stop, block.base + block.within(content - block.start)[1])
    start = len(prompt)
    authors = lane_owners(scheduler, handle, Role.SMALL, start)[start:stop]
    logprobs = scheduler.lane_logprobs(handle, Role.SMALL, start, stop).copy()
    logprobs[authors == 0] = np.nan  # a tag that died may have begun with the very token the large model wrote
    return Rollout(
        prompt_token_ids=prompt,
        ids=scheduler.lane_ids(handle, Role.SMALL, start, stop).tolist(),
        sampled=~np.isnan(logprobs),
        authors=authors,
        logprobs=logprobs,
        passed=[p - start for p in closings.passed if p <= stop],
        dead=[(p - start, ids) for p, ids in closings.dead if p <= stop],
    )
