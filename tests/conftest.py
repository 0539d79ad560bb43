"""One thread for every test: the machines that run them are shared, and two contended OpenMP threads crawl.

Triton is interpreted, except by `pytest -m gpu`: it chooses when it is imported, so the choice is made here.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TRITON_INTERPRET"] = "0" if config.option.markexpr == "gpu" else "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel runs: in Triton's interpreter, and on a GPU by `pytest -m gpu`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
