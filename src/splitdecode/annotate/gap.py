"""F7: traces annotated without a third model: hard is where the small model loses most against the large one.

    loss_small - loss_large per token (nats)  ->  centred moving average  ->  the top x % of tokens  ->  spans

Both models read prompt and trace once. The units are the small model's tokens; where the tokenizers differ, a token's
loss is spread evenly over its bytes and gathered again by the small model's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from splitdecode.annotate.records import Annotation
from splitdecode.annotate.spans import MERGE, Span, normalise
from splitdecode.annotate.traces import Trace
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.roles import Pair, Role

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GapRecipe:
    """share: of the tokens that become spans; window: tokens of the moving average, odd; min_gap: nats, smoothed, below
    which no token does; merge, min_length and cap as in normalise()."""

    share: float = 0.2
    window: int = 9
    min_gap: float = 0.0
    merge: int = MERGE
    min_length: int = 1
    cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("share", "cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise RequestError(f"{name}: found {value}, expected a share above 0 and up to 1")
        if self.window < 1 or self.window % 2 == 0:
            raise RequestError(f"window: found {self.window}, expected an odd number of tokens")
        if self.merge < 0 or self.min_length < 1:
            raise RequestError(f"recipe: found merge {self.merge} and min_length {self.min_length}, expected merge "
                               ">= 0 and min_length >= 1")  # fmt: skip


class GapAnnotator:
    """Scores traces by both models of a decoder, `batch` at a time."""

    def __init__(
        self, decoder: SplitDecoder, names: Pair[str], recipe: GapRecipe | None = None, *, chat: bool = False,
        batch: int = 16,
    ) -> None:  # fmt: skip
        """names: of the models, for the record. chat: prompts are messages, put through each model's own template."""
        self._decoder, self._names, self._recipe = decoder, names, recipe or GapRecipe()
        self._chat, self._batch = chat, batch

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"annotator": "gap", **asdict(self._names), "chat": self._chat, **asdict(self._recipe)}

    def annotate(self, traces: Iterable[Trace]) -> Iterator[Annotation]:
        """Raises RequestError naming a trace that is longer than a model has positions, or that a tokenizer cannot
        spell."""
        remaining = iter(traces)
        while batch := list(islice(remaining, self._batch)):
            for trace, losses in zip(batch, self._losses(batch), strict=True):
                yield self._found(trace, losses)

    def _losses(self, batch: list[Trace]) -> list[Pair[tuple[list[int], Floats]]]:
        """Per trace and role: the trace's ids and the loss of each, in nats."""
        scored = Pair.of(lambda r: self._scored(batch, r))
        return [Pair(*both) for both in zip(*scored, strict=True)]

    def _scored(self, batch: list[Trace], role: Role) -> list[tuple[list[int], Floats]]:
        tokenizer, most = self._decoder.tokenizers[role], self._decoder.models[role].config.max_positions
        prompts, bodies = [], []
        for trace in batch:
            try:
                prompts.append(tokenizer.encode(self._prompt(trace, role)))
                bodies.append(tokenizer.encode_inserted(trace.text))
            except RequestError as error:
                raise RequestError(f"trace {trace.id!r}: {error}") from None
            length = len(prompts[-1]) + len(bodies[-1])
            if length > most:
                raise RequestError(f"trace {trace.id!r}: found {length} tokens with its prompt, expected at most "
                                   f"{most}, the positions of the {role} model")  # fmt: skip
        scores = self._decoder.score([p + b for p, b in zip(prompts, bodies, strict=True)], role)
        return [(b, -s[len(p) :]) for p, b, s in zip(prompts, bodies, scores, strict=True)]

    def _prompt(self, trace: Trace, role: Role) -> str:
        if not self._chat:
            return trace.prompt
        return self._decoder.chat_prompts([{"role": "user", "content": trace.prompt}], hint=False)[role]

    def _found(self, trace: Trace, losses: Pair[tuple[list[int], Floats]]) -> Annotation:
        recipe, tables = self._recipe, self._decoder.tokenizers
        edges = Pair.of(lambda r: byte_edges(tables[r], losses[r][0]))
        units = edges[Role.SMALL]
        gathered = Pair.of(lambda r: regathered(losses[r][1], edges[r], units))
        gap = np.nan_to_num(gathered[Role.SMALL] - gathered[Role.LARGE], nan=0.0)
        smooth = moving_average(gap, recipe.window)
        order = np.argsort(-smooth, kind="stable")[: math.ceil(recipe.share * len(smooth))]
        order = order[smooth[order] > recipe.min_gap]
        ranges = token_ranges(trace.text, units, order)
        spans = normalise(trace.text, ranges, merge=recipe.merge, min_length=recipe.min_length, cap=recipe.cap)
        rest = np.delete(gap, order)
        details = {
            "tokens": len(gap),
            "chosen": len(order),
            "gap_inside": round(float(gap[order].mean()), 4) if len(order) else None,
            "gap_outside": round(float(rest.mean()), 4) if len(rest) else None,
            "threshold": round(float(smooth[order[-1]]), 4) if len(order) else None,
        }
        return Annotation(trace, spans, details)


def byte_edges(tokenizer: Tokenizer, ids: list[int]) -> npt.NDArray[np.int64]:
    """Where each token begins and the last one ends, in bytes of the text they spell; int64 [n + 1]."""
    return np.cumsum([0, *(len(tokenizer.token_bytes[i]) for i in ids)])


def regathered(losses: Floats, edges: npt.NDArray[np.int64], units: npt.NDArray[np.int64]) -> Floats:
    """Losses of the tokens between `edges` as losses of the stretches between `units`; both in bytes, over one text.

    A token's loss is spread evenly over its bytes. NaN (nothing stood before it) counts as 0.
    """
    if np.array_equal(edges, units):
        return losses
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(losses))])
    keep = np.concatenate([np.diff(edges) > 0, [True]])  # tokens of no bytes add theirs to the one before
    return np.diff(np.interp(units, edges[keep], total[keep]))


def moving_average(values: Floats, window: int) -> Floats:
    """The mean over the `window` values around each, over those there are at the ends."""
    ones, middle = np.ones(window), slice(window // 2, window // 2 + len(values))
    return np.convolve(values, ones)[middle] / np.convolve(np.ones(len(values)), ones)[middle]


def token_ranges(text: str, edges: npt.NDArray[np.int64], tokens: Iterable[int]) -> list[Span]:
    """Ranges of characters of tokens given in order of importance: a character partly in a token is in its range."""
    sizes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    lengths = 1 + (sizes >= 0x80).astype(np.int64) + (sizes >= 0x800) + (sizes >= 0x10000)
    bounds = np.concatenate([[0], np.cumsum(lengths)])  # bytes before each character
    first = np.searchsorted(bounds, edges, side="right") - 1
    last = np.searchsorted(bounds, edges, side="left")
    return [(int(first[t]), int(last[t + 1])) for t in tokens]
