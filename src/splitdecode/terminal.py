"""F7: who wrote what, in colour. NO_COLOR and pipes get plain text (rich sees to it)."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from splitdecode.split.outputs import Delta

STYLES = {"small": "cyan", "large": "bold magenta"}


def legend() -> Text:
    """One line that says which colour is whose."""
    return Text.assemble(
        "written by the ", ("small model", STYLES["small"]), " and the ", ("large model", STYLES["large"])
    )


def show(console: Console, delta: Delta) -> None:
    """Prints a streamed piece in its author's colour."""
    console.print(Text(delta.text, style=STYLES[delta.model]), end="", soft_wrap=True)


def coloured(pieces: list[Delta]) -> Text:
    """A whole answer, coloured by author."""
    return Text.assemble(*((piece.text, STYLES[piece.model]) for piece in pieces))
