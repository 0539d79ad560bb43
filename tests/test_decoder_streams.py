"""Streams against whole answers, and decoders beside each other, on fuzzed policies, parameters and engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from oracles.scripted import scripted_pair
from oracles.tiny import PIECES
from oracles.worlds import World, make_decoder, make_worlds, random_engine, random_params, random_policy

from splitdecode import CompletionOutput, Delta, HandoffPolicy, SamplingParams, SplitDecoder
from splitdecode.split.engine import Choice

IDS = {piece: i for i, piece in enumerate([*PIECES, "\xc3", "\xa9"])}
Asked = tuple[list[int], SamplingParams, HandoffPolicy]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("pairs"))


def random_request(rng: np.random.Generator, world: World) -> Asked:
    prompt = [int(i) for i in rng.integers(1, 6, size=int(rng.integers(1, 16)))]
    params = replace(
        random_params(rng, world.tokenizers),
        n=int(rng.choice([1, 1, 3])),
        skip_special_tokens=bool(rng.integers(2)),
    )
    return prompt, params, random_policy(rng)


def check_stream(deltas: list[Delta], outputs: list[CompletionOutput], texts: dict[int, int]) -> None:
    """Deltas of each choice join to its text, and their authors are those of its spans."""
    for output in outputs:
        own = [delta for delta in deltas if delta.index == output.index]
        assert "".join(delta.text for delta in own) == output.text
        assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + [output.finish_reason]
        assert all(delta.text for delta in own[:-1])
        assert {delta.model for delta in own[:-1]} <= {span.model for span in output.spans}
        texts[len(own) > 2] = texts.get(len(own) > 2, 0) + 1


def authors(deltas: list[Delta], index: int) -> list[tuple[str, str]]:
    """Text by author, neighbours joined."""
    own = [delta for delta in deltas if delta.index == index and delta.text]
    return [(model, "".join(d.text for d in run)) for model, run in groupby(own, key=lambda delta: delta.model)]


@pytest.mark.parametrize("name", ["plain", "added", "unequal"])
def test_deltas_join_to_the_text(worlds: dict[str, World], name: str) -> None:
    texts: dict[int, int] = {}
    split = 0
    for seed in range(28):
        rng = np.random.default_rng(seed)
        decoder = make_decoder(worlds[name], random_engine(rng))
        prompt, params, policy = random_request(rng, worlds[name])
        outputs = decoder.generate([prompt], params, handoff=policy)[0].outputs
        deltas = list(decoder.stream(prompt, params, handoff=policy))
        check_stream(deltas, outputs, texts)
        for output in outputs:
            if "\N{REPLACEMENT CHARACTER}" not in output.text and not isinstance(output.stop_reason, str):
                assert authors(deltas, output.index) == spans_text(worlds[name], output, params)
                split += len(output.spans) > 1
        assert [runner.cache.pool.in_use for runner in decoder.engine.runners] == [0, 0]
    assert texts[True] > 15
    assert split > 5


def spans_text(world: World, output: CompletionOutput, params: SamplingParams) -> list[tuple[str, str]]:
    """(author, text) of each span; a character belongs to whoever wrote its last byte."""
    ids = output.token_ids[: -1 if output.finish_reason == "stop" else None]
    found, rest = [], b""
    for span in output.spans:
        table = (world.tokenizers.small if span.model == "small" else world.tokenizers.large).token_bytes
        shown = [i for i in ids[span.start : span.end] if i or not params.skip_special_tokens]
        rest += b"".join(table[i] for i in shown)
        whole = rest.decode("utf-8", "ignore")
        rest = rest[len(whole.encode()) :]
        found.append((span.model, whole))
    return [(model, said) for model, said in found if said]


def test_nothing_uncertain_is_streamed() -> None:
    """Half a character, and what may become a stop string, wait for what follows."""
    decoder, models, _ = scripted_pair(PIECES, page_size=2)
    at = len(PIECES)
    models.small.says(3, [IDS["a"], at, at + 1, IDS["b"], IDS["c"], IDS["b"], IDS["c"], IDS["T"], 0])
    params = SamplingParams(temperature=0.0, stop=["bcT", "zz"])
    deltas = [delta.text for delta in decoder.stream([1, 2, 3], params)]
    assert deltas == ["a", "é", "bc", ""]
    (output,) = decoder.generate([1, 2, 3], params)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("aébc", "bcT")
    params = SamplingParams(temperature=0.0, stop=["bcX"])
    assert [delta.text for delta in decoder.stream([1, 2, 3], params)] == ["a", "é", "bc", "bcT", ""]


def test_what_waited_keeps_its_author() -> None:
    """The large model's last token may begin a stop string: it is sent later, and still as the large model's."""
    decoder, models, _ = scripted_pair(PIECES, page_size=2, read_interval=2)
    tag = [IDS[piece] for piece in ("<", "big", "model", ">")]
    close = [IDS[piece] for piece in ("</", "big", "model", ">")]
    models.small.says(3, [*tag, IDS["a"], IDS["a"], *close, IDS["c"], 0])
    models.large.says(3, [IDS["a"], IDS["b"]])
    deltas = list(decoder.stream([1, 2, 3], SamplingParams(temperature=0.0, stop=["bT"])))
    assert [(delta.text, delta.model) for delta in deltas[:-1]] == [("a", "large"), ("b", "large"), ("c", "small")]


def queued(decoder: SplitDecoder, asked: list[Asked]) -> list[Choice]:
    made = [choice for p, s, h in asked for choice in decoder._request(p, None, s, h)]
    for choice in made:
        decoder.engine.add(choice)
    return made


def ticking(decoder: SplitDecoder) -> Iterator[None]:
    while decoder.engine.unfinished:
        decoder.engine.tick()
        yield


def said(choices: list[Choice]) -> list[tuple[str, list[int], Any]]:
    return [(c.output.text, c.output.token_ids, c.output.spans) for c in choices if c.output is not None]


@pytest.mark.parametrize("names", [("plain", "plain"), ("added", "unequal")])
def test_decoders_do_not_touch_each_other(worlds: dict[str, World], names: tuple[str, str]) -> None:
    """Two decoders tick in turn (over one pair of models, or two): each says what it says alone."""
    for seed in range(2):
        rng = np.random.default_rng(seed)
        engines = [random_engine(rng) for _ in names]
        asked = [[random_request(rng, worlds[name]) for _ in range(3)] for name in names]
        alone = []
        for name, engine, requests in zip(names, engines, asked, strict=True):
            decoder = make_decoder(worlds[name], engine)
            choices = queued(decoder, requests)
            list(ticking(decoder))
            alone.append(said(choices))
        decoders = [make_decoder(worlds[name], engine) for name, engine in zip(names, engines, strict=True)]
        both = [queued(decoder, requests) for decoder, requests in zip(decoders, asked, strict=True)]
        while any(decoder.engine.unfinished for decoder in decoders):
            for decoder in decoders:
                if decoder.engine.unfinished:
                    decoder.engine.tick()
        assert [said(choices) for choices in both] == alone
        assert all(alone)


def test_streams_of_one_decoder_run_together(worlds: dict[str, World]) -> None:
    """Streams read in turn give what generate() gives, and share steps."""
    world = worlds["plain"]
    rng = np.random.default_rng(5)
    engine = {"page_size": 4, "max_num_seqs": 8, "max_model_len": 64}
    asked = [random_request(rng, world) for _ in range(5)]
    decoder = make_decoder(world, engine)
    wanted = [[c.text for c in decoder.generate([p], s, handoff=h)[0].outputs] for p, s, h in asked]
    streams = [decoder.stream(p, s, handoff=h) for p, s, h in asked]
    texts = [dict.fromkeys(range(s.n), "") for _, s, _ in asked]
    open_still = list(range(len(streams)))
    while open_still:
        for i in list(open_still):
            delta = next(streams[i], None)
            if delta is None:
                open_still.remove(i)
            else:
                texts[i][delta.index] += delta.text
    assert [list(text.values()) for text in texts] == wanted
