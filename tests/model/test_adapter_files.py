"""Adapter files: damaged or foreign ones, every part of a header, permissions, a save that fails."""

from __future__ import annotations

import json
import os
import stat

import loradash
import pytest
import torch
from loradash import AdapterError, DashConfig, apply_dash, load_adapter, save_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.networks import CONFIG, X, network, train, trained


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    file = save_adapter(trained(2), tmp_path)
    before = file.read_bytes()

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(6), tmp_path)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def damaged(tmp_path, kind):
    file = save_adapter(trained(), tmp_path / "a.safetensors")
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("{'a': 1}" * 100)
    elif kind == "foreign":
        save_file({"a": torch.zeros(2)}, file, metadata={"format": "pt"})
    elif kind == "missing":
        file.unlink()
    return file


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "foreign", "missing"])
@pytest.mark.parametrize("adapted", [False, True])
def test_damaged_files(tmp_path, kind, adapted):
    file = damaged(tmp_path, kind)
    model = apply_dash(network(), CONFIG) if adapted else network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        load_adapter(model, file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert adapted == any(isinstance(m, loradash.DashLinear) for m in model.modules())


GOOD = {"config": CONFIG.to_dict(), "step": 6, "dash_only": False}


def rewritten(tmp_path, header=None, tensors=None, **about):
    """An adapter file with another header, or with some of its tensors replaced."""
    file = save_adapter(trained(), tmp_path / "a.safetensors")
    text = json.dumps({**GOOD, **about}) if header is None else header
    save_file({**load_file(file), **(tensors or {})}, file, metadata={"format": "loradash-1", "loradash": text})
    return file


def refused(file, message, model=None):
    """Loading raises an AdapterError that names the file, and leaves the model, adapted or not, as it was."""
    for victim in (network(), trained(3)) if model is None else (model,):
        before = {k: v.clone() for k, v in victim.state_dict().items()}
        state = getattr(victim, "_loradash_state", None)
        remembered = state and (state.config, state.step, state.dash_only)
        with pytest.raises(AdapterError, match=message) as caught:
            load_adapter(victim, file)
        assert str(file) in str(caught.value)
        after = victim.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(v, before[k]) for k, v in after.items())
        assert (state and (state.config, state.step, state.dash_only)) == remembered


@pytest.mark.parametrize(
    "header",
    ["", "{", "[]", "null", "3", '"a"', "[" * 100_000, "{}", '{"config": {}}', '{"config": [], "step": 1}', "\ud800"],
)
def test_headers_that_are_no_settings(tmp_path, header):
    refused(rewritten(tmp_path, header.encode("utf-8", "replace").decode()), "cannot be read")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"step": -1}, "step must be an integer of at least 0, got -1"),
        *(({"step": value}, "step must be") for value in (1.5, "3", True, None, [1], {})),
        *(({"dash_only": value}, "dash_only must be") for value in (1, "true", None)),
        *(({"config": value}, "settings must be") for value in (None, 3, "r", [["r", 3]])),
        ({"config": {"rank": 3}}, "unknown settings"),
        ({"config": {"r": "3"}}, "r must be"),
        ({"config": {"alpha": float("nan")}}, "alpha must be"),
        ({"config": {"target_modules": "a("}}, "target_modules must be a regular expression"),
        ({"config": {"overrides": {"(": {"r": 3}}}}, "overrides must be a regular expression"),
        ({"config": {"overrides": {"2": {"r": None}}}}, "overrides"),
        ({"config": {**GOOD["config"], "target_modules": ["nope"]}}, "fit the model: .*(is no target|has no place)"),
        ({"config": {**GOOD["config"], "r": 4}}, r"fit the model: 0.lora_a .* \(4, 20\)"),
        ({"config": {**GOOD["config"], "overrides": {}}}, r"fit the model: 2.lora_a .* \(3, 30\)"),
        ({"config": {**GOOD["config"], "directions": 1}}, r"fit the model: 0.dash_sigma .* \(1,\)"),
        ({"config": {**GOOD["config"], "train_bias": True}}, "0.bias is (missing|kept by one alone)"),
        ({"config": {**GOOD["config"], "trainable_modules": None}}, "4.bias (has no place|is kept by one alone)"),
    ],
)
def test_settings_in_a_file_are_checked(tmp_path, about, message):
    refused(rewritten(tmp_path, **about), message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"0.lora_a": torch.full((3, 20), float("nan"))}, "0.lora_a is not finite"),
        ({"0.dash_sigma": torch.tensor([1, float("inf")])}, "0.dash_sigma is not finite"),
        ({"0.lora_a": torch.zeros(3, 20, dtype=torch.int32)}, "0.lora_a is torch.int32, the model wants torch.float32"),
        ({"0.lora_a": torch.full((3, 20), 1e300, dtype=torch.float64)}, "overflows"),
        ({"0.launched": torch.tensor(2)}, "0.launched is torch.int64"),
        ({"0.launched": torch.tensor([True])}, "0.launched has shape"),
        ({"0.lora_c": torch.zeros(2)}, "0.lora_c has no place"),
    ],
)
def test_tensors_in_a_file_are_checked(tmp_path, tensors, message):
    refused(rewritten(tmp_path, tensors=tensors), message)


def test_files_of_before_dash_only_was_kept(tmp_path):
    file = rewritten(tmp_path, json.dumps({"config": CONFIG.to_dict(), "step": 6}))
    assert not loradash.dash_state(load_adapter(network(), file)).dash_only


def test_folders_in_the_place_of_files(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    refused(tmp_path / "a.safetensors", "cannot be read")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "a.safetensors", "cannot be read")
    with pytest.raises(OSError, match="file"):
        save_adapter(trained(), tmp_path / "file" / "a.safetensors")


def test_an_adapter_too_large_for_half_precision(tmp_path):
    big = trained()
    big[0].lora_b.data[0, 0] = 1e5
    big[4].weight.data[0, 0] = -1e5
    file = save_adapter(big, tmp_path / "a.safetensors")
    for adapted in (False, True):
        half = (trained(3) if adapted else network()).half()
        refused(file, "4.weight is torch.float32, the model wants torch.float16, which overflows", half)
    fitting = load_adapter(trained(3).half(), save_adapter(trained(), tmp_path / "b"))
    assert torch.equal(fitting[0].lora_b, trained()[0].lora_b.half())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o027, 0o640)])
def test_files_take_the_permissions_of_new_ones(tmp_path, mask, mode):
    model, old = trained(), os.umask(mask)
    try:
        file = save_adapter(model, tmp_path)
        file.chmod(0o600)
        save_adapter(model, tmp_path)
        loradash.export_lora(model, tmp_path / "peft")
    finally:
        os.umask(old)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.rglob("*") if f.is_file()}
    assert len(modes) == 3 and set(modes.values()) == {mode}


def test_no_settings_can_make_a_file_that_does_not_load(tmp_path):
    numpy = pytest.importorskip("numpy")
    config = DashConfig(
        r=numpy.int64(3),
        alpha=numpy.float32(0.3),
        target_modules={"2", "0"},
        exclude_modules=frozenset({"4"}),
        overrides={"2": {"r": numpy.int32(5), "alpha": numpy.float64(2)}},
    )
    model = train(apply_dash(network(), config), 2)
    file = save_adapter(model, tmp_path)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["loradash"])["config"] == config.to_dict()
    other = load_adapter(network(), file)
    assert loradash.dash_state(other).config == config
    assert torch.equal(other(X), model(X))
