"""F7: a file that grows by whole lines and survives kill -9.

opening    one writer only (the kernel drops the lock of a dead one); a last line without its end is cut off
add        one line in one write, then fsync: what was reported as done stays done
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from splitdecode.annotate.records import Annotation, as_line, read_row
from splitdecode.annotate.traces import Trace
from splitdecode.errors import RequestError


class Output:
    """An annotated file, open for more. `done` maps the ids in it to their digests; `cost` is what they cost."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises RequestError when another run holds the file, a line is no annotated trace, or was made by other
        settings."""
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))  # as it reads back
        self.done: dict[str, str] = {}
        self.cost = 0.0
        self.cut = 0  # bytes of a torn last line
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def has(self, trace: Trace) -> bool:
        """Whether the trace is done. Raises RequestError when the file has another one under its id."""
        digest = self.done.get(trace.id)
        if digest is not None and digest != trace.digest:
            raise RequestError(f"trace {trace.id!r}: found other text than {self.path} was made from, expected the "
                               "same traces, or another file")  # fmt: skip
        return digest is not None

    def add(self, found: Annotation) -> None:
        """Appends a finished trace; when this returns it is on the disk."""
        line = as_line(found, self.settings)
        start = os.fstat(self._file).st_size
        try:
            at = 0
            while at < len(line):
                at += os.write(self._file, line[at:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, start)
            raise RequestError(f"{self.path}: cannot be written ({error.strerror}); what it holds is whole") from None
        self.done[found.trace.id] = found.trace.digest

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._file)

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
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{self.path}: another run is writing it, expected to be the only one") from None

    def _read(self) -> None:
        whole = 0
        with open(self._file, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    self.cut = len(line)
                    break
                whole += len(line)
                self._take(read_row(line, f"{self.path.name} line {number}"), number)
        if self.cut:
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
        if not whole:
            _sync_directory(self.path.parent)

    def _take(self, row: Mapping[str, Any], number: int) -> None:
        if row.get("by") != self.settings:
            raise RequestError(f"{self.path.name} line {number}: made by {row.get('by')}, expected {self.settings}: "
                               "use the same flags to go on, or another file")  # fmt: skip
        if row["id"] in self.done:
            raise RequestError(f"{self.path.name} line {number}: found id {row['id']!r} again, expected each id once")
        self.done[row["id"]] = str(row.get("digest"))
        details = row.get("details")
        self.cost += float(details.get("cost") or 0.0) if isinstance(details, dict) else 0.0


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
