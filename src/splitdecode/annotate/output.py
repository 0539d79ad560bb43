"""F7: files that grow by whole lines and survive kill -9.

    tagged.jsonl           a line per annotated trace
    tagged.jsonl.failed    a line per failure: {"id", "digest", "reason", "cost", "left_out", "by"}; made by the first

opening    one writer only (the kernel drops the lock of a dead one); a last line that is torn is cut off
add, fail  one line in one write, then fsync: what was reported as done stays done, what was paid stays counted
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from splitdecode.annotate.records import Annotation, Failure, as_line, read_row
from splitdecode.annotate.traces import Trace
from splitdecode.errors import RequestError
from splitdecode.jsonl import read_object, whole, whole_lines


class Lines:
    """A file of JSON objects, one a line, open for more."""

    def __init__(self, path: Path) -> None:
        """Raises RequestError for a file that cannot be written."""
        self.path = path
        self.cut = 0  # bytes of a torn last line
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error.strerror})") from None

    def read(self) -> Iterator[tuple[bytes, str]]:
        """Each line and its place. A last one without its end is ended where it is a whole object, else cut off."""
        size = 0
        with open(self.file, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                place = f"{self.path.name} line {number}"
                if not (line.endswith(b"\n") or whole(line)):
                    self.cut = len(line)
                    break
                size += len(line)
                yield line, place
        if size and not line.endswith(b"\n") and not self.cut:
            self.add(b"\n")
        if self.cut:
            os.ftruncate(self.file, size)
            os.fsync(self.file)
        if not size:
            _sync_directory(self.path.parent)

    def add(self, line: bytes) -> None:
        """Appends a line; when this returns it is on the disk. Raises RequestError where that fails: it is not."""
        start = os.fstat(self.file).st_size
        try:
            at = 0
            while at < len(line):
                at += os.write(self.file, line[at:])
            os.fsync(self.file)
        except OSError as error:
            os.ftruncate(self.file, start)
            raise RequestError(f"{self.path}: cannot be written ({error.strerror}); what it holds is whole") from None

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self.file)


class Output:
    """An annotated file and its failures, open for more.

    done      the digests of what is in it, by id       tries  failures that may go away, by id
    left_out  (digest, reason) of what never can be     cost   dollars, of both files
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises RequestError when another run holds the file, a line is no annotated trace, or was made by other
        settings. Failures under other settings count for nothing but what they cost."""
        self.path, self.failed = path, failures_of(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))  # as it reads back
        self.done: dict[str, str] = {}
        self.left_out: dict[str, tuple[str, str]] = {}
        self.tries: Counter[str] = Counter()
        self.cost = 0.0
        self._lines = Lines(path)
        self._failures: Lines | None = None
        try:
            self._lock()
            for line, place in self._lines.read():
                self._take(read_row(line, place), place)
            if self.failed.exists():
                self._failures = Lines(self.failed)
                for line, place in self._failures.read():
                    self._take_failure(read_failure(line, place))
        except BaseException:
            self.close()
            raise

    @property
    def cut(self) -> int:
        """Bytes of a torn last line that were cut off."""
        return self._lines.cut

    def has(self, trace: Trace) -> bool:
        """Whether the trace is done. Raises RequestError when the file has another one under its id."""
        digest = self.done.get(trace.id)
        if digest is not None and digest != trace.digest:
            raise RequestError(f"trace {trace.id!r}: found other text than {self.path} was made from, expected the "
                               "same traces, or another file")  # fmt: skip
        return digest is not None

    def why_not(self, trace: Trace) -> str:
        """Why the trace was left out; "" where it was not."""
        digest, reason = self.left_out.get(trace.id, ("", ""))
        return reason if digest == trace.digest else ""

    def add(self, found: Annotation) -> None:
        """Appends a finished trace; when this returns it is on the disk."""
        self._lines.add(as_line(found, self.settings))
        self.done[found.trace.id] = found.trace.digest

    def fail(self, found: Failure) -> None:
        """Notes down what failed, and what it cost; when this returns it is on the disk."""
        row = {
            "id": found.trace.id,
            "digest": found.trace.digest,
            "reason": found.reason,
            "cost": found.cost,
            "left_out": found.left_out,
            "by": self.settings,
        }
        self._failures = self._failures or Lines(self.failed)
        self._failures.add((json.dumps(row) + "\n").encode())
        self._take_failure(row)

    def close(self) -> None:
        """Lets go of the files."""
        self._lines.close()
        if self._failures is not None:
            self._failures.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: nobody guards against a second writer
            return
        try:
            fcntl.flock(self._lines.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{self.path}: another run is writing it, expected to be the only one") from None

    def _take(self, row: Mapping[str, Any], place: str) -> None:
        if row.get("by") != self.settings:
            raise RequestError(f"{place}: made by {row.get('by')}, expected {self.settings}: use the same flags to go "
                               "on, or another file")  # fmt: skip
        if row["id"] in self.done:
            raise RequestError(f"{place}: found id {row['id']!r} again, expected each id once")
        self.done[row["id"]] = str(row.get("digest"))
        details = row.get("details")
        self.cost += float(details.get("cost") or 0.0) if isinstance(details, dict) else 0.0

    def _take_failure(self, row: Mapping[str, Any]) -> None:
        self.cost += float(row.get("cost") or 0.0)
        if row.get("by") == self.settings and row.get("left_out"):
            self.left_out[row["id"]] = (str(row.get("digest")), str(row.get("reason")))
        elif row.get("by") == self.settings:
            self.tries[row["id"]] += 1


def failures_of(path: Path) -> Path:
    """Where the failures of an annotated file are noted down."""
    return path.with_name(f"{path.name}.failed")


def left_out(path: Path) -> int:
    """How many traces the failures beside an annotated file say that its annotator can never do."""
    file = failures_of(path)
    rows = [read_failure(*line) for line in whole_lines(file)] if file.is_file() else []
    return len({row["id"] for row in rows if row.get("left_out")})


def read_failure(line: bytes, place: str) -> dict[str, Any]:
    """The record of a failure. Raises RequestError naming the place where it is none."""
    row = read_object(line, place)
    if not isinstance(row.get("id"), str) or not isinstance(row.get("cost"), (int, float)):
        raise RequestError(f"{place}: expected the record of a failure, an object with 'id' and 'cost'")
    return row


def _sync_directory(directory: Path) -> None:
    """Makes a new file's name outlive a power cut, where directories can be synced."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
