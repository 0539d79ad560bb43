"""src/splitdecode/_C.pyi names what the extension has, with the extension's own argument names and defaults."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from splitdecode import _C

STUB = Path(__file__).resolve().parents[2] / "src" / "splitdecode" / "_C.pyi"


def stubbed() -> dict[str, ast.AST]:
    """{"name" or "Class.name": its node} of everything the stub declares."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(STUB.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        for below in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(below, ast.FunctionDef):
                found[f"{node.name}.{below.name}"] = below
            elif isinstance(below, ast.Assign):
                found[f"{node.name}.{ast.unparse(below.targets[0])}"] = below
    return found


def bound(key: str, value: object) -> bool:
    """Bound by csrc/ for its callers, not inherited or made by nanobind."""
    return not key.startswith("_") or (
        key in ("__init__", "__len__", "__repr__") and hasattr(value, "__nb_signature__")
    )


def public() -> dict[str, object]:
    """The same of the extension; of an enum its members only."""
    found: dict[str, object] = {}
    for name, thing in vars(_C).items():
        if name.startswith("_"):
            continue
        found[name] = thing
        if isinstance(thing, type):
            members = getattr(thing, "__members__", None) or vars(thing)
            found |= {f"{name}.{key}": value for key, value in members.items() if bound(key, value)}
    return found


STUBBED, PUBLIC = stubbed(), public()
CALLABLE = sorted(name for name, thing in PUBLIC.items() if hasattr(thing, "__nb_signature__"))


def test_both_name_the_same() -> None:
    assert set(STUBBED) == set(PUBLIC)
    assert len(CALLABLE) > 50


@pytest.mark.parametrize("name", CALLABLE)
def test_arguments_are_the_extensions(name: str) -> None:
    """Names, order and defaults."""
    node = STUBBED[name]
    assert isinstance(node, ast.FunctionDef)
    ((signature, _, defaults),) = PUBLIC[name].__nb_signature__  # type: ignore[attr-defined]
    signature = re.sub(r"ndarray\[[^\]]*\]", "ndarray", signature)
    theirs = ast.parse(re.sub(r"\\(\d+)", lambda m: repr(defaults[int(m[1])]), signature) + ": ...").body[0]
    assert isinstance(theirs, ast.FunctionDef)
    assert [a.arg for a in node.args.args] == [a.arg for a in theirs.args.args]
    assert [ast.literal_eval(d) for d in node.args.defaults] == [ast.literal_eval(d) for d in theirs.args.defaults]


def test_members_of_enums() -> None:
    for kind in (_C.EventKind, _C.Phase):
        for member in kind:
            node = STUBBED[f"{kind.__name__}.{member.name}"]
            assert isinstance(node, ast.Assign)
            assert ast.literal_eval(node.value) == member.value
