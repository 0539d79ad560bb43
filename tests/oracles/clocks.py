"""Time that does not depend on the machine: who is held back and which idle cache goes first follow from it."""

from __future__ import annotations

from itertools import count

from splitdecode import SplitDecoder
from splitdecode.runtime.runner import ModelRunner


def steady(decoder: SplitDecoder) -> SplitDecoder:
    """Every look at a clock is a millisecond later than the one before, so every step takes one."""
    decoder.engine.clock = count(0.0, 1e-3).__next__
    for runner in decoder.engine.runners:
        assert isinstance(runner, ModelRunner)
        runner.clock = count(0.0, 1e-3).__next__
    return decoder
