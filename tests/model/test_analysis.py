"""`loradash decompose` and `loradash directions`, from files on disk."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from loradash import (
    AdapterError,
    DashConfig,
    SpectralCache,
    apply_dash,
    dash_layers,
    export_lora,
    prelaunch,
    save_adapter,
)
from loradash.analysis import Weights, agreement, layer_rates, load_factors, overlap
from loradash.cli import app
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from loradash_kernels import change_rates


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 56), nn.Linear(56, 40)


@pytest.fixture
def trained(tmp_path):
    """A base model on disk, and three adapters: two of one training, one of another."""
    torch.manual_seed(0)
    block = Block()
    save_file({f"model.{n}": t.clone() for n, t in block.state_dict().items()}, tmp_path / "base.safetensors")
    model = apply_dash(block, DashConfig(r=3, alpha=6, directions=4))
    with torch.no_grad():
        for name, seed in (("early", 0), ("late", 0), ("other", 1)):
            torch.manual_seed(seed)
            for layer in (model.up, model.down):
                layer.lora_a.normal_()
                layer.lora_b.normal_()
                if name == "late":
                    layer.lora_b.add_(0.05 * torch.randn_like(layer.lora_b))
            save_adapter(model, tmp_path / name)
    return tmp_path, model


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_rates_from_disk(trained):
    folder, model = trained
    factors = load_factors(folder / "other")
    rates = layer_rates(Weights(folder), factors, progress=False)
    layer = model.up
    wanted = change_rates(layer.weight, layer.lora_a, layer.lora_b, scaling=2.0, method="exact").rate
    # The rates from disk are those of a copy elsewhere in memory, whose SVD may differ in its last bits.
    torch.testing.assert_close(rates["up"].rate, wanted, rtol=1e-3, atol=1e-3)
    early, late = (layer_rates(Weights(folder), load_factors(folder / n), progress=False) for n in ("early", "late"))
    assert overlap(late, late, 8) == 1 and overlap(early, late, 8) > overlap(rates, late, 8)
    assert agreement([late], late) == [(1.0, 1.0)]


def test_peft_adapters(trained, tmp_path):
    folder, model = trained
    ours = load_factors(folder / "other")
    # Before launch U is zero, so the ranks added carry nothing.
    export_lora(model, tmp_path / "peft")
    theirs = load_factors(tmp_path / "peft")
    assert theirs.keys() == ours.keys()
    for name, (a, b, scaling) in ours.items():
        pa, pb, ps = theirs[name]
        torch.testing.assert_close(ps * pb @ pa, scaling * b @ a)


def test_directions_command(trained, tmp_path):
    folder, _ = trained
    code, text = run(
        "directions",
        folder / "base.safetensors",
        *(folder / n for n in ("early", "other", "late")),
        "--out",
        tmp_path / "out",
    )
    assert code == 0, text
    assert "accuracy" in text and "early" in text
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"change_rates.png", "sorted_rates.png", "overlap.png", "agreement.png"}


def test_decompose_command(trained, tmp_path, monkeypatch):
    folder, model = trained
    monkeypatch.setenv("LORADASH_CACHE", str(tmp_path / "cache"))
    code, text = run("decompose", folder / "base.safetensors")
    assert code == 0 and "2 weights" in text, text
    cache = SpectralCache()
    assert cache.has(model.up.weight) and cache.has(model.down.weight)
    # A launch from the cache decomposes nothing.
    monkeypatch.setattr("loradash.cache.decompose_to_keep", None)
    assert len(prelaunch(model, progress=False, cache=cache)) == 2


@pytest.mark.parametrize("what", ["missing", "foreign", "truncated", "no layer", "untrained"])
def test_bad_files(trained, tmp_path, what):
    folder, _ = trained
    base, adapter = folder / "base.safetensors", folder / "late"
    if what == "missing":
        adapter = folder / "nowhere"
    elif what == "foreign":
        base = tmp_path / "text.safetensors"
        base.write_text("hello")
    elif what == "truncated":
        file = adapter / "loradash_adapter.safetensors"
        file.write_bytes(file.read_bytes()[:200])
    elif what == "no layer":
        base = tmp_path / "else.safetensors"
        save_file({"something.weight": torch.zeros(3, 3)}, base)
    else:
        model = apply_dash(Block(), DashConfig(r=3))
        save_adapter(model, tmp_path / "fresh")
        adapter = tmp_path / "fresh"
    code, text = run("directions", base, adapter)
    assert code == 1 and "Traceback" not in text
    words = {
        "missing": "nowhere",
        "foreign": "safetensors",
        "truncated": "cannot be read",
        "no layer": "0 weights for layer",
        "untrained": "every B is zero",
    }
    assert words[what] in text.replace("\n", " "), text


def message(text):
    """What was printed, without the line breaks of a narrow terminal."""
    return " ".join(text.split())


@pytest.fixture
def bracketed(tmp_path):
    """A base model and an adapter in whose names everything is markup, emoji or a pattern to somebody."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"[red]": nn.Linear(12, 10), "a[0]:smile:": nn.Linear(10, 12)})
    folder = tmp_path / "[bold]runs"
    folder.mkdir()
    save_file({n: t.clone() for n, t in model.state_dict().items()}, folder / "base.safetensors")
    apply_dash(model, DashConfig(r=2))
    for layer in dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    save_adapter(model, folder / "one[b]")
    save_adapter(model, folder / "two [link=x]")
    return folder


def test_nothing_printed_is_markup(bracketed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    base, one, two = bracketed / "base.safetensors", bracketed / "one[b]", bracketed / "two [link=x]"
    code, text = run("directions", base, one, two, "--out", bracketed / "[i]out")
    assert code == 0, text
    for name in ("[red]", "a[0]:smile:", "one[b]", "two [link=x]", str(bracketed / "[i]out")):
        assert name in text
    code, text = run("decompose", base, "--cache", bracketed / "[dim]cache")
    assert code == 0 and str(bracketed / "[dim]cache") in text
    code, text = run("decompose", base, "--target", "[/x][a-z]")
    assert code == 1 and "[/x][a-z]" in text and "[red].weight" in text
    code, text = run("directions", bracketed / "nothing[b]", one)
    assert code == 1 and "nothing[b]" in text


def test_missing_package_is_named_whole(trained, tmp_path, monkeypatch):
    folder, _ = trained
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, text = run("directions", folder / "base.safetensors", folder / "late", "--out", tmp_path / "out")
    assert code == 1 and "pip install loradash-kernels[plots]" in message(text)


MISTAKES = {
    "no model": (["decompose", "{folder}/nowhere"], "nowhere: no matrices"),
    "text": (["decompose", "{folder}/text.safetensors"], "cannot be read as safetensors"),
    "target": (["decompose", "{folder}/base.safetensors", "--target", "["], "--target '[' is no regular expression"),
    "exclude": (
        ["decompose", "{folder}/base.safetensors", "--exclude", "(a"],
        "--exclude '(a' is no regular expression",
    ),
    "no match": (["decompose", "{folder}/base.safetensors", "--target", "x"], "matches 'x': model."),
    "nan": (["decompose", "{folder}/nan.safetensors"], "sick.weight: weight has values that are not finite"),
    "overflow": (["decompose", "{folder}/large.safetensors", "--dtype", "float16"], "big.weight: weight has values"),
    "cache": (
        ["decompose", "{folder}/base.safetensors", "--cache", "{folder}/text.safetensors/x"],
        "text.safetensors/x",
    ),
    "no adapter": (["directions", "{folder}/base.safetensors", "{folder}/nowhere"], "nowhere: cannot be read as"),
    "model as adapter": (["directions", "{folder}/base.safetensors", "{folder}/base.safetensors"], "cannot be read as"),
    "shapes": (
        ["directions", "{folder}/shapes.safetensors", "{folder}/late"],
        "down: lora_a has shape (3, 56); wanted",
    ),
    "out": (["directions", "{folder}/base.safetensors", "{folder}/late", "--out", "{folder}/text.safetensors"], "text"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_get_a_message(trained, kind):
    folder, _ = trained
    (folder / "text.safetensors").write_text("hello")
    save_file({"sick.weight": torch.full((3, 3), torch.nan)}, folder / "nan.safetensors")
    save_file({"big.weight": torch.full((3, 3), 1e6)}, folder / "large.safetensors")
    save_file({"up.weight": torch.ones(9, 9), "down.weight": torch.ones(9, 9)}, folder / "shapes.safetensors")
    arguments, wanted = MISTAKES[kind]
    code, text = run(*(a.format(folder=folder) for a in arguments))
    assert code == 1 and "Traceback" not in text and wanted in message(text), text


class Two(nn.Module):
    """Layers whose names end alike."""

    def __init__(self):
        super().__init__()
        self.q, self.qq = nn.Linear(12, 10), nn.Linear(10, 12)
        self.inner = nn.ModuleDict({"q": nn.Linear(12, 12)})


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"q": 2}, "alpha_pattern": {"qq": 3}},
        {"rank_pattern": {"inner.q": 5, "q": 2}, "alpha_pattern": {r"inner\..*": 7, "q": 1}},
        {"rank_pattern": {"^qq$": 3}, "alpha_pattern": {"^q": 9}},
    ],
)
def test_ranks_and_alphas_of_single_layers(tmp_path, patterns, use_rslora):
    """The update of every layer is the one that PEFT itself computes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "qq"], use_rslora=use_rslora, **patterns)
    model = peft.get_peft_model(Two(), config)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    found = load_factors(tmp_path)
    assert found.keys() == {n.removeprefix("base_model.model.") for n in layers} == {"q", "qq", "inner.q"}
    for name, (a, b, scaling) in found.items():
        theirs = layers[f"base_model.model.{name}"].get_delta_weight("default")
        torch.testing.assert_close(scaling * b @ a, theirs.detach())


DAMAGES = {
    "r": {"r": "four"},
    "no r": {"r": None},
    "another r": {"r": 5},
    "zero": {"r": 0},
    "alpha": {"lora_alpha": []},
    "pattern": {"rank_pattern": {"(": 4}},
    "list": {"alpha_pattern": ["up"]},
}


@pytest.mark.parametrize("damage", [*DAMAGES, "array", "binary", "missing", "no layers"])
def test_damaged_settings(tmp_path, damage):
    a, b = torch.randn(4, 8), torch.randn(6, 4)
    tensors = {"base_model.model.up.lora_A.weight": a, "base_model.model.up.lora_B.weight": b}
    save_file({"something": a} if damage == "no layers" else tensors, tmp_path / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, **DAMAGES.get(damage, {})}
    text = "[]" if damage == "array" else json.dumps(settings)
    if damage != "missing":
        (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe" if damage == "binary" else text.encode())
    with pytest.raises(AdapterError, match=f"{tmp_path}: cannot be read as"):
        load_factors(tmp_path)


@pytest.mark.parametrize(
    "settings", ["{", "[]", '{"config": []}', '{"config": {"r": "x"}}', '{"config": {"overrides": {"(": {"r": 2}}}}']
)
def test_damaged_settings_of_ours(tmp_path, settings):
    save_file(
        {"up.lora_a": torch.randn(4, 8), "up.lora_b": torch.randn(6, 4)},
        tmp_path / "a.safetensors",
        metadata={"loradash": settings},
    )
    with pytest.raises(AdapterError, match=r"a\.safetensors: cannot be read as"):
        load_factors(tmp_path / "a.safetensors")


def stored_by_columns(folder):
    torch.manual_seed(0)
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.ModuleDict({"attend": Conv1D(36, 12), "project": Conv1D(12, 12), "shrink": Conv1D(12, 48)})
    save_file({f"h.{n}": t.clone() for n, t in model.state_dict().items()}, folder / "base.safetensors")
    apply_dash(model, DashConfig(r=2, directions=3))
    for layer in dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


def test_rates_of_square_weights_stored_by_columns(tmp_path):
    model = stored_by_columns(tmp_path)
    save_adapter(model, tmp_path / "adapter")
    rates = layer_rates(Weights(tmp_path / "base.safetensors"), load_factors(tmp_path / "adapter"), progress=False)
    for name, layer in dash_layers(model).items():
        wanted = change_rates(layer.weight_nk(), layer.lora_a, layer.lora_b, scaling=layer.scaling, method="exact")
        torch.testing.assert_close(rates[name].rate, wanted.rate, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decompose_serves_models_stored_by_columns(tmp_path, dtype, monkeypatch):
    """And those that are loaded in less precision than the file's, where it says so."""
    model = stored_by_columns(tmp_path)
    for layer in dash_layers(model).values():
        layer.weight.data = layer.weight.data.to(dtype)
    options = ["--dtype", "bfloat16"] if dtype == torch.bfloat16 else []
    code, text = run("decompose", tmp_path / "base.safetensors", "--cache", tmp_path / "cache", *options)
    assert code == 0 and "3 weights" in text, text
    made = set(os.listdir(tmp_path / "cache"))
    for name in ("decompose_to_keep", "task_specific_directions"):
        monkeypatch.setattr(f"loradash.cache.{name}", None)
    reports = prelaunch(model, progress=False, cache=SpectralCache(tmp_path / "cache"))
    assert len(reports) == 3 and set(os.listdir(tmp_path / "cache")) == made
