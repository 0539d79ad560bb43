"""F7: lm-evaluation-harness drives a pair: the model "splitdecode", registered when this module is imported.

    splitdecode eval --tasks my_task --include-path tasks --policies small,large,split
    python -m splitdecode.evaluate.lm_harness run --model splitdecode --model_args policy=split --tasks ...

generate_until runs under a policy of evaluate/policies.py. A likelihood is one model's: a text that two models write in
turns has none that could be computed simply, so it must be said which model scores (policy small or large, or
score_with); anything else is an error that says so.

A chat is kept as JSON until a model reads it: each one has its own template, and the hint is for the small one alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from splitdecode.config import MAX_STOP_STRINGS, SamplingParams, request_key
from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.evaluate.likelihood import score
from splitdecode.evaluate.pair import PairSource
from splitdecode.evaluate.policies import Rate, Row, parse_rows, policies_of
from splitdecode.evaluate.runs import watched
from splitdecode.evaluate.tasks import Item
from splitdecode.split.outputs import RequestMetrics
from splitdecode.split.prompts import with_hint
from splitdecode.split.roles import Role

_CHAT = "<|splitdecode chat|>"
_KNOWN = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}


@register_model("splitdecode")
class SplitDecodeLM(TemplateLM):
    """A pair as lm-evaluation-harness sees a model.

    small, large      directories or hub ids; neither: the embedded pair
    policy            a row of `splitdecode eval`; p, chunk: of the random ones
    score_with        "small" or "large": whose likelihood is asked for under policies that are neither
    think_end_token   what ends the thinking: stop strings count only behind it, and only what follows is graded
    max_gen_toks      tokens of an answer where a task does not say
    Further arguments are SplitDecoder.from_pretrained's. Raises RequestError for wrong ones.
    """

    def __init__(
        self,
        small: str | None = None,
        large: str | None = None,
        policy: str = "split",
        p: float | None = None,
        chunk: int = 32,
        score_with: str | None = None,
        think_end_token: str | None = None,
        max_gen_toks: int = 1024,
        seed: int = 0,
        decoder: SplitDecoder | None = None,
        device: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.row = _row(policy)
        if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
            options["device"] = device  # lm-eval's own default is "cuda:0", also where there is none
        self.decoder = decoder or PairSource(small, large, options=options).decoder(self.row)
        self.rate = None if p is None else Rate(p, chunk)
        own = _scoring_role(policy)
        self.scoring_role = _scoring_role(score_with or "") if own is None else own
        self.think_end_token, self.max_gen_toks, self.seed = think_end_token, max_gen_toks, seed
        self.metrics: list[RequestMetrics] = []  # one per generated answer, in order

    # ---- text

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text; of the scoring model's tokenizer."""
        found = self.decoder.tokenizers[self.scoring_role or Role.SMALL].eos_id
        if found is None:
            raise RequestError("lm-eval: found a tokenizer without an EOS token, expected one to begin a text with")
        return found

    @property
    def tokenizer_name(self) -> str:
        """Names the template in lm-eval's request cache."""
        return f"splitdecode-{self.row.name}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of the scoring model."""
        role = self.scoring_role or Role.SMALL
        text = self._as_read(string, role)
        return self.decoder.tokenizers[role].encode(text, add_special_tokens=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation, to be rendered for each model when it is read."""
        if self.decoder.templates is None or any(template.source is None for template in self.decoder.templates):
            raise RequestError("apply_chat_template: found a checkpoint without a chat template, expected one each")
        return _CHAT + json.dumps({"messages": chat_history, "open": add_generation_prompt})

    def _as_read(self, text: str, role: Role) -> str:
        if not text.startswith(_CHAT) or self.decoder.templates is None:
            return text
        found, end = json.JSONDecoder().raw_decode(text, len(_CHAT))
        messages = with_hint(found["messages"]) if self.row.hint and role is Role.SMALL else found["messages"]
        rendered = self.decoder.templates[role].render(
            messages, add_generation_prompt=found["open"], continue_final_message=not found["open"]
        )
        return rendered + text[end:]

    # ---- answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """One text per request, up to its stop strings; all of them run together."""
        contexts = [request.args[0] for request in requests]
        asked = [self._params(request.args[1], index) for index, request in enumerate(requests)]
        unlabelled = [Item("lm-eval task", "", "")] * len(requests)
        outputs = self.decoder.generate(
            [self._as_read(context, Role.SMALL) for context in contexts],
            [params for params, _ in asked],
            handoff=policies_of(self.row, unlabelled, self.decoder.tokens, self.rate),
            large_prompt=[self._as_read(context, Role.LARGE) for context in contexts],
            use_tqdm=not disable_tqdm,
        )
        self.metrics += [output.metrics for output in outputs]
        texts = []
        for request, (_, until), output in zip(requests, asked, outputs, strict=True):
            text = postprocess_generated_text(output.outputs[0].text, until, self.think_end_token)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _params(self, given: dict[str, Any], index: int) -> tuple[SamplingParams, list[str]]:
        """How one request is sampled, and the stop strings that end it."""
        named = dict(normalize_gen_kwargs(given, default_max_gen_toks=self.max_gen_toks))
        until = handle_stop_sequences(named.pop("until"), eos=None)
        limit = named.pop("max_gen_toks")
        named.pop("do_sample", None)
        if strange := set(named) - _KNOWN:
            raise RequestError(f"generation_kwargs: found {', '.join(sorted(strange))}, expected until, do_sample, "
                               f"max_gen_toks, {', '.join(sorted(_KNOWN))}")  # fmt: skip
        early = None if self.think_end_token else [text for text in until if text][:MAX_STOP_STRINGS]
        params = SamplingParams(
            **named,
            max_tokens=limit,
            stop=early,
            seed=request_key(self.seed, index),
            skip_special_tokens=self.think_end_token is None,  # the end of thinking may be a special token
        )
        return params, until

    # ---- likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        role = self._scoring()
        out = []
        for key, context, continuation in requests:
            room = self.decoder.models[role].config.max_positions - len(continuation) + 1
            if not continuation or room < 1:
                raise RequestError(f"loglikelihood: found a continuation of {len(continuation)} tokens, expected 1 to "
                                   f"{self.decoder.models[role].config.max_positions}")  # fmt: skip
            found = score(self.decoder.models[role], context[-room:], continuation)
            self.cache_hook.add_partial("loglikelihood", key, found)
            out.append(found)
        return out

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the scoring model's context."""
        model = self.decoder.models[self._scoring()]
        out = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.eot_token_id,
                max_seq_len=model.config.max_positions,
                context_len=1,
            )
            out.append(sum(score(model, *make_disjoint_window(window))[0] for window in windows))
        return out

    def _scoring(self) -> Role:
        if self.scoring_role is None:
            raise RequestError(
                f"loglikelihood: unsupported under policy {self.row.name!r}, where two models write in turns: say "
                "score_with=small or score_with=large, or take the policy small or large"
            )
        return self.scoring_role


def find_tasks(names: Sequence[str], include: Path | None) -> TaskManager:
    """lm-eval's index of tasks, those of the folder `include` too. Raises RequestError for a name that is not in it."""
    if include is not None and not include.is_dir():
        raise RequestError(f"--include-path: found no folder {include}")
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if not manager.match_tasks([name]):
            raise RequestError(f"--tasks: found {name!r}, which is neither ours nor one lm-eval knows"
                               + ("" if include is None else f" here or in {include}"))  # fmt: skip
    return manager


def evaluate(
    name: str,
    row: Row,
    decoder: SplitDecoder,
    *,
    manager: TaskManager,
    fewshot: int | None,
    chat: bool,
    limit: int | None,
    **options: Any,
) -> tuple[list[dict[str, Any]], list[RequestMetrics]]:
    """lm-eval's own figures for one of its tasks or groups under one policy, how the pair got on over all of its
    answers ("health", "alarms": split/health.py), and what the answers cost.

    fewshot: worked examples before a question, None: the task's own; chat: questions in chat templates; limit:
    questions per task; options: SplitDecodeLM's.
    """
    model = SplitDecodeLM(policy=row.name, decoder=decoder, **options)
    with watched(decoder) as signs:
        found = simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=manager,
            num_fewshot=fewshot,
            apply_chat_template=chat,
            limit=limit,
            log_samples=False,
        )
    rows = []
    for task, results in found["results"].items():
        numbers = {name: value for name, value in results.items() if isinstance(value, (int, float))}
        numbers.pop("sample_len", None)
        seen = {"health": signs.figures, "alarms": signs.alarms}
        rows.append({"task": task, "policy": row.name, "metrics": numbers, **seen})
    return rows, model.metrics


def _row(policy: str) -> Row:
    rows = parse_rows(policy)
    if len(rows) != 1:
        raise RequestError(f"policy: found {policy!r}, expected one")
    return rows[0]


def _scoring_role(name: str) -> Role | None:
    return {str(role): role for role in Role}.get(name.removesuffix("-base"))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
