"""Split attention of a few tokens: the reference against torch, the kernel against the reference, all amid NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles.cases.attention import Step
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from splitdecode.kernels import attend as module
from splitdecode.kernels.attend import AttendScratch, Config, attend, attend_ref, splits_for

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
Runs = list[tuple[int, int]]  # (keys before, tokens) of each sequence


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 keys per step, splits from 16 keys on: what happens to long sequences happens to short ones."""
    monkeypatch.setattr(module, "_rule", lambda *_: Config(16, 16, 4, 2, (4, 2, 2)))


def run(step: Step, queries: int, splits: int, **more: Any) -> tuple[Tensor, Tensor]:
    """(out, counters [C, Hkv]) of one call in poisoned memory."""
    tokens, groups, heads, dim = step.q.shape
    device, tiles = step.q.device, len(step.tiles)
    scratch = AttendScratch.new(tiles, heads, splits, queries * groups, dim, device)
    scratch.parts.fill_(torch.nan)
    scratch.sizes.fill_(torch.nan)
    counters = torch.zeros(tiles * heads + 1, dtype=torch.int32, device=device)
    out = torch.full((tokens + 1, groups * heads * dim), torch.nan, dtype=step.q.dtype, device=device)
    attend(*step.args(), scratch, counters, out[:-1], queries=queries, **more)
    assert out[-1].isnan().all()
    assert counters[-1] == 0
    return out[:-1], counters[:-1].view(tiles, heads)


def check(step: Step, queries: int, splits: int, dtype: torch.dtype, device: torch.device) -> None:
    step = step.to(dtype, device)
    before = [one.clone() for one in step.args()]
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    out, _ = run(step, queries, splits, prefetch=torch.empty(3000, dtype=dtype, device=device), pdl=pdl)
    wanted = torch.full(out.shape, torch.nan, dtype=torch.float64)
    attend_ref(*step.wide().args(), None, None, wanted, queries=queries)
    torch.testing.assert_close(out.double().cpu(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for old, new in zip(before, step.args(), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


@pytest.mark.parametrize("page", [1, 4, 16])
def test_the_reference_is_attention(page: int) -> None:
    step = Step.of([(0, 1), (page - 1, 2), (30, 5), (0, 0), (17, 16), (3, 40)], 3, 2, 8, page)
    out = torch.full((len(step.q), 48), torch.nan, dtype=torch.float64)
    attend_ref(*step.args(), None, None, out, queries=16)
    torch.testing.assert_close(out, step.plainly(), rtol=1e-12, atol=1e-12)


def test_the_reference_of_padding_alone_is_zero() -> None:
    step = Step.of([(0, 0)], 2, 1, 8, 4, padding=3)
    out = torch.full((3, 16), torch.nan, dtype=torch.float64)
    attend_ref(*step.args(), None, None, out, queries=1)
    assert torch.equal(out, torch.zeros(3, 16, dtype=torch.float64))


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize(
    ("runs", "groups", "heads", "dim", "page", "queries", "splits", "dtype"),
    [
        ([(0, 1)], 1, 1, 16, 16, 1, 1, torch.float32),
        ([(15, 1), (0, 1), (16, 1), (0, 0)], 2, 2, 16, 16, 1, 2, torch.float32),
        ([(63, 1), (64, 1), (14, 1)], 6, 1, 32, 64, 1, 4, torch.float16),
        ([(37, 1)], 7, 1, 16, 1, 1, 8, torch.float32),
        ([(49, 2), (0, 2)], 5, 1, 16, 2, 2, 4, torch.float16),
        ([(14, 5), (30, 3), (0, 0), (0, 9)], 8, 1, 32, 16, 5, 4, torch.float32),
        ([(40, 8)], 3, 1, 64, 64, 8, 2, torch.float16),
        ([(33, 1)], 4, 1, 128, 16, 1, 2, torch.bfloat16),
        ([(0, 16)], 8, 1, 16, 4, 16, 1, torch.float16),
        ([(0, 0), (0, 0)], 2, 1, 16, 16, 1, 2, torch.float32),
    ],
)
def test_the_kernel_is_the_reference(
    device: torch.device,
    runs: Runs,
    groups: int,
    heads: int,
    dim: int,
    page: int,
    queries: int,
    splits: int,
    dtype: torch.dtype,
) -> None:
    check(Step.of(runs, groups, heads, dim, page, queries), queries, splits, dtype, device)


@pytest.mark.parametrize(
    ("runs", "groups", "heads", "queries", "dtype"),
    [([(299, 1)], 6, 2, 1, torch.bfloat16), ([(150, 8)], 5, 1, 8, torch.float16), ([(140, 2)], 6, 1, 2, torch.float32)],
)
def test_as_configured(
    device: torch.device, runs: Runs, groups: int, heads: int, queries: int, dtype: torch.dtype
) -> None:
    check(Step.of(runs, groups, heads, 128, 64, queries), queries, 4, dtype, device)


@pytest.mark.usefixtures("fine")
def test_padding_far_from_the_tiles_is_zero(device: torch.device) -> None:
    check(Step.of([(3, 1)], 4, 1, 16, 16, 1, padding=40), 1, 1, torch.float32, device)


@pytest.mark.usefixtures("fine")
def test_splits_with_keys_arrive_and_no_others(device: torch.device) -> None:
    lengths = {1: 0, 16: 0, 17: 2, 48: 3, 49: 4, 64: 4, 65: 3, 129: 3}  # splits of 16, 16, .., 32, 48 keys
    step = Step.of([(length - 1, 1) for length in lengths], 1, 1, 16, 16).to(torch.float32, device)
    assert dict(zip(lengths, run(step, 1, 4)[1][:, 0].tolist(), strict=True)) == lengths


@pytest.mark.usefixtures("fine")
def test_the_order_of_programs_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step.of([(60, 2), (30, 2)], 2, 2, 16, 16, 2).to(torch.float32, torch.device("cpu"))
    wanted, _ = run(step, 2, 4)
    grid, place = (2, 2, 4), interpreter_builder.set_grid_idx  # tiles, heads, splits
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(16).reshape(grid)
        monkeypatch.setattr(
            interpreter_builder,
            "set_grid_idx",
            lambda *at, order=order: place(*map(int, np.unravel_index(order[at], grid))),
        )
        assert torch.equal(run(step, 2, 4)[0], wanted)


@pytest.mark.gpu
def test_repeats_are_equal() -> None:
    step = Step.of([(3000, 3), (700, 8)], 6, 2, 128, 64, 8).to(torch.bfloat16, torch.device("cuda"))
    wanted, _ = run(step, 8, 32)
    for _ in range(20):
        assert torch.equal(run(step, 8, 32)[0], wanted)


@pytest.mark.parametrize(
    ("tiles", "heads", "splits"), [(1, 2, 64), (1, 8, 16), (3, 2, 32), (8, 8, 2), (64, 2, 1), (1, 200, 1)]
)
def test_splits_fill_the_device(tiles: int, heads: int, splits: int) -> None:
    assert splits_for(tiles, heads) == splits


def test_wrong_arguments_are_named() -> None:
    args = list(Step.of([(4, 1)], 2, 1, 16, 4, 1, padding=0).to(torch.float32, torch.device("cpu")).args())
    scratch, counters = AttendScratch.new(1, 1, 2, 2, 16, "cpu"), torch.zeros(1, dtype=torch.int32)
    args += [scratch, counters, torch.empty(1, 32)]
    for place, wrong, name in (
        (1, torch.empty(3, 4, 2, 1, 8), "cache"),
        (1, torch.empty(3, 3, 2, 1, 16), "page_size"),
        (6, AttendScratch.new(1, 1, 3, 2, 16, "cpu"), "splits"),
        (6, AttendScratch.new(1, 1, 2, 1, 16, "cpu"), "scratch"),
        (7, counters[:0], "counters"),
        (8, torch.empty(1, 16), "out"),
    ):
        with pytest.raises(ValueError, match=name):
            attend(*args[:place], wrong, *args[place + 1 :], queries=1)
    with pytest.raises(ValueError, match="queries"):
        attend(*args, queries=17)


@pytest.mark.slow
@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("seed", range(20))
def test_random_steps(device: torch.device, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=random))]

    queries, dim, page = pick(1, 1, 2, 3, 5, 8), pick(16, 32, 64, 128), pick(1, 2, 8, 16, 32, 64)
    edges = (0, 1, 14, 15, 16, 17, 31, 33, 47, 63, 64, 100, page - 1, page, page + 1, 3 * page)
    runs = [(pick(*edges), pick(0, 1, queries, 2 * queries - 1)) for _ in range(pick(1, 2, 4))]
    dtype = pick(torch.float32, torch.float16, torch.bfloat16)
    step = Step.of(runs, pick(*range(1, 9)), pick(1, 1, 2, 3), dim, page, queries, padding=pick(0, 3))
    check(step, queries, pick(1, 2, 4, 8), dtype, device)
