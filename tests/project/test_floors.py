"""The floors of the project: arrows between files point down."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The rooms of a package, floor by floor: a file may import those above it in its list. loradash may import loradash_kernels,
# never the other way.
FLOORS = {
    "loradash_kernels": (
        "_version", "files", "notices", "timing", "random", "calls", "backends", "packed_weights", "composite", "ops",
        "checkpointing", "flops", "autograd", "group_autograd", "sharded", "arguments", "functional", "group", "rows", "experts", "directions", "testing", "__init__",
    ),
    "loradash_kernels/backends": (
        "__init__", "extension", "cards", "measurements", "tuning", "fused_dropout", "products", "reference", "cpu", "cuda",
        "triton", "registry",
    ),
    "loradash_kernels/backends/triton": (
        "__init__", "target", "kernels", "tiles", "problem", "strategies", "plan", "launcher", "prepared", "prelaunch", "backend",
    ),
    "loradash_kernels/backends/triton/plan": ("__init__", "forward", "backward"),
    "loradash_kernels/backends/triton/kernels": ("__init__", "common", "forward", "backward", "descriptor", "prelaunch"),
    "loradash_kernels/directions": (
        "__init__", "kernels", "linalg", "randomized_svd", "decompositions", "policy", "arguments", "checks", "attempts", "choice",
        "decompose", "rates", "kept",
    ),
    "python/loradash": (
        "presets", "config", "meeting", "zero", "distributed", "units", "formats", "slices", "base_layers", "quantised", "merging", "parked", "linear", "convolution", "expert_modules", "experts",
        "data_parallel", "state", "counts",
        "targets", "attention", "bypass", "tensor_parallel", "model", "grouping", "split", "adapters", "combining", "unload", "warming", "checkpoint", "hotswap", "peft_layout", "export", "streams", "background",
        "fingerprint", "cache", "background_process", "batches", "prelaunch", "watches", "schedule", "training", "optimizer", "plots", "analysis", "integrations",
        "devices", "machine", "cli", "__init__",
    ),
    "python/loradash/integrations": ("__init__", "callbacks", "lightning", "peft", "subspace_tuning", "transformers"),
    "python/loradash/integrations/peft": (
        "fused", "accelerated_layer", "versions", "registration", "config", "files", "views", "merging", "layer", "accelerator",
        "model", "__init__",
    ),
    "python/loradash/integrations/subspace_tuning": (
        "dialects", "state_dicts", "layers", "merged", "kinds", "run", "patch", "drop_in", "settings", "convert", "__init__",
    ),
}  # fmt: skip


# A package's face and its version go without saying: the page does not draw them.
UNDRAWN = {"__init__", "_version"}


def imported(source: str, package: str) -> set[str]:
    """Full names of what a file of `package` imports, however it is written."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def dotted(folder: str) -> str:
    return folder.removeprefix("python/").replace("/", ".")


def neighbours(source: str, package: str, folder: str) -> set[str]:
    """Which names of FLOORS[folder] a file of `package` imports; what stands for no file there is its __init__'s."""
    inside = [f"{name}." for name in imported(source, package) if f"{name}.".startswith(f"{dotted(folder)}.")]
    firsts = {name.removeprefix(f"{dotted(folder)}.").split(".")[0] for name in inside}
    return {first if first in FLOORS[folder] else "__init__" for first in firsts}


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_point_down(package):
    order, folder = FLOORS[package], ROOT / package
    rooms = {f.parent.name: f.parent for f in folder.glob("*/__init__.py")}
    files = {f.stem: f for f in folder.glob("*.py")}
    assert {*files, *rooms} == set(order), "a new file takes its place in the order of floors"
    for name, path in {**files, **rooms}.items():
        for file in [path] if path.suffix else path.rglob("*.py"):
            inside = dotted(file.parent.relative_to(ROOT).as_posix())
            # The files of a room may import each other, which is for the room's own floors to judge.
            for other in neighbours(file.read_text(), inside, package) - {name}:
                assert order.index(other) < order.index(name), f"{file} imports {other}"
            if package.startswith("loradash_kernels"):
                assert not {n for n in imported(file.read_text(), inside) if n.split(".")[0] == "loradash"}, file


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from ... import calls", {"calls"}),
        ("from ...calls import ForwardCall", {"calls"}),
        ("from .. import tuning", {"backends"}),
        ("from .tiles import TARGETS", {"backends"}),
        ("from loradash_kernels import functional", {"functional"}),
        ("from loradash_kernels import dash_linear", {"__init__"}),
        ("from loradash_kernels.functional import dash_linear", {"functional"}),
        ("import loradash_kernels", {"__init__"}),
        ("def f():\n    import loradash_kernels.ops as o", {"ops"}),
        ("from loradash import DashLinear", set()),
    ],
)
def test_every_way_of_importing_is_seen(line, expected):
    assert neighbours(line, "loradash_kernels.backends.triton", "loradash_kernels") == expected


def drawn(picture: str) -> list[str]:
    """The names in the first column, which ends at the first two spaces after the indentation."""
    columns = [re.split(r"\s{2,}", line.strip())[0] for line in picture.splitlines()]
    return [name for column in columns for name in re.findall(r"\w+", column)]


def test_the_page_draws_the_floors():
    """Top first. What stands beside a package's own name, on the line that is split here, says what it is about."""
    picture = (ROOT / "docs" / "design.md").read_text().split("\n    python/loradash/")[1].split("\n    csrc/")[0]
    stateful, stateless = (part.partition("\n")[2] for part in picture.split("\n    loradash_kernels/"))
    for package, part in (("python/loradash", stateful), ("loradash_kernels", stateless)):
        assert drawn(part) == [name for name in reversed(FLOORS[package]) if name not in UNDRAWN], package


def test_only_autograd_saves_tensors():
    users = [f for f in (ROOT / "loradash_kernels").rglob("*.py") if "save_for_backward" in f.read_text()]
    wanted = ["loradash_kernels/autograd.py", "loradash_kernels/group_autograd.py"]
    assert sorted(f.relative_to(ROOT).as_posix() for f in users) == wanted


def test_only_bindings_know_torch():
    users = [
        f for f in (ROOT / "csrc").rglob("*") if f.is_file() and ("torch/" in f.read_text() or "ATen/" in f.read_text())
    ]
    assert {f.parent.name for f in users} == {"bindings"}
