"""Every bound of config.py, and the host's random numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.sampling import philox

from splitdecode.config import EngineConfig, SamplingParams, Stream, parse_bytes, philox_uniform, request_key
from splitdecode.errors import RequestError

GOOD: dict[str, list[Any]] = {
    "n": [1, 128],
    "temperature": [0, 0.0, 0.6, 1, 100.0],
    "top_p": [1e-6, 0.95, 1, 1.0],
    "top_k": [-1, 0, 1, 10**6],
    "min_p": [0, 0.5, 1.0],
    "presence_penalty": [-2, 0.5, 2],
    "frequency_penalty": [-2, 0.5, 2],
    "repetition_penalty": [0.5, 1, 1.3, 10],
    "max_tokens": [None, 1, 2**31 - 1],
    "min_tokens": [0, 7],
    "stop": [None, "a", ["a", "b"], ("é",), []],
    "stop_token_ids": [None, [], [0, 5], (7,)],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True],
    "rollout": [True],
    "seed": [None, 0, -5, 2**64 - 1],
    "logprobs": [None, 0, 20],
    "logit_bias": [None, {}, {3: -100, 4: 100.0}],
    "skip_special_tokens": [False],
    "max_large_tokens": [None, 0, 1, 2**31 - 1],
    "max_offloads": [None, 0, 2**31 - 1],
    "max_offload_fraction": [None, 0, 0.0, 0.02, 1, 1.0],
    "deadline_ms": [None, 0, 0.5, 250, 1e12],
}
BUDGETS = {"max_large_tokens", "max_offloads", "max_offload_fraction", "deadline_ms"}
BAD: dict[str, list[Any]] = {
    "n": [0, -1, 129, True, 1.0, "1", None],
    "temperature": [-0.1, math.nan, math.inf, True, "1", None, 10**400],
    "top_p": [0, 0.0, -0.5, 1.01, math.nan, True, "1", None],
    "top_k": [-2, 1.0, True, None, 2**31],
    "min_p": [-0.1, 1.1, math.nan, False, None],
    "presence_penalty": [-2.1, 2.1, math.nan, None],
    "frequency_penalty": [-2.1, 2.1, math.inf, "0"],
    "repetition_penalty": [0, -1, 10.5, math.nan, None],
    "max_tokens": [0, -1, 1.5, True, 2**31, "9"],
    "min_tokens": [-1, 1.0, True, None],
    "stop": ["", [""], ["a", ""], [1], 7, ["x"] * 17, {"a": 1}, "\ud800", b"a"],
    "stop_token_ids": [[-1], [1.0], [True], 5, "5", ["5"], [2**31]],
    "include_stop_str_in_output": [1, None, "yes"],
    "ignore_eos": [0],
    "rollout": [0, None],
    "seed": [1.0, True, "1", 2**64, -(2**63) - 1],
    "logprobs": [-1, 21, True, 1.0],
    "logit_bias": [{-1: 0}, {"1": 0}, {1: 101}, {1: -100.5}, {1: math.nan}, {1: True}, [1], {True: 1}],
    "skip_special_tokens": [1],
    "max_large_tokens": [-1, 1.0, True, "9", 2**31],
    "max_offloads": [-1, 0.5, False, "all", 2**31],
    "max_offload_fraction": [-0.01, 1.01, 2, math.nan, True, "5%"],
    "deadline_ms": [-1, math.nan, math.inf, True, "1s", 10**400],
}


def test_every_parameter_has_cases() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == set(GOOD) == set(BAD)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_in_bounds(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_out_of_bounds(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name}.*: found .*, expected ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 300


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
anything = scalars | st.lists(scalars, max_size=3) | st.dictionaries(scalars, scalars, max_size=2)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(GOOD)), value=anything)
def test_anything_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    refusal = None
    try:
        params = SamplingParams(**{name: value})
    except RequestError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith(name)
        return
    assert dataclasses.replace(params) == params
    assert params.temperature >= 0
    assert 0 < params.top_p <= 1
    assert all(token >= 0 for token in params.stop_ids)


def test_normal_forms() -> None:
    params = SamplingParams(stop=["b", "a", "b"], stop_token_ids=[5, 5, 1], logit_bias={1: 2})
    assert params.stop_strings == ("b", "a")
    assert params.stop_ids == (5, 1)
    assert params.logit_bias == {1: 2.0}
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams().stop_strings == SamplingParams().stop_ids == ()
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams().greedy
    assert not SamplingParams().penalised
    assert SamplingParams(presence_penalty=0.1).penalised
    assert hash(params) == hash(dataclasses.replace(params))


def test_min_tokens_at_most_max_tokens() -> None:
    SamplingParams(min_tokens=5, max_tokens=5)
    with pytest.raises(RequestError, match="min_tokens: found 6, expected at most max_tokens"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_params_do_not_change_under_the_caller() -> None:
    bias, stop = {1: 1.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[2] = 5.0
    stop.append("b")
    assert params.logit_bias == {1: 1.0}
    assert params.stop_strings == ("a",)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("4096", 4096),
        ("256MiB", 2**28),
        ("1GiB", 2**30),
        (" 1.5 GiB ", 3 * 2**29),
        ("64kB", 64000),
        ("64KB", 64000),
        ("1TB", 10**12),
        ("2 M", 2_000_000),
        ("9B", 9),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "0", 0, -5, True, 1.5, None, "1PiB", "1e9", "1 0", "٣", "9" * 30])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(RequestError, match=r"^room: found"):
        parse_bytes(text, "room")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_size", 0),
        ("page_size", 12),
        ("page_size", True),
        ("kv_cache_memory", "lots"),
        ("kv_cache_memory", 0),
        ("max_num_batched_tokens", 0),
        ("max_num_seqs", 0),
        ("max_model_len", 0),
        ("enable_prefix_caching", 1),
        ("depth", 0),
        ("read_interval", 0),
        ("max_span", 0),
        ("seed", 1.5),
        *((name, value) for name in sorted(BUDGETS) for value in BAD[name]),
    ],
)
def test_engine_bounds(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_an_engine_takes_the_budgets_of_a_request(name: str) -> None:
    for value in GOOD[name]:
        assert getattr(EngineConfig(**{name: value}), name) == value


def test_engine_defaults() -> None:
    config = EngineConfig(kv_cache_memory="1GiB")
    assert config.kv_cache_bytes == 2**30
    assert (config.page_size, config.max_num_batched_tokens, config.max_num_seqs) == (16, 512, 64)


def test_streams_share_no_counter() -> None:
    words = {stream.word(step) for stream in Stream for step in (0, 1, 2**24 - 1)}
    assert len(words) == 3 * len(Stream)
    assert max(words) < 2**32
    with pytest.raises(ValueError, match="step"):
        Stream.CLOSE.word(2**24)


def test_request_keys() -> None:
    keys = {request_key(seed, choice) for seed in (0, 1, -1, 2**64 - 1) for choice in range(16)}
    assert len(keys) == 64
    assert all(0 <= key < 2**64 for key in keys)
    assert request_key(0, 0) == 0xEC0BCAA0E9F5B1FC  # changing it changes every seeded text


@given(st.integers(0, 2**64 - 1), st.tuples(*[st.integers(0, 2**32 - 1)] * 4))
def test_philox_uniform(key: int, counter: tuple[int, int, int, int]) -> None:
    uniform = philox_uniform(key, counter)
    assert 0 < uniform < 1
    assert uniform == (philox(counter, (key & 0xFFFFFFFF, key >> 32))[0] + 0.5) / 2**32
