"""F7: synthetic traces annotated by their own structure: the value of each product is hard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from splitdecode.annotate.records import Annotation, Failure
from splitdecode.annotate.spans import normalise
from splitdecode.annotate.traces import Trace
from splitdecode.families import hard_ranges


class RuleAnnotator:
    """Reads the lines a*b=value of families' solutions; right or wrong, the value is the span. Nothing is merged."""

    settings: Mapping[str, Any] = {"annotator": "rules"}

    def annotate(self, traces: Iterable[Trace]) -> Iterator[Annotation | Failure]:
        """A trace with no such line is left out."""
        for trace in traces:
            spans = normalise(trace.text, hard_ranges(trace.text), merge=1)
            if spans:
                yield Annotation(trace, spans)
            else:
                yield Failure(trace, "found no line a*b=value, expected a solution of a synthetic family; other traces "
                                     "need --by endpoint or --by gap", left_out=True)  # fmt: skip
