"""When the small model takes the pen back: NEXT_TOKEN against enumeration, CONTINUE against a decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracles.sampling import kept, processed, sample_row
from oracles.scripted import NEVER, Recorder, Scripted
from oracles.tiny import TAGS, ToyTokenizer
from scipy.stats import chisquare
from torch import Tensor

from splitdecode import CloseRule, ControlTags, EngineConfig, RequestOutput, SamplingParams, SplitDecoder
from splitdecode.config import request_key
from splitdecode.split.roles import Pair

CLOSE = TAGS[1].encode()
PIECES = ["<|eos|>", "a", "b", "c", "x", "<", "</", ".</", "</b", "</big", "big", "ig", "model", "model>", ">", ">\n"]
PIECES += ["></", "/", "</bigmodel>", ".", "\n", "<<"]
IDS = {piece: i for i, piece in enumerate(PIECES)}
OPENING = ["<", "big", "model", ">"]
LARGE = ["b", "c", "b", "a", "c", "b"]
PROMPT, EOS, WRITE_SMALL, CONFIRM = 3, 0, 0, 3
START = PROMPT + len(OPENING)  # small-lane position of the first large token
CHAINS = [
    ("<", "/"),
    ("/", "big"),
    ("</", "big"),
    (".</", "big"),
    ("</b", "ig"),
    ("</big", "model"),
    ("</big", "model>"),
]
CHAINS += [("big", "model"), ("big", "model>"), ("ig", "model"), ("ig", "model>"), ("model", ">"), ("model", ">\n")]
CHAINS += [("model", "></"), ("<<", "/")]
Path = tuple[int, ...]


class Chained(Scripted):
    """Logits of a position plus those of the token before it: what follows a tag's piece depends on the piece."""

    follows: Tensor

    def forward(self, batch: Any, kv: Tensor, rows: Tensor) -> Tensor:
        return super().forward(batch, kv, rows) + self.follows[batch.tokens[rows].long()]

    def logits(self, ids: list[int]) -> np.ndarray:
        row: np.ndarray = (self.table[len(ids)] + self.follows[ids[-1]]).numpy()
        return row


class Stage:
    """A small model that opens at once, may close anywhere, and ends behind the tag; a large one that says LARGE."""

    def __init__(self, **engine: Any) -> None:
        tokenizer = ToyTokenizer(PIECES)
        rng = np.random.default_rng(11)
        small, large = Chained(tokenizer.size, 64), Scripted(tokenizer.size, 64)
        small.table[:] = torch.from_numpy(rng.normal(0, 0.7, tuple(small.table.shape)))
        small.table[:, IDS["</bigmodel>"]] += 0.7
        small.table[:, len(PIECES) :] = NEVER  # halves of a character
        small.says(PROMPT, [IDS[piece] for piece in OPENING])
        follows = rng.normal(0, 0.5, (tokenizer.size, tokenizer.size))
        for left, right in CHAINS:
            follows[IDS[left], IDS[right]] += 3.5
        for piece in ("model>", ">", ">\n", "></", "</bigmodel>"):
            follows[IDS[piece], EOS] += 40.0
        small.follows = torch.from_numpy(follows)
        large.says(PROMPT, [*(IDS[piece] for piece in LARGE), EOS])
        self.small, self.tokenizer = small, tokenizer
        config = EngineConfig(kv_cache_memory="16MiB", **engine)
        self.decoder = SplitDecoder(
            Pair(small, large), Pair(tokenizer, tokenizer), eos_ids=Pair((EOS,), (EOS,)), config=config
        )  # type: ignore[arg-type]
        self.recorder = Recorder(self.decoder)

    def run(self, seeds: range, policy: ControlTags | None = None, **params: Any) -> list[RequestOutput]:
        wanted = [SamplingParams(seed=seed, **params) for seed in seeds]
        return self.decoder.generate([[1, 2, 3]] * len(wanted), wanted, handoff=policy)

    def bytes_of(self, ids: list[int] | Path) -> bytes:
        return b"".join(self.tokenizer.token_bytes[i] for i in ids)


# ---- NEXT_TOKEN


def distribution(stage: Stage, ids: list[int], params: SamplingParams) -> dict[int, float]:
    """The small model's own processed distribution behind `ids`."""
    alive = processed(stage.small.logits(ids), params, vocab_limit=stage.tokenizer.size)
    assert alive
    left = kept(alive, params)
    weights = np.exp([alive[token] - alive[left[0]] for token in left])
    return dict(zip(left, weights / weights.sum(), strict=True))


def closings(stage: Stage, ids: list[int], params: SamplingParams, path: Path = ()) -> Iterator[tuple[Path, float]]:
    """Every way to write the tag on from `ids`, beginning in the first token, and its probability."""
    for token, chance in distribution(stage, [*ids, *path], params).items():
        longer = (*path, token)
        data, first = stage.bytes_of(longer), len(stage.bytes_of(longer[:1]))
        if token == EOS:
            continue
        if any(data[at:].startswith(CLOSE) for at in range(first)):
            yield longer, chance
        elif any(CLOSE.startswith(data[at:]) for at in range(first)):
            for rest, more in closings(stage, ids, params, longer):
                yield rest, chance * more


def expected(stage: Stage, params: SamplingParams) -> dict[tuple[int, Path], float]:
    """(large tokens kept, closing path) -> probability; an empty path: the large model's EOS ended it."""
    opening, written = [IDS[p] for p in OPENING], [IDS[p] for p in LARGE]
    out: dict[tuple[int, Path], float] = {}
    open_still = 1.0
    for count in range(1, len(LARGE) + 1):
        found = dict(closings(stage, [1, 2, 3, *opening, *written[:count]], params))
        out |= {(count, path): open_still * chance for path, chance in found.items()}
        open_still *= 1 - sum(found.values())
    return out | {(len(LARGE), ()): open_still}


def observed(stage: Stage, outputs: list[RequestOutput], seeds: range) -> Counter[tuple[int, Path]]:
    seen: Counter[tuple[int, Path]] = Counter()
    for output, seed in zip(outputs, seeds, strict=True):
        answer = output.outputs[0]
        lane = stage.recorder.lanes[request_key(seed, 0)].small
        closed = TAGS[1] in answer.raw_text
        count = sum(span.end - span.start for span in answer.spans if span.model == "large") - (not closed)
        assert lane[START : START + count] == [IDS[p] for p in LARGE[:count]]
        assert not closed or lane[-1] == EOS
        seen[count, tuple(lane[START + count : -1]) if closed else ()] += 1
    return seen


def p_value(seen: Counter[Any], wanted: dict[Any, float]) -> float:
    """Chi-square; cells that expect fewer than five are one."""
    total = sum(seen.values())
    assert set(seen) <= set(wanted)
    assert sum(wanted.values()) == pytest.approx(1.0)
    common = [cell for cell in wanted if wanted[cell] * total >= 5]
    counts, chances = [seen[cell] for cell in common], [wanted[cell] for cell in common]
    found = chisquare([*counts, total - sum(counts)], [total * c for c in [*chances, max(1e-9, 1 - sum(chances))]])
    return float(found.pvalue)


def by_prefix(cells: Any) -> Counter[Any]:
    out: Counter[Any] = Counter()
    for (count, path), value in cells.items():
        out[count, bool(path)] += value
    return out


SAMPLING = {"temperature": 0.9, "top_p": 0.9, "top_k": 16, "logit_bias": {IDS["</"]: 0.8, IDS["</big"]: 0.8}}


def check_hazards(number: int) -> None:
    stage = Stage(max_num_seqs=64, read_interval=4)
    seeds = range(number)
    wanted = expected(stage, SamplingParams(**SAMPLING))
    seen = observed(stage, stage.run(seeds, **SAMPLING), seeds)
    assert p_value(by_prefix(seen), dict(by_prefix(wanted))) > 1e-3
    assert p_value(seen, wanted) > 1e-3
    pieces = {PIECES[token] for count, path in seen if path for token in path}
    assert {".</", "<", "</", ">\n", "></", "</b", "</bigmodel>"} <= pieces
    closed = sum(chance for (_, path), chance in wanted.items() if path)
    assert 0.3 < closed < 0.95
    # Power: the distribution before top_p, top_k and bias is told from the right one.
    wrong = expected(stage, SamplingParams(temperature=0.9))
    assert p_value(by_prefix(seen), dict(by_prefix(wrong))) < 1e-6


def test_the_hazard_is_the_small_models_own() -> None:
    check_hazards(3000)


@pytest.mark.slow
def test_the_hazard_is_the_small_models_own_at_length() -> None:
    check_hazards(20_000)


def test_candidates_die() -> None:
    """What the enumeration must leave out happens: draws that enter the tag and do not complete it."""
    stage = Stage()
    params = SamplingParams(**SAMPLING)
    ids = [1, 2, 3, *(IDS[p] for p in [*OPENING, *LARGE[:1]])]
    matching = {path[0] for path, _ in closings(stage, ids, params)}
    entering = sum(chance for token, chance in distribution(stage, ids, params).items() if token in matching)
    assert sum(chance for _, chance in closings(stage, ids, params)) < 0.8 * entering


def test_the_stream_does_not_depend_on_how_often_one_reads() -> None:
    seeds = range(60)
    found = []
    for interval in range(1, 9):
        stage = Stage(read_interval=interval, max_num_seqs=16)
        outputs = stage.run(seeds, **SAMPLING)
        found.append([(o.outputs[0].raw_text, o.outputs[0].token_ids, o.outputs[0].spans) for o in outputs])
    assert all(other == found[0] for other in found)
    assert len({text for text, *_ in found[0]}) > 10


# ---- CONTINUE


def continuation(stage: Stage, ids: list[int], steps: int, params: SamplingParams, key: int) -> list[int] | None:
    """What the small model writes on behind `ids`, up to the end of the closing tag; None: it does not close."""
    written: list[int] = []
    for step in range(steps):
        row = stage.small.logits([*ids, *written])
        token = sample_row(row, params, key, len(ids), CONFIRM, step, vocab_limit=stage.tokenizer.size)
        if token == EOS:
            return None
        written.append(token)
        end = stage.bytes_of(written).find(CLOSE) + len(CLOSE)
        if end >= len(CLOSE):
            before = stage.bytes_of(written[:-1])
            if end < len(stage.bytes_of(written)):
                written[-1:] = stage.tokenizer.encode_bytes(stage.bytes_of(written)[len(before) : end])
            return written
    return None


def brute_force(stage: Stage, policy: ControlTags, interval: int, params: SamplingParams) -> tuple[str, list[int], int]:
    """(raw text, content ids, how many of them are the large model's) of one request under CONTINUE."""
    key = request_key(params.seed or 0, 0)
    lane = [1, 2, 3, *(IDS[p] for p in OPENING)]
    large = [IDS[p] for p in LARGE]
    for start in range(0, len(large), interval):
        matches = []
        for count in range(start + 1, min(start + interval, len(large)) + 1):
            probe = continuation(stage, lane + large[:count], policy.probe_tokens, params, key)
            if probe is not None:
                matches.append((count, probe))
        if matches:
            count, probe = matches[0] if policy.which == "first" else matches[-1]
            data = stage.bytes_of(probe)[: -len(CLOSE)]
            whole: list[int] = []
            while len(stage.bytes_of([*whole, probe[len(whole)]])) <= len(data):
                whole.append(probe[len(whole)])
            pre = data[len(stage.bytes_of(whole)) :]
            own = whole + (stage.tokenizer.encode_bytes(pre) if pre else [])
            lane += large[:count] + probe
            last = sample_row(stage.small.logits(lane), params, key, len(lane), WRITE_SMALL, vocab_limit=len(PIECES))
            assert last == EOS
            text = stage.bytes_of(large[:count]) + data
            return TAGS[0] + text.decode() + TAGS[1], [*large[:count], *own, EOS], count
    return TAGS[0] + stage.bytes_of(large).decode(), [*large, EOS], len(large) + 1


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("probe_tokens", range(1, 9))
def test_continue_equals_a_brute_force_decode(which: str, probe_tokens: int) -> None:
    interval = 1 + probe_tokens % 4 if which == "first" else 3
    stage = Stage(read_interval=interval, max_num_seqs=5, depth=1 + probe_tokens % 2)
    policy = ControlTags(CloseRule.CONTINUE, probe_tokens, which)
    seeds = range(100 * probe_tokens, 100 * probe_tokens + 16)
    closed = 0
    for output, seed in zip(stage.run(seeds, policy, **SAMPLING), seeds, strict=True):
        answer = output.outputs[0]
        wanted = brute_force(stage, policy, interval, SamplingParams(seed=seed, **SAMPLING))
        large = sum(span.end - span.start for span in answer.spans if span.model == "large")
        assert (answer.raw_text, answer.token_ids, large) == wanted
        assert answer.finish_reason == "stop"
        closed += TAGS[1] in answer.raw_text
    assert closed >= (1 if probe_tokens < 3 else 3)


def test_which_match_wins_is_a_parameter() -> None:
    """`first` and `last` part somewhere, and only `last` depends on the length of a block."""
    seeds = range(40)
    texts: dict[tuple[str, int], list[str]] = {}
    for which in ("first", "last"):
        for interval in (1, 3, 6):
            outputs = Stage(read_interval=interval).run(seeds, ControlTags(CloseRule.CONTINUE, 5, which), **SAMPLING)
            texts[which, interval] = [output.outputs[0].raw_text for output in outputs]
    assert texts["first", 1] == texts["first", 3] == texts["first", 6] == texts["last", 1]
    assert texts["last", 6] != texts["last", 1]
    assert texts["last", 6] != texts["last", 3]
