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


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (alias.name for alias in node.names if node.module is None)


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
    found = [
        f"{name_of(f)} imports {module}"
        for f in python_files("tests/", "tools/", "benchmarks/")
        for module in imported(f)
        if any(part.startswith("test_") for part in module.split("."))
    ]
    assert found == []


def edits_search_path(node: ast.AST) -> bool:
    """A call of a method of sys.path, or an assignment to it."""
    if isinstance(node, ast.Call):
        targets = [node.func.value] if isinstance(node.func, ast.Attribute) else []
    elif isinstance(node, ast.Assign):
        targets = node.targets
    else:
        targets = [node.target] if isinstance(node, ast.AugAssign) else []
    return any(ast.unparse(target).split("[")[0] == "sys.path" for target in targets)


def test_nobody_edits_the_search_path():
    """Packages are installed, and pytest's `pythonpath` names the rooms of helpers."""
    files = python_files("tests/", "benchmarks/", "tools/")
    assert [name_of(f) for f in files if any(map(edits_search_path, ast.walk(tree(f))))] == []
