"""The benchmarks are scripts beside each other: their folder must be on the path to import one."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from splitdecode.decoder import SplitDecoder

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times decide who waits for a hand-off and which idle cache goes first. Here nobody is made to wait and
    the clock counts how often it is read, so a run is the same on every machine, however busy it is."""
    import sweep

    made = sweep.Sweep.decoder

    def decoder(self: Any, *args: Any, **engine: Any) -> SplitDecoder:
        one = made(self, *args, **engine, handoff_patience=0.0)
        one.engine.clock = count(0.0, 1e-3).__next__
        return one

    monkeypatch.setattr(sweep.Sweep, "decoder", decoder)
