"""F7: synthetic traces annotated by their own structure: the value of each product is hard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from splitdecode.annotate.records import Annotation
from splitdecode.annotate.spans import normalise
from splitdecode.annotate.traces import Trace
from splitdecode.errors import RequestError
from splitdecode.families import hard_ranges


class RuleAnnotator:
    """Reads the lines a*b=value of families' solutions; right or wrong, the value is the span. Nothing is merged."""

    settings: Mapping[str, Any] = {"annotator": "rules"}

    def annotate(self, traces: Iterable[Trace]) -> Iterator[Annotation]:
        """Raises RequestError for a trace with no such line."""
        for trace in traces:
            spans = normalise(trace.text, hard_ranges(trace.text), merge=1)
            if not spans:
                raise RequestError(f"trace {trace.id!r}: found no line a*b=value, expected a solution of a synthetic "
                                   "family; other traces need --by endpoint or --by gap")  # fmt: skip
            yield Annotation(trace, spans)
