"""What trainings under test share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def others_warnings() -> Iterator[None]:
    """transformers warns of names that TRL still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
