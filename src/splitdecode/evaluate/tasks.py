"""F7: what is asked: synthetic families, files of JSON lines, data sets of the hub.

    family_task   a family of splitdecode.families: prompts as they are, labels by rule for whatever is written
    file_task     one JSON object a line: question (or problem), answer, and optionally id, trace and hard
    hub_task      gsm8k, math500, aime24, aime25, through the datasets package: needs the network or its cache

Only hub_task ever opens a connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from splitdecode.errors import MissingExtraError, RequestError
from splitdecode.evaluate.scorers import Scorer, scorer
from splitdecode.families import Ranges, hard_ranges, stream
from splitdecode.jsonl import read_objects


@dataclass(frozen=True, slots=True)
class Item:
    """One question and its right answer, as text.

    reference  a worked solution, None where there is none      hard   half-open ranges of its characters a large model
    id         a name that stays when other items come or go           should write; None: not labelled
    """

    id: str
    prompt: str
    answer: str
    reference: str | None = None
    hard: Ranges | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Questions and how their answers are read.

    chat     the question is put to a checkpoint in its chat template, with the demand for a box
    labels   which characters of any answer are hard; None: only the items' own labels count
    n        temperature, top_p and max_tokens of an answer unless something else is asked for
    """

    name: str
    items: list[Item]
    score: Scorer
    source: str
    chat: bool = False
    labels: Callable[[str], Ranges] | None = None
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 400})

    @property
    def labelled(self) -> bool:
        """Whether every item has a solution with labels."""
        return all(item.reference is not None and item.hard is not None for item in self.items)


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set of the hub: repository, configuration, split, the fields of question and answer, the scorer."""

    path: str
    config: str | None
    split: str
    question: str
    answer: str
    scorer: str
    gold: Callable[[str], str] = str.strip


def gsm8k_gold(answer: str) -> str:
    """The number behind the last "####" of a GSM8K solution, without commas. Raises RequestError without one."""
    _, mark, number = answer.rpartition("####")
    if not mark or not number.strip():
        raise RequestError(f"answer: found {answer[-60:]!r}, expected a GSM8K solution that ends in '#### number'")
    return number.strip().replace(",", "")


HUB = {
    "gsm8k": HubSet("openai/gsm8k", "main", "test", "question", "answer", "math", gsm8k_gold),
    "math500": HubSet("HuggingFaceH4/MATH-500", None, "test", "problem", "answer", "math"),
    "aime24": HubSet("Maxwell-Jia/AIME_2024", None, "train", "Problem", "Answer", "aime"),
    "aime25": HubSet("math-ai/aime25", None, "test", "problem", "answer", "aime"),
}
REASONING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 16384}  # the published protocol of these sets


def family_task(name: str, number: int, seed: int) -> Task:
    """`number` held-out problems of a family. Raises RequestError for an unknown family or less than one problem."""
    if number < 1:
        raise RequestError(f"--n: found {number}, expected at least 1")
    found = islice(stream(seed, name, "held-out"), number)
    items = [Item(f"{name}/{seed}/{i}", p.prompt, str(p.answer), p.trace, p.hard) for i, p in enumerate(found)]
    return Task(name, items, scorer("integer"), f"splitdecode.families, held-out, seed {seed}", labels=hard_ranges)


def file_task(name: str, file: Path, number: int | None = None, how: str | None = None) -> Task:
    """The first `number` questions (None: all) of a file of JSON lines.

    A line has "question" or "problem", and "answer": a string or a number (of gsm8k: what stands behind "####" where
    that occurs). Optional: "id"; "trace" with "hard", [[start, stop], ...] in characters of the trace. Names may be in
    capitals, as in "Problem" and "ID".
    how: a scorer's name; None: that of the known data set `name`, else "math".
    Raises RequestError naming file and line, MissingExtraError where the scorer's package is absent.
    """
    known = HUB.get(name)
    rows = islice(read_objects(file, f"--data {name}"), number)
    items = [_item(name, place, place.rpartition(" ")[2], row) for place, row in rows]
    if not items:
        raise RequestError(f"--data {name}: {file}: found no questions, expected one JSON object a line")
    score = scorer(how or (known.scorer if known else "math"))
    return Task(name, items, score, file.name, chat=True, sampling=REASONING)


def hub_task(name: str, number: int | None = None) -> Task:
    """The first `number` questions (None: all) of one of HUB. Raises RequestError where it cannot be loaded."""
    hub = HUB[name]
    score = scorer(hub.scorer)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError("datasets", "eval", f"loading {name} from the hub") from error
    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:  # the package raises whatever its transport does
        reason = str(error).partition("\n")[0][:200]
        raise RequestError(f"{name}: {hub.path} could not be loaded from the hub ({reason}); "
                           f"a local file does without: --data {name}=FILE.jsonl") from error  # fmt: skip
    chosen = list(islice(rows, number))
    items = [
        Item(f"{name}/{i}", str(row[hub.question]), hub.gold(str(row[hub.answer]))) for i, row in enumerate(chosen)
    ]
    return Task(name, items, score, f"{hub.path}, {hub.split}", chat=True, sampling=REASONING)


def _item(name: str, place: str, number: str, row: Mapping[str, Any]) -> Item:
    found = {**{field.lower(): value for field, value in row.items()}, **row}
    question, answer = found.get("question", found.get("problem")), found.get("answer")
    if not isinstance(question, str) or not isinstance(answer, (str, int, float)) or isinstance(answer, bool):
        raise RequestError(f"{place}: found {', '.join(map(repr, row)) or 'no fields'}, expected 'question' (or "
                           "'problem') and 'answer'")  # fmt: skip
    gold = gsm8k_gold(str(answer)) if name == "gsm8k" and "####" in str(answer) else str(answer).strip()
    reference, hard = _labels(place, found)
    return Item(str(found.get("id", f"{name}/{number}")), question, gold, reference, hard)


def _labels(place: str, row: Mapping[str, Any]) -> tuple[str | None, Ranges | None]:
    trace, hard = row.get("trace"), row.get("hard")
    if trace is None and hard is None:
        return None, None
    edge, ranges = 0, []
    expected = "'trace' (text) and 'hard' ([[start, stop], ...], ordered, disjoint, within it)"
    if not isinstance(trace, str) or not isinstance(hard, list):
        raise RequestError(f"{place}: found one of them, or another type, expected {expected}")
    for pair in hard:
        good = isinstance(pair, list) and len(pair) == 2 and all(type(edge) is int for edge in pair)
        if not good or not edge <= pair[0] < pair[1] <= len(trace):
            raise RequestError(f"{place}: hard: found {pair!r}, expected {expected}")
        edge = pair[1]
        ranges.append((pair[0], pair[1]))
    return trace, tuple(ranges)
