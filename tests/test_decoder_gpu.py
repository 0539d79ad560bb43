"""The whole decoder on a GPU: captured against eager against the CPU; run by `pytest -m gpu`.

Captured and eager steps run the same kernels on the same shapes (one sequence at a time), so their tokens are equal.
Against the CPU, streams may part where the two likeliest ids are closer than float32 resolves, and nowhere else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitdecode import SamplingParams, SplitDecoder
from splitdecode.families import problems
from splitdecode.split.outputs import RequestOutput
from splitdecode.split.roles import Role

pytestmark = pytest.mark.gpu
MARGIN = 2e-3  # difference of log-probs below which float32 sums in another order may choose differently


@pytest.fixture(autouse=True)
def needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def run(count: int = 8, temperature: float = 0.0, **options: Any) -> list[RequestOutput]:
    """Answers of the embedded pair to its first problems."""
    params = SamplingParams(temperature=temperature, max_tokens=96, seed=5, logprobs=options.pop("logprobs", None))
    with SplitDecoder.demo(**options) as decoder:
        outputs = decoder.generate([task.prompt for task in problems(count, 3)], params)
        assert [runner.cache.pool.in_use for runner in decoder.engine.runners] == [0, 0]
    return outputs


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_streams_part_from_the_cpu_only_where_two_ids_are_close() -> None:
    truth, found = run(logprobs=2), run(device="cuda")
    assert any(output.metrics.handoffs for output in found)
    for mine, theirs in zip(found, truth, strict=True):
        a, b = mine.outputs[0].token_ids, theirs.outputs[0].token_ids
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            assert a == b
            continue
        chances = theirs.outputs[0].logprobs
        assert chances is not None
        ranked = sorted((chances[at] or {}).values(), reverse=True)
        assert len(ranked) > 1, "a stream parted at a token without log-probs"
        assert ranked[0] - ranked[1] < MARGIN, (at, a[at], b[at], ranked)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "options",
    [
        {"depth": 3},
        {"steps_per_graph": 4},
        {"programmatic_launch": True},
        {"programmatic_launch": True, "steps_per_graph": 3, "depth": 3},
        {"page_size": 64},
        {"l2_prefetch": True},
    ],
    ids=str,
)
def test_captured_steps_write_what_eager_ones_write(temperature: float, options: dict[str, Any]) -> None:
    same = {"max_num_seqs": 1, "page_size": options.get("page_size", 16), "temperature": temperature}
    eager = run(device="cuda", enforce_eager=True, depth=1, **same)
    assert ids(run(device="cuda", **(same | options))) == ids(eager)


def test_half_precision_answers_too() -> None:
    for dtype in ("bfloat16", "float16"):
        outputs = run(2, device="cuda", dtype=dtype)
        assert all(output.outputs[0].finish_reason in ("stop", "length") for output in outputs)


def test_a_row_that_is_not_a_number_ends_its_request() -> None:
    with SplitDecoder.demo(device="cuda") as decoder:
        norm = decoder.models[Role.SMALL].weights.norm
        assert norm is not None
        norm.fill_(float("nan"))
        (output,) = decoder.generate([problems(1, 3)[0].prompt], SamplingParams(max_tokens=8))
        assert output.outputs[0].finish_reason == "error"
        assert [runner.cache.pool.in_use for runner in decoder.engine.runners] == [0, 0]


def test_every_way_of_sampling_runs_in_graphs() -> None:
    ways = [
        SamplingParams(temperature=0.7, top_p=0.9, top_k=20, max_tokens=24, seed=1),
        SamplingParams(temperature=1.0, min_p=0.05, repetition_penalty=1.2, max_tokens=24, seed=2),
        SamplingParams(temperature=0.0, logprobs=3, min_tokens=4, max_tokens=24),
        SamplingParams(temperature=0.9, logit_bias={5: 3.0}, stop=["="], max_tokens=24, seed=4),
    ]
    prompts = [task.prompt for task in problems(len(ways), 9)]
    one: dict[str, Any] = {"device": "cuda", "max_num_seqs": 1}
    with SplitDecoder.demo(**one) as captured, SplitDecoder.demo(**one, enforce_eager=True) as eager:
        found, wanted = captured.generate(prompts, ways), eager.generate(prompts, ways)
    assert ids(found) == ids(wanted)
    assert found[2].outputs[0].logprobs is not None
