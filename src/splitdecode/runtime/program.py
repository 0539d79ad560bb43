"""F4: one whole step on static memory: run the model, draw, and move on, so that the next step needs no host.

    inputs -> embed, layers (models/step.py) -> head + draw -> advance: outbox, last, and (of several steps) the inputs
              '---------------------------- `steps` times in one graph ----------------------------'

    one row, plain (greedy, or Gumbel-max over all ids)      the head draws by itself, in its own launch
    several rows, or a row that wants more (`full`)          logits first, then sample, nucleus and log-probs

The outbox is host memory the device writes to (pinned), a ring of flights: [flights, steps, draws].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from splitdecode.models.step import SKINNY, StepInputs, StepModel, StepShape
from splitdecode.ops import StepOps
from splitdecode.runtime.slots import DeviceSlots

Adjust = Callable[[Tensor, Tensor, Tensor], None]


class Program:
    """Everything a step of one model reads and writes besides the model itself."""

    def __init__(
        self,
        model: StepModel,
        slots: DeviceSlots,
        outbox: Tensor,
        out_logprobs: Tensor,
        max_words: int,
        adjust: Adjust | None = None,
    ) -> None:
        """outbox int32 and out_logprobs float32 [flights, steps, draws]; max_words: int32 of the largest inputs.

        adjust(logits [N, V], tokens [T], draws [N, 6]): changes raw logits in place before anything is drawn.
        """
        self.model, self.slots, self.adjust = model, slots, adjust
        self.outbox, self.out_logprobs = outbox, out_logprobs
        device, dtype = model.device, model.dtype
        self.inbox = torch.zeros(4 + max_words, dtype=torch.int32, device=device)  # which flight, then the inputs
        real = torch.float64 if dtype == torch.float64 else torch.float32
        draws, vocab = outbox.shape[2], model.config.vocab_size
        self.hidden = torch.zeros(draws, model.config.hidden_size, dtype=dtype, device=device)
        self.logits = torch.zeros(draws, vocab, dtype=real, device=device)
        self.ids = torch.zeros(draws, dtype=torch.int32, device=device)
        self.chosen = torch.zeros(draws, dtype=torch.float32, device=device)
        self._head_scratch: tuple[Tensor, Tensor] | None = None
        self._sample_scratch: Any = None
        self._counters: dict[int, Tensor] = {}

    def inputs(self, shape: StepShape) -> StepInputs:
        """The static inputs of steps of this shape."""
        return StepInputs.of(self.inbox[4:], shape)

    def prepare(self, ops: StepOps, shape: StepShape) -> None:
        """Takes the memory steps of this shape need beyond what is there."""
        self.model.prepare(ops, shape)
        size = self._counter_count(shape)
        if size not in self._counters:
            self._counters[size] = torch.zeros(size, dtype=torch.int32, device=self.model.device)
        if self._head_scratch is None:
            self._head_scratch = ops.head_scratch(self.model.weights.head.t())
            rows, device, real = len(self.ids), self.ids.device, self.logits.dtype
            self._sample_scratch = ops.sample_scratch(rows, self.slots.vocab_limit, device, real)

    def run(self, ops: StepOps, shape: StepShape) -> None:
        """All steps of the shape; prepare() came before."""
        inputs = self.inputs(shape)
        counters = self._counters[self._counter_count(shape)]
        for step in range(shape.steps):
            x = self.model.run(ops, shape, inputs, counters)
            if shape.draws:
                self._draw(ops, shape, inputs, x, counters[self.model.counter_count(shape) :])
                self._advance(ops, shape, inputs, step)

    def _counter_count(self, shape: StepShape) -> int:
        """Of the layers, of the head, of `sample` by row."""
        return self.model.counter_count(shape) + 1 + shape.draws

    def logits_of(self, shape: StepShape) -> Tensor:
        """Where the logits [N, V] of such a step lie: wide; in the model's dtype when a library's product made them."""
        logits = self.logits[: shape.draws]
        return logits if shape.draws <= SKINNY else logits.view(self.model.dtype)[:, : logits.shape[1]]

    def _draw(self, ops: StepOps, shape: StepShape, inputs: StepInputs, x: Tensor, counters: Tensor) -> None:
        w, eps, state, count = self.model.weights, self.model.config.rms_eps, self.slots.state, shape.draws
        logits, ids, draws = self.logits_of(shape), self.ids[:count], inputs.draws
        alone = count == 1 and self.adjust is None
        if alone:
            assert self._head_scratch is not None
            ops.head(x, w.norm, eps, w.head.t(), draws, state, logits, *self._head_scratch, counters[:1], ids)
        else:
            hidden = self.hidden[:count]
            ops.rmsnorm(x, w.norm, eps, hidden, rows=draws[:, 0])
            self.model.product(ops, hidden, w.head, None, logits)
            if self.adjust is not None:
                ops.call(self.adjust, logits, inputs.tokens, draws)
        if shape.full or not alone:
            ops.sample(logits, draws, state, self._sample_scratch, counters[1:], ids)
        if shape.full:
            ops.nucleus(draws, state, self._sample_scratch, ids)
            ops.logprobs(logits, draws, state, ids, self.chosen[:count])

    def _advance(self, ops: StepOps, shape: StepShape, inputs: StepInputs, step: int) -> None:
        ids, chosen = self.ids[: shape.draws], self.chosen[: shape.draws] if shape.full else None
        words = (inputs.tokens, inputs.positions, inputs.left, inputs.tiles, inputs.draws)
        ops.advance(
            *words,
            ids,
            chosen,
            self.model.last,
            self.slots.ends,
            self.outbox,
            self.out_logprobs if shape.full else None,
            self.inbox[:1],
            step=step,
            more=step + 1 < shape.steps,
        )
