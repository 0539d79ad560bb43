"""The embedded pair, and how long its answers to `two-products` are: all equally long."""

from __future__ import annotations

from pathlib import Path

import splitdecode
from splitdecode.families import problems
from splitdecode.models.tokenizer import Tokenizer

PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"
LARGE = 8  # tokens by the large model: the digits of two products
TOKENS = len(Tokenizer.from_directory(PAIR / "small").encode(problems(1, 0)[0].trace)) + 1  # and the EOS; tags are not
SMALL = TOKENS - LARGE
OFFLOAD = LARGE / TOKENS
