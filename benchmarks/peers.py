"""Benchmarks: the same work on Hugging Face transformers, the way one would do it without this runtime.

Two models, one `generate()` call per turn, the whole prompt resent at each. Four loops:

    alone    one model, n tokens
    batched  one model, n tokens for each of many prompts at once: a static batch, padded on the left. Two models taking
             turns cannot be batched: `generate()` has no sequence wait for another model
    told     the hand-offs are known beforehand: one call per segment, nothing is probed. It is spared what deciding
             costs (and large tokens written in vain); no real decoder can do this
    probing  the small model decides: large tokens in blocks, then the small model asked at every prefix of the block
             whether it would close (one token each; the published code decodes 6 to 8)

The models keep no cache between calls, as in the published code. Geometry and dtype are those of our pair; random
weights are other random numbers, which costs the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from pairs import Source
from torch import Tensor

from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.models.config import ModelConfig
from splitdecode.split.roles import Pair, Role

Pieces = Sequence[tuple[bool, int]]  # (by the large model, tokens)


class TransformersPeer:
    """A pair of transformers models. tags: ids of the opening and the closing one, None where they are several."""

    def __init__(
        self,
        sources: Pair[Source],
        roles: Collection[Role],
        device: str,
        tags: tuple[int, int] | None,
        eos_ids: Pair[list[int]],
        limit: int,
    ) -> None:
        """roles: the models that are needed; limit: ids from here on are folded into the shared vocabulary."""
        self._device, self._tags, self._eos, self._limit = device, tags, eos_ids, limit
        self._models = Pair.of(lambda r: _load(sources[r], device) if r in roles else None)

    def alone(self, role: Role, prompt: list[int], tokens: int) -> list[int]:
        """n tokens by one model."""
        return self._generate(role, prompt, tokens)

    def batched(self, role: Role, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        """n tokens for each prompt by one model, all of them in one static batch."""
        width = max(map(len, prompts))
        given = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self._device)
        return [self._folded(row) for row in self._run(role, given, mask, tokens, None)[:, width:].tolist()]

    def told(self, prompt: list[int], pieces: Pieces, probe: bool = False) -> list[int]:
        """Segments of given lengths; with `probe` the small model is asked at every large token all the same."""
        opening, closing = self._tags or (0, 0)
        lanes, content = Pair(list(prompt), list(prompt)), []
        for large, count in pieces:
            lanes[Role.SMALL] += [opening] if large else []
            role = Role.LARGE if large else Role.SMALL
            fresh = self._generate(role, lanes[role], count)
            for i in range(1, count + 1) if large and probe else ():
                self._generate(Role.SMALL, lanes[Role.SMALL] + fresh[:i], 1)
            for lane in lanes:
                lane += fresh
            lanes[Role.SMALL] += [closing] if large else []
            content += fresh
        return content

    def probing(self, prompt: list[int], tokens: int, block: int) -> list[int]:
        """The small model's own tags decide, greedily; ends at EOS or after `tokens` content tokens."""
        if self._tags is None:
            raise RequestError("--compare: the transformers loop needs tags that are single tokens; use --trace")
        opening, closing = self._tags
        content: list[int] = []
        lane = list(prompt)  # the small model's: tags stand in it
        while len(content) < tokens:
            stops = [opening, *self._eos[Role.SMALL]]
            fresh = self._generate(Role.SMALL, lane, tokens - len(content), stops)
            lane += fresh
            opens = fresh[-1] == opening
            content += fresh[:-1] if opens else fresh
            if not opens:
                break
            span = self._span(prompt + content, lane, closing, tokens - len(content), block)
            content += span
            lane += [*span, closing]
            if span and span[-1] in self._eos[Role.LARGE]:
                break
        return content

    def _span(self, prompt: list[int], lane: list[int], closing: int, room: int, block: int) -> list[int]:
        """What the large model writes until the small one would close."""
        span: list[int] = []
        while len(span) < room:
            fresh = self._generate(Role.LARGE, prompt + span, min(block, room - len(span)), self._eos[Role.LARGE])
            for token in fresh:
                span.append(token)
                if token in self._eos[Role.LARGE] or self._generate(Role.SMALL, lane + span, 1) == [closing]:
                    return span
        return span

    def _generate(self, role: Role, ids: list[int], tokens: int, stops: list[int] | None = None) -> list[int]:
        given = torch.tensor([ids], device=self._device)
        return self._folded(self._run(role, given, torch.ones_like(given), tokens, stops)[0, len(ids) :].tolist())

    def _run(self, role: Role, given: Tensor, mask: Tensor, tokens: int, stops: list[int] | None) -> Tensor:
        out: Tensor = self._models[role].generate(
            given,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=0,
        )
        return out

    def _folded(self, ids: list[int]) -> list[int]:
        return [i if i < self._limit else i % self._limit for i in ids]


def versions() -> dict[str, str]:
    """What the peer is. Raises MissingExtraError when it is not installed."""
    return {"transformers": str(_transformers().__version__)}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "compare", "--compare transformers") from error
    return transformers


def _load(source: Source, device: str) -> Any:
    library = _transformers()
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    kind = library.AutoModelForCausalLM
    if source.directory is not None:
        model = kind.from_pretrained(source.directory, dtype=source.dtype or "auto").to(device)
    else:
        with torch.device(device):
            model = kind.from_config(_config(library, source.config), dtype=source.dtype)
    model.generation_config = library.GenerationConfig()
    return model.eval()


def _config(library: Any, config: ModelConfig) -> Any:
    """The same geometry as transformers says it; scaled rotary angles cost what plain ones do."""
    name = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "llama": "LlamaConfig"}[config.model_type]
    return getattr(library, name)(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tied,
    )
