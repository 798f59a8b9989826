"""The rules of style that a machine can hold: sizes of files, banners, comments, what tests import."""

from __future__ import annotations

import ast
import functools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("loradash_kernels", "python", "csrc", "tests", "benchmarks", "examples", "tools")
FOREIGN = (".cpp", ".h", ".inc", ".cu", ".cuh", ".c")
CODE = sorted(
    file
    for room in ROOMS
    for file in (ROOT / room).rglob("*")
    if file.suffix in (".py", *FOREIGN) and not {"build", "__pycache__", ".venv"} & {*file.parts}
)
LONGEST = 400
VERBS = "is|are|was|were|has|have|had|do|does|can|must|may|might|will|would|should|needs?|takes?|gives?|holds?|stays?"
# Kernels' signatures and the arguments of their launches are tables, and so are the floors of the project.
TABLES = ("loradash_kernels/backends/triton/", "tests/project/test_floors.py")


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def python_files(*rooms: str) -> list[Path]:
    return [f for f in CODE if f.suffix == ".py" and name_of(f).startswith(rooms or ROOMS)]


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def comments(file: Path) -> list[tuple[int, str]]:
    """(line, text) of every comment; in C++, of those that have a line to themselves."""
    return [*found_comments(file)]


def found_comments(file: Path) -> Iterator[tuple[int, str]]:
    if file.suffix == ".py":
        with tokenize.open(file) as source:
            for token in tokenize.generate_tokens(source.readline):
                if token.type == tokenize.COMMENT:
                    yield token.start[0], token.string.lstrip("#").strip()
    else:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if line.lstrip().startswith("//"):
                yield number, line.strip().lstrip("/").strip()


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring of a Python file."""
    for node in ast.walk(tree(file)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def imported(module: ast.Module) -> Iterator[str]:
    """The modules that a file imports, and every name that it takes from one."""
    for node in ast.walk(module):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""


def imported_tests(module: ast.Module) -> list[str]:
    return [name for name in imported(module) if any(part.startswith("test_") for part in name.split("."))]


@pytest.mark.parametrize("room", ROOMS)
def test_files_are_short(room):
    lengths = {name_of(f): len(f.read_text().splitlines()) for f in CODE if name_of(f).startswith(f"{room}/")}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_there_are_no_banners(room):
    """A rule drawn in a comment marks a part that wants a file, or a sentence, of its own."""
    found = [
        f"{name_of(f)}:{line}"
        for f in CODE
        if name_of(f).startswith(f"{room}/")
        for line, text in comments(f)
        if re.match(r"[-=*#~]{3,}", text)
    ]
    assert found == []


def headless(text: str) -> bool:
    """Whether a comment starts with "Of ..." or "That of ..." and its first sentence has no verb of a common kind."""
    sentence = re.split(r"[.:;]\s", " ".join(text.split()))[0]
    return bool(re.match(r"(Of|(That|Those|The same) of)\b", sentence)) and not re.search(rf"\b({VERBS})\b", sentence)


@pytest.mark.parametrize("room", ROOMS)
def test_comments_have_a_head(room):
    """A comment or docstring that starts with "Of ..." or "That of ..." leaves out what it is about."""
    found = []
    for file in (f for f in CODE if name_of(f).startswith(f"{room}/")):
        continued = {line + 1 for line, _ in comments(file)}
        said = [(line, text) for line, text in comments(file) if line not in continued]
        said += docstrings(file) if file.suffix == ".py" else ()
        found += [f"{name_of(file)}:{line}: {text[:60]}" for line, text in said if headless(text)]
    assert found == []


@pytest.mark.parametrize("room", ROOMS)
def test_the_formatter_formats(room):
    off = [
        f"{name_of(f)}:{line}"
        for f in CODE
        if name_of(f).startswith(f"{room}/") and not name_of(f).startswith(TABLES)
        for line, text in comments(f)
        if re.search(r"fmt: (skip|off)|clang-format off", text)
    ]
    assert off == []


def test_no_test_imports_a_test():
    """What tests share lies in tests/support and, for the emulator, in tools/ptxsim/tests/kernels."""
    found = {name_of(f): imported_tests(tree(f)) for f in python_files("tests/", "tools/", "benchmarks/")}
    assert {name: tests for name, tests in found.items() if tests} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import operator.test_layouts",
        "from operator import test_layouts as layouts",
        "from . import test_layouts",
        "from .test_layouts import SHAPES",
        "from support.layouts import test_slices",
    ],
)
def test_imported_tests_are_found(line):
    assert imported_tests(ast.parse(f"def late():\n    {line}"))


def edits_search_path(node: ast.AST) -> bool:
    """A call of a method of sys.path, an assignment to it or a deletion from it; or sys.path under another name."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.ImportFrom):
        return node.module == "sys" and any(alias.name == "path" for alias in node.names)
    if isinstance(node, ast.Call):
        targets = [node.func.value] if isinstance(node.func, ast.Attribute) else []
    elif isinstance(node, (ast.Assign, ast.Delete)):
        targets = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    return any(ast.unparse(target).split("[")[0] == "sys.path" for target in targets)


def test_nobody_edits_the_search_path():
    """Packages are installed, pytest's `pythonpath` names the rooms of helpers, and Python that of a program it runs."""
    assert [name_of(f) for f in python_files() if any(map(edits_search_path, ast.walk(tree(f))))] == []


@pytest.mark.parametrize(
    ("line", "edits"),
    [
        ("sys.path.insert(0, folder)", True),
        ("sys.path[:0] = [folder]", True),
        ("sys.path += [folder]", True),
        ("sys.path: list[str] = []", True),
        ("del sys.path[0]", True),
        ("from sys import path", True),
        ("from sys import argv, path as places", True),
        ("print(sys.path, os.path.join(folder))", False),
        ("from os import path", False),
    ],
)
def test_edits_of_the_search_path_are_found(line, edits):
    assert any(map(edits_search_path, ast.walk(ast.parse(line)))) is edits
