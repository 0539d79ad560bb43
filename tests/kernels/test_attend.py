"""Split attention of a few tokens: the reference against torch, the kernel against the reference, both amid NaN."""

from __future__ import annotations

import pytest
import torch
from oracles.cases.attention import Step
from torch import Tensor

from splitdecode.kernels import attend as module
from splitdecode.kernels.attend import AttendScratch, Config, attend, attend_ref, splits_for

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(step: Step, queries: int, splits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """attend against its reference; what may not be written is not."""
    step = step.to(dtype, device)
    tokens, groups, heads, dim = step.q.shape
    tiles = len(step.tiles)
    scratch = AttendScratch.new(tiles, heads, splits, queries * groups, dim, device)
    for part in (scratch.parts, scratch.sizes):
        part.fill_(torch.nan)
    counters = torch.zeros(tiles * heads + 1, dtype=torch.int32, device=device)
    before = [one.clone() for one in step.args()]
    out = torch.full((tokens, groups * heads * dim), torch.nan, dtype=dtype, device=device)
    attend(*step.args(), scratch, counters, out, queries=queries)
    wanted = torch.empty_like(out, dtype=torch.float64, device="cpu")
    attend_ref(*step.wide().args(), None, None, wanted, queries=queries)
    torch.testing.assert_close(out.double().cpu(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for old, new in zip(before, step.args(), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))
    assert counters[-1] == 0
    return counters[:-1].view(tiles, heads)


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 keys per step, splits of at least 16 keys: everything that long sequences do, on short ones."""
    monkeypatch.setattr(module, "_rule", lambda *_: Config(16, 16, 4, 2, (4, 2, 2)))


@pytest.mark.parametrize("page", [1, 4, 16])
def test_the_reference_is_attention(page: int) -> None:
    step = Step.of([(0, 1), (page - 1, 2), (30, 5), (0, 0), (17, 16)], 3, 2, 8, page)
    out = torch.full((len(step.q), 48), torch.nan, dtype=torch.float64)
    attend_ref(*step.args(), None, None, out, queries=16)
    torch.testing.assert_close(out, step.plainly(), rtol=1e-12, atol=1e-12)


def test_the_reference_of_padding_alone_is_zero() -> None:
    step = Step.of([(0, 0)], 2, 1, 8, 4, padding=3)
    out = torch.full((3, 16), torch.nan, dtype=torch.float64)
    attend_ref(*step.args(), None, None, out, queries=1)
    assert torch.equal(out, torch.zeros(3, 16, dtype=torch.float64))


# (keys before, tokens) of each sequence, G, Hkv, D, page size, queries, splits, dtype
CASES = [
    ([(0, 1)], 1, 1, 16, 16, 1, 1, torch.float32),
    ([(15, 1), (0, 1), (16, 1), (0, 0)], 2, 2, 16, 16, 1, 2, torch.float32),
    ([(63, 1), (64, 1), (14, 1)], 6, 1, 32, 64, 1, 4, torch.float16),
    ([(37, 1)], 7, 1, 16, 1, 1, 8, torch.float32),
    ([(49, 2), (0, 2)], 5, 1, 16, 2, 2, 4, torch.float16),
    ([(14, 5), (30, 3)], 8, 1, 32, 16, 5, 4, torch.float32),
    ([(40, 8)], 3, 1, 64, 64, 8, 2, torch.float16),
    ([(33, 1)], 4, 1, 128, 16, 1, 2, torch.bfloat16),
    ([(0, 16)], 8, 1, 16, 4, 16, 1, torch.float16),
    ([(0, 0), (0, 0)], 2, 1, 16, 16, 1, 2, torch.float32),
]


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize(("runs", "groups", "heads", "dim", "page", "queries", "splits", "dtype"), CASES)
def test_the_kernel_is_the_reference(
    device: torch.device,
    runs: list[tuple[int, int]],
    groups: int,
    heads: int,
    dim: int,
    page: int,
    queries: int,
    splits: int,
    dtype: torch.dtype,
) -> None:
    check(Step.of(runs, groups, heads, dim, page, queries), queries, splits, dtype, device)
