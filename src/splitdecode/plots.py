"""F7: matplotlib where it is there."""

from __future__ import annotations

from typing import Any

from splitdecode.errors import MissingExtraError


def load_pyplot(purpose: str = "a plot") -> Any:
    """matplotlib's pyplot, drawing to files. Raises MissingExtraError, which names `purpose`, when it is absent."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", purpose) from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
