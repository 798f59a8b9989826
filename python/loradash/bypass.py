"""Parents that multiply by a child's weight without calling the child: an adapter there would be passed by."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from .attention import are_made_to_call
from .linear import DashLinear
from .state import HOST

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
# Methods that run once, or write weights.
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


def refuse_fusing(parent: nn.Module) -> None:
    """Makes methods such as diffusers' `fuse_projections` raise while children that they would fuse have adapters.

    They make one layer of several weights, and adapters beside these would be passed by. Where the adapters are in the
    weights (merge, merge_and_unload) they fuse as ever.
    """
    for cls in type(parent).__mro__:
        for method in filter(re.compile("fuse_").match, vars(cls)):
            children = _methods(cls).get(method, [])
            if any(_has_adapter(child_at(parent, child)) for child in children):
                parent.__dict__.setdefault(method, _Fuses(parent, method, children))


def allow_fusing(parent: nn.Module) -> None:
    """Undoes `refuse_fusing`."""
    for name in [name for name, value in vars(parent).items() if isinstance(value, _Fuses)]:
        del parent.__dict__[name]


def _has_adapter(module: nn.Module | None) -> bool:
    """Has it an adapter of ours that is not merged, by whichever door?"""
    ours = isinstance(module, DashLinear) or hasattr(type(module), HOST)
    return ours and not cast(Any, module).merged


class _Fuses:
    """Takes the place of a module's method that fuses its children's weights; goes along with copies and pickles."""

    def __init__(self, parent: nn.Module, method: str, children: list[str]) -> None:
        self.parent, self.method, self.children = parent, method, children

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = [child for child in self.children if _has_adapter(child_at(self.parent, child))]
        if found:
            raise ValueError(
                f"{type(self.parent).__name__}.{self.method} makes one layer of the weights of {', '.join(found)}, and would pass "
                "their adapters by; merge these before (merge_and_unload)"
            )
        return getattr(type(self.parent), self.method)(self.parent, *args, **kwargs)


def _uses(cls: Any) -> dict[str, str]:
    """The paths `child` of every use of `self.child.weight` in a class, with the method."""
    found: dict[str, str] = {}
    for method, children in _methods(cls).items():
        if not _SETUP.search(method):
            for child in children:
                found.setdefault(child, f"{cls.__name__}.{method}")
    return found


@functools.cache
def _methods(cls: Any) -> dict[str, list[str]]:
    """The paths `child` of the uses of `self.child.weight` in a class, by method; nothing for a class without source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    methods = (node for node in getattr(tree.body[0], "body", ()) if isinstance(node, ast.FunctionDef))
    return {method.name: list(dict.fromkeys(_used_weights(method))) for method in methods}


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
