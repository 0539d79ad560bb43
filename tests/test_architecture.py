"""The laws of the house, kept by reading the sources: floors, the one door to the kernels, pairs instead of twins.

    F0 config errors | F1 _C kernels | F2 ops | F3 models | F4 runtime | F5 split | F6 requests decoder | F7 the rest

A file imports its own floor or a lower one. Each `*_breaches` takes sources and tells what is wrong with them; the
planted breaches at the end show that every law bites.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "config": 0,
    "errors": 0,
    "_C": 1,
    "kernels": 1,
    "ops": 2,
    "models": 3,
    "runtime": 4,
    "split": 5,
    "requests": 6,
    "decoder": 6,
}
CODE = {".py", ".pyi", ".cpp", ".hpp", ".h", ".cu", ".cuh", ".md"}
ASKED = {"max_large_tokens"}  # a caller's word for a budget; config.py has every word a caller may use
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Source:
    """One Python file: its path below the root, its dotted module name, its syntax tree."""

    path: str
    module: str
    tree: ast.Module

    @property
    def floor(self) -> int:
        return floor(self.module)


def floor(module: str) -> int:
    parts = module.split(".")
    return FLOORS.get(parts[1], 7) if len(parts) > 1 else 7


def files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        for here, below, names in os.walk(root / folder):  # does not follow the kernels symlink
            below[:] = sorted(name for name in below if not name.startswith((".", "__pycache__")))
            yield from (Path(here) / name for name in sorted(names))


def sources(root: Path) -> list[Source]:
    found = []
    for base, package in (("src", ""), ("triton_kernels", "splitdecode.kernels.")):
        for path in files(root, base):
            if path.suffix == ".py":
                dotted = ".".join(path.relative_to(root / base).with_suffix("").parts)
                found.append(Source(str(path.relative_to(root)), package + dotted, ast.parse(path.read_text("utf-8"))))
    return found


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported, at any depth, by statement or by import_module()."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = source.module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every name, attribute, argument, keyword, function, class and import; strings are no names."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield from ((getattr(node, "lineno", 0), part) for part in name.split("."))


def words(name: str) -> list[str]:
    return [word for word in re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().split("_") if word]


def floor_breaches(source: Source) -> Iterator[str]:
    for line, name in imports(source):
        if name.split(".")[0] != "splitdecode":
            continue
        if floor(name) > source.floor:
            yield f"{source.path}:{line}: F{source.floor} imports {name}, F{floor(name)}"
        door = source.module == "splitdecode.ops" or source.module.startswith("splitdecode.kernels.")
        if name.startswith("splitdecode.kernels") and not door:
            yield f"{source.path}:{line}: only ops.py imports the kernels"


def role_breaches(source: Source) -> Iterator[str]:
    if source.floor < FLOORS["split"]:
        for line, name in identifiers(source.tree):
            if name == "Role" or ({"small", "large"} & set(words(name)) and name not in ASKED):
                yield f"{source.path}:{line}: {name} names a role below split/"


def twin_breaches(source: Source) -> Iterator[str]:
    names = {name for _, name in identifiers(source.tree) if name.islower()}
    for name in sorted(names):
        twin = re.sub(r"(?<![a-z])small(?![a-z])", "large", name)
        if twin != name and twin in names and words(name) != ["small"]:
            yield f"{source.path}: twins {name} and {twin}: a Pair is indexed by a Role"


def safety_breaches(source: Source) -> Iterator[str]:
    torches = {"torch"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            torches |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
    for line, name in imports(source):
        if name.split(".")[0] in UNSAFE or re.fullmatch(r"torch(\.\w+)*\.load", name):
            yield f"{source.path}:{line}: unsafe import {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node).split(".")[0] in torches:
            yield f"{source.path}:{node.lineno}: unsafe {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield f"{source.path}:{node.lineno}: trust_remote_code"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"{source.path}:{node.lineno}: allow_pickle"
    for line, name in identifiers(source.tree):
        if name == "trust_remote_code":
            yield f"{source.path}:{line}: trust_remote_code"


def file_breaches(root: Path) -> Iterator[str]:
    for path in files(root, "src", "csrc", "triton_kernels", "benchmarks"):
        if path.suffix in CODE and not {"data", "results"} & set(path.relative_to(root).parts):
            lines = len(path.read_text("utf-8").splitlines())
            if lines > 400:
                yield f"{path.relative_to(root)}: {lines} lines, over 400"
    for path in files(root, "src", "triton_kernels", "benchmarks", "tests"):
        text = path.read_text("utf-8") if path.suffix == ".py" else ""
        if text.strip() and ast.get_docstring(ast.parse(text)) is None:
            yield f"{path.relative_to(root)}: does not open with a docstring"


def breaches(root: Path) -> list[str]:
    laws = (floor_breaches, role_breaches, twin_breaches, safety_breaches)
    return [b for source in sources(root) for law in laws for b in law(source)] + list(file_breaches(root))


def test_the_laws_hold() -> None:
    read = {source.module.split(".")[1] for source in sources(ROOT)}
    assert {"errors", "models", "runtime", "split"} <= read, "the checker no longer finds the sources"
    assert breaches(ROOT) == []


def test_import_is_light_and_leaves_the_environment_alone() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import splitdecode; "
        "assert dict(os.environ) == before, 'os.environ changed'; "
        "heavy = {'triton', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


CLEAN = '"""Clean."""\nfrom splitdecode.errors import SplitDecodeError\nlargest = smallest = 0\n'
PLANTS = {
    "upwards": ("src/splitdecode/ops.py", "from splitdecode.models import config", "F2 imports splitdecode.models"),
    "upwards from the package": ("src/splitdecode/models/a.py", "from splitdecode import decoder", "F3 imports"),
    "the front door": ("src/splitdecode/runtime/a.py", "import splitdecode", "F4 imports splitdecode, F7"),
    "relative": ("src/splitdecode/runtime/a.py", "from ..split import roles", "F4 imports splitdecode.split.roles"),
    "in a function": ("src/splitdecode/models/a.py", "def f():\n    import splitdecode.runtime.b", "F3 imports"),
    "by name": ("src/splitdecode/models/a.py", "importlib.import_module('splitdecode.split')", "F3 imports"),
    "kernel upwards": ("triton_kernels/a.py", "from splitdecode import ops", "F1 imports splitdecode.ops"),
    "second door": ("src/splitdecode/runtime/a.py", "from splitdecode.kernels.host.rope import rope", "only ops.py"),
    "second door, whole": ("src/splitdecode/cli.py", "from splitdecode import kernels", "only ops.py"),
    "Role": ("src/splitdecode/runtime/a.py", "def f(role: Role): pass", "Role names a role"),
    "small": ("src/splitdecode/config.py", "small = 1", "small names a role"),
    "argument": ("triton_kernels/a.py", "def f(large_ids): pass", "large_ids names a role"),
    "attribute": ("src/splitdecode/models/a.py", "x.lane_small.y", "lane_small names a role"),
    "class": ("src/splitdecode/runtime/a.py", "class LargeRunner: pass", "LargeRunner names a role"),
    "twins": ("src/splitdecode/split/a.py", "def f(small_ids, large_ids): pass", "twins small_ids"),
    "twin attributes": ("src/splitdecode/cli.py", "x._small_ids = x._large_ids", "twins _small_ids"),
    "twins, last": ("src/splitdecode/split/a.py", "ids_small = ids_large = 0", "twins ids_small"),
    "torch.load": ("src/splitdecode/cli.py", "import torch as t\nt.load('x')", "unsafe t.load"),
    "torch.jit.load": ("src/splitdecode/cli.py", "torch.jit.load('x')", "unsafe torch.jit.load"),
    "from torch": ("src/splitdecode/cli.py", "from torch import load", "unsafe import torch.load"),
    "pickle": ("src/splitdecode/cli.py", "def f():\n    import pickle", "unsafe import pickle"),
    "allow_pickle": ("src/splitdecode/cli.py", "numpy.load('x', allow_pickle=True)", "allow_pickle"),
    "remote code": ("src/splitdecode/cli.py", "f(trust_remote_code=False)", "trust_remote_code"),
    "remote code, key": ("src/splitdecode/cli.py", "{'trust_remote_code': 1}", "trust_remote_code"),
    "long": ("benchmarks/a.py", "x = 0\n" * 400, "over 400"),
    "long C++": ("csrc/a.cpp", "//\n" * 401, "over 400"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_breach_is_found(tmp_path: Path, plant: str) -> None:
    for folder in ("models", "runtime", "split"):
        (tmp_path / "src/splitdecode" / folder).mkdir(parents=True)
    for folder in ("csrc", "triton_kernels", "benchmarks", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "src/splitdecode/ops.py").write_text(CLEAN + "from splitdecode.kernels.host.rope import rope\n")
    (tmp_path / "triton_kernels/rope.py").write_text(CLEAN + "from splitdecode.kernels.contract import expect\n")
    (tmp_path / "src/splitdecode/split/pair.py").write_text(
        CLEAN + "def f(*, small, large, large_prompt): Role.SMALL\n"
    )
    assert breaches(tmp_path) == []
    path, text, wanted = PLANTS[plant]
    (tmp_path / path).write_text(CLEAN + text + "\n" if path.endswith(".py") else text)
    found = breaches(tmp_path)
    assert found, plant
    assert all(wanted in line for line in found)


def test_a_missing_docstring_is_found(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("import os\n")
    (tmp_path / "tests/__init__.py").write_text("")
    assert breaches(tmp_path) == ["tests/test_a.py: does not open with a docstring"]
