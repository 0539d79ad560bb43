"""The front door on the embedded pair: prompts of all kinds, sampling parameters, seeds, chat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.scripted import Recorder
from transformers import AutoModelForCausalLM

import splitdecode
from splitdecode import CapacityError, LargeOnly, RequestError, SamplingParams, SmallOnly, SplitDecoder
from splitdecode.config import request_key
from splitdecode.families import boxed, problems
from splitdecode.split.roles import Role
from splitdecode.split.tokens import HINT

PAIR = Path(splitdecode.__file__).parent / "data" / "tiny-pair"
TEXT = problems(1, 3)[0].prompt
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def decoder() -> Iterator[SplitDecoder]:
    """float64: a row's logits then do not depend on its neighbours in any bit that matters."""
    with SplitDecoder.demo(dtype="float64", page_size=4) as made:
        yield made


def answers(decoder: SplitDecoder, *args: Any, **kwargs: Any) -> list[Any]:
    return [output.outputs[0] for output in decoder.generate(*args, **kwargs)]


# ---- prompts


def test_prompts_of_all_kinds_are_one_prompt(decoder: SplitDecoder) -> None:
    ids = decoder.tokenizers.small.encode(TEXT)
    kinds: list[Any] = [TEXT, ids, tuple(ids), {"prompt": TEXT}, {"prompt_token_ids": ids}]
    outputs = [decoder.generate(kind, GREEDY) for kind in kinds]
    assert [len(one) for one in outputs] == [1] * len(kinds)
    together = decoder.generate(kinds, GREEDY)
    for output, alone in zip(together, outputs, strict=True):
        assert output.prompt_token_ids == ids
        assert output.outputs == alone[0].outputs == outputs[0][0].outputs
        assert output.finished
    assert [output.prompt for output in together] == [TEXT, None, None, TEXT, None]
    assert len({output.request_id for output in together}) == len(kinds)
    assert len(decoder.generate([TEXT, TEXT], GREEDY)) == 2


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], r"prompts: found \[\], expected a str, a list of token ids"),
        (3, "prompts: found 3"),
        (None, "prompts: found None"),
        ("", "prompt: found no tokens for the small model"),
        ({"text": "a"}, r"prompt: found \{'text': 'a'\}"),
        ({"prompt_token_ids": "ab"}, "prompt: found .*prompt_token_ids"),
        ({"prompt_token_ids": [5, 1.5]}, "token id 1.5"),
        ([[]], "prompt: found no tokens"),
        ([5, "a"], "prompt: found 5"),
        ([5, 364], "token id 364, expected ids from 0 to 363"),
        ([5, -1], "token id -1"),
        ([True, 5], "token id True"),
        ("a\ud800", "expected text that can be written as UTF-8"),
        ({"prompt": "ab", "cache_salt": 3}, "cache_salt: found 3"),
    ],
)
def test_wrong_prompts_are_named(decoder: SplitDecoder, prompts: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        decoder.generate(prompts, GREEDY)
    assert decoder.engine.unfinished == 0
    if not isinstance(prompts, list) or prompts:
        with pytest.raises(RequestError):
            decoder.generate([TEXT, prompts], GREEDY)
    assert decoder.engine.unfinished == 0


def test_numbers_of_prompts_and_parameters_must_agree(decoder: SplitDecoder) -> None:
    with pytest.raises(RequestError, match="large_prompt: found 1 prompts, expected 2"):
        decoder.generate([TEXT, TEXT], GREEDY, large_prompt=[TEXT])
    with pytest.raises(RequestError, match="sampling_params: found 3 for 2 prompts"):
        decoder.generate([TEXT, TEXT], [GREEDY] * 3)
    with pytest.raises(RequestError, match="handoff: found str"):
        decoder.generate(TEXT, GREEDY, handoff="tags")  # type: ignore[arg-type]


def test_the_large_prompt_is_what_the_large_model_sees(decoder: SplitDecoder) -> None:
    other = problems(2, 8)[1].prompt
    same, asked, plain = answers(
        decoder, [TEXT, TEXT, other], GREEDY, handoff=LargeOnly(), large_prompt=[TEXT, other, other]
    )
    assert asked == plain
    assert asked.text != same.text
    ids = decoder.tokenizers.large.encode(other)
    assert answers(decoder, TEXT, GREEDY, handoff=LargeOnly(), large_prompt=ids) == [asked]


def test_prompts_too_long_are_refused_with_sizes(decoder: SplitDecoder) -> None:
    with pytest.raises(RequestError, match="found 512 tokens for the small model, expected fewer than 512"):
        decoder.generate([[5] * 512], GREEDY)
    with pytest.raises(RequestError, match="found 600 tokens for the large model, expected fewer than 512"):
        decoder.generate(TEXT, GREEDY, handoff=LargeOnly(), large_prompt=[5] * 600)
    (found,) = answers(decoder, [[5] * 511], SamplingParams(temperature=0.0, ignore_eos=True))
    assert (len(found.token_ids), found.finish_reason) == (1, "length")
    (found,) = answers(decoder, TEXT, GREEDY, large_prompt=[5] * 600)  # openings are refused, nothing else
    assert {span.model for span in found.spans} == {"small"}


def test_the_engine_is_checked_at_construction() -> None:
    with pytest.raises(CapacityError, match=r"found 100 bytes, expected at least \d+ .*16 tokens"):
        SplitDecoder.demo(kv_cache_memory=100)
    with pytest.raises(RequestError, match="pages: unknown argument, expected one of page_size, kv_cache_memory"):
        SplitDecoder.demo(pages=3)
    with pytest.raises(RequestError, match="page_size: found 3, expected a power of two"):
        SplitDecoder.demo(page_size=3)
    with pytest.raises(RequestError, match="dtype: found 'float8'"):
        SplitDecoder.demo(dtype="float8")


# ---- sampling parameters


def test_ten_problems_are_solved() -> None:
    with SplitDecoder.demo() as decoder:
        tasks = problems(10, 123)
        outputs = decoder.generate([task.prompt for task in tasks], SamplingParams(temperature=0.0, max_tokens=400))
    assert [boxed(output.outputs[0].text) for output in outputs] == [task.answer for task in tasks]
    assert all(output.metrics.handoffs and 0 < output.metrics.offload_fraction < 0.2 for output in outputs)
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}


def test_choices_share_their_prefix_and_differ(decoder: SplitDecoder) -> None:
    decoder.engine.runners[Role.SMALL].cache.pool.clear_cache()
    params = SamplingParams(temperature=6.0, n=4, seed=3, max_tokens=30)
    (output,) = decoder.generate(problems(5, 5)[4].prompt, params)
    assert [choice.index for choice in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 4
    shared = (len(output.prompt_token_ids) - 1) // 4 * 4
    assert output.metrics.small.cached_tokens == 3 * shared > 0
    one = SamplingParams(temperature=6.0, seed=3, max_tokens=30)
    assert answers(decoder, problems(5, 5)[4].prompt, one) == [output.outputs[0]]


def test_seeds_are_reproducible_beside_any_neighbours(decoder: SplitDecoder) -> None:
    prompts = [task.prompt for task in problems(6, 4)]
    params = [SamplingParams(temperature=5.0 + i, top_p=0.99, seed=i, max_tokens=40, n=1 + i % 2) for i in range(6)]
    alone = [decoder.generate(p, s)[0].outputs for p, s in zip(prompts, params, strict=True)]
    order = [3, 1, 5, 0, 4, 2]
    mixed = decoder.generate([prompts[i] for i in order], [params[i] for i in order])
    assert [output.outputs for output in mixed] == [alone[i] for i in order]
    other = decoder.generate(prompts[2], SamplingParams(temperature=7.0, top_p=0.99, seed=99, max_tokens=40))
    assert other[0].outputs[0].token_ids != alone[2][0].token_ids


def test_requests_without_a_seed_draw_theirs_from_the_engine() -> None:
    def found(seed: int) -> list[list[int]]:
        with SplitDecoder.demo(dtype="float64", seed=seed) as decoder:
            return [a.token_ids for a in answers(decoder, [TEXT] * 3, SamplingParams(temperature=6.0, max_tokens=20))]

    assert found(1) == found(1) != found(2)
    assert len({tuple(ids) for ids in found(1)}) == 3


def test_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    with SplitDecoder.demo(dtype="float64") as decoder:
        assert decoder.default_sampling_params.temperature == 0.0
        (greedy,) = decoder.generate(TEXT)
        assert greedy.outputs == decoder.generate(TEXT, SamplingParams(temperature=0.0))[0].outputs
    small = copied(tmp_path, "small")
    config = {"eos_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01}
    (small / "generation_config.json").write_text(json.dumps(config))
    with SplitDecoder.from_pretrained(small, PAIR / "large", kv_cache_memory="16MiB") as decoder:
        assert decoder.default_sampling_params == SamplingParams(temperature=0.6, top_p=0.95, top_k=20, min_p=0.01)


@pytest.mark.parametrize("asked", [0, 3])
def test_logprobs_are_the_models_own(decoder: SplitDecoder, asked: int) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=20, logprobs=asked, logit_bias={10: 3.0})
    (output,) = decoder.generate(TEXT, params, handoff=SmallOnly())
    answer, limit = output.outputs[0], decoder.vocab_limits[Role.SMALL]
    hf = AutoModelForCausalLM.from_pretrained(PAIR / "small", dtype=torch.float64)
    ids = output.prompt_token_ids + answer.token_ids
    with torch.inference_mode():
        rows = hf(torch.tensor([ids])).logits[0, len(output.prompt_token_ids) - 1 : -1, :limit].log_softmax(-1)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids) > 10
    for found, token, row in zip(answer.logprobs, answer.token_ids, rows, strict=True):
        assert found is not None
        best = row.topk(asked).indices.tolist()
        assert set(found) == {token, *best}
        np.testing.assert_allclose([found[i] for i in found], [row[i] for i in found], atol=1e-5)
    total = sum(row[token].item() for row, token in zip(rows, answer.token_ids, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total, abs=1e-4)
    assert answers(decoder, TEXT, GREEDY)[0].logprobs is None


def test_stop_strings_end_the_text(decoder: SplitDecoder) -> None:
    (plain,) = answers(decoder, TEXT, SamplingParams(temperature=0.0))
    assert plain.finish_reason == "stop"
    assert plain.stop_reason is None
    cut = plain.text.index("carry 1") + len("carry 1")
    (found,) = answers(decoder, TEXT, SamplingParams(temperature=0.0, stop=["zzz", "rry 1"]))
    assert (found.text, found.finish_reason, found.stop_reason) == (plain.text[: cut - 5], "stop", "rry 1")
    (found,) = answers(decoder, TEXT, SamplingParams(temperature=0.0, stop="rry 1", include_stop_str_in_output=True))
    assert found.text == plain.text[:cut]
    digit = plain.token_ids[12]
    (found,) = answers(decoder, TEXT, SamplingParams(temperature=0.0, stop_token_ids=[digit]))
    assert found.token_ids == plain.token_ids[: plain.token_ids.index(digit) + 1]
    assert found.stop_reason == digit


def test_progress_is_shown_on_request(decoder: SplitDecoder, capsys: pytest.CaptureFixture[str]) -> None:
    decoder.generate([TEXT] * 3, GREEDY, use_tqdm=True)
    assert "3/3" in capsys.readouterr().err
    decoder.generate(TEXT, GREEDY)
    assert capsys.readouterr().err == ""


# ---- chat


def copied(folder: Path, name: str, template: str | None = None) -> Path:
    target = folder / name
    shutil.copytree(PAIR / name, target)
    file = target / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if template is not None:
        config |= {"chat_template": template, "bos_token": "<|endoftext|>", "add_bos_token": True}
    file.write_text(json.dumps(config))
    return target


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<think>\n{% endif %}"


def test_chat_hints_in_the_small_lane_alone(tmp_path: Path) -> None:
    pair = [copied(tmp_path, name, TEMPLATE) for name in ("small", "large")]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    messages.append({"role": "user", "content": TEXT.strip()})
    with SplitDecoder.from_pretrained(*pair, kv_cache_memory="16MiB") as decoder:
        recorder = Recorder(decoder)
        (output,) = decoder.chat(messages, SamplingParams(temperature=0.0, max_tokens=3, seed=4))
        lanes = recorder.lanes[request_key(4, 0)]
        small, large = (decoder.tokenizers[r].decode(lanes[r]) for r in Role)
        (bare,) = decoder.chat(messages, SamplingParams(temperature=0.0, max_tokens=3), hint=False)
        prompts = decoder.chat_prompts(messages, add_generation_prompt=False)
    said = f"<|endoftext|>user: x\nassistant: y\nuser: {TEXT.strip()}"
    assert small.startswith(f"{said}\n{HINT}\n<think>\n")
    assert large == f"{said}\n<think>\n"
    assert lanes.small.count(0) == lanes.large.count(0) == 1
    assert output.prompt_token_ids == lanes.small[: len(output.prompt_token_ids)]
    assert decoder.tokenizers.small.decode(bare.prompt_token_ids) == large
    assert prompts.large == f"{said}\n"
    assert messages[2]["content"] == TEXT.strip()  # the caller's messages are left alone


def test_chat_without_templates(decoder: SplitDecoder) -> None:
    with pytest.raises(RequestError, match="no chat template; use generate"):
        decoder.chat([{"role": "user", "content": "x"}])
    bare = SplitDecoder(decoder.models, decoder.tokenizers, eos_ids=decoder.models.map(lambda _: (0,)))
    with pytest.raises(RequestError, match="built without any"):
        bare.chat([{"role": "user", "content": "x"}])
