"""The first launch of a step: rows are copied bit for bit, counters are zero afterwards."""

from __future__ import annotations

import pytest
import torch

from splitdecode.kernels.embed import embed, embed_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 40, 1536, 2050])
@pytest.mark.parametrize("counters", [0, 1, 700])
def test_rows_are_copied(device: torch.device, dtype: torch.dtype, d: int, counters: int) -> None:
    """Slot 0 last sampled 7, slot 1 sampled none; NaN in row 3 is nobody's."""
    weight = torch.randn(9, d, generator=torch.Generator().manual_seed(d)).to(device, dtype)
    weight[3] = torch.nan
    tokens = torch.tensor([5, -1, 0, 8, -2, -3], dtype=torch.int32, device=device)
    last = torch.tensor([7, -2, 2], dtype=torch.int32, device=device)
    for run in (embed, embed_ref):
        x = torch.full((7, d), torch.nan, dtype=dtype, device=device)
        room = torch.full((counters + 2,), 11, dtype=torch.int32, device=device)
        run(tokens, last, weight, x[:6], room[1:-1], pdl=True)
        assert torch.equal(x[:6], weight[[5, 7, 0, 8, 0, 2]])
        assert x[6].isnan().all()
        assert room.tolist() == [11, *[0] * counters, 11]


def test_no_tokens_still_zero_the_counters(device: torch.device) -> None:
    none, weight = torch.zeros(0, dtype=torch.int32, device=device), torch.zeros(2, 4, device=device)
    for run in (embed, embed_ref):
        counters = torch.full((300,), 11, dtype=torch.int32, device=device)
        run(none, none, weight, weight[:0], counters)
        assert not counters.any()


def test_shapes_are_checked(device: torch.device) -> None:
    ids, weight = torch.zeros(3, dtype=torch.int32, device=device), torch.zeros(2, 4, device=device)
    with pytest.raises(ValueError, match=r"embed: x: expected \[3, 4\], found \[2, 4\]"):
        embed(ids, ids, weight, weight, ids)
