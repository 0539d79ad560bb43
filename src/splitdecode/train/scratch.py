"""F7: a checkpoint with nothing learned yet: a byte-level BPE of given texts and a random Qwen2, on disk.

The tokenizer splits as Qwen2's does: transformers' AutoTokenizer would split so whatever stood in the file. All 256
bytes are tokens, so any text can be spelled. Control tags stay plain text: `=<` and `>\\n` are tokens where the texts
have them, as `.</` is in the released checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from splitdecode.errors import MissingExtraError, RequestError

EOS = "<|endoftext|>"
SPLIT = (  # Qwen2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen2 with tied embeddings; positions: the longest sequence it is made for, in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    positions: int = 512


def write_scratch(
    directory: Path, texts: Iterable[str], shape: Shape, *, vocabulary: int = 384, padding: int = 0, seed: int = 0
) -> Path:
    """A tokenizer of at most `vocabulary` ids trained on `texts`, id 0 its EOS, and float32 weights drawn by `seed`.

    padding: rows of the embedding without an id. Equal arguments give equal files. Raises MissingExtraError without
    the [train] extra, RequestError where the directory exists.
    """
    try:
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        raise MissingExtraError("transformers", "train", "a model from scratch") from error
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        raise RequestError(f"{directory}: exists, expected a new directory") from None
    ids = _write_tokenizer(directory, texts, vocabulary, shape.positions)
    config = Qwen2Config(
        vocab_size=ids + padding,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config.do_sample = False
    model.save_pretrained(directory)
    return directory


def _write_tokenizer(directory: Path, texts: Iterable[str], vocabulary: int, positions: int) -> int:
    """Writes tokenizer.json and tokenizer_config.json; the number of ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    built = Tokenizer(models.BPE())
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(EOS, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    built.train_from_iterator(texts, trainer)
    built.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": EOS,
        "pad_token": EOS,
        "bos_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return built.get_vocab_size()
