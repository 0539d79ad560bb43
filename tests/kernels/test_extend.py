"""Attention of long steps: the kernel against the reference, amid NaN; whole tiles of keys and their causal end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.cases.attention import Step

from splitdecode.kernels import extend as module
from splitdecode.kernels.extend import Config, extend, extend_ref

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
Runs = list[tuple[int, int]]  # (keys before, tokens) of each sequence


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 keys per step: what happens to long sequences happens to short ones."""
    monkeypatch.setattr(module, "_rule", lambda *_: Config(16, 4, 2))


def check(step: Step, queries: int, dtype: torch.dtype, device: torch.device) -> None:
    step = step.to(dtype, device)
    before = [one.clone() for one in step.args()]
    tokens, groups, heads, dim = step.q.shape
    out = torch.full((tokens + 1, groups * heads * dim), torch.nan, dtype=dtype, device=device)
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    extend(*step.args(), out[:-1], queries=queries, pdl=pdl)
    wanted = torch.full((tokens, groups * heads * dim), torch.nan, dtype=torch.float64)
    extend_ref(*step.wide().args(), wanted, queries=queries)
    torch.testing.assert_close(out[:-1].double().cpu(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert out[-1].isnan().all()
    for old, new in zip(before, step.args(), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


def test_the_reference_is_attention() -> None:
    step = Step.of([(0, 70), (90, 3), (0, 0), (5, 33)], 2, 2, 8, 16, 24)
    out = torch.full((len(step.q), 32), torch.nan, dtype=torch.float64)
    extend_ref(*step.args(), out, queries=24)
    torch.testing.assert_close(out, step.plainly(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize(
    ("runs", "groups", "heads", "dim", "page", "queries", "dtype"),
    [
        ([(0, 1)], 1, 1, 16, 16, 16, torch.float32),
        ([(0, 40)], 3, 2, 32, 16, 16, torch.float32),
        ([(15, 17), (16, 16), (0, 0), (14, 2)], 5, 1, 16, 1, 16, torch.float32),
        ([(31, 20), (50, 1)], 7, 1, 64, 64, 18, torch.float16),
        ([(33, 24)], 5, 1, 128, 8, 24, torch.bfloat16),
        ([(47, 64)], 2, 1, 16, 2, 64, torch.float16),
        ([(0, 0)], 8, 1, 16, 16, 16, torch.float32),
    ],
)
def test_the_kernel_is_the_reference(
    device: torch.device, runs: Runs, groups: int, heads: int, dim: int, page: int, queries: int, dtype: torch.dtype
) -> None:
    check(Step.of(runs, groups, heads, dim, page, queries), queries, dtype, device)


@pytest.mark.parametrize(("groups", "dtype"), [(5, torch.bfloat16), (6, torch.float16), (4, torch.float32)])
def test_as_configured(device: torch.device, groups: int, dtype: torch.dtype) -> None:
    check(Step.of([(130, 30)], groups, 1, 128, 64, 128 // groups), 128 // groups, dtype, device)


def test_padding_far_from_the_tiles_is_zero(device: torch.device) -> None:
    check(Step.of([(3, 5)], 4, 1, 16, 16, 16, padding=70), 16, torch.float32, device)


def test_wrong_arguments_are_named() -> None:
    step = Step.of([(4, 1)], 2, 1, 16, 4, 1, padding=0).to(torch.float32, torch.device("cpu"))
    args = [*step.args(), torch.empty(1, 32)]
    for place, wrong, name in (
        (1, torch.empty(3, 4, 2, 1, 8), "cache"),
        (1, torch.empty(3, 3, 2, 1, 16), "page_size"),
        (6, torch.empty(1, 16), "out"),
    ):
        with pytest.raises(ValueError, match=name):
            extend(*args[:place], wrong, *args[place + 1 :], queries=16)
    with pytest.raises(ValueError, match="queries"):
        extend(*args, queries=65)


@pytest.mark.slow
@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("seed", range(15))
def test_random_steps(device: torch.device, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=random))]

    groups, dim, page = pick(*range(1, 9)), pick(16, 32, 64, 128), pick(1, 2, 8, 16, 32, 64)
    queries = pick(16, 24, 64, 128) // groups or 1
    edges = (0, 1, 14, 15, 16, 17, 31, 33, 64, 100, page - 1, page, page + 1)
    runs = [(pick(*edges), pick(0, 1, 15, 16, 17, 40, queries, queries + 1)) for _ in range(pick(1, 2, 3))]
    dtype = pick(torch.float32, torch.float16, torch.bfloat16)
    step = Step.of(runs, groups, pick(1, 1, 2, 3), dim, page, queries, padding=pick(0, 3))
    check(step, queries, dtype, device)
