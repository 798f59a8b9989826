"""The way of x through a layer and of W through pre-launch: no file twice, and as docs/design.md lists it."""

from __future__ import annotations

import functools
import re

import loradash
import pytest
import torch
from support.walks import ROOT, repeated, walks
from torch import nn

from loradash_kernels.testing import make_case, run

DESIGN = (ROOT / "docs" / "design.md").read_text()


@functools.cache
def listed(row: str) -> list[str]:
    """The files of a row of the page's tables."""
    (line,) = re.findall(rf"^\| {row} \| (.*) \|$", DESIGN, re.M)
    return re.findall(r"`([^`]+)`", line)


def check_row(row: str, chains: set[tuple[str, ...]]) -> None:
    """The Python files of a row lie on one way: each was reached, after those before it or called by the same file."""
    assert repeated(chains) == []
    python = [file for file in listed(row) if file.endswith(".py")]
    reached = {file for chain in chains for file in chain}
    assert set(python) <= reached, set(python) - reached
    for chain in chains:
        order = [python.index(file) for file in chain if file in python]
        assert order == sorted(order), chain


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    model = loradash.apply_dash(
        nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 72)), loradash.DashConfig(r=2, directions=2)
    )
    for layer in model:
        nn.init.normal_(layer.lora_b)
    return model


def test_of_x_through_a_backend(backend, device):
    case = make_case(20, 24, 16, 4, 2, torch.bfloat16, dropout_p=0.1, device=device)
    check_row(backend, walks(lambda: run(case, backend)))


def test_of_x_through_a_layer(adapted):
    chains = walks(lambda: adapted(torch.randn(3, 40)).sum().backward())
    assert repeated(chains) == []
    (shared,) = re.findall(r"^All backends: (.*?)\. Then", DESIGN, re.M | re.S)
    assert tuple(re.findall(r"`([^`]+)`", shared)) in {chain[:5] for chain in chains}


def test_of_w_through_pre_launch(adapted):
    check_row("now", walks(lambda: loradash.prelaunch(adapted, progress=False)))


def test_of_w_that_was_decomposed_before(adapted, tmp_path):
    cache = loradash.SpectralCache(tmp_path)
    for layer in adapted:
        cache.keep(layer.weight_nk())
    check_row("before", walks(lambda: loradash.prelaunch(adapted, progress=False, cache=cache)))


@pytest.mark.parametrize("row", ["cpu", "cuda", "triton", "reference", "now", "before"])
def test_the_page_lists_files_once(row):
    files = listed(row)
    assert files and len({*files}) == len(files)
    assert [file for file in files if not (ROOT / file).is_file()] == []
