"""F7: JSON lines, read alike wherever there are any.

A line ends with a newline and with nothing else: U+2028, U+0085 and what else some take for the end of a line may stand
inside a string. Blank lines are passed over; the last line needs no end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitdecode.errors import RequestError


def read_objects(file: Path, flag: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a file, and its place: "x.jsonl line 3", behind "flag: " where one is given.

    Raises RequestError naming the file that cannot be read, or the place of a line that holds no object.
    """
    said = f"{flag}: " if flag else ""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    place = f"{said}{file.name} line {number}"
                    yield place, read_object(line, place)
    except OSError as error:
        raise RequestError(f"{said}{file}: found no text to read ({error.strerror})") from None


def read_object(line: bytes, place: str) -> dict[str, Any]:
    """The object of one line. Raises RequestError naming the place."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RequestError(f"{place}: found bytes that are not UTF-8, expected a JSON object") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: found no JSON ({error}), expected an object") from None
    if not isinstance(row, dict):
        raise RequestError(f"{place}: found {type(row).__name__}, expected an object")
    return row


def whole_lines(file: Path) -> Iterator[tuple[bytes, str]]:
    """Each line of a file that grows, and its place; not a torn last one, as a killed writer leaves."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and (line.endswith(b"\n") or whole(line)):
                yield line, f"{file.name} line {number}"


def whole(line: bytes) -> bool:
    """Whether a line is a JSON object from its beginning to its end."""
    try:
        read_object(line, "")
    except RequestError:
        return False
    return True
