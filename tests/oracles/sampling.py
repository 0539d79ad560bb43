"""A sampler for one row, written to be read: lists, sorts and Python integers. The runtime's must agree with it.

Independent of splitdecode's arithmetic: its own Philox, its own Gumbel, its own processing order, all in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from splitdecode.config import SamplingParams

Margins = list[float]  # one entry per draw: the least change of a logit that might have changed what was drawn

WORD = 0xFFFFFFFF
NO_TOKEN = -1


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 as the paper's figure draws it: four words and two key words in, four words out."""
    x, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(x[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(x[2] * 0xCD9E8D57, 1 << 32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return x


def gumbel(token: int, key: int, position: int, stream: int, step: int, attempt: int) -> float:
    """The noise of one token id at one place."""
    words = philox([token // 4, position, stream + 256 * step, attempt], [key & WORD, key >> 32])
    uniform = min((words[token % 4] + 0.5) / 2**32, 1 - 2**-53)
    return -math.log(-math.log1p(-uniform))


def processed(
    logits: npt.NDArray[np.float64],
    params: SamplingParams,
    *,
    vocab_limit: int,
    banned: Collection[int] = (),
    entering: Collection[int] = (),
    attempt: int = 0,
    suppress: bool = False,
    stop_ids: Collection[int] = (),
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
) -> dict[int, float] | None:
    """Token id -> logit after every step up to the temperature; excluded ids are absent; None: the row is corrupt.

    stop_ids: EOS and the request's own, excluded when `suppress`.
    """
    values = [float(value) for value in logits[:vocab_limit]]
    if any(math.isnan(value) or value == math.inf for value in values):
        return None
    alive = {token: value for token, value in enumerate(values) if value > -math.inf}
    excluded = set(banned) | (set(entering) if attempt > 0 else set()) | (set(stop_ids) if suppress else set())
    alive = {token: value for token, value in alive.items() if token not in excluded}
    for token, bias in (params.logit_bias or {}).items():
        if token in alive:
            alive[token] += bias
    for token in alive:
        times = list(output_ids).count(token)
        if times or token in prompt_ids:
            over = alive[token] > 0
            alive[token] *= 1 / params.repetition_penalty if over else params.repetition_penalty
        if times:
            alive[token] -= params.frequency_penalty * times
            alive[token] -= params.presence_penalty
    if params.temperature >= 1e-5:
        alive = {token: value / params.temperature for token, value in alive.items()}
    return alive


def kept(alive: dict[int, float], params: SamplingParams) -> list[int]:
    """The ids that min_p, then top_k, then top_p leave, likeliest first."""
    ranked = sorted(alive, key=lambda token: (-alive[token], token))
    peak = alive[ranked[0]]
    if params.min_p > 0:
        ranked = [token for token in ranked if alive[token] - peak >= math.log(params.min_p)]
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        masses = [math.exp(alive[token] - peak) for token in ranked]
        total, before, left = math.fsum(masses), 0.0, []
        for token, mass in zip(ranked, masses, strict=True):
            if before < params.top_p * total:
                left.append(token)
            before += mass
        ranked = left
    return ranked


def sample_row(
    logits: npt.NDArray[np.float64],
    params: SamplingParams,
    key: int,
    position: int,
    stream: int,
    step: int = 0,
    attempt: int = 0,
    *,
    vocab_limit: int | None = None,
    banned: Collection[int] = (),
    entering: Collection[int] = (),
    suppress: bool = False,
    stop_ids: Collection[int] = (),
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    margins: Margins | None = None,
) -> int:
    """One token id, or NO_TOKEN for a row that holds NaN or +inf, or of which nothing is left.

    margins: gets how far the runner-up was behind, or the cut (top_k, top_p, min_p) from another verdict that matters.
    """
    alive = processed(
        logits,
        params,
        vocab_limit=len(logits) if vocab_limit is None else vocab_limit,
        banned=banned,
        entering=entering,
        attempt=attempt,
        suppress=suppress,
        stop_ids=stop_ids,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
    )
    if not alive:
        return NO_TOKEN
    if params.temperature < 1e-5:
        if margins is not None:
            margins.append(_lead(alive))
        return min(alive, key=lambda token: (-alive[token], token))
    left = kept(alive, params)
    noisy = {token: alive[token] + gumbel(token, key, position, stream, step, attempt) for token in left}
    chosen = min(noisy, key=lambda token: (-noisy[token], token))
    if margins is not None:
        lost = [t for t in alive if t not in noisy]
        beaten = [alive[t] + gumbel(t, key, position, stream, step, attempt) > noisy[chosen] - 1e-3 for t in lost]
        matters = chosen == left[-1] or any(beaten)
        margins.append(min(_lead(noisy), _cut_margin(alive, params, len(left)) if matters else math.inf))
    return chosen


def _lead(values: Mapping[int, float]) -> float:
    best = sorted(values.values(), reverse=True)
    return best[0] - best[1] if len(best) > 1 else math.inf


def _cut_margin(alive: dict[int, float], params: SamplingParams, count: int) -> float:
    """How little may move the border between the `count` ids kept and the rest."""
    ranked = sorted(alive, key=lambda token: (-alive[token], token))
    peak = alive[ranked[0]]
    border = [token for token in (count - 1, count) if token < len(ranked)]
    found = [math.inf]
    if params.min_p > 0:
        found += [abs(alive[ranked[i]] - peak - math.log(params.min_p)) for i in border]
    if params.top_k > 0 and count == params.top_k and count < len(ranked):
        found.append(alive[ranked[count - 1]] - alive[ranked[count]])
    if params.top_p < 1:
        masses = [math.exp(alive[token] - peak) for token in ranked[: params.top_k or None]]
        if params.min_p > 0:
            masses = [mass for mass in masses if mass >= params.min_p]
        total = math.fsum(masses)
        found += [abs(math.fsum(masses[:i]) / total - params.top_p) for i in border if 0 < i < len(masses)]
    return min(found)


def random_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    """Any mixture of what shapes a draw."""
    pick = rng.choice
    return SamplingParams(
        temperature=float(pick([0.0, 0.3, 0.6, 1.0, 1.7])),
        top_k=int(pick([0, 0, -1, 1, 2, 7, vocab, vocab + 5])),
        top_p=float(pick([1.0, 1.0, 0.95, 0.5, 0.05])),
        min_p=float(pick([0.0, 0.0, 0.02, 0.3, 1.0])),
        repetition_penalty=float(pick([1.0, 1.0, 1.3, 0.8])),
        presence_penalty=float(pick([0.0, 0.0, 0.7])),
        frequency_penalty=float(pick([0.0, 0.0, -0.4])),
        logit_bias={1: 5.0, 2: -100.0, 9: 1.5} if rng.random() < 0.5 else None,
        stop_token_ids=(4, 8) if rng.random() < 0.5 else None,
        min_tokens=0,
    )
