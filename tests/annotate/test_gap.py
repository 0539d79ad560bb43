"""The model gap: where the small model loses most against the large one, in characters of the trace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitdecode import SplitDecoder
from splitdecode.annotate import report
from splitdecode.annotate.gap import GapAnnotator, GapRecipe, byte_edges, moving_average, regathered, token_ranges
from splitdecode.annotate.records import Annotation, Failure, Tagged
from splitdecode.annotate.rules import RuleAnnotator
from splitdecode.annotate.spans import covered
from splitdecode.annotate.traces import Trace, family_traces
from splitdecode.errors import RequestError
from splitdecode.split.roles import Pair, Role

TRACES = list(family_traces("two-products", 40, 2))
NAMES = Pair("a", "b")


@pytest.fixture(scope="module")
def decoder() -> Iterator[SplitDecoder]:
    with SplitDecoder.demo(small="small-base") as made:
        yield made


def by_id(annotations: object) -> dict[str, Tagged]:
    return {a.trace.id: Tagged(a.trace.id, a.trace.text, a.spans, {}) for a in annotations}  # type: ignore[attr-defined]


def test_it_finds_the_products(decoder: SplitDecoder) -> None:
    """The hard parts of these traces are known: with a window of their width it finds them without being told."""
    recipe = GapRecipe(share=0.05, window=5, merge=1)
    mine = by_id(GapAnnotator(decoder, NAMES, recipe, batch=7).annotate(TRACES))
    assert list(mine) == [trace.id for trace in TRACES]
    found = report.agreement(mine.values(), by_id(RuleAnnotator().annotate(TRACES)))
    assert found["f1"] > 0.85
    assert found["their_spans_met"] > 0.95
    assert found["f1_by_chance"] < 0.05


def test_it_reports_what_it_chose(decoder: SplitDecoder) -> None:
    (found,) = GapAnnotator(decoder, NAMES, GapRecipe(share=0.1)).annotate(TRACES[:1])
    ids = decoder.tokenizers[Role.SMALL].encode_inserted(TRACES[0].text)
    assert found.details["tokens"] == len(ids)
    assert found.details["chosen"] == -(-len(ids) // 10)
    assert found.details["loss"]["small"] > found.details["loss"]["large"] > 0
    assert found.details["gap_inside"] > 0.01 > found.details["gap_outside"]
    assert 0 < covered(found.spans) / len(TRACES[0].text) < 0.15


def test_gaps_are_losses_of_the_two_models(decoder: SplitDecoder) -> None:
    trace = TRACES[0]
    tokenizer = decoder.tokenizers[Role.SMALL]
    prompt, body = tokenizer.encode(trace.prompt), tokenizer.encode_inserted(trace.text)
    losses = [-decoder.score([prompt + body], role)[0][len(prompt) :] for role in Role]
    best = int(np.argmax(losses[0] - losses[1]))
    (found,) = GapAnnotator(decoder, NAMES, GapRecipe(share=1e-9, window=1)).annotate([trace])
    edges = byte_edges(tokenizer, body)
    assert found.spans == [(edges[best], edges[best + 1])]  # this text is ASCII


def test_a_least_gap_leaves_traces_without_spans(decoder: SplitDecoder) -> None:
    (found,) = GapAnnotator(decoder, NAMES, GapRecipe(min_gap=1e9)).annotate(TRACES[:1])
    assert found.spans == []
    assert found.details["chosen"] == 0


def test_unequal_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large model's tokenizer spells two words by letters: its losses are gathered by the small one's tokens."""
    pair = Path(str(files("splitdecode"))) / "data" / "tiny-pair"
    with SplitDecoder.from_pretrained(
        pair / "small-base", pair / "large", kv_cache_memory="64MiB", dtype="float32"
    ) as d:
        other = d.tokenizers[Role.LARGE]
        spell = other.encode_inserted
        words = [i for i, data in enumerate(other.token_bytes) if data in (b"tens ", b" carry ")]
        monkeypatch.setattr(other, "encode_inserted", lambda text: spell(text, avoid=words))
        mine = by_id(GapAnnotator(d, NAMES, GapRecipe(share=0.05, window=5, merge=1)).annotate(TRACES))
    assert report.agreement(mine.values(), by_id(RuleAnnotator().annotate(TRACES)))["f1"] > 0.8


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 4)), min_size=1, max_size=20), st.data())
def test_regathering_keeps_the_sum(tokens: list[tuple[float, int]], data: st.DataObject) -> None:
    losses = np.array([loss for loss, _ in tokens])
    edges = np.cumsum([0, *(size for _, size in tokens)])
    if not edges[-1]:
        return
    inner = data.draw(st.lists(st.integers(0, int(edges[-1])), max_size=9))
    units = np.array([0, *sorted(inner), edges[-1]])
    first = next(i for i, (_, size) in enumerate(tokens) if size)  # what no byte carries has nowhere to go before it
    if not np.array_equal(edges, units):  # else each token keeps its own
        assert regathered(losses, edges, units).sum() == pytest.approx(losses[first:].sum())
    assert regathered(losses, edges, edges) is losses


def test_regathering_by_hand() -> None:
    losses = np.array([4.0, 1.0, 3.0])
    assert regathered(losses, np.array([0, 4, 5, 8]), np.array([0, 2, 5, 6, 8])).tolist() == [2.0, 3.0, 1.0, 2.0]
    assert regathered(losses, np.array([0, 4, 4, 8]), np.array([0, 4, 6, 8])).tolist() == [5.0, 1.5, 1.5]


def test_moving_average_by_hand() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert moving_average(values, 1).tolist() == [1, 2, 6, 3]
    assert moving_average(values, 3).tolist() == [1.5, 3, 11 / 3, 4.5]
    assert moving_average(values, 99) == pytest.approx(3.0)


def test_token_ranges_are_whole_characters() -> None:
    text = "aé\U0001f600b"  # 1 + 2 + 4 + 1 bytes
    edges = np.array([0, 1, 2, 5, 8])
    assert token_ranges(text, edges, range(4)) == [(0, 1), (1, 2), (1, 3), (2, 4)]


@pytest.mark.parametrize("options", [{"share": 0}, {"window": 4}, {"window": 0}, {"merge": -1}, {"min_length": 0}])
def test_recipes_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="found"):
        GapRecipe(**options)


def test_traces_are_refused_by_name(decoder: SplitDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    words = decoder.tokenizers[Role.LARGE]
    spell = words.encode_inserted
    snow = [i for i, data in enumerate(words.token_bytes) if data == "\N{SNOWMAN}".encode()[:1]]
    monkeypatch.setattr(words, "encode_inserted", lambda text: spell(text, avoid=snow))  # it cannot spell one trace
    annotator = GapAnnotator(decoder, NAMES)
    bad = [Trace("long", "p\n", "1" * 100_000), Trace("odd", "p\n", "\N{SNOWMAN}")]
    found = {one.trace.id: one for one in annotator.annotate([bad[0], TRACES[0], bad[1], TRACES[1]])}
    long, odd = found["long"], found["odd"]
    assert isinstance(long, Failure)
    assert long.left_out
    assert re.match(r"found 10000\d tokens with its prompt, expected at most \d+, the positions of", long.reason)
    assert isinstance(odd, Failure)
    assert odd.left_out
    assert all(isinstance(found[trace.id], Annotation) for trace in TRACES[:2])
    assert all(isinstance(one, Failure) for one in annotator.annotate(bad))  # a batch of nothing else
    with pytest.raises(RequestError, match="no chat template"):
        list(GapAnnotator(decoder, NAMES, chat=True).annotate(TRACES[:1]))
