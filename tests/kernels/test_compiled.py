"""Every kernel compiled for sm_80, sm_90 and sm_100 at the shapes of the 1.5B and the 32B: what each may need.

The bounds stand beside the cases (oracles/cases): no spills; registers and shared memory the occupancy assumes; 128-bit
loads on weights and cache; matrix instructions where tl.dot is used. `pytest -s` shows the table.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
from oracles.compiled import ARCHS, compiled_elsewhere, table

FILES = ("linear", "attention", "sampling")
KERNELS = {
    "linear": {
        "_embed_kernel",
        "_rmsnorm_kernel",
        "_qkv_kernel",
        "_linear_kernel",
        "_gate_up_kernel",
        "_skinny_kernel",
    },
    "attention": {"_attend_kernel", "_extend_kernel", "_rope_write_kernel", "_swiglu_kernel"},
    "sampling": {"_head_kernel", "_sample_kernel", "_nucleus_kernel", "_logprobs_kernel", "_advance_kernel"},
}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], list[dict[str, Any]]]:
    jobs = list(product(FILES, ARCHS))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: compiled_elsewhere([job[0]], job[1]), jobs))
    return dict(zip(jobs, found, strict=True))


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")  # one process compiles for all of them
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_need_no_more_than_they_may(
    compiled: dict[tuple[str, int], list[dict[str, Any]]], file: str, arch: int
) -> None:
    rows = compiled[file, arch]
    print(f"\n{table(rows)}")
    assert {row["kernel"] for row in rows} >= KERNELS[file]
    faults = [f"{row['case']} ({row['kernel']}): {fault}" for row in rows for fault in row["faults"]]
    assert faults == []
