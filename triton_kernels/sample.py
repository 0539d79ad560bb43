"""F1: one id per row of logits: exclusions, bias, penalties, temperature, Gumbel-max. The host's order, in one launch.

    raw logits, ids < V
      -> banned; entering (attempt > 0); END and the slot's STOP ids (SUPPRESS_END): -inf
      -> bias -> repetition, frequency, presence -> / temperature          scaled
      -> + gumbel, argmax, the lowest id among equals                      ids

A program takes one block of one row; the last of a row to arrive compares the leaders of all blocks. Rows that are cut
(top_k, top_p, min_p) are drawn from all ids all the same: `nucleus` keeps that id if the cut does, and otherwise goes
on from `scaled` and its maxima by block.

| argument        | shape         | dtype            | unit                                                            |
|-----------------|---------------|------------------|-----------------------------------------------------------------|
| logits          | [>= N, >= V]  | fp32, bf16, fp16 | raw; rows may be strided; ids from V on are never read          |
| draws           | [N, 6]        | int32            | see state.py                                                    |
| state           | SamplingState |                  |                                                                 |
| scratch.scaled  | [>= N, V]     | fp32             | written for rows with CUT; -inf: excluded                       |
| scratch.peaks   | [>= N, B]     | fp32             | written for rows with CUT: maxima of scaled by block            |
| scratch.best    | [>= N, B]     | fp32             | the largest perturbed value by block                            |
| scratch.best_id | [>= N, B]     | int32            | the lowest id that has it                                       |
| counters        | [>= N]        | int32            | zero before the call and after it                               |
| ids             | [N]           | int32            | written. BROKEN: NaN or +inf among the raw logits, those of     |
|                 |               |                  | excluded ids too; or, after temperature, +inf or nothing above  |
|                 |               |                  | -inf. NOTHING: padding                                          |

B = ceil(V / 1024). The reference takes float64 too (state and scratch hold it then) and leaves best, best_id and
counters alone. Scratch of BROKEN rows means nothing.

Sources: order and penalties: vLLM's logits processors and apply_penalties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitdecode.kernels import shims
from splitdecode.kernels import state as bits
from splitdecode.kernels.host.sampling import gumbel_ref
from splitdecode.kernels.philox import noise
from splitdecode.kernels.shims import release, wait
from splitdecode.kernels.state import SamplingState

BLOCK = 1024  # ids per program; nucleus visits blocks of this size
DRAW, CUT, EDIT, LOGPROBS = (tl.constexpr(bit) for bit in (bits.DRAW, bits.CUT, bits.EDIT, bits.LOGPROBS))
SUPPRESS_END, FEEDS_DEVICE = tl.constexpr(bits.SUPPRESS_END), tl.constexpr(bits.FEEDS_DEVICE)
BANNED, ENTERING, END = tl.constexpr(bits.BANNED), tl.constexpr(bits.ENTERING), tl.constexpr(bits.END)
PROMPT, STOP = tl.constexpr(bits.PROMPT), tl.constexpr(bits.STOP)
BROKEN, NOTHING = tl.constexpr(bits.BROKEN), tl.constexpr(bits.NOTHING)


@dataclass(frozen=True, slots=True)
class SampleScratch:
    """What `sample` leaves for `nucleus`; see the table above."""

    scaled: Tensor
    peaks: Tensor
    best: Tensor
    best_id: Tensor

    @staticmethod
    def new(rows: int, vocab: int, device: torch.device | str, real: torch.dtype = torch.float32) -> SampleScratch:
        """Uninitialised."""
        shape = (rows, triton.cdiv(vocab, BLOCK))
        return SampleScratch(
            scaled=torch.empty(rows, vocab, dtype=real, device=device),
            peaks=torch.empty(shape, dtype=real, device=device),
            best=torch.empty(shape, dtype=real, device=device),
            best_id=torch.empty(shape, dtype=torch.int32, device=device),
        )


_CONFIGS: dict[tuple[str, tuple[int, ...]], int] = {}  # (device, (V,)) -> warps


def _rule(vocab: int) -> int:
    """Two Philox blocks a thread."""
    return 4


@triton.jit
def draw(draws, row):
    """A row of draws: token, slot, position, stream, attempt, flags; the slot of padding is 0."""
    at = draws + row * 6
    token = tl.load(at)
    slot = tl.where(token < 0, 0, tl.load(at + 1))
    return token, slot.to(tl.int64), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def excluded(v, forbid, marks, attempt, flags, V: tl.constexpr):
    """Which ids `v` must not be sampled; marks: the slot's row."""
    wanted = BANNED | tl.where(attempt > 0, ENTERING, 0) | tl.where((flags & SUPPRESS_END) != 0, END, 0)
    out = (tl.load(forbid + v, mask=v < V, other=BANNED) & wanted) != 0
    if (flags & SUPPRESS_END) != 0:
        out = out | ((tl.load(marks + v, mask=v < V, other=0) & STOP) != 0)
    return out


@triton.jit
def edited(value, v, bias, counts, marks, penalties, V: tl.constexpr):
    """Bias, then the penalties; all pointers are at the slot's row."""
    value += tl.load(bias + v, mask=v < V, other=0.0)
    times = tl.load(counts + v, mask=v < V, other=0)
    seen = ((tl.load(marks + v, mask=v < V, other=0) & PROMPT) != 0) | (times > 0)
    repetition, frequency, presence = tl.load(penalties), tl.load(penalties + 1), tl.load(penalties + 2)
    repeated = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
    value = tl.where(seen, repeated, value)
    return tl.where(times > 0, value - frequency * times.to(tl.float32) - presence, value)


@triton.jit
def leader(value, v):
    """The largest value and the lowest id that has it."""
    top = tl.max(value, axis=0)
    return top, tl.min(tl.where(value == top, v, 0x7FFFFFFF), axis=0)


@triton.jit
def elect(value, v, corrupt, best, best_id, counter, out, block, BLOCKS: tl.constexpr, STEP: tl.constexpr):
    """Enters a block's leader; the last block of the row to do so writes the row's id to `out`.

    A block with a corrupt value enters +inf and BROKEN, below every id: it wins wherever it stands.
    """
    top, first = leader(value, v)
    broken = tl.max(corrupt.to(tl.int32), axis=0) > 0
    tl.store(best + block, tl.where(broken, float("inf"), top))
    tl.store(best_id + block, tl.where(broken, BROKEN, first))
    tl.debug_barrier()  # both are stored before it is counted
    if tl.atomic_add(counter, 1, sem="acq_rel") == BLOCKS - 1:
        tops = tl.full([STEP], float("-inf"), tl.float32)
        firsts = tl.full([STEP], BROKEN, tl.int32)
        for start in range(0, BLOCKS, STEP):
            at = start + tl.arange(0, STEP)
            values = tl.load(best + at, mask=at < BLOCKS, other=float("-inf"), cache_modifier=".cg")
            holders = tl.load(best_id + at, mask=at < BLOCKS, other=BROKEN, cache_modifier=".cg")
            firsts = tl.where(values > tops, holders, firsts)  # ids rise with `at`: equals stay
            tops = tl.maximum(tops, values)
        top, first = leader(tops, firsts)
        tl.store(out, tl.where(top > float("-inf"), first, BROKEN))
        tl.store(counter, 0)


@triton.jit
def _sample_kernel(
    logits, draws, kind, key, temperature, penalties, bias, counts, marks, forbid,
    scaled, peaks, best, best_id, counters, ids,
    WIDTH: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    wait(PDL)
    token, slot, position, stream, attempt, flags = draw(draws, row)
    if token < 0:
        if block == 0:
            tl.store(ids + row, NOTHING)
        return
    needs = tl.load(kind + slot)
    first = block * BLOCK
    v = first + tl.arange(0, BLOCK)
    own = slot * V
    raw = tl.load(logits + row.to(tl.int64) * WIDTH + v, mask=v < V, other=float("-inf")).to(tl.float32)
    corrupt = ~(raw < float("inf"))  # NaN too
    value = tl.where(excluded(v, forbid, marks + own, attempt, flags, V), float("-inf"), raw)
    if needs & EDIT:
        value = edited(value, v, bias + own, counts + own, marks + own, penalties + slot * 3, V)
    if needs & DRAW:
        value = tl.div_rn(value, tl.load(temperature + slot))
    corrupt = corrupt | (value == float("inf"))  # edits and temperature may overflow
    if needs & DRAW:
        if needs & CUT:
            tl.store(scaled + row.to(tl.int64) * V + v, value, mask=v < V)
            tl.store(peaks + row * BLOCKS + block, tl.max(value, axis=0))
        value += noise(first, tl.load(key + slot), position, stream, attempt, BLOCK)
    at = row * BLOCKS
    elect(value, v, corrupt, best + at, best_id + at, counters + row, ids + row, block, BLOCKS, STEP)


def excluded_ref(draws: Tensor, slot: Tensor, state: SamplingState) -> Tensor:
    """Which ids each row must not sample: bool [N, V]."""
    attempt, flags = draws[:, 4:5], draws[:, 5:6]
    again, suppressed = attempt > 0, (flags & bits.SUPPRESS_END) != 0
    out = (state.forbid & bits.BANNED) != 0
    out = out | (again & ((state.forbid & bits.ENTERING) != 0))
    ends = ((state.forbid & bits.END) != 0) | ((state.marks[slot] & bits.STOP) != 0)
    return out | (suppressed & ends)


def edited_ref(value: Tensor, slot: Tensor, state: SamplingState) -> Tensor:
    """Bias, then the penalties."""
    repetition, frequency, presence = state.penalties[slot, :, None].unbind(1)
    value = value + state.bias[slot]
    times = state.counts[slot]
    seen = ((state.marks[slot] & bits.PROMPT) != 0) | (times > 0)
    value = torch.where(seen, torch.where(value > 0, value / repetition, value * repetition), value)
    return torch.where(times > 0, value - frequency * times.to(value.dtype) - presence, value)


def sample_ref(
    logits: Tensor,
    draws: Tensor,
    state: SamplingState,
    scratch: SampleScratch,
    counters: Tensor | None,
    ids: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """The contract above."""
    real, vocab, rows = state.temperature.dtype, state.vocab, draws.shape[0]
    live = draws[:, 0] >= 0
    slot = torch.where(live, draws[:, 1], 0).long()
    needs = state.kind[slot]
    drawn, cut = (needs & bits.DRAW) != 0, live & ((needs & bits.CUT) != 0)
    raw = logits[:rows, :vocab].to(real)
    value = raw.masked_fill(excluded_ref(draws, slot, state), -torch.inf)
    value = torch.where(((needs & bits.EDIT) != 0)[:, None], edited_ref(value, slot, state), value)
    value = value / torch.where(drawn, state.temperature[slot], 1.0)[:, None]
    sound = raw.amax(1).isfinite() & value.amax(1).isfinite()
    scratch.scaled[:rows].copy_(torch.where(cut[:, None], value, scratch.scaled[:rows]))
    padded = torch.nn.functional.pad(value, (0, -vocab % BLOCK), value=-torch.inf)
    peaks = padded.view(rows, -1, BLOCK).amax(2)
    scratch.peaks[:rows].copy_(torch.where(cut[:, None], peaks, scratch.peaks[:rows]))
    every = torch.arange(vocab, device=draws.device).expand(rows, vocab)
    position, stream, attempt = draws[:, 2:5].long().unbind(1)
    noisy = value + gumbel_ref(every, state.key[slot], position, stream, attempt, real)
    found = torch.where(drawn[:, None], noisy, value).argmax(1)
    ids.copy_(torch.where(live, torch.where(sound, found, bits.BROKEN), bits.NOTHING))


def sample(
    logits: Tensor,
    draws: Tensor,
    state: SamplingState,
    scratch: SampleScratch,
    counters: Tensor,
    ids: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Writes ids, and scratch for rows that are cut, as the contract above says."""
    rows, vocab = draws.shape[0], state.vocab
    blocks = triton.cdiv(vocab, BLOCK)
    if logits.shape[0] < rows or logits.shape[1] < vocab or logits.stride(1) != 1:
        raise ValueError(f"sample: logits: found {list(logits.shape)}, expected rows of at least [{rows}, {vocab}]")
    if scratch.scaled.shape[0] < rows or scratch.scaled.shape[1] != vocab:
        raise ValueError(f"sample: scratch: found {list(scratch.scaled.shape)}, expected at least [{rows}, {vocab}]")
    if counters.numel() < rows:
        raise ValueError(f"sample: counters: found {counters.numel()}, expected at least {rows}")
    if not rows:
        return
    _sample_kernel[(rows, blocks)](
        logits, draws, state.kind, state.key, state.temperature, state.penalties, state.bias, state.counts,
        state.marks, state.forbid, scratch.scaled, scratch.peaks, scratch.best, scratch.best_id, counters, ids,
        WIDTH=logits.stride(0), V=vocab, BLOCK=BLOCK, BLOCKS=blocks, STEP=triton.next_power_of_2(min(blocks, 1024)),
        PDL=shims.wants_pdl(pdl), num_warps=shims.tuned(_CONFIGS, logits.device, (vocab,), _rule),
        **shims.launch_options(pdl),
    )  # fmt: skip
