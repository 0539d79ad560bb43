"""Scripted pairs that open tags at known places: what budgets are tried on."""

from __future__ import annotations

from typing import Any

from oracles.scripted import Scripted, scripted_pair
from oracles.tiny import PIECES, WHOLE

from splitdecode import RequestOutput, SamplingParams, SplitDecoder
from splitdecode.split.roles import Pair

IDS = {piece: index for index, piece in enumerate(PIECES + WHOLE)}
OPEN = IDS["<bigmodel>"]
IN = "<bigmodel>T</bigmodel>c"  # what three_openings() writes where it may open
OUT = "bT</bigmodel>c"  # what is written where an opening was refused: the closing tag is a stray one


def ids(*pieces: str) -> list[int]:
    return [IDS[piece] for piece in pieces]


def pair(pieces: list[str] = PIECES + WHOLE, **engine: Any) -> tuple[SplitDecoder, Pair[Scripted]]:
    decoder, models, _ = scripted_pair(pieces, **engine)
    return decoder, models


def run(decoder: SplitDecoder, handoff: Any = None, **params: Any) -> RequestOutput:
    wanted = SamplingParams(**{"temperature": 0.0, "max_tokens": 40, **params})
    return decoder.generate({"prompt_token_ids": ids("a", "b", "c")}, wanted, handoff=handoff)[0]


def three_openings(**engine: Any) -> SplitDecoder:
    """Opens at lane positions 0, 4 and 8 and closes behind one large token; without a tag it writes `b` there."""
    decoder, models = pair(**engine)
    for at in (0, 4, 8):
        models.small.draws(3 + at, {OPEN: 9.0, IDS["b"]: 1.0}).says(3 + at + 1, ids("T", "</bigmodel>", "c"))
    models.small.says(3 + 12, ids("<|eos|>"))
    models.large.says(3, ids(*"TTTTTTTTTTTTTTTT"))
    return decoder
