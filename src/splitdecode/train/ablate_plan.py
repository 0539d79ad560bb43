"""F7: what an ablation is asked to do: the levels of its axes, its traces and questions, all checked before it begins.

    --sources  rules | gap[:share=0.05,window=5,merge=1] | file:PATH     who put the tags there
    --sft      paper | toy | FILE.toml[:tag_weight=2,epochs=4]           a preset of settings.py, options over it
    --rl       none | grpo-paper | grpo-toy | FILE.toml[:latency=...]    a preset of grpo_settings.py, options over it

Options are separated by commas; inside a text a plus stands for a comma: rewards=accuracy=1+latency=0.5.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from splitdecode.annotate import traces as untagged
from splitdecode.annotate.gap import GapRecipe
from splitdecode.annotate.records import Tagged
from splitdecode.errors import CheckpointError, RequestError
from splitdecode.evaluate.runs import Settings as EvalSettings
from splitdecode.evaluate.tasks import Task, family_task, file_task
from splitdecode.families import FAMILIES, stream
from splitdecode.models.checkpoint import open_checkpoint
from splitdecode.split.roles import Pair
from splitdecode.train import grpo_settings, settings, sft
from splitdecode.train.grpo_settings import GrpoSettings
from splitdecode.train.questions import Question, asked, read_questions
from splitdecode.train.settings import Settings
from splitdecode.train.traces import read_traces

NONE = "none"
RULES = "rules"
Source = GapRecipe | Path | None  # a recipe of the gap, a tagged file, or None: the rules
_GRPO = {f"grpo-{name}": name for name in settings.PRESETS}
_READ: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": ({"true": True, "false": False}.__getitem__, "true or false"),
    "str": (lambda text: text.replace("+", ","), "a text"),
}


@dataclass(frozen=True)
class Plan:
    """An ablation.

    sources, sft, rl  levels by what they are called; rl: None is no reinforcement    seeds  of the trainings
    traces            untagged solutions, annotated once per source                   questions  {prompt: right answer}
    large_prompts     what the large model is given in RL, by the small one's prompt, where it is another text
    labels            the same traces with the families' own labels, by digest; empty where there are none
    tasks             what every model is asked                                       asking  and how
    options           of SplitDecoder.from_pretrained, for annotation and evaluation
    identity          what tells this run from others, as JSON has it
    """

    base: str
    large: str
    options: dict[str, Any]
    output: Path
    sources: dict[str, Source]
    sft: dict[str, Settings]
    rl: dict[str, GrpoSettings | None]
    seeds: list[int]
    traces: list[untagged.Trace]
    questions: dict[str, str]
    large_prompts: dict[str, str]
    labels: dict[str, Tagged]
    tasks: list[Task]
    asking: EvalSettings
    identity: dict[str, Any]


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan of a command line. Raises RequestError naming the flag, MissingExtraError without the [train] extra."""
    sources, tuned = parse_sources(args.sources), parse_sft(args.sft)
    reinforced = parse_rl(args.rl, args.scorer or "math" if args.data else None)
    seeds = _seeds(args.seeds)
    for name, least in (("n", 1), ("eval_n", 1), ("data_seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise RequestError(f"--{name.replace('_', '-')}: found {value}, expected at least {least}")
    for setting in tuned.values():
        sft.require_extra(setting)
    families, tasks = _families(args), []
    if args.data is None:
        traces, rows, labels = _family_data(families, args.n or 1000, args.data_seed)
        tasks = [family_task(name, args.eval_n or 100, args.data_seed) for name in families]
    else:
        traces, rows = _file_data(args.data, args.n)
        labels, tasks = {}, [_file_questions(args.eval_data, args.eval_n, args.scorer, bare=traces[0].bare)]
    _check_sources(sources, "question" if traces[0].bare else "prompt")
    for name in ("base", "large"):
        with _named(f"--{name}"):
            open_checkpoint(getattr(args, name))
    questions, others = asked(rows, Pair(args.base, args.large))
    for text, chosen in reinforced.items():
        if chosen is not None and len(questions) < chosen.prompts:
            raise RequestError(f"--n: found {len(questions)} questions, expected at least {chosen.prompts}, those of "
                               f"a step of {text}")  # fmt: skip
    asking = EvalSettings(seed=args.data_seed, temperature=args.temperature, max_tokens=args.max_tokens)
    for task in tasks:
        asking.params(task)  # what cannot be sampled is said now
    levels = {text: Path(head) for text in (*tuned, *reinforced) if (head := text.partition(":")[0]).endswith(".toml")}
    costs = {f"{text}: cost": Path(rl.cost) for text, rl in reinforced.items() if rl is not None and rl.cost}
    files = {"data": args.data, "eval_data": args.eval_data, **sources, **levels, **costs}
    options = {"device": args.device, "dtype": args.dtype or ("float32" if args.device == "cpu" else "auto")}
    identity = {
        "base": args.base,
        "large": args.large,
        "dtype": options["dtype"],
        "families": families,
        **{name: getattr(args, name) for name in ("n", "eval_n", "data_seed", "temperature", "max_tokens", "scorer")},
        **{"sources": list(sources), "sft": list(tuned), "rl": list(reinforced), "seeds": seeds},
        "files": {k: sha256(path.read_bytes()).hexdigest() for k, path in files.items() if isinstance(path, Path)},
    }
    return Plan(args.base, args.large, options, args.output, sources, tuned, reinforced, seeds, traces, questions,
                others, labels, tasks, asking, identity)  # fmt: skip


def parse_sources(texts: Sequence[str]) -> dict[str, Source]:
    """Annotators by name. Raises RequestError for one that cannot be used, a file that holds no tagged traces too."""
    found: dict[str, Source] = {}
    for text in dict.fromkeys(texts):
        head, _, rest = text.partition(":")
        if head == "file" and rest:
            path = Path(rest)
            read_traces(path, "--sources")
            if f"file:{path.name}" in found:
                raise RequestError(f"--sources: found two files called {path.name}, expected different names")
            found[f"file:{path.name}"] = path
        elif text == RULES:
            found[text] = None
        elif head == "gap":
            with _named(f"--sources: {text}"):
                found[text] = GapRecipe(**_options(text, GapRecipe))
        else:
            raise RequestError(f"--sources: found {text!r}, expected {RULES}, gap[:key=value,...] or file:PATH")
    return found


def parse_sft(texts: Sequence[str]) -> dict[str, Settings]:
    """Settings by name; their seed is set later. Raises RequestError for some that cannot be used."""
    found: dict[str, Settings] = {}
    for text in dict.fromkeys(texts):
        head = text.partition(":")[0]
        if head not in settings.PRESETS and not head.endswith(".toml"):
            raise RequestError(f"--sft: found {text!r}, expected {', '.join(settings.PRESETS)} or a .toml file, with "
                               "[:key=value,...]")  # fmt: skip
        with _named(f"--sft: {text}"):
            found[text] = settings.preset(head, **_options(text, Settings))
    return found


def parse_rl(texts: Sequence[str], scoring: str | None = None) -> dict[str, GrpoSettings | None]:
    """Settings of GRPO by name, None for none; their seed is set later. scoring: of answers where it is not an option.

    Raises RequestError for some that cannot be used.
    """
    found: dict[str, GrpoSettings | None] = {}
    for text in dict.fromkeys(texts):
        head = text.partition(":")[0]
        if text == NONE:
            found[text] = None
            continue
        if head not in _GRPO and not head.endswith(".toml"):
            raise RequestError(f"--rl: found {text!r}, expected {NONE}, {', '.join(_GRPO)} or a .toml file, with "
                               "[:key=value,...]")  # fmt: skip
        with _named(f"--rl: {text}"):
            usual = {} if scoring is None else {"scoring": scoring}
            chosen = grpo_settings.preset(_GRPO.get(head, head), **{**usual, **_options(text, GrpoSettings)})
            chosen.given_cost()  # a file that is none is said now
        found[text] = chosen
    return found


def folders(names: Sequence[str]) -> dict[str, str]:
    """A name of its own for each of some levels, fit for a folder."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:80]
        found[name] = plain if plain not in found.values() else f"{plain}-{len(found)}"
    return found


def _options(text: str, kind: type[Any]) -> dict[str, Any]:
    """What stands behind the colon, as the fields of `kind` have it."""
    known = {field.name: str(field.type).partition(" ")[0] for field in fields(kind) if field.name != "seed"}
    found: dict[str, Any] = {}
    _, mark, rest = text.partition(":")
    for part in rest.split(",") if mark else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and value):
            raise RequestError(f"found {part!r}, expected key=value")
        if name.replace("-", "_") not in known:
            instead = "it in --seeds" if name == "seed" else f"one of {', '.join(known)}"
            raise RequestError(f"found {name!r}, expected {instead}")
        name = name.replace("-", "_")
        read, expected = _READ[known[name]]
        try:
            found[name] = read(value)
        except (ValueError, KeyError):
            raise RequestError(f"{name}: found {value!r}, expected {expected}") from None
    return found


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RequestError(f"--seeds: found {text!r}, expected whole numbers from 0, as in 0,1,2")
    return list(dict.fromkeys(map(int, parts)))


def _families(args: argparse.Namespace) -> list[str]:
    if (args.data is None) == (args.families is None):
        said = "neither" if args.data is None else "both"
        raise RequestError(f"--data and --families: found {said}, expected one of them")
    if (args.data is None) != (args.eval_data is None):
        said = "--eval-data beside --families" if args.data is None else "--data alone"
        raise RequestError(f"--eval-data: found {said}, expected --data and --eval-data together")
    if args.data is not None:
        return []
    if args.scorer is not None:
        raise RequestError(f"--scorer: found {args.scorer} beside --families, which have their own")
    names = list(dict.fromkeys(part.strip() for part in args.families.split(",")))
    for name in names:
        if name not in FAMILIES:
            raise RequestError(f"--families: found {name!r}, expected some of {', '.join(FAMILIES)}")
    return names


def _family_data(
    names: Sequence[str], number: int, seed: int
) -> tuple[list[untagged.Trace], list[Question], dict[str, Tagged]]:
    traces, questions, labels = [], [], {}
    for name in names:
        for index, problem in enumerate(islice(stream(seed, name, "train"), number)):
            trace = untagged.Trace(f"{name}-{seed}-{index}", problem.prompt, problem.trace)
            traces.append(trace)
            questions.append(Question(problem.prompt, str(problem.answer)))
            labels[trace.digest] = Tagged(trace.digest, trace.text, list(problem.hard), {})
    return traces, questions, labels


def _file_data(file: Path, number: int | None) -> tuple[list[untagged.Trace], list[Question]]:
    with _named("--data"):
        traces = list(islice(untagged.read_traces(file), number))
        if not traces:
            raise RequestError(f"{file}: found no traces, expected at least one")
        if len({trace.bare for trace in traces}) > 1:
            raise RequestError(f"{file}: found lines with 'question' and lines with 'prompt', expected one of the two: "
                               "--eval-data is asked as they are")  # fmt: skip
        chosen = {trace.prompt for trace in traces}
        return traces, [question for question in read_questions(file) if question.text in chosen]


def _file_questions(file: Path, number: int | None, scorer: str | None, *, bare: bool) -> Task:
    """Questions put like those trained on: bare ones by split/questions.py, else as they stand, without template."""
    with _named("--eval-data", f"--data {file.stem}: "):
        return replace(file_task(file.stem, file, number, scorer), chat=bare)


def _check_sources(sources: dict[str, Source], expected: str) -> None:
    """What a tagged file trains on must be put as it is asked later. Raises RequestError."""
    for path in sources.values():
        if isinstance(path, Path):
            found = {"question" if trace.bare else "prompt" for trace in read_traces(path, "--sources")}
            if found != {expected}:
                raise RequestError(f"--sources: {path}: found lines with {' and '.join(sorted(found))!r}, expected "
                                   f"{expected!r} in all of them, as in what is asked")  # fmt: skip


@contextmanager
def _named(flag: str, instead_of: str = "") -> Iterator[None]:
    try:
        yield
    except (RequestError, CheckpointError) as error:
        raise RequestError(f"{flag}: {str(error).removeprefix(instead_of)}") from None
