"""F7: traces annotated without a third model: hard is where the small model loses most against the large one.

    loss_small - loss_large per token (nats)  ->  centred moving average  ->  the top x % of tokens  ->  spans

This finds what the large model can do and the small one cannot: where the large one is lost too (its mean loss is in
the details), nothing is gained by asking it. Both models read prompt and trace once. The units are the small model's
tokens; where the tokenizers differ, a token's loss is spread evenly over its bytes and gathered again by the small
model's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from splitdecode.annotate.records import Annotation, Failure
from splitdecode.annotate.spans import MERGE, Span, normalise
from splitdecode.annotate.traces import Trace
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.questions import THINK, opening, question_prompts
from splitdecode.split.roles import Pair, Role

Floats = npt.NDArray[np.float64]
_Ids = tuple[list[int], list[int]]  # of the prompt, of the trace


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
        """names: of the models, for the record. chat: prompts are messages, put through each model's own template;
        bare questions always are, as split/questions.py does it, without the hint."""
        self._decoder, self._names, self._recipe = decoder, names, recipe or GapRecipe()
        self._chat, self._batch = chat, batch

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"annotator": "gap", **asdict(self._names), "chat": self._chat, **asdict(self._recipe)}

    def annotate(self, traces: Iterable[Trace]) -> Iterator[Annotation | Failure]:
        """A trace with more tokens than a model has positions, or that a tokenizer cannot spell, is left out.

        Raises RequestError where a chat template is wanted and there is none."""
        if self._chat:
            self._decoder.chat_prompts([{"role": "user", "content": ""}], hint=False)
        remaining = iter(traces)
        while batch := list(islice(remaining, self._batch)):
            read: list[tuple[Trace, Pair[_Ids]]] = []
            for trace in batch:
                try:
                    read.append((trace, Pair.of(partial(self._ids, trace))))
                except RequestError as error:
                    yield Failure(trace, str(error), left_out=True)
            losses = Pair.of(partial(self._losses, [ids for _, ids in read]))
            for (trace, ids), *both in zip(read, *losses, strict=True):
                yield self._found(trace, ids.map(lambda found: found[1]), Pair(*both))

    def _ids(self, trace: Trace, role: Role) -> _Ids:
        """The ids of prompt and trace. Raises RequestError when there are none, or too many."""
        tokenizer, most = self._decoder.tokenizers[role], self._decoder.models[role].config.max_positions
        prompt, body = tokenizer.encode(self._prompt(trace, role)), tokenizer.encode_inserted(trace.text)
        if len(prompt) + len(body) > most:
            raise RequestError(f"found {len(prompt) + len(body)} tokens with its prompt, expected at most {most}, the "
                               f"positions of the {role} model")  # fmt: skip
        return prompt, body

    def _losses(self, ids: list[Pair[_Ids]], role: Role) -> list[Floats]:
        """Per trace the loss of each of its tokens, in nats; float64 [n]."""
        both = [found[role] for found in ids]
        scores = self._decoder.score([prompt + body for prompt, body in both], role)
        return [-row[len(prompt) :] for (prompt, _), row in zip(both, scores, strict=True)]

    def _prompt(self, trace: Trace, role: Role) -> str:
        if trace.bare:
            made = question_prompts(trace.prompt, self._decoder.templates, hint=False)[role]
        elif self._chat:
            made = self._decoder.chat_prompts([{"role": "user", "content": trace.prompt}], hint=False)[role]
        else:
            return trace.prompt
        return made.removesuffix(opening(made)) if trace.text.startswith(THINK) else made  # it is there once

    def _found(self, trace: Trace, ids: Pair[list[int]], losses: Pair[Floats]) -> Annotation:
        recipe, tables = self._recipe, self._decoder.tokenizers
        edges = Pair.of(lambda r: byte_edges(tables[r], ids[r]))
        units = edges[Role.SMALL]
        gathered = Pair.of(lambda r: regathered(losses[r], edges[r], units))
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
            "loss": asdict(Pair.of(lambda r: round(float(np.nanmean(losses[r])), 6))),
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
