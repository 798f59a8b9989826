"""The floors of the project: arrows between files point down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The rooms of a package, floor by floor: a file may import those above it in its list. loradash may import loradash_kernels,
# never the other way.
FLOORS = {
    "loradash_kernels": (
        "_version", "files", "notices", "random", "calls", "backends", "packed_weights", "composite", "ops", "flops", "autograd",
        "arguments", "functional", "directions", "testing", "__init__",
    ),
    "loradash_kernels/backends": ("__init__", "extension", "tuning", "reference", "cpu", "cuda", "triton", "registry"),
    "loradash_kernels/backends/triton": (
        "__init__", "target", "kernels", "tiles", "problem", "strategies", "plan", "prelaunch", "backend",
    ),
    "loradash_kernels/backends/triton/plan": ("__init__", "forward", "backward"),
    "loradash_kernels/backends/triton/kernels": ("__init__", "common", "forward", "backward", "descriptor", "prelaunch"),
    "loradash_kernels/directions": (
        "__init__", "kernels", "linalg", "randomized_svd", "decompositions", "policy", "arguments", "checks", "attempts", "choice",
        "decompose", "rates", "kept",
    ),
    "python/loradash": (
        "config", "distributed", "base_layers", "quantised", "linear", "state", "targets", "attention", "bypass", "model",
        "checkpoint", "integrations", "export", "background", "cache", "background_process", "prelaunch", "schedule", "plots",
        "analysis", "cli", "__init__",
    ),
    "python/loradash/integrations": ("__init__", "peft_layout"),
}  # fmt: skip


def imports(file: Path) -> set[tuple[int, str]]:
    """(level, module) of every import statement in a file; level 0 is absolute."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(node.level, name or "") for name in names}
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_point_down(package):
    order, folder = FLOORS[package], ROOT / package
    rooms = {f.parent.name: f.parent for f in folder.glob("*/__init__.py")}
    files = {f.stem: f for f in folder.glob("*.py")}
    assert {*files, *rooms} == set(order), "a new file takes its place in the order of floors"
    for name, path in {**files, **rooms}.items():
        for file in [path] if path.suffix else path.rglob("*.py"):
            for level, module in imports(file):
                above = level - len(file.relative_to(folder).parts)
                first = module.split(".")[0]
                if level and above == 0:
                    assert order.index(first) < order.index(name), f"{file} imports {module}"
                elif not level and package.startswith("loradash_kernels"):
                    assert first != "loradash", f"{file} imports {module}"


def test_only_autograd_saves_tensors():
    users = [f.name for f in (ROOT / "loradash_kernels").glob("*.py") if "save_for_backward" in f.read_text()]
    assert users == ["autograd.py"]


def test_only_bindings_know_torch():
    users = [
        f for f in (ROOT / "csrc").rglob("*") if f.is_file() and ("torch/" in f.read_text() or "ATen/" in f.read_text())
    ]
    assert {f.parent.name for f in users} == {"bindings"}
