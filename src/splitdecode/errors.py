"""F0: what can go wrong, by name. Every message says what was wrong, where, and what was expected."""

from __future__ import annotations


class SplitDecodeError(Exception):
    """Base of every error this package raises on purpose."""


class CheckpointError(SplitDecodeError):
    """A checkpoint (weights, config, tokenizer, template) that cannot be used as it stands."""


class RequestError(SplitDecodeError, ValueError):
    """A prompt, sampling parameter or policy that cannot be served; nothing of the request was started."""


class CapacityError(SplitDecodeError):
    """Memory, pages or positions that do not suffice; names the sizes."""


class EngineError(SplitDecodeError):
    """A step failed, or the thread that runs the steps; __cause__ is what it raised. The answer is lost."""


class MissingExtraError(SplitDecodeError, ImportError):
    """An optional package is absent; names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'splitdecode[{extra}]'")
