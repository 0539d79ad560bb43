"""F7: `splitdecode annotate-report`: what an annotated file holds, and how far it agrees with another.

splitdecode annotate-report gap.jsonl --against rules.jsonl --output-dir report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from splitdecode.annotate import report
from splitdecode.annotate.output import left_out
from splitdecode.annotate.records import read_tagged
from splitdecode.errors import RequestError
from splitdecode.models.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `splitdecode annotate-report`."""
    parser.add_argument("file", type=Path, help="written by `splitdecode annotate`")
    parser.add_argument("--against", type=Path, help="another annotation of the same traces, by id")
    parser.add_argument("--tokenizer", type=Path, help="a checkpoint's directory: lengths in its tokens too")
    parser.add_argument("--output-dir", type=Path, help="for report.json, report.md and report.png")
    parser.add_argument("--no-plot", action="store_true", help="leave report.png out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    found = {
        "file": args.file.name,
        "left_out": left_out(args.file),
        "statistics": report.statistics(read_tagged(args.file), _counter(args.tokenizer)),
    }
    if args.against is not None:
        found["against"] = args.against.name
        found["agreement"] = report.agreement(read_tagged(args.file), report.index(args.against))
    if args.output_dir is not None:
        if args.output_dir.exists() and not args.output_dir.is_dir():
            raise RequestError(f"--output-dir: found {args.output_dir}, a file, expected a directory")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if not args.no_plot:
            report.plot(found["statistics"], args.output_dir / "report.png")
    histograms = found["statistics"].pop("histograms")
    if args.output_dir is not None:
        whole = {**found, "histograms": histograms}
        (args.output_dir / "report.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        (args.output_dir / "report.md").write_text(report.as_markdown(found), encoding="utf-8")
    print(json.dumps(found) if args.json else report.as_markdown(found), end="\n" if args.json else "")
    return 0


def _counter(directory: Path | None) -> Callable[[str], int] | None:
    if directory is None:
        return None
    tokenizer = Tokenizer.from_directory(directory)
    return lambda text: len(tokenizer.encode_inserted(text))
