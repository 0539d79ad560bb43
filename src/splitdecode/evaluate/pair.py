"""F7: the pair an evaluation runs, and its small model as it was before it was taught the tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitdecode.decoder import SplitDecoder
from splitdecode.errors import RequestError
from splitdecode.evaluate.policies import Row

DEMO = "demo"
DEMO_TRAINED_ON = "two-products"


@dataclass(slots=True)
class PairSource:
    """Opens decoders when a row first needs them, one per small checkpoint, and keeps them.

    small, large, base: directories or hub ids; small and large None: the embedded pair, whose base is embedded too
    options: of SplitDecoder.from_pretrained
    """

    small: str | None = None
    large: str | None = None
    base: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    _open: dict[bool, SplitDecoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.small is None) != (self.large is None):
            raise RequestError("--small and --large: found one, expected both, or neither for the embedded pair")
        if self.embedded and self.base is not None:
            raise RequestError("--base: found one without --small and --large; the embedded pair has its own")

    @property
    def embedded(self) -> bool:
        """Whether this is the pair that comes with the package."""
        return self.small is None

    @property
    def name(self) -> str:
        """How results call the pair: of folders their names, no paths."""
        if self.small is None or self.large is None:
            return "embedded pair"
        return " + ".join(Path(one).name if Path(one).is_dir() else one for one in (self.small, self.large))

    @property
    def trained_on(self) -> str:
        """What a transfer matrix calls it where nothing else is said."""
        return DEMO_TRAINED_ON if self.embedded else self.name

    def check(self, row: Row) -> None:
        """Raises RequestError where the row needs a base model and there is none."""
        if row.base and not self.embedded and self.base is None:
            raise RequestError(f"{row.name}: found no base model, expected --base (the small model before SFT)")

    def decoder(self, row: Row) -> SplitDecoder:
        """The decoder of a row's pair. Raises what from_pretrained does."""
        self.check(row)
        if row.base not in self._open:
            self._open[row.base] = self._load(row.base)
        return self._open[row.base]

    def _load(self, base: bool) -> SplitDecoder:
        if self.small is None or self.large is None:
            return SplitDecoder.demo(small="small-base" if base else "small", **self.options)
        small = self.base if base and self.base is not None else self.small
        return SplitDecoder.from_pretrained(small, self.large, **self.options)
