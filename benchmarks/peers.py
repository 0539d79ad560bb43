"""Benchmarks: the same work on Hugging Face transformers, the way one would do it without this runtime.

Two models, one `generate()` call per turn, the whole prompt resent at each. Four loops:

    alone    one model, n tokens
    batched  one model, n tokens for each of many prompts at once: a static batch, padded on the left. Two models taking
             turns cannot be batched: `generate()` has no sequence wait for another model
    told     the hand-offs are known beforehand: one call per segment, nothing is probed. It is spared what deciding
             costs (and large tokens written in vain); no real decoder can do this
    probing  the small model decides: large tokens in blocks, then the small model asked at every prefix of the block
             whether it would close (one token each, the rest of the tag where that begins it; the published code
             decodes 6 to 8)

The models keep no cache between calls, as in the published code. Geometry and dtype are those of our pair; random
weights are other random numbers, which costs the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from pairs import Source
from torch import Tensor

from splitdecode.decoder import SplitDecoder
from splitdecode.errors import MissingExtraError
from splitdecode.models.config import ModelConfig
from splitdecode.split.roles import Pair, Role
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG

Pieces = Sequence[tuple[bool, int]]  # (by the large model, tokens)


OPENING, CLOSING = OPEN_TAG.encode(), CLOSE_TAG.encode()


class TransformersPeer:
    """A pair of transformers models with one tokenizer. tags: ids of the opening and of the closing one."""

    def __init__(
        self,
        sources: Pair[Source],
        roles: Collection[Role],
        device: str,
        tags: Sequence[list[int]],
        eos_ids: Pair[list[int]],
        limit: int,
        words: Any,
    ) -> None:
        """roles: the models that are needed; limit: ids from here on are folded into the shared vocabulary; words: the
        tokenizer, of which token_bytes and encode_bytes are used."""
        self._device, self._tags, self._eos, self._limit, self._words = device, tags, eos_ids, limit, words
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
        opening, closing = self._tags
        lanes, content = Pair(list(prompt), list(prompt)), []
        for large, count in pieces:
            lanes[Role.SMALL] += opening if large else []
            role = Role.LARGE if large else Role.SMALL
            fresh = self._generate(role, lanes[role], count)
            for i in range(1, count + 1) if large and probe else ():
                self._generate(Role.SMALL, lanes[Role.SMALL] + fresh[:i], 1)
            for lane in lanes:
                lane += fresh
            lanes[Role.SMALL] += closing if large else []
            content += fresh
        return content

    def probing(self, prompt: list[int], tokens: int, block: int) -> list[int]:
        """The small model's own tags decide, greedily; ends at EOS or after `tokens` content tokens."""
        content: list[int] = []
        lane = list(prompt)  # the small model's: tags stand in it
        while len(content) < tokens:
            fresh = self._generate(Role.SMALL, lane, tokens - len(content), self._eos[Role.SMALL], OPENING)
            lane += fresh
            before, opens, behind = self._bytes(fresh).partition(OPENING)
            content += self._words.encode_bytes(before + behind) if opens else fresh
            if not opens:
                break
            span, closing = self._span(prompt + content, lane, tokens - len(content), block)
            lane += span + closing
            content += span
            if span and span[-1] in self._eos[Role.LARGE]:
                break
            content += self._words.encode_bytes(self._bytes(closing).replace(CLOSING, b""))
        return content

    def _span(self, prompt: list[int], lane: list[int], room: int, block: int) -> tuple[list[int], list[int]]:
        """What the large model writes until the small one would close, and what that one closes with."""
        span: list[int] = []
        while len(span) < room:
            fresh = self._generate(Role.LARGE, prompt + span, min(block, room - len(span)), self._eos[Role.LARGE])
            for token in fresh:
                span.append(token)
                if token in self._eos[Role.LARGE]:
                    return span, []
                if closing := self._closing(lane + span):
                    return span, closing
        return span, []

    def _closing(self, lane: list[int]) -> list[int]:
        """The tokens of a closing tag where the small model would write one now, else none."""
        first = self._generate(Role.SMALL, lane, 1)
        said = self._bytes(first)
        if said.startswith(CLOSING):
            return first
        if not said or not CLOSING.startswith(said):
            return []
        rest = self._generate(
            Role.SMALL, lane + first, len(self._tags[1]) - 1, self._eos[Role.SMALL], CLOSING[len(said) :]
        )
        return first + rest if (said + self._bytes(rest)).startswith(CLOSING) else []

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._words.token_bytes[i] for i in ids)

    def _generate(
        self, role: Role, ids: list[int], tokens: int, stops: list[int] | None = None, until: bytes = b""
    ) -> list[int]:
        given = torch.tensor([ids], device=self._device)
        ends = _transformers().StoppingCriteriaList([self._holds(until, len(ids))]) if until else None
        return self._folded(self._run(role, given, torch.ones_like(given), tokens, stops, ends)[0, len(ids) :].tolist())

    def _holds(self, text: bytes, start: int) -> Any:
        """A stopping criterion: the text stands in the last tokens, as many as it has bytes at most."""

        def holds(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            last = ids[0, max(start, ids.shape[1] - len(text)) :].tolist()
            return torch.tensor([text in self._bytes(self._folded(last))], device=ids.device)

        return holds

    def _run(
        self, role: Role, given: Tensor, mask: Tensor, tokens: int, stops: list[int] | None, ends: Any = None
    ) -> Tensor:
        out: Tensor = self._models[role].generate(
            given,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=0,
            stopping_criteria=ends,
        )
        return out

    def _folded(self, ids: list[int]) -> list[int]:
        return [i if i < self._limit else i % self._limit for i in ids]


def peer_of(decoder: SplitDecoder, sources: Pair[Source], roles: list[Role], device: str) -> TransformersPeer:
    """The same pair on transformers."""
    tags, words = [list(ids) for ids in decoder.tokens.tag_ids], decoder.tokenizers[Role.SMALL]
    ends = decoder.tokenizers.map(lambda t: [] if t.eos_id is None else [t.eos_id])
    return TransformersPeer(sources, roles, device, tags, ends, min(decoder.vocab_limits), words)


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
