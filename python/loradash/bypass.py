"""Parents that multiply by a child's weight without calling the child: an adapter there would be passed by."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from .attention import are_made_to_call

# A read of one of these asks about the weight and does not use it.
_FACTS = (
    "dtype",
    "device",
    "shape",
    "size",
    "dim",
    "ndim",
    "numel",
    "is_meta",
    "requires_grad",
    "grad",
    "is_cuda",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_tensor",
)
# Methods that run once, or write weights: diffusers' attention has a fuse_projections that nobody calls in training.
_SETUP = re.compile(r"^(__init__|extra_repr)$|^(un)?fuse_|init|reset|tie|load|save|prune|resize")
_QUESTIONS = ("isinstance", "hasattr", "getattr", "setattr", "id", "type")


def bypassed_children(parent: nn.Module) -> dict[str, str]:
    """Children by dotted path whose weight the parent's own methods use, with the place: "MambaMixer.forward".

    Read from the source of the parent's classes: `self.<child>.weight`, wherever it is more than a question about dtype,
    device or shape. What torch.nn's own modules do is mended (`attention`) and left out; so is a class without source.
    """
    mended = are_made_to_call(parent)
    found: dict[str, str] = {}
    for cls in type(parent).__mro__:
        if cls is nn.Module:
            break
        if mended is None or not issubclass(mended, cls):
            for child, place in _uses(cls).items():
                found.setdefault(child, place)
    return {child: place for child, place in found.items() if child_at(parent, child) is not None}


def mended_children(parent: nn.Module) -> set[str]:
    """Children by dotted path whose weight torch.nn's own code uses: `attention` makes it call our layers, nobody else's."""
    mended: Any = are_made_to_call(parent)
    return {child for child in _uses(mended) if child_at(parent, child) is not None} if mended else set()


def child_at(parent: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    module: object = parent
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


@functools.cache
def _uses(cls: Any) -> dict[str, str]:
    """The paths `child` of every use of `self.child.weight` in a class, with the method."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    definition = tree.body[0]
    found: dict[str, str] = {}
    for method in getattr(definition, "body", ()):
        if isinstance(method, ast.FunctionDef) and not _SETUP.search(method.name):
            for child in _used_weights(method):
                found.setdefault(child, f"{cls.__name__}.{method.name}")
    return found


def _used_weights(method: ast.FunctionDef) -> Iterator[str]:
    owner = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value)
            if path and not _only_asks(node, owner):
                yield path


def _path(node: ast.AST) -> str:
    """`a.b` of the expression self.a.b; empty for any other."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ""


def _only_asks(node: ast.AST, owner: dict[ast.AST, ast.AST]) -> bool:
    above = owner.get(node)
    if isinstance(above, ast.Attribute):
        return above.attr in _FACTS or above.attr.startswith("_")
    if isinstance(above, ast.Call) and isinstance(above.func, ast.Name):
        return above.func.id in _QUESTIONS
    # x.to(weight) asks for its dtype and device.
    if isinstance(above, ast.Call) and isinstance(above.func, ast.Attribute):
        return above.func.attr in ("to", "type_as", "is_tensor")
    # Handing the tensor itself over: `weight is None`, `return self.head.weight`.
    return isinstance(above, ast.Return) or (
        isinstance(above, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in above.ops)
    )
