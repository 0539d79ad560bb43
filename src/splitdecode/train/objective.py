"""F7: the log-probability of an answer under the small model, act by act, and the policy-gradient loss over it.

What the small model did is more than the tokens it drew (split/rollout.py). Its acts, each with its probability:

    drew a token                             p(token)              tags and EOS included
    read a prefix and began no closing tag   1 - q                 q = sum of p over the ids that enter the tag
    began one there, and it died             p(its ids)            a branch beside the lane

A closing tag that completed is made of drawn tokens. So over all answers the products add up to one, and the gradient
of the sum of logarithms is that of the answer's log-probability: nothing of it falls on what the large model wrote, nor
on a tag that was forced. That the small model did not close where it might have is rewarded and punished like all
it does.

The loss is GRPO's (Shao et al., "DeepSeekMath", arXiv 2402.03300, eq. 3; acts in place of tokens, their mean over the
batch as in DAPO, arXiv 2503.14476, eq. 8): the group's mean reward is the baseline, the ratio to the policy that drew
is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from splitdecode.errors import RequestError
from splitdecode.split.rollout import Rollout

Logits = Callable[[Tensor, Tensor], Tensor]  # ids [B, T] int64, mask [B, T] int64 -> logits [B, T, V]
_LN2 = 0.6931471805599453


@dataclass(frozen=True, slots=True)
class ActLogprobs:
    """One answer's acts under a policy: log-probabilities, float32 or float64, with gradients.

    drawn [a]  tokens the small model drew, in order     stayed [b]  prefixes at which no closing tag was begun
    died [c]   closing tags that were begun and died
    """

    drawn: Tensor
    stayed: Tensor
    died: Tensor

    def all(self) -> Tensor:
        """[a + b + c]."""
        return torch.cat([self.drawn, self.stayed, self.died])


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact at both ends (Mächler, "Accurately computing log(1 - exp(-|a|))", 2012)."""
    near = x > -_LN2  # each side is computed where it is exact; the other side's gradient must stay finite
    low = torch.where(near, torch.full_like(x, -1.0), x)
    high = torch.where(near, x, torch.full_like(x, -0.1))
    return torch.where(near, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))


def act_logprobs(
    policy: Logits, rollouts: Sequence[Rollout], entering: Sequence[int], *, temperature: float = 1.0
) -> list[ActLogprobs]:
    """Log-probabilities of every act of every answer, by one forward of the policy over lanes and dead branches.

    policy: logits of right-padded ids; entering: ids whose bytes enter the closing tag (PairTokens.entering);
    temperature: that of the draws. Answers must have been drawn without top-p, top-k, min-p and penalties, or these are
    not the probabilities they were drawn with. Of logits that say nothing of an act no copy is made.
    Raises RequestError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise RequestError(
            f"temperature: found {temperature!r}, expected a number above 0: greedy answers have no acts"
        )
    lanes = [rollout.prompt_token_ids + rollout.ids for rollout in rollouts]
    drawn: list[tuple[int, int]] = []  # (lane, position) of what was drawn; of prefixes, of the token behind them
    stayed: list[tuple[int, int]] = []
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt_token_ids)
        drawn += [(row, start + at) for at, own in enumerate(rollout.sampled.tolist()) if own]
        stayed += [(row, start + at) for at in _stayed(rollout)]
    ends = [len(drawn)]
    for row, rollout in enumerate(rollouts):
        for at, tried in rollout.dead:
            branch = lanes[row][: len(rollout.prompt_token_ids) + at]
            drawn += [(len(lanes), len(branch) + k) for k in range(len(tried))]
            lanes.append(branch + tried)
            ends.append(len(drawn))
    if not lanes:
        return []
    ids, mask = padded(lanes)
    logits = policy(ids, mask)
    lane, position = torch.tensor(drawn + stayed, dtype=torch.int64, device=logits.device).view(-1, 2).unbind(1)
    scores = logits.flatten(0, 1).index_select(0, lane * logits.shape[1] + position - 1)  # [acts, V]
    scores = (scores.float() if scores.dtype.itemsize < 4 else scores) / temperature
    norm, split = scores.logsumexp(-1), len(drawn)
    chosen = ids.to(logits.device)[lane[:split], position[:split]]
    picked = scores[:split].gather(1, chosen[:, None])[:, 0] - norm[:split]
    begins = scores[split:, torch.tensor(list(entering), dtype=torch.int64, device=logits.device)].logsumexp(-1)
    rest = log1mexp((begins - norm[split:]).clamp(max=-torch.finfo(norm.dtype).eps))  # rounding may give 0
    own = torch.split(picked[: ends[0]], [int(rollout.sampled.sum()) for rollout in rollouts])
    kept = torch.split(rest, [len(_stayed(rollout)) for rollout in rollouts])
    died = iter([picked[a:b].sum() for a, b in pairwise(ends)])
    none = picked.new_zeros(0)
    return [
        ActLogprobs(own[row], kept[row], torch.stack([next(died) for _ in one.dead]) if one.dead else none)
        for row, one in enumerate(rollouts)
    ]


def act_count(rollout: Rollout) -> int:
    """How many acts an answer has: the length of its ActLogprobs.all()."""
    return int(rollout.sampled.sum()) + len(_stayed(rollout)) + len(rollout.dead)


def _stayed(rollout: Rollout) -> list[int]:
    """Prefixes at which no closing tag was begun."""
    begun = {at for at, _ in rollout.dead}
    return [at for at in rollout.passed if at not in begun]


def padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T] int64, right-padded with zeros."""
    longest = max(map(len, sequences))
    ids, mask = (torch.zeros(len(sequences), longest, dtype=torch.int64) for _ in range(2))
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, : len(sequence)] = 1
    return ids, mask


def policy_loss(
    acts: Sequence[Tensor],
    advantages: Tensor,
    old: Sequence[Tensor] | None = None,
    *,
    clip: float = 0.2,
    total: int | None = None,
) -> Tensor:
    """A scalar to minimise: the sum over all acts of -min(ratio A, clipped ratio A), over their number or `total`.

    acts: log-probabilities of each answer's acts, [k_r] with gradients; advantages: [answers]; old: the same under the
    policy that drew them, None: that is this one; total: acts of the whole batch where these are a part of it: the
    parts' losses add up to that of the whole. Raises RequestError when lengths differ or there is no act at all.
    """
    if len(acts) != len(advantages) or (old is not None and [len(o) for o in old] != [len(a) for a in acts]):
        raise RequestError(
            f"policy_loss: found {len(acts)} answers, {len(advantages)} advantages"
            + ("" if old is None else f", old acts {[len(o) for o in old]} for {[len(a) for a in acts]}")
            + ", expected one for one"
        )
    new = torch.cat(list(acts)) if acts else torch.zeros(0)
    count = len(new) if total is None else total
    if not count:
        raise RequestError("policy_loss: found no act of the policy in any answer, expected one at least")
    before = new.detach() if old is None else torch.cat(list(old)).to(new)
    weight = torch.cat([a.expand(len(one)) for a, one in zip(advantages.to(new), acts, strict=True)])
    ratio = torch.exp(new - before)
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return -torch.minimum(ratio * weight, clipped * weight).sum() / count
