"""F7: `splitdecode claims`: each published figure beside its source, its caveat and our own measurement.

The figures are data (data/claims.json). A claim points at rows of results documents: `same` the same thing on the same
task, `near` the nearest thing that was measured. Documents are those of --results and the one that comes with the
package, an evaluation of the embedded pair. What no document has is "not measured".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from splitdecode.errors import RequestError
from splitdecode.evaluate import report

UNMEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Pointer:
    """A figure of a row of a results document: "accuracy", "offload" or "ms_per_answer".

    over: the policy whose figure is divided by that of `policy`; None: the figure itself.
    """

    task: str
    policy: str
    figure: str
    over: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A published figure, word for word, where it stands, what is to be known about it, where our own would be."""

    claim: str
    published: str
    source: str
    caveat: str
    same: tuple[Pointer, ...] = ()
    near: tuple[Pointer, ...] = ()


def load_claims() -> list[Claim]:
    """The claims that come with the package."""
    rows = json.loads((_data() / "claims.json").read_text("utf-8"))
    for row in rows:
        row |= {key: tuple(Pointer(**pointer) for pointer in row[key]) for key in ("same", "near")}
    return [Claim(**row) for row in rows]


def shipped_results() -> list[dict[str, Any]]:
    """The results documents that come with the package."""
    return [report.read(file) for file in sorted((_data() / "results").glob("*.json"))]


def measured(pointers: Sequence[Pointer], documents: Sequence[dict[str, Any]]) -> list[str]:
    """What the first document that has it says of each pointer, in words; what none has is left out."""
    out = []
    for pointer in pointers:
        for document in documents:
            rows = {row["policy"]: row for row in document["rows"] if row["task"] == pointer.task}
            wanted = [pointer.policy, *([pointer.over] if pointer.over else [])]
            if all(policy in rows for policy in wanted):
                place = document["provenance"]
                where = f"{pointer.task}, {document['pair']['name']}"
                how = f"n={rows[pointer.policy]['n']}, {place['date']}, {place['gpu'] or place['cpu']}"
                out.append(f"{_said(pointer, rows)} ({where}, {how})")
                break
    return out


def _said(pointer: Pointer, rows: dict[str, dict[str, Any]]) -> str:
    value = rows[pointer.policy][pointer.figure]
    if pointer.over is not None:
        factor = rows[pointer.over][pointer.figure] / value
        return f"{pointer.over} / {pointer.policy}: {factor:.2f}x in {pointer.figure.replace('_', ' ')}"
    if pointer.figure == "accuracy":
        low, high = 100 * value["low"], 100 * value["high"]
        return f"{pointer.policy}: {100 * value['value']:.1f} % right [{low:.1f}, {high:.1f}]"
    if pointer.figure == "offload":
        return f"{pointer.policy}: {100 * value:.2f} % of the tokens by the large model"
    return f"{pointer.policy}: {value:.2f} ms an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `splitdecode claims`."""
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="results.json of your own evaluations")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of text")


def main(args: argparse.Namespace) -> int:
    """Prints the table; always 0."""
    documents = [report.read(file) for file in args.results] + shipped_results()
    found = [(claim, measured(claim.same, documents), measured(claim.near, documents)) for claim in load_claims()]
    if args.json:
        rows = [{**_plain(claim), "ours": same or UNMEASURED, "nearest": near} for claim, same, near in found]
        print(json.dumps(rows))
        return 0
    console = Console(highlight=False)
    for claim, same, near in found:
        console.print(Text(claim.claim, style="bold"), soft_wrap=True)
        lines = [("published", claim.published), ("source", claim.source), ("caveat", claim.caveat)]
        lines += [("ours", said) for said in same or [UNMEASURED]] + [("nearest", said) for said in near]
        for name, said in lines:
            console.print(Text(f"  {name:<10} {said}"), soft_wrap=True)
        console.print()
    return 0


def _plain(claim: Claim) -> dict[str, str]:
    return {name: getattr(claim, name) for name in ("claim", "published", "source", "caveat")}


def _data() -> Path:
    folder = Path(str(files("splitdecode"))) / "data"
    if not (folder / "claims.json").is_file():
        raise RequestError(f"{folder / 'claims.json'}: missing; it comes with the package")
    return folder
