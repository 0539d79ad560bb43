"""F4: sampling parameters of every slot in device memory: what the sampler keeps on a host, for kernels to read.

The host keeps a copy of what it needs to choose a graph (`kind`, how many alternatives are wanted) and of the ids it
has counted for penalties, so that counts are rewound by sending differences. Everything is written in stream order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitdecode import ops
from splitdecode.config import SamplingParams
from splitdecode.runtime.sampler import Counts, kind_of

Ints = npt.NDArray[np.int32]

MAX_ENDS = 16  # ids a slot stops at by itself; the host stops at all of them


class DeviceSlots:
    """Sampling state of one model on its device, by slot. The interface is Sampler's; launching is the runner's."""

    def __init__(
        self,
        vocab_limit: int,
        max_slots: int,
        device: torch.device,
        real: torch.dtype,
        *,
        banned_ids: Iterable[int] = (),
        entering_ids: Iterable[int] = (),
        eos_ids: Iterable[int] = (),
    ) -> None:
        """As Sampler; real: float64 for float64 models, float32 for all others."""
        self.vocab_limit, self.device = vocab_limit, device
        self.state = ops.SamplingState.new(max_slots, vocab_limit, device, real)
        self.ends = torch.full((max_slots, MAX_ENDS), -1, dtype=torch.int32, device=device)
        self._eos = tuple(eos_ids)
        forbid = torch.zeros(vocab_limit, dtype=torch.uint8)
        for bit, ids in ((ops.BANNED, banned_ids), (ops.ENTERING, entering_ids), (ops.END, self._eos)):
            forbid[sorted({i for i in ids if 0 <= i < vocab_limit})] |= bit
        self.state.forbid.copy_(forbid)
        self._kind = np.zeros(max_slots, dtype=np.int32)
        self._top = np.zeros(max_slots, dtype=np.int32)
        self._params: list[SamplingParams | None] = [None] * max_slots
        self._counted: dict[int, list[int]] = {}  # slot -> ids its counts hold
        self._marked: set[int] = set()  # slots whose prompt is marked

    def set(self, slot: int, params: SamplingParams, key: int) -> None:
        """Gives a slot its parameters and its 64-bit key.

        Raises RequestError when stop_token_ids or logit_bias name an id at or beyond vocab_limit.
        """
        kind = kind_of(params, self.vocab_limit)
        self.clear(slot)
        state = self.state
        self._kind[slot], self._params[slot], self._top[slot] = kind, params, params.logprobs or 0
        signed = key - (1 << 64) if key >= 1 << 63 else key
        state.key[slot] = signed
        state.temperature[slot] = 1.0 if params.greedy else params.temperature
        state.top_k[slot] = min(params.top_k, self.vocab_limit) if params.top_k > 0 else self.vocab_limit
        state.top_p[slot] = params.top_p
        state.log_min_p[slot] = float(np.log(params.min_p)) if params.min_p > 0 else float("-inf")
        for column, value in enumerate((params.repetition_penalty, params.frequency_penalty, params.presence_penalty)):
            state.penalties[slot, column] = value
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=self.device)
            values = torch.tensor(list(params.logit_bias.values()), dtype=state.bias.dtype, device=self.device)
            state.bias[slot].index_copy_(0, ids, values)
        if params.stop_ids:
            self._mark(slot, params.stop_ids, ops.STOP)
        stops = [*params.stop_ids, *(() if params.ignore_eos else self._eos)][:MAX_ENDS]
        ends = torch.full((MAX_ENDS,), -1, dtype=torch.int32)
        ends[: len(stops)] = torch.tensor(stops, dtype=torch.int32)
        self.ends[slot].copy_(ends)
        state.kind[slot] = kind

    def clear(self, slot: int) -> None:
        """Forgets a slot; until it is set again, its rows are greedy."""
        params, state = self._params[slot], self.state
        if self._kind[slot]:
            state.kind[slot] = 0
        if params is not None and params.logit_bias:
            state.bias[slot].zero_()
        if params is not None and (params.stop_ids or params.penalised):
            state.marks[slot].zero_()
        if self._counted.pop(slot, None):
            state.counts[slot].zero_()
        self._marked.discard(slot)
        self._kind[slot] = self._top[slot] = 0
        self._params[slot] = None

    def needs_counts(self, slot: int) -> bool:
        """Whether rows of this slot must come with Counts."""
        params = self._params[slot]
        return params is not None and params.penalised

    def is_plain(self, draws: Ints) -> bool:
        """Whether all rows [N, 6] are greedy, or Gumbel-max over all ids: what the head samples by itself."""
        slots = draws[:, 1]
        if (self._kind[slots] & (ops.CUT | ops.EDIT | ops.LOGPROBS)).any():
            return False
        return not ((draws[:, 4] > 0) | (draws[:, 5] & ops.SUPPRESS_END != 0)).any()

    def top(self, slots: Ints) -> int:
        """The most alternatives any of these slots wants."""
        return int(self._top[slots].max(initial=0))

    @property
    def any_top(self) -> bool:
        """Whether any slot wants alternatives."""
        return bool(self._top.any())

    def count_edits(self, draws: Ints, counts: Sequence[Counts]) -> Ints:
        """(slot, id, +1 or -1) [E, 3]: what turns the device's counts into these."""
        edits: list[tuple[int, int, int]] = []
        for count in counts:
            slot = int(draws[count.row, 1])
            if slot not in self._marked:
                self._mark(slot, [int(i) for i in count.prompt_ids], ops.PROMPT)
                self._marked.add(slot)
            wanted = [int(i) for i in count.output_ids]
            known = self._counted.setdefault(slot, [])
            same = 0
            while same < min(len(known), len(wanted)) and known[same] == wanted[same]:
                same += 1
            edits += [(slot, i, -1) for i in known[same:]] + [(slot, i, 1) for i in wanted[same:]]
            self._counted[slot] = wanted
        inside = [edit for edit in edits if 0 <= edit[1] < self.vocab_limit]
        return np.array(inside, dtype=np.int32).reshape(-1, 3)

    def _mark(self, slot: int, ids: Iterable[int], bit: int) -> None:
        inside = sorted({i for i in ids if 0 <= i < self.vocab_limit})
        at = torch.tensor(inside, dtype=torch.int64, device=self.device)
        row: Tensor = self.state.marks[slot]
        row.index_copy_(0, at, row[at] | bit)
