"""F7: traces through an annotator into a file: what is there is skipped, what is finished is kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from splitdecode.annotate.output import Output
from splitdecode.annotate.records import Annotator, Failure
from splitdecode.annotate.spans import covered
from splitdecode.annotate.traces import Trace

FAILURES_IN_A_ROW = 20  # after so many, what failed is not the trace
SECONDS = 30.0  # between two lines of progress where there is no terminal


@dataclass(slots=True)
class Summary:
    """What a run did. cost: dollars, of this run, failures included; share: of the characters it annotated.

    failed    "id: reason" of what this run could not annotate and another may
    left_out  the same of traces that the annotator can never do, those that earlier runs noted down too
    stopped   why the run ended before its traces did, and how to go on; "" if it did not
    """

    annotated: int = 0
    already: int = 0
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
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
    """Annotates what `out` does not hold yet, and appends each trace as it is finished; what failed is noted down in a
    file beside it, and tried again after everything else, what failed least often first.

    total: traces in all, for the progress (a bar on a terminal, else a line now and then). max_cost: dollars for this
    file, failures included; no trace is begun beyond it, those in flight are finished. Raises RequestError for an
    output of other traces or settings, and for an endpoint that takes no request.
    """
    summary = Summary()
    in_a_row = 0
    with Output(out, annotator.settings) as output, closing(_Progress(total)) as progress:
        before = output.cost
        summary.cut_bytes = output.cut

        def ends() -> bool:
            if max_cost is not None and before + summary.cost >= max_cost:
                spent = f"spent ${before + summary.cost:.4f}, the limit is ${max_cost:g}"
                summary.stopped = f"{spent}: a higher one goes on"
            elif in_a_row >= FAILURES_IN_A_ROW:
                summary.stopped = f"{in_a_row} traces failed in a row: the same command goes on, those come last"
            return bool(summary.stopped)

        def todo() -> Iterator[Trace]:
            again: list[Trace] = []
            for trace in traces:
                if output.has(trace):
                    summary.already += 1
                    progress.step()
                elif reason := output.why_not(trace):
                    summary.left_out.append(f"{trace.id}: {reason}")
                    progress.step()
                elif output.tries[trace.id]:
                    again.append(trace)
                elif ends():
                    return
                else:
                    yield trace
            for trace in sorted(again, key=lambda trace: output.tries[trace.id]):
                if ends():
                    return
                yield trace

        for found in annotator.annotate(todo()):
            summary.cost += found.cost
            if isinstance(found, Failure):
                output.fail(found)
                in_a_row += not found.left_out
                (summary.left_out if found.left_out else summary.failed).append(f"{found.trace.id}: {found.reason}")
            else:
                output.add(found)
                in_a_row = 0
                summary.annotated += 1
                summary.characters += len(found.trace.text)
                summary.inside += covered(found.spans)
            progress.step(_said(summary, before))
    return summary


def _said(summary: Summary, before: float) -> str:
    parts = [f"share {100 * summary.share:.1f} %"]
    if before + summary.cost:
        parts.append(f"${before + summary.cost:.4f}")
    for number, name in ((len(summary.failed), "failed"), (len(summary.left_out), "left out")):
        if number:
            parts.append(f"{number} {name}")
    return ", ".join(parts)


class _Progress:
    """A bar on a terminal; elsewhere a line on standard error every SECONDS."""

    def __init__(self, total: int | None) -> None:
        from tqdm import tqdm

        self._plain = not sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="trace", dynamic_ncols=True, disable=self._plain)
        self._of = "" if total is None else f" of {total}"
        self._done, self._then = 0, time.monotonic()

    def step(self, said: str = "") -> None:
        """One trace more."""
        self._done += 1
        if said:
            self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(1)
        now = time.monotonic()
        if self._plain and said and now - self._then >= SECONDS:
            self._then = now
            print(f"splitdecode annotate: {self._done}{self._of} traces, {said}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
