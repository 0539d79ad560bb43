"""F7: traces through an annotator into a file: what is there is skipped, what is finished is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitdecode.annotate.output import Output
from splitdecode.annotate.records import Annotator, Failure
from splitdecode.annotate.spans import covered
from splitdecode.annotate.traces import Trace

FAILURES_IN_A_ROW = 20  # after so many, what failed is not the trace


@dataclass(slots=True)
class Summary:
    """What a run did. cost: dollars, of this run, failures included; share: of the characters it annotated.

    stopped  why the run ended before its traces did; "" if it did not
    """

    annotated: int = 0
    already: int = 0
    failed: list[str] = field(default_factory=list)  # "id: reason"
    cost: float = 0.0
    characters: int = 0
    inside: int = 0
    cut_bytes: int = 0
    stopped: str = ""

    @property
    def share(self) -> float:
        return self.inside / self.characters if self.characters else 0.0


def annotate(
    traces: Iterable[Trace],
    annotator: Annotator,
    out: Path,
    *,
    total: int | None = None,
    max_cost: float | None = None,
) -> Summary:
    """Annotates what `out` does not hold yet, and appends each trace as it is finished.

    total: traces in all, for the progress bar (shown on a terminal). max_cost: dollars for this file; no trace is begun
    beyond it, those in flight are finished. Raises RequestError for an output of other traces or settings, and for an
    endpoint that takes no request.
    """
    summary = Summary()
    in_a_row = 0
    with Output(out, annotator.settings) as output, closing(_bar(total)) as bar:
        before = output.cost
        summary.cut_bytes = output.cut

        def todo() -> Iterator[Trace]:
            for trace in traces:
                if output.has(trace):
                    summary.already += 1
                    bar.update(1)
                    continue
                if max_cost is not None and before + summary.cost >= max_cost:
                    summary.stopped = f"spent ${before + summary.cost:.4f}, the limit is ${max_cost:g}"
                    return
                if in_a_row >= FAILURES_IN_A_ROW:
                    summary.stopped = f"{in_a_row} traces failed in a row"
                    return
                yield trace

        for found in annotator.annotate(todo()):
            summary.cost += found.cost
            if isinstance(found, Failure):
                in_a_row += 1
                summary.failed.append(f"{found.trace.id}: {found.reason}")
            else:
                output.add(found)
                in_a_row = 0
                summary.annotated += 1
                summary.characters += len(found.trace.text)
                summary.inside += covered(found.spans)
            bar.set_postfix_str(_postfix(summary, before), refresh=False)
            bar.update(1)
    return summary


def _postfix(summary: Summary, before: float) -> str:
    parts = [f"share {100 * summary.share:.1f} %"]
    if before + summary.cost:
        parts.append(f"${before + summary.cost:.4f}")
    if summary.failed:
        parts.append(f"{len(summary.failed)} failed")
    return ", ".join(parts)


def _bar(total: int | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="trace", dynamic_ncols=True, disable=not sys.stderr.isatty())
