"""The authors' layers (`benchmarks.front_ends.authors`) for tests: without a clone, those that want their files skip."""

from __future__ import annotations

import functools

import pytest

from benchmarks.front_ends import authors
from benchmarks.front_ends.authors import DIALECTS, SOURCES
from benchmarks.front_ends.parity import CLASSES, OPTIMIZERS, WIDTH, batches, losses_of

__all__ = [
    "CLASSES",
    "DIALECTS",
    "OPTIMIZERS",
    "SOURCES",
    "WIDTH",
    "batches",
    "losses_of",
    "make_layer",
    "make_model",
    "skip_without",
    "trained",
]

_IMPORTS = {"loralib": (), "cr_mr": ("transformers",), "sdg": ("peft", "transformers")}


def skip_without(dialect, source):
    """Skips where what a source needs is not there."""
    if source == "restated":
        return
    if authors.CLONE is None:
        pytest.skip("LORADASH_AUTHORS names no clone of the authors' repository")
    for module in _IMPORTS[dialect]:
        pytest.importorskip(module)


def _skipping(make):
    @functools.wraps(make)
    def made(dialect, source, *arguments, **settings):
        skip_without(dialect, source)
        return make(dialect, source, *arguments, **settings)

    return made


make_layer, make_model = _skipping(authors.make_layer), _skipping(authors.make_model)


def trained(model, steps, schedule=None, **arguments):
    losses_of(model, steps, schedule=schedule, **arguments)
    return model
