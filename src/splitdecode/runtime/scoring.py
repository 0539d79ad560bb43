"""F4: what a model thinks of given text: log p(token | tokens before it), by plain prefills over a cache of their own.

    group     sequences that fit one forward together; page s holds all positions of sequence s
    step k    | seq 0: its k-th part | seq 1: its k-th part | ...       long ones go in parts

Nothing of an engine is touched: its cache, its graphs and whatever it runs stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitdecode.errors import RequestError
from splitdecode.models import Transformer
from splitdecode.ops import PagedBatch

Scores = npt.NDArray[np.float64]
_LOGITS = 1 << 25  # elements of one forward's logits


def token_logprobs(model: Transformer, sequences: Sequence[Sequence[int]], *, most: int = 2048) -> list[Scores]:
    """Raw log-probabilities, at temperature 1, of each token of each sequence given those before it.

    most: tokens of one forward. Returns a float64 [n] per sequence of n ids; its first is NaN, since nothing stands
    before it. Raises RequestError for ids the model has no embedding of, and for more ids than it has positions.
    """
    config = model.config
    for number, ids in enumerate(sequences):
        wrong = [i for i in ids if not 0 <= i < config.vocab_size]
        if wrong:
            raise RequestError(f"sequence {number}: found id {wrong[0]}, expected ids below {config.vocab_size}")
        if len(ids) > config.max_positions:
            raise RequestError(f"sequence {number}: found {len(ids)} ids, expected at most {config.max_positions}")
    most = max(1, min(most, _LOGITS // config.vocab_size))
    out: list[Scores] = []
    for group in _groups(sequences, most):
        out += _score(model, group, max(1, most // len(group)))
    return out


def _groups(sequences: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Neighbours whose ids, each padded to the longest, stay within `most`; or one alone."""
    group: list[Sequence[int]] = []
    longest = 0
    for ids in sequences:
        if group and max(longest, len(ids)) * (len(group) + 1) > most:
            yield group
            group, longest = [], 0
        group.append(ids)
        longest = max(longest, len(ids))
    if group:
        yield group


@torch.inference_mode()
def _score(model: Transformer, group: list[Sequence[int]], part: int) -> list[Scores]:
    out = [np.full(len(ids), np.nan) for ids in group]
    longest = max(map(len, group))
    if longest < 2:
        return out
    kv = model.new_cache(len(group), longest)
    for start in range(0, longest - 1, part):
        rows = [s for s, ids in enumerate(group) if len(ids) - 1 > start]
        stops = [min(len(group[s]) - 1, start + part) for s in rows]  # behind the last id nothing is asked
        counts = [stop - start for stop in stops]
        logits = model.forward(_batch(group, rows, start, stops, longest), kv)
        following = [i for s, stop in zip(rows, stops, strict=True) for i in group[s][start + 1 : stop + 1]]
        wanted = torch.tensor(following, device=logits.device)[:, None]
        scores = (logits.gather(1, wanted)[:, 0] - logits.logsumexp(1)).double().cpu().numpy()
        for s, piece in zip(rows, np.split(scores, np.cumsum(counts)[:-1]), strict=True):
            out[s][start + 1 : start + 1 + len(piece)] = piece
    return out


def _batch(group: list[Sequence[int]], rows: list[int], start: int, stops: list[int], longest: int) -> PagedBatch:
    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    ends = [0]
    for stop in stops:
        ends.append(ends[-1] + stop - start)
    positions = [p for stop in stops for p in range(start, stop)]
    return PagedBatch(
        tokens=ints([i for s, stop in zip(rows, stops, strict=True) for i in group[s][start:stop]]),
        positions=ints(positions),
        slots=ints([s * longest + p for s, stop in zip(rows, stops, strict=True) for p in range(start, stop)]),
        cu_q=ints(ends),
        kv_len=ints(stops),
        page_indptr=ints(list(range(len(rows) + 1))),
        pages=ints(rows),
        page_size=longest,
    )
