"""Two models, one stream: a small model writes and hands the pen to a large one where it says so."""

from __future__ import annotations

from splitdecode.async_decoder import AsyncSplitDecoder
from splitdecode.config import EngineConfig, SamplingParams
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import (
    CapacityError,
    CheckpointError,
    EngineError,
    MissingExtraError,
    RequestError,
    SplitDecodeError,
)
from splitdecode.split.actions import ControlAction, DraftLength, StopThinking, ThinkingBudget
from splitdecode.split.outputs import CompletionOutput, Delta, ModelSpan, RequestMetrics, RequestOutput
from splitdecode.split.policies import (
    CloseRule,
    ControlTags,
    ForcedSpans,
    HandoffPolicy,
    LargeOnly,
    RandomSwitch,
    SmallOnly,
)

__version__ = "0.1.0"

__all__ = [
    "AsyncSplitDecoder",
    "CapacityError",
    "CheckpointError",
    "CloseRule",
    "CompletionOutput",
    "ControlAction",
    "ControlTags",
    "Delta",
    "DraftLength",
    "EngineConfig",
    "EngineError",
    "ForcedSpans",
    "HandoffPolicy",
    "LargeOnly",
    "MissingExtraError",
    "ModelSpan",
    "RandomSwitch",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SmallOnly",
    "SplitDecodeError",
    "SplitDecoder",
    "StopThinking",
    "ThinkingBudget",
]
