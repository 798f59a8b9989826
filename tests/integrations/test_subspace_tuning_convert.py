"""`convert` and `convert_state_dict`: every dialect into every other, lost directions found again, settings, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from loradash import (
    AdapterError,
    DashConfig,
    DashSchedule,
    apply_dash,
    dash_layers,
    dash_state,
    load_adapter,
    save_adapter,
)
from loradash.integrations.subspace_tuning import convert, convert_state_dict, patch
from safetensors.torch import load_file, save_file
from support.authors import DIALECTS, make_model, trained
from torch import nn

X = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
PREFIX = "base_model.model."
NAMES = {"loralib": "lora.pt", "cr_mr": "adapter_model.bin", "sdg": "adapter_model.safetensors"}
SETTINGS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "fan_in_fan_out": False, "merge_weights": True}
ALL = (*DIALECTS, "loradash")


def plain(model):
    """The base model, as it was before the authors' layers."""
    found = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    for i in (0, 2):
        base = getattr(model[i], "base_layer", model[i])
        found[i].weight, found[i].bias = base.weight, base.bias
    return found


def checkpoint_of(model, dialect, folder, **settings):
    """What the authors' code bases write: `lora_state_dict`, or their fork's save_pretrained."""
    tensors = {key: t.detach().clone() for key, t in model.state_dict().items() if "lora_" in key or "map_" in key}
    folder.mkdir(exist_ok=True)
    if dialect == "loralib":
        torch.save(tensors, folder / NAMES[dialect])
        return folder / NAMES[dialect]
    tensors = {PREFIX + key.replace(".default", ""): t for key, t in tensors.items()}
    if dialect == "cr_mr":
        torch.save(tensors, folder / NAMES[dialect])
    else:
        save_file(tensors, folder / NAMES[dialect])
    more = {"lora_use_dash": True, "use_rslora": False} if dialect == "sdg" else {"enable_lora": None}
    about = {"peft_type": "LORA", "target_modules": ["0", "2"], "bias": "none", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **about, **more, **settings}))
    return folder


def loaded(model, folder):
    """A plain model with our adapter."""
    found = plain(model)
    return load_adapter(found, folder)


@pytest.fixture(scope="module")
def runs():
    return {
        (dialect, steps): trained(make_model(dialect, "restated", warmup=6), steps)
        for dialect in DIALECTS
        for steps in (4, 9)
    }


def options(dialect, model):
    return {"settings": SETTINGS, "weights": plain(model)} if dialect == "loralib" else {}


@pytest.mark.parametrize("steps", [4, 9])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_their_checkpoints_become_ours_and_theirs_again(dialect, steps, runs, tmp_path):
    theirs = copy.deepcopy(runs[dialect, steps])
    source = checkpoint_of(theirs, dialect, tmp_path / "theirs")
    config = convert(source, tmp_path / "ours", "loradash", **options(dialect, theirs))
    assert (config["r"], config["alpha"], config["dropout"], config["directions"]) == (4, 8, 0.05, 8)
    ours = loaded(theirs, tmp_path / "ours").eval()
    assert [bool(layer.launched) for layer in dash_layers(ours).values()] == [steps > 6] * 2
    assert dash_state(ours).step == (100 if steps > 6 else 0)
    torch.testing.assert_close(ours(X), copy.deepcopy(theirs)(X), rtol=1e-5, atol=1e-6)
    save_adapter(ours, tmp_path / "again")
    for into in DIALECTS:
        back = tmp_path / f"{into}.pt" if into == "loralib" else tmp_path / into
        settings = convert(tmp_path / "again", back, into)
        assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8, 0.05)
        tensors = (
            load_file(back / NAMES[into])
            if into == "sdg"
            else torch.load(back / NAMES[into] if back.is_dir() else back)
        )
        target = make_model(into, "restated", warmup=6, seed=7)
        for i in (0, 2):
            base = getattr(target[i], "base_layer", target[i])
            base.weight, base.bias = plain(theirs)[i].weight, plain(theirs)[i].bias
        own = {key.removeprefix(PREFIX): t for key, t in tensors.items()}
        if into == "sdg":
            # As their loader puts the adapter's name in.
            own = {
                key.replace(".weight", ".default.weight") if key.endswith("weight") else f"{key}.default": t
                for key, t in own.items()
            }
        result = target.load_state_dict(own, strict=False)
        assert not result.unexpected_keys and all("lora" not in key for key in result.missing_keys)
        patch(target, "authors")
        with torch.no_grad():
            torch.testing.assert_close(target(X), ours(X), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "sdg" / "adapter_config.json").exists() and (tmp_path / "cr_mr" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "sdg" / "adapter_config.json").read_text())["lora_use_dash"] is True


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_way_there_and_back_loses_no_bit(dialect, runs, tmp_path):
    theirs = runs[dialect, 9]
    source = checkpoint_of(theirs, dialect, tmp_path / "theirs")
    convert(source, tmp_path / "ours", "loradash", **options(dialect, theirs))
    for into in DIALECTS:
        convert(tmp_path / "ours", tmp_path / f"{into}.safetensors", into)
        convert(tmp_path / f"{into}.safetensors", tmp_path / f"{into}-ours", "loradash", settings=SETTINGS)
        first, second = (load_file(tmp_path / f / "loradash_adapter.safetensors") for f in ("ours", f"{into}-ours"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("into", ALL)
@pytest.mark.parametrize("dialect", ALL)
def test_state_dicts_of_models_change_hands(dialect, into, runs):
    theirs = runs["loralib", 9]
    states = {"loralib": {k: t for k, t in theirs.state_dict().items() if "change" not in k}}
    state = states["loralib"] if dialect == "loralib" else convert_state_dict(states["loralib"], dialect)
    target = (
        apply_dash(plain(theirs), DashConfig(r=4, alpha=8))
        if into == "loradash"
        else make_model(into, "restated", warmup=6, seed=9)
    )
    target.load_state_dict(convert_state_dict(state, into))
    if into != "loradash":
        patch(target, "authors")
    with torch.no_grad():
        torch.testing.assert_close(target(X), copy.deepcopy(theirs)(X), rtol=1e-5, atol=1e-6)


def test_lost_directions_come_back_exactly(runs, tmp_path):
    theirs = runs["loralib", 9]
    source = checkpoint_of(theirs, "loralib", tmp_path / "theirs")
    convert(source, tmp_path / "ours.safetensors", "loradash", settings=SETTINGS, weights=plain(theirs).state_dict())
    found = load_file(tmp_path / "ours.safetensors")
    for name, layer in (("0", theirs[0]), ("2", theirs[2])):
        pairs = found[f"{name}.dash_u"].t() @ layer.weight_u_top, found[f"{name}.dash_vt"] @ layer.weight_vt_top.t()
        assert all(torch.allclose(p.abs(), torch.eye(8), atol=1e-4) for p in pairs)
        assert torch.allclose(pairs[0].diag(), pairs[1].diag(), atol=1e-4), "signs change together"
    # A state dict of the whole model brings its weights along.
    whole = {k: t for k, t in theirs.state_dict().items() if not k.endswith("_top")}
    torch.save(whole, tmp_path / "whole.pt")
    convert(tmp_path / "whole.pt", tmp_path / "two.safetensors", "loradash", settings=SETTINGS)
    second = load_file(tmp_path / "two.safetensors")
    assert found.keys() == second.keys() and all(torch.equal(found[key], second[key]) for key in found)


def test_heads_biases_and_patterns_go_along(runs, tmp_path):
    theirs = copy.deepcopy(runs["sdg", 9])
    model = nn.ModuleDict({"body": theirs, "classifier": nn.Linear(16, 2)})
    source = checkpoint_of(theirs, "sdg", tmp_path / "theirs", bias="lora_only", modules_to_save=["classifier"])
    file = source / NAMES["sdg"]
    tensors = {key.replace(PREFIX, f"{PREFIX}body."): t for key, t in load_file(file).items()}
    tensors |= {f"{PREFIX}classifier.{key}": t for key, t in model["classifier"].state_dict().items()}
    tensors |= {f"{PREFIX}body.{i}.bias": theirs[i].base_layer.bias.detach() + 1 for i in (0, 2)}
    save_file(tensors, file)
    about = json.loads((source / "adapter_config.json").read_text())
    about |= {"alpha_pattern": {"body.2": 6}, "use_rslora": True}
    (source / "adapter_config.json").write_text(json.dumps(about))
    convert(source, tmp_path / "ours", "loradash")
    found = load_adapter(nn.ModuleDict({"body": plain(theirs), "classifier": nn.Linear(16, 2)}), tmp_path / "ours")
    assert torch.equal(found["classifier"].weight, model["classifier"].weight)
    layers = dash_layers(found)
    assert layers["body.0"].scaling == 4.0 and layers["body.2"].scaling == 3.0
    assert torch.equal(layers["body.0"].bias, tensors[f"{PREFIX}body.0.bias"])
    assert dash_state(found).config.train_bias
    save_adapter(found, tmp_path / "again")
    settings = convert(tmp_path / "again", tmp_path / "back", "sdg")
    assert settings["modules_to_save"] == ["classifier"] and settings["bias"] == "lora_only"
    assert settings["alpha_pattern"] == {"body.2": 6} and settings["use_rslora"] is True
    back = load_file(tmp_path / "back" / NAMES["sdg"])
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in back)
    for into, named in (("cr_mr", "use_rslora has no counterpart"), ("loralib", "use_rslora has no counterpart")):
        with pytest.raises(AdapterError, match=named):
            convert(tmp_path / "again", tmp_path / "no.pt", into)


def test_a_layer_without_directions_in_sdg(runs, tmp_path):
    theirs = copy.deepcopy(runs["sdg", 9])
    source = checkpoint_of(theirs, "sdg", tmp_path / "theirs", lora_use_dash_pattern={"2": False})
    tensors = {
        k: t for k, t in load_file(source / NAMES["sdg"]).items() if ".2." not in k or "lora_A" in k or "lora_B" in k
    }
    save_file(tensors, source / NAMES["sdg"])
    convert(source, tmp_path / "ours", "loradash")
    found = loaded(theirs, tmp_path / "ours")
    assert [layer.config.directions for layer in dash_layers(found).values()] == [8, 0]
    settings = convert(tmp_path / "ours", tmp_path / "back", "sdg")
    assert settings["lora_use_dash"] is True and settings["lora_use_dash_pattern"] == {"2": False}
    assert load_file(tmp_path / "back" / NAMES["sdg"]).keys() == tensors.keys()
    with pytest.raises(AdapterError, match="directions = 0 for 2"):
        convert(tmp_path / "ours", tmp_path / "no", "cr_mr")


def test_fewer_directions_than_theirs_are_widened(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    ours = apply_dash(copy.deepcopy(base), DashConfig(r=4, alpha=8, directions=3, prelaunch_steps=1))
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], 0.5)
    schedule = DashSchedule(ours, progress=False)
    for _ in range(4):
        optimizer.zero_grad()
        ours(X).square().mean().backward()
        optimizer.step()
        schedule.step()
    save_adapter(ours, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "cr_mr")
    convert(tmp_path / "theirs", tmp_path / "again", "loradash")
    again = load_adapter(copy.deepcopy(base), tmp_path / "again")
    assert dash_layers(again)["0"].dash_sigma.shape == (8,)
    torch.testing.assert_close(again(X), ours(X), rtol=1e-5, atol=1e-6)


REFUSED = {
    "use_dora": (True, "use_dora = True has no counterpart"),
    "lora_use_map": (True, "lora_use_map = True has no counterpart"),
    "enable_lora": ([True, False], "enable_lora = .* has no counterpart"),
    "bias": ("all", "bias = 'all' has no counterpart"),
    "peft_type": ("ADALORA", "peft_type = 'ADALORA' has no counterpart"),
    "loftq_config": ({"loftq_bits": 4}, "loftq_config = .* has no counterpart"),
    "temperature": (1, "temperature is no setting of the authors' LoRA-Dash"),
    "r": (5, "r = 5 for 0, whose tensors have rank 4"),
    "lora_alpha": (None, "lora_alpha is missing"),
    "lora_dropout": (2.0, "dropout must be"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_settings_without_a_counterpart_are_refused_by_name(key, runs, tmp_path):
    value, named = REFUSED[key]
    source = checkpoint_of(runs["cr_mr", 9], "cr_mr", tmp_path / "theirs", **{key: value})
    with pytest.raises(AdapterError, match=named) as error:
        convert(source, tmp_path / "ours", "loradash")
    assert str(source) in str(error.value) and not (tmp_path / "ours").exists()


def test_our_settings_without_a_counterpart_are_refused_by_name(tmp_path):
    for settings, into, named in (
        ({"prelaunch_steps": 7}, "cr_mr", "prelaunch_steps = 7: the authors' classes have 100"),
        ({"directions": 4}, "cr_mr", "directions = 4 for 0 before launch"),
        ({"directions": 12}, "loralib", "directions = 12 for 0 before launch"),
        ({"overrides": {"2": {"r": 2}}}, "cr_mr", "overrides: this code base has one r"),
    ):
        model = apply_dash(nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)), DashConfig(r=4, **settings))
        save_adapter(model, tmp_path / "ours")
        with pytest.raises(AdapterError, match=named):
            convert(tmp_path / "ours", tmp_path / "theirs.bin", into)
        assert not (tmp_path / "theirs.bin").exists()


def test_broken_files_are_named_with_their_keys(runs, tmp_path):
    theirs = runs["cr_mr", 9]

    def refuse(change, match, dialect="cr_mr", **arguments):
        folder = checkpoint_of(runs[dialect, 9], dialect, tmp_path / "theirs")
        file = folder / NAMES[dialect] if folder.is_dir() else folder
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
        torch.save(change(tensors), file.with_suffix(".pt"))
        with pytest.raises(AdapterError, match=match) as error:
            convert(file.with_suffix(".pt"), tmp_path / "ours", "loradash", **{"settings": SETTINGS, **arguments})
        assert str(file.with_suffix(".pt")) in str(error.value) and not (tmp_path / "ours").exists()

    def without(*ends):
        return lambda tensors: {k: t for k, t in tensors.items() if not k.endswith(ends)}

    refuse(without("0.lora_w_u"), "0 has one of 0.lora_w_u and 0.lora_w_vt without the other")
    refuse(without("lora_w_u", "lora_w_vt"), "0.lora_w_u and 0.lora_w_vt are missing")
    refuse(without("lora_index.weight", "lora_w_u", "lora_w_vt"), "holds no directions .*plain LoRA")
    refuse(without("lora_A.weight"), "wanted the keys of one kind of adapter .*found none")
    refuse(lambda t: {**t, f"{PREFIX}0.lora_w_u": torch.ones(3, 8)}, r"0.lora_w_u has shape \(3, 8\), wanted \(32, 8\)")
    refuse(lambda t: {**t, f"{PREFIX}head.weight": torch.ones(3)}, "head.weight is no part of an adapter")
    refuse(lambda t: {k: v.reshape(-1) for k, v in t.items()}, r"0.lora_A.weight has shape \(96,\), wanted a matrix")
    refuse(lambda t: t, "unterminated subpattern", settings={**SETTINGS, "alpha_pattern": {"(": 3}})
    refuse(lambda t: {**t, "step": 3}, "step is a int, wanted tensors alone")
    refuse(lambda t: list(t), "wanted a state dict, found list")
    refuse(lambda t: t, "weight_u_top and 0.weight_vt_top are missing; give weights=", "loralib")
    other = {"0.weight": torch.randn(32, 24), "2.weight": torch.randn(16, 32)}
    refuse(lambda t: t, "0: lora_change_a are not the singular values of this weight", "loralib", weights=other)
    mixed = {**convert_state_dict(theirs.state_dict(), "loralib"), **convert_state_dict(theirs.state_dict(), "sdg")}
    refuse(lambda t: mixed, "found loralib, sdg")
    (tmp_path / "torn.safetensors").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for source, match in (
        (tmp_path / "torn.safetensors", "torn.safetensors: cannot be read"),
        (tmp_path / "missing.pt", "missing.pt: cannot be read"),
        (tmp_path / "empty", "empty: wanted one of"),
    ):
        with pytest.raises(AdapterError, match=match):
            convert(source, tmp_path / "ours", "loradash")
    for call in (lambda: convert(tmp_path, tmp_path, "peft"), lambda: convert_state_dict({}, "peft")):
        with pytest.raises(ValueError, match="into must be one of"):
            call()
    for step in (-1, 2.5):
        with pytest.raises(ValueError, match="step must be an integer of at least 0"):
            convert(tmp_path / "theirs", tmp_path / "ours", "loradash", step=step)


def test_the_step_is_said_by_who_knows_it(runs, tmp_path):
    source = checkpoint_of(runs["sdg", 4], "sdg", tmp_path / "theirs")
    convert(source, tmp_path / "ours", "loradash", step=37)
    assert dash_state(loaded(runs["sdg", 4], tmp_path / "ours")).step == 37
    # A state dict of a patched model knows its count itself.
    patched = copy.deepcopy(runs["loralib", 4])
    patch(patched, "authors")
    torch.save(patched.state_dict(), tmp_path / "patched.pt")
    convert(tmp_path / "patched.pt", tmp_path / "two", "loradash", settings=SETTINGS)
    assert dash_state(loaded(patched, tmp_path / "two")).step == 4
    torch.save({k: t[:1] if "flag" in k else t for k, t in patched.state_dict().items()}, tmp_path / "torn.pt")
    with pytest.raises(ValueError, match=r"lora_flag has shape \(1,\), wanted \(2,\)"):
        patched.load_state_dict(torch.load(tmp_path / "torn.pt"))
