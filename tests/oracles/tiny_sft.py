"""A checkpoint with nothing learned: a random Qwen2 of some ten thousand weights and a byte-level BPE, on disk.

The merges cross the edges of the tags, as those of the released checkpoints do: `.</` and `>The` are tokens. The
tokenizer splits as Qwen2's does, since AutoTokenizer would split so whatever stood in the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

EOS = "<|endoftext|>"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_checkpoint(directory: Path, texts: Sequence[str], *, hidden: int = 48, padding: int = 0) -> Path:
    """Random weights (seed 0), tied embeddings, and a tokenizer trained on `texts`; `padding` rows without an id."""
    built = Tokenizer(models.BPE())
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    built.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    directory.mkdir(parents=True)
    built.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": EOS, "pad_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    eos_id = built.token_to_id(EOS)
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=built.get_vocab_size() + padding,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    Qwen2ForCausalLM(shape).save_pretrained(directory)
    return directory
