"""Edits on the device and the end of a step: kernels against references, and both against what they mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitdecode.kernels import state as bits
from splitdecode.kernels.step import advance, advance_ref, count_patch, count_patch_ref, patch, patch_ref


def ints(rows: list[list[int]] | list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def test_patch(device: torch.device) -> None:
    edits = ints([[2, 0, 7], [-1, 1, 9], [0, 4, -5], [-1, 0, 3]], device)
    for run in (patch, patch_ref):
        table = torch.zeros(3, 5, dtype=torch.int32, device=device)
        run(edits, table)
        assert table.tolist() == [[0, 0, 0, 0, -5], [0] * 5, [7, 0, 0, 0, 0]]
        run(edits[:0], table)
    with pytest.raises(ValueError, match=r"patch: edits: found \[4, 2\]"):
        patch(edits[:, :2], table)


def test_counts_add_up(device: torch.device) -> None:
    """Many edits of few places: one id counted several times, and rewound; more edits than one program takes."""
    generator = torch.Generator().manual_seed(0)
    edits = torch.stack(
        [torch.randint(low, high, (300,), generator=generator) for low, high in ((-1, 3), (0, 7), (-2, 3))], 1
    )
    wanted = torch.full((3, 7), 10)
    for slot, token, delta in edits.tolist():
        if slot >= 0:
            wanted[slot, token] += delta
    for run in (count_patch, count_patch_ref):
        counts = torch.full((3, 7), 10, dtype=torch.int32, device=device)
        run(edits.int().to(device), counts)
        assert counts.tolist() == wanted.tolist()


def step(device: torch.device) -> dict[str, Tensor | None]:
    """Rows: goes on; has none left; hits its second end; is broken; is padding; goes on without feeding the device."""
    return {
        "tokens": ints([50, 51, 52, 53, 54, 55], device),
        "positions": ints([10, 11, 12, 13, -1, 15], device),
        "left": ints([5, 1, 5, 5, 5, 2], device),
        "tiles": ints([[0, 1], [1, 1], [2, 1], [3, 1], [4, 0], [5, 1]], device),
        "draws": ints([[row if row != 4 else -1, 5 - row, 20 + row, 0, 0, 2 * (row != 5)] for row in range(6)], device),
        "ids": ints([7, 8, 9, bits.BROKEN, 11, 12], device),
        "logprobs": torch.tensor([-0.5, -1.0, -1.5, torch.nan, -2.5, -3.0], device=device),
        "last": ints([90, 91, 92, 93, 94, 95], device),
        "ends": ints([[-1, -1], [11, -1], [-1, -1], [4, 9], [-1, -1], [8, -1]], device),
        "outbox": torch.full((2, 3, 7), -77, dtype=torch.int32, device=device),
        "out_logprobs": torch.full((2, 3, 7), -77.0, device=device),
        "place": ints([1], device),
    }


@pytest.mark.parametrize("run", [advance, advance_ref])
def test_the_end_of_a_step(device: torch.device, run: object) -> None:
    assert callable(run)
    for more in (False, True):
        now, was = step(device), step(device)
        run(**now, step=1, more=more)
        was["outbox"][1, 1, :6] = ints([7, 8, 9, bits.BROKEN, bits.NOTHING, 12], device)
        was["out_logprobs"][1, 1, :6] = was["logprobs"]
        was["out_logprobs"][1, 1, 4] = torch.nan
        for name in ("outbox", "out_logprobs", "ids", "logprobs", "ends", "place"):
            torch.testing.assert_close(now[name], was[name], equal_nan=True)
        assert now["last"].tolist() == [90, 91, 92, 9, 8, 7]
        if not more:
            for name in ("tokens", "positions", "left", "tiles", "draws"):
                assert torch.equal(now[name], was[name])
            continue
        assert now["tokens"].tolist() == [7, 51, 52, 53, 54, 12]
        assert now["positions"].tolist() == [11, -1, -1, -1, -1, 16]
        assert now["left"].tolist() == [4, 0, 4, 4, 4, 1]
        assert now["tiles"].tolist() == [[0, 1], [1, 0], [2, 0], [3, 0], [4, 0], [5, 1]]
        assert now["draws"][:, 0].tolist() == [0, -1, -1, -1, -1, 5]
        assert now["draws"][:, 2].tolist() == [21, 21, 22, 23, 24, 26]
        assert torch.equal(now["draws"][:, [1, 3, 4, 5]], was["draws"][:, [1, 3, 4, 5]])


def test_many_rows_and_no_logprobs(device: torch.device) -> None:
    """More rows than one program takes, each its own slot, against the reference."""
    generator = torch.Generator().manual_seed(1)
    rows = 300

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    draws = random(0, 4, rows, 6)
    draws[:, 0] = torch.where(torch.rand(rows, generator=generator) < 0.2, -1, torch.arange(rows))
    draws[:, 1] = torch.randperm(rows, generator=generator)
    arguments = (random(0, 9, rows), random(0, 9, rows), random(1, 4, rows), random(1, 2, rows, 2), draws)
    arguments += (random(-2, 6, rows), random(0, 9, rows), random(-1, 6, rows, 3), random(0, 9, 2, 2, rows))
    outcomes = []
    for run in (advance, advance_ref):
        tokens, positions, left, tiles, copy, ids, last, ends, outbox = (one.clone().to(device) for one in arguments)
        run(tokens, positions, left, tiles, copy, ids, None, last, ends, outbox, None, ints([1], device), 1, more=True)
        outcomes.append([one.tolist() for one in (tokens, positions, left, tiles, copy, last, outbox)])
    assert outcomes[0] == outcomes[1]


def test_sizes_are_checked() -> None:
    now = step(torch.device("cpu"))
    with pytest.raises(ValueError, match="expected both or none"):
        advance(**{**now, "logprobs": None}, step=0, more=False)
    with pytest.raises(ValueError, match=r"outbox: found \[2, 3, 7\], expected \[_, > 3, >= 6\]"):
        advance(**now, step=3, more=False)
    with pytest.raises(ValueError, match="found 5 and 6, expected 6"):
        advance(**{**now, "tokens": now["tokens"][:5]}, step=0, more=True)
