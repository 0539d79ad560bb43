"""F6: SplitDecoder, the front door: builds the Pair, takes prompts, gives answers and who wrote them.

decoder = SplitDecoder.from_pretrained(small, large)      or SplitDecoder.demo()
decoder.generate(["..."], SamplingParams(temperature=0.0))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from splitdecode.config import EngineConfig, SamplingParams
from splitdecode.errors import RequestError
from splitdecode.models import Transformer, load_model, open_checkpoint
from splitdecode.models.chat import ChatTemplate
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.requests import Requests, closing, default_params, gathered
from splitdecode.runtime.device import DeviceRunner
from splitdecode.runtime.kvcache import make_memory
from splitdecode.runtime.runners import make_runner
from splitdecode.runtime.scoring import Scores, token_logprobs
from splitdecode.split.actions import ControlAction, check_actions
from splitdecode.split.engine import Choice, Engine
from splitdecode.split.health import Health
from splitdecode.split.outputs import Delta, RequestOutput
from splitdecode.split.policies import HandoffPolicy
from splitdecode.split.prompts import Prompt, as_prompts, with_hint
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG, PairTokens

Dtype = str | torch.dtype
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SplitDecoder:
    """One reasoning stream, two models: the small one writes, and hands the pen over where it says so.

    Not thread-safe: one thread drives one decoder (AsyncSplitDecoder is the one for many tasks). Any number of decoders
    live in one process.
    """

    def __init__(
        self,
        models: Pair[Transformer],
        tokenizers: Pair[Tokenizer],
        *,
        eos_ids: Pair[tuple[int, ...]],
        templates: Pair[ChatTemplate] | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        config: EngineConfig | None = None,
        tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG),
        actions: Mapping[str, ControlAction] | None = None,
    ) -> None:
        """models: loaded and ready; eos_ids: ids that end an answer, per model; templates: for chat(); actions: what
        further tags of the small model mean (split/actions.py).

        Raises CapacityError when kv_cache_memory holds no page of both caches, CheckpointError when a tokenizer is
        larger than its model's vocabulary.
        """
        self.config = config = (config or EngineConfig()).on(models[Role.SMALL].device.type)
        self.models, self.tokenizers, self.templates = models, tokenizers, templates
        self._defaults = dict(sampling_defaults or {})
        check_actions(actions or {}, tags)
        self.tokens = PairTokens(tokenizers, tags, actions or ())
        self.vocab_limits = Pair.of(lambda r: min(models[r].config.vocab_size, tokenizers[r].size))
        if self.tokens.same:  # an id only one of them knows cannot be handed over
            self.vocab_limits = Pair(*[min(self.vocab_limits)] * 2)
        drawable = Pair.of(lambda r: self.tokens.drawable(r, self.vocab_limits[r]))
        self.vocab_limits = drawable.map(lambda found: found[0])
        longest = models.map(lambda m: min(m.config.max_positions, config.max_model_len or m.config.max_positions))
        self.memory = memory = make_memory(list(models), config, list(longest))
        self.max_len = longest.map(lambda most: min(most, memory.max_len))
        runners = Pair.of(
            lambda r: make_runner(
                models[r],
                memory.caches[r],
                config,
                self.max_len[r],
                self.vocab_limits[r],
                banned_ids=drawable[r][1],
                entering_ids=self.tokens.entering(r, self.tokens.tags[0]) if r is Role.SMALL else (),
                eos_ids=eos_ids[r],
            )
        )
        self.engine = Engine(
            runners, self.tokens, config, eos_ids.map(list), self.max_len, memory.arena, actions=actions
        )
        self._warm_up()
        self._requests: dict[str, list[Choice]] = {}
        self.requests = Requests(self.tokens, self.vocab_limits, self.max_len, config.seed)
        self._numbers = count()
        self._shut = ""  # why nothing more is taken

    # ---- construction

    @classmethod
    def from_pretrained(
        cls,
        small: str | Path,
        large: str | Path,
        *,
        device: str = "cpu",
        dtype: Dtype | tuple[Dtype, Dtype] = "auto",
        revisions: Sequence[str | None] = (None, None),
        tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG),
        actions: Mapping[str, ControlAction] | None = None,
        **engine: Any,
    ) -> SplitDecoder:
        """Loads both checkpoints: local directories in Hugging Face layout, or hub ids (pinned by `revisions`).

        dtype: "auto" (the file's), a torch dtype or its name, or one for each; device: where both models run;
        revisions: hub revisions of the small and the large model; tags, actions: as above. Further arguments are
        EngineConfig's: page_size, kv_cache_memory, max_num_batched_tokens, max_num_seqs, max_model_len, ...
        Raises CheckpointError naming file and field, CapacityError with sizes, RequestError for a wrong argument.
        """
        dtypes = dtype if isinstance(dtype, tuple) else (dtype, dtype)
        for name, given in (("dtype", dtypes), ("revisions", revisions)):
            if len(given) != 2:
                raise RequestError(f"{name}: found {len(given)}, expected one for each of the two models")
        wanted = Pair(*map(_dtype, dtypes))
        config = engine_config(engine)
        _check_device(device)
        paths, pins = Pair(small, large), Pair(*revisions)
        points = Pair.of(lambda r: open_checkpoint(paths[r], revision=pins[r]))
        tokenizers = points.map(lambda p: Tokenizer.from_directory(p.directory))
        for role in Role:
            tokenizers[role].check_against_vocab(points[role].config.vocab_size, points[role].directory)
        models = Pair.of(lambda r: load_model(points[r], dtype=wanted[r], device=device))
        eos = Pair.of(lambda r: points[r].eos_ids or tuple(i for i in [tokenizers[r].eos_id] if i is not None))
        return cls(
            models,
            tokenizers,
            eos_ids=eos,
            templates=points.map(lambda p: ChatTemplate.from_directory(p.directory)),
            sampling_defaults=points[Role.SMALL].sampling,
            config=config,
            tags=tags,
            actions=actions,
        )

    @classmethod
    def demo(cls, *, small: str = "small", **options: Any) -> SplitDecoder:
        """The embedded pair: two models trained on step-by-step arithmetic, 98 k and 835 k parameters.

        small: "small" (writes the tags) or "small-base" (before it was taught to). Options as in from_pretrained().
        """
        pair = Path(str(files("splitdecode"))) / "data" / "tiny-pair"
        options.setdefault("dtype", "float32")
        options.setdefault("kv_cache_memory", "64MiB")
        return cls.from_pretrained(pair / small, pair / "large", **options)

    def _warm_up(self) -> None:
        """Compiles kernels and captures steps where models run by captured steps, with a progress bar."""
        for role in Role:
            runner = self.engine.runners[role]
            if isinstance(runner, DeviceRunner) and runner.captures:
                runner.warm_up(partial(_progress, unit="graph", desc=f"capturing steps of the {role} model"))

    # ---- answers

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        handoff: HandoffPolicy | list[HandoffPolicy] | None = None,
        large_prompt: Prompt | Sequence[Prompt] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answers every prompt; results in the order of the prompts.

        prompts: a str, a list of token ids, {"prompt": str}, {"prompt_token_ids": ids}, or a list of these. Both models
        see the same text, unless large_prompt says what the large one sees. A mapping may carry "cache_salt": requests
        share cached prefixes only under equal salts. sampling_params: one for all or one each;
        None: the small checkpoint's generation_config. handoff: one for all or a list; ControlTags() by default.
        Raises RequestError before anything runs when a prompt or parameter cannot be served.
        """
        wanted = as_prompts(prompts)
        others: Sequence[Prompt | None] = [None] * len(wanted) if large_prompt is None else as_prompts(large_prompt)
        if len(others) != len(wanted):
            raise RequestError(f"large_prompt: found {len(others)} prompts, expected {len(wanted)}")
        params = self._params(sampling_params, len(wanted))
        policies = handoff if isinstance(handoff, list) else [handoff] * len(wanted)
        if len(policies) != len(wanted):
            raise RequestError(f"handoff: found {len(policies)} for {len(wanted)} prompts, expected one each")
        made = [self._request(*one) for one in zip(wanted, others, params, policies, strict=True)]
        ids: list[str] = []
        try:
            for choices in made:
                ids.append(self._queue(choices, None))
            self._run(ids, use_tqdm)
            return [gathered(i, p, self._requests[i]) for i, p in zip(ids, wanted, strict=True)]
        finally:
            for request_id in ids:
                self.abort(request_id)
                self._requests.pop(request_id, None)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        handoff: HandoffPolicy | None = None,
        large_prompt: Prompt | None = None,
        request_id: str | None = None,
    ) -> Iterator[Delta]:
        """Yields the answer as it becomes certain: text and the model that wrote it. Closing the iterator aborts.

        Held back are bytes that may still become a control tag, a stop string or a whole character, and large tokens
        the small model has not read yet. The request is checked at once, before the first delta is asked for.
        """
        (params,) = self._params(sampling_params, 1)
        choices = self._request(as_prompts(prompt)[0], large_prompt, params, handoff, streams=True)
        deltas = self._stream(choices, self._queue(choices, request_id))
        next(deltas)
        return deltas

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        handoff: HandoffPolicy | None = None,
        hint: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answers a conversation. Each checkpoint's own template is applied; the sentence that tells the small model
        to use its tags stands in its lane alone (`hint`). Raises RequestError where a checkpoint has no template."""
        pair = self.chat_prompts(messages, hint=hint, add_generation_prompt=add_generation_prompt)
        return self.generate(pair[Role.SMALL], sampling_params, handoff=handoff, large_prompt=pair[Role.LARGE])

    def chat_prompts(
        self, messages: Sequence[Mapping[str, Any]], *, hint: bool = True, add_generation_prompt: bool = True
    ) -> Pair[str]:
        """The text each model sees of a conversation."""
        if self.templates is None:
            raise RequestError("chat() needs chat templates and this decoder was built without any: use generate()")
        said = Pair(with_hint(messages) if hint else list(messages), list(messages))
        templates = self.templates
        return Pair.of(lambda r: templates[r].render(said[r], add_generation_prompt=add_generation_prompt))

    def abort(self, request_id: str) -> None:
        """Ends a request where it stands and frees both of its lanes; unknown ids are ignored."""
        for choice in self._requests.get(request_id, []):
            if choice.output is None:
                self.engine.abort(choice)

    def close(self) -> None:
        """Aborts what is running. The decoder takes no further requests."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self._shut = self._shut or "this decoder is closed"

    def take_over(self) -> Engine:
        """The engine, for a driver on a thread of its own; from here on this decoder takes no requests itself.

        Raises RequestError when it is closed, was taken over before, or has unfinished requests.
        """
        self._check_open()
        if self.engine.unfinished:
            raise RequestError(f"decoder: found {self.engine.unfinished} unfinished answers, expected one at rest")
        self._shut = "this decoder is driven by an AsyncSplitDecoder: ask that one"
        return self.engine

    def _check_open(self) -> None:
        if self._shut:
            raise RequestError(self._shut)

    def __enter__(self) -> SplitDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- requests

    @property
    def health(self) -> Health:
        """Figures and alarms of how the two models get on (split/health.py)."""
        return self.engine.health

    def score(self, sequences: Sequence[Sequence[int]], role: Role = Role.SMALL) -> list[Scores]:
        """log p(id | ids before it) by one of the models, at temperature 1: a float64 [n] per sequence of n ids, its
        first NaN. What runs is not disturbed. Raises RequestError for ids the model does not know."""
        return token_logprobs(self.models[role], sequences)

    def update_weights(self, tensors: Mapping[str, Tensor], role: Role = Role.SMALL) -> None:
        """Takes new weights of one model, under Hugging Face names, between two answers; its cached prefixes are
        forgotten. Raises RequestError while answers run, CheckpointError for tensors that do not fit: nothing changed.
        """
        if self.engine.unfinished:
            raise RequestError(f"update_weights: found {self.engine.unfinished} unfinished answers, expected none")
        self.models[role].update(tensors)
        self.engine.runners[role].cache.pool.clear_cache()

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What the small checkpoint's generation_config.json says; max_new_tokens is max_tokens."""
        return default_params(self._defaults)

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, number: int) -> Sequence[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.default_sampling_params] * number
        if len(given) != number:
            raise RequestError(f"sampling_params: found {len(given)} for {number} prompts, expected one each")
        return given

    def _request(
        self,
        prompt: Prompt,
        other: Prompt | None,
        params: SamplingParams,
        handoff: HandoffPolicy | None,
        streams: bool = False,
    ) -> list[Choice]:
        """The choices of one request, checked; nothing is queued."""
        self._check_open()
        return self.requests.choices(prompt, other, params, handoff, streams=streams)

    def _queue(self, choices: list[Choice], request_id: str | None) -> str:
        name = request_id or next(n for n in map("request-{}".format, self._numbers) if n not in self._requests)
        if name in self._requests:
            raise RequestError(f"request_id: {name!r} is in use")
        self._requests[name] = choices
        for choice in choices:
            self.engine.add(choice)
        return name

    def _run(self, ids: Iterable[str], use_tqdm: bool) -> None:
        choices = [choice for request_id in ids for choice in self._requests[request_id]]
        bar = _progress(total=len(choices), unit="answer") if use_tqdm else None
        left, unfinished = len(choices), -1
        while left:
            self.engine.tick()
            if self.engine.unfinished == unfinished:
                continue  # nobody was retired: nothing to count
            unfinished = self.engine.unfinished
            before, left = left, sum(choice.output is None for choice in choices)
            if bar is not None:
                bar.update(before - left)
        if bar is not None:
            bar.close()

    def _stream(self, choices: list[Choice], request_id: str) -> Iterator[Delta]:
        try:
            yield Delta("", str(Role.SMALL))  # stream() takes this one: a generator that never ran would not abort
            while True:
                left = sum(choice.output is None for choice in choices)
                for choice in choices:
                    yield from choice.deltas
                    choice.deltas = []
                if not left:
                    break
                self.engine.tick()
            yield from closing(choices)
        finally:
            self.abort(request_id)
            self._requests.pop(request_id, None)


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """An EngineConfig from keyword arguments; RequestError names one it does not know."""
    known = EngineConfig.__dataclass_fields__
    for name in options:
        if name not in known:
            raise RequestError(f"{name}: unknown argument, expected one of {', '.join(known)}")
    return replace(EngineConfig(), **options)


def _dtype(dtype: Any) -> Any:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise RequestError(f"dtype: found {dtype!r}, expected 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both, for a wrong name and for a missing driver
        reason = str(error).partition("\n")[0]
        raise RequestError(f"device: found {device!r}, expected one torch can use here ({reason})") from None


def _progress(*items: Any, **options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(*items, dynamic_ncols=True, **options)
