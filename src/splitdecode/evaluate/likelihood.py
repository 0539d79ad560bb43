"""F7: log-probabilities of given ids under one model of a pair: a forward over all of them, without a hand-off."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splitdecode.models import Transformer
from splitdecode.ops import PagedBatch

_PAGE = 16


def score(model: Transformer, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """(log p(continuation | context) in nats, whether each of its ids is the likeliest one at its place).

    context: at least one id. Both together fit the model's positions.
    """
    ids = torch.tensor([*context, *continuation][:-1], dtype=torch.int32)
    pages = -(-len(ids) // _PAGE)
    positions = torch.arange(len(ids), dtype=torch.int32)
    batch = PagedBatch(
        tokens=ids,
        positions=positions,
        slots=positions,  # pages 0, 1, ... in order: a position is its own slot
        cu_q=torch.tensor([0, len(ids)], dtype=torch.int32),
        kv_len=torch.tensor([len(ids)], dtype=torch.int32),
        page_indptr=torch.tensor([0, pages], dtype=torch.int32),
        pages=torch.arange(pages, dtype=torch.int32),
        page_size=_PAGE,
    )
    rows = torch.arange(len(context) - 1, len(ids), dtype=torch.int64)
    logits = model.forward(batch, model.new_cache(pages, _PAGE), rows).double().cpu()
    wanted = torch.tensor(list(continuation))
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())
