"""F7: the directory of one run: whose it is, and from where it goes on.

A run that got to no checkpoint, since its input was wrong, say, is no run yet and gives way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitdecode.errors import CheckpointError, RequestError
from splitdecode.models.checkpoint import read_json


def claim(target: Path, mine: Mapping[str, Any], begun: bool = False) -> None:
    """The output is empty, or holds this very run: other settings would go on with a wrong schedule or data.

    mine: what tells the run from others, as JSON has it; begun: it holds products besides models and checkpoints.
    Raises RequestError.
    """
    file = target / "run.json"
    if file.is_file():
        try:
            theirs = read_json(file)
        except CheckpointError as error:
            raise RequestError(f"--output: {error}") from None
        differ = [name for name in mine if theirs.get(name) != mine[name]]
        if not differ:
            return
        if begun or (target / "config.json").exists() or newest_checkpoint(target / "checkpoints") is not None:
            raise RequestError(f"--output: {target} holds a run with {differ[0]} {theirs.get(differ[0])!r}, found "
                               f"{mine[differ[0]]!r}: expected the same to go on, or another directory")  # fmt: skip
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"--output: found {target}, which is no run of this command, expected an empty directory")
    try:
        target.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(dict(mine), indent=1) + "\n", "utf-8")
        os.replace(part, file)
    except OSError as error:
        raise RequestError(f"--output: {target} cannot be written to ({error.strerror})") from None


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step; one that a kill cut short is passed over."""
    found = folder.glob("checkpoint-*") if folder.is_dir() else ()
    ordered = sorted((path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of, reverse=True)
    return next((path for path in ordered if _complete(path)), None)


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _complete(path: Path) -> bool:
    try:
        return "global_step" in json.loads((path / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
