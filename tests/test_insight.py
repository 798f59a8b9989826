"""`loradash decompose` and `loradash directions`, from files on disk."""

from __future__ import annotations

import pytest
import torch
from loradash import DashConfig, apply_dash, export_lora, prelaunch, save_adapter
from loradash.cli import app
from loradash.insight import Weights, agreement, layer_rates, load_factors, overlap
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
    torch.testing.assert_close(
        rates["up"].rate, wanted, rtol=1e-3, atol=1e-3
    )  # by the SVD of a copy elsewhere in memory
    early, late = (layer_rates(Weights(folder), load_factors(folder / n), progress=False) for n in ("early", "late"))
    assert overlap(late, late, 8) == 1 and overlap(early, late, 8) > overlap(rates, late, 8)
    assert agreement([late], late) == [(1.0, 1.0)]


def test_peft_adapters(trained, tmp_path):
    folder, model = trained
    ours = load_factors(folder / "other")
    export_lora(model, tmp_path / "peft")  # before launch: U is zero, so the ranks added carry nothing
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
    from loradash import SpectralCache

    cache = SpectralCache()
    assert cache.has(model.up.weight) and cache.has(model.down.weight)
    monkeypatch.setattr("loradash.spectral.decompose", None)  # launch needs none
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
    words = {"missing": "nowhere", "foreign": "safetensors", "truncated": "cannot be read", "no layer": "0 weights for layer", "untrained": "every B is zero"}  # fmt: skip
    assert words[what] in text.replace("\n", " "), text
