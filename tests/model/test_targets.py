"""What target_modules names is adapted or refused by name: every layer of torch.nn that has numbers, lists and expressions."""

from __future__ import annotations

import inspect

import pytest
from loradash import DashConfig, apply_dash, dash_layers, dash_state, load_adapter, save_adapter
from support.layers import NAMED
from torch import nn

ADAPTED = {"Linear", "Conv1d", "Conv2d", "Conv3d"}


def made(cls: type[nn.Module]) -> nn.Module | None:
    """An instance, its kernel of one element; None for a class that takes other arguments."""
    for arguments in ((), (8,), (8, 8), (8, 8, 1)):
        try:
            return cls(*arguments)
        except (TypeError, ValueError):
            continue
    return None


def parametric() -> dict[str, nn.Module]:
    """torch.nn's layers that have parameters of their own."""
    classes = [c for c in vars(nn.modules).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    layers = {cls.__name__: layer for cls in classes if (layer := made(cls)) is not None}
    return {name: layer for name, layer in layers.items() if any(p is not None for p in layer._parameters.values())}


@pytest.mark.filterwarnings("ignore")
def test_every_layer_of_torch():
    layers = parametric()
    assert len(layers) > 35 and layers.keys() >= {*ADAPTED, "Embedding", "EmbeddingBag", "Bilinear", "LSTM", "GRU"}
    for name, layer in layers.items():
        model = nn.ModuleDict({"layer": layer, "other": nn.Linear(8, 8)})
        config = DashConfig(r=2, directions=2, target_modules=["layer", "other"])
        if name in ADAPTED:
            assert {*dash_layers(apply_dash(model, config))} == {"layer", "other"}
            continue
        with pytest.raises(ValueError, match=f"layer: {name}"):
            apply_dash(model, config)
        assert model["layer"] is layer and type(model["other"]) is nn.Linear


@pytest.mark.parametrize("row", NAMED)
def test_the_rows_of_the_table(row):
    make, outcome = NAMED[row]
    for layer in make():
        model = nn.ModuleDict({"layer": layer, "other": nn.Linear(8, 8)})
        config = DashConfig(r=2, directions=2, target_modules=["layer"])
        if outcome == "adapted":
            assert {*dash_layers(apply_dash(model, config))} == {"layer"}
            continue
        with pytest.raises(ValueError, match=f"layer: {type(layer).__name__}"):
            apply_dash(model, config)


def tree() -> nn.ModuleDict:
    """Linear layers, and beside them what is none."""
    attention = nn.ModuleDict({"q": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "proj": nn.Linear(8, 8)})
    patches = nn.ModuleDict({"proj": nn.Conv2d(3, 8, 4, 4), "mix": nn.Conv2d(8, 8, 1)})
    return nn.ModuleDict({"attention": attention, "patches": patches, "words": nn.Embedding(9, 8)})


def adapted(**settings) -> set[str]:
    return {*dash_layers(apply_dash(tree(), DashConfig(r=2, directions=2, **settings)))}


def test_without_names_every_linear_layer_is_taken_and_nothing_else():
    assert adapted() == {"attention.q", "attention.proj"}


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["proj"], r"names layers that cannot be adapted: patches\.proj: Conv2d\(3, 8, kernel_size=\(4, 4\)"),
        (["q", "words"], r"words: Embedding\(9, 8\) is no linear layer"),
        (["q", "norm"], r"attention\.norm: LayerNorm"),
        (".*", r"patches\.proj: .*words"),
        ("patches.*", r"patches\.proj"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(targets, said):
    with pytest.raises(ValueError, match=said):
        adapted(target_modules=targets)


def test_what_would_be_refused_can_be_left_out_or_trained_whole():
    both = {"attention.q", "attention.proj"}
    assert adapted(target_modules=["q", "proj"], exclude_modules=["patches.proj"]) == both
    assert adapted(target_modules=["q", "proj"], trainable_modules=["patches"]) == both
    assert adapted(target_modules=".*", exclude_modules=["patches.proj", "words"]) == {*both, "patches.mix"}
    with pytest.raises(ValueError, match="exclude_modules: 'nowhere' matches no"):
        adapted(target_modules=["q"], exclude_modules=["nowhere"])


def test_an_expression_means_matrices_and_passes_over_norms():
    assert adapted(target_modules=r"attention\..*") == {"attention.q", "attention.proj"}
    assert adapted(target_modules=r"patches\.m.*") == {"patches.mix"}


def test_the_matrix_of_an_attention_is_not_passed_over():
    """A layer of nn.MultiheadAttention has one matrix for q, k and v, which no adapter of its child out_proj reaches."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"attention: MultiheadAttention"):
        apply_dash(model, DashConfig(target_modules=".*attention.*"))
    assert {*dash_layers(apply_dash(model, DashConfig(target_modules=["out_proj"])))} == {"attention.out_proj"}


@pytest.mark.parametrize(
    ("before", "excluded"),
    [({"exclude_modules": ["q"]}, ["q", "patches.proj", "words", "mix"]), ({}, ["patches.proj", "words", "mix"])],
)
def test_adapters_of_older_versions_load(before, excluded, tmp_path):
    """Their settings may name layers that were passed over then."""
    model = apply_dash(tree(), DashConfig(r=2, directions=2, target_modules=".*", exclude_modules=excluded))
    dash_state(model).config = DashConfig(r=2, directions=2, target_modules=".*", **before)
    loaded = load_adapter(tree(), save_adapter(model, tmp_path))
    assert {*dash_layers(loaded)} == {*dash_layers(model)}
    again = load_adapter(tree(), save_adapter(loaded, tmp_path / "again"))
    assert {*dash_layers(again)} == {*dash_layers(model)}
