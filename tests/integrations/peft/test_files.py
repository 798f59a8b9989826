"""Folders of LORADASH adapters: found by one import, refused without, whole or not at all; from and to plain LoRA."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings

import loradash
import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs PEFT")
pytest.importorskip("transformers", reason="needs transformers")

from loradash.integrations.peft import DashLoraConfig, from_lora
from loradash.integrations.peft.versions import SAVES_BIASES
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file, save_file
from support.peft_models import (
    Net,
    adapted,
    check_layers,
    config,
    gap,
    layers_of,
    llama,
    llama_config,
    loss_of,
    output,
    train,
    two_adapters,
)

FRESH = """
import sys, torch
from peft import PeftModel
folder = sys.argv[1]
def loaded():
    return PeftModel.from_pretrained(torch.load(folder + "/base", weights_only=False), folder)
try:
    loaded()
except KeyError as error:
    assert "LORADASH" in str(error)
else:
    sys.exit("an adapter was loaded without its method")
import loradash.integrations.peft
with torch.no_grad():
    torch.save(loaded()(torch.load(folder + "/x")), folder + "/y")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained LORADASH Llama, its base model and the adapter in folders."""
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder / "base")
    base = type(llama()).from_pretrained(folder / "base")
    model = train(get_peft_model(base, llama_config(alpha_pattern={"q_proj": 3}, use_rslora=True)))
    model.save_pretrained(folder / "adapter")
    return model, folder


def changed(folder, target, settings=None, tensors=None):
    """A copy of an adapter folder with other settings, or with tensors as a function makes them."""
    target.mkdir()
    values = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**values, **(settings or {})}))
    found = load_file(folder / "adapter_model.safetensors")
    save_file(tensors(found) if tensors else found, target / "adapter_model.safetensors", {"format": "pt"})
    return target


def test_a_fresh_process_needs_one_import_and_fails_without(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(3, 8)
    torch.save(base, tmp_path / "base")
    torch.save(x, tmp_path / "x")
    model = get_peft_model(base, config(target_modules=["0", "2"]))
    for view in loradash.dash_layers(model).values():
        nn.init.normal_(view.lora_b)
    loradash.prelaunch(model, progress=False)
    for view in loradash.dash_layers(model).values():
        nn.init.normal_(view.dash_sigma)
    model.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y"), model.eval()(x))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading(saved, low_cpu_mem_usage, is_trainable):
    model, folder = saved
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable}
    loaded = PeftModel.from_pretrained(llama(), folder / "adapter", **options).eval()
    assert torch.equal(output(loaded), output(model))
    assert loradash.dash_state(loaded).step == 3
    assert all(view.launched for view in loradash.dash_layers(loaded).values())
    trained = {n.split(".lora_")[1].split(".")[0] for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == ({"A", "B", "dash_sigma"} if is_trainable else set())


def test_16_bits_keep_the_vectors(saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(llama().to(torch.bfloat16), folder / "adapter", low_cpu_mem_usage=True)
    for name, view in loradash.dash_layers(loaded).items():
        assert torch.equal(view.dash_u, loradash.dash_layers(model)[name].dash_u)


def test_auto_classes_and_settings(saved):
    model, folder = saved
    settings = PeftConfig.from_pretrained(folder / "adapter")
    assert isinstance(settings, DashLoraConfig) and settings.to_dict() == {
        **model.peft_config["default"].to_dict(),
        "inference_mode": True,
    }
    assert (settings.directions, settings.prelaunch_steps, settings.loradash_format) == (3, 2, 1)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    assert torch.equal(output(loaded.eval()), output(model))


def test_the_files_hold_step_and_phase(saved):
    tensors = load_file(saved[1] / "adapter" / "adapter_model.safetensors")
    steps = {int(t) for key, t in tensors.items() if key.endswith("lora_dash_step")}
    phases = {bool(t) for key, t in tensors.items() if key.endswith("lora_dash_launched")}
    assert steps == {3} and phases == {True}


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(stop, tmp_path):
    """Before, at and after launch, by a folder or by load_adapter on the adapter that is there; SGD has no state to carry."""

    def run(model, steps):
        schedule = loradash.DashSchedule(model, progress=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            schedule.step()
        return model

    whole = run(adapted(), 5)
    run(adapted(), stop).save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    again = adapted()
    again.load_adapter(tmp_path, "default", is_trainable=True)
    for model in (resumed, again):
        run(model, 5 - stop)
        assert loradash.dash_state(model).step == 5
        assert all(torch.equal(t, whole.state_dict()[n]) for n, t in model.state_dict().items())


def test_each_adapter_has_a_folder(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "another")
    assert torch.equal(output(loaded), output(model))
    for one, name in ((model, "other"), (loaded, "another")):
        one.set_adapter(name)
    assert torch.equal(output(loaded), output(model)) and loradash.dash_state(loaded).step == 4


def test_state_dicts_carry_everything():
    model, other = train(adapted()), adapted()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys and torch.equal(output(other.eval()), output(model))
    assert loradash.dash_state(other).step == 3
    third = adapted()
    assert loradash.dash_state(third).step == 0
    third.load_state_dict(model.state_dict(), assign=True)
    assert loradash.dash_state(third).step == 3


def test_a_newer_format_is_refused(saved, tmp_path):
    newer = changed(saved[1] / "adapter", tmp_path / "newer", {"loradash_format": 2, "something": 1})
    with pytest.warns(UserWarning, match="something"), pytest.raises(ValueError, match=r"newer loradash.*format 2"):
        PeftModel.from_pretrained(llama(), newer)


@pytest.mark.parametrize("part", ["lora_dash_u", "lora_dash_sigma", "lora_dash_step"])
def test_a_part_of_an_adapter_is_refused(saved, tmp_path, part):
    folder = changed(
        saved[1] / "adapter", tmp_path / "part", tensors=lambda t: {k: v for k, v in t.items() if not k.endswith(part)}
    )
    with pytest.raises(ValueError, match=f"not a whole LORADASH adapter: .*{part}"):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.skipif(not SAVES_BIASES, reason="PEFT has this warning from 0.21 on")
def test_parts_of_tensors_are_told(tmp_path):
    model = adapted()
    layers_of(model)["base_model.model.last"].lora_A["default"].weight.data = torch.zeros(32)
    with pytest.warns(PeftWarning, match="were not gathered"):
        model.save_pretrained(tmp_path)


def test_layers_that_disagree_about_the_step_are_told():
    model = train(adapted())
    layers_of(model)["base_model.model.last"].lora_dash_step["default"].fill_(9)
    with pytest.raises(ValueError, match=r"disagree about its step \(\[3, 9\]\)"):
        loradash.dash_state(model).step  # noqa: B018


def test_export(saved, tmp_path):
    model, _ = saved
    assert loradash.export_lora(model, tmp_path) == tmp_path
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == settings["lora_alpha"] == 7
    assert not set(settings) & {"directions", "prelaunch_steps", "svd", "loradash_format"}
    assert not any("dash" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    served = PeftModel.from_pretrained(llama(), tmp_path)
    assert type(served.base_model).__name__ == "LoraModel" and gap(output(served), output(model)) < 1e-5


def test_export_of_one_of_several(tmp_path):
    model = two_adapters()
    model.set_adapter("other")
    layers_of(model)["base_model.model.first"].set_scale("other", 2)
    loradash.export_lora(model, tmp_path)
    served = PeftModel.from_pretrained(Net(), tmp_path)
    assert gap(output(served), output(model)) < 1e-5


def step(model):
    """An optimizer's step that no schedule counts."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    return model


def warned(model, folder):
    """Does saving say that nobody counted?"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    return ["loradash: adapter default was trained without DashSchedule" in str(w.message) for w in caught].count(True)


class TestTrainedWithoutASchedule:
    def test_saving_says_so(self, tmp_path):
        model = step(adapted())
        assert warned(model, tmp_path) == 1
        for trainable in (False, True):
            loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=trainable, low_cpu_mem_usage=trainable)
            assert not warned(loaded, tmp_path / "again")
        assert warned(step(loaded), tmp_path / "again") == 1
        loradash.DashSchedule(model, progress=False)
        assert not warned(model, tmp_path)

    @pytest.mark.parametrize("settings", [{}, {"init_lora_weights": False}, {"init_lora_weights": "orthogonal"}])
    def test_what_was_not_trained_is_quiet(self, settings, tmp_path):
        model = adapted(**settings)
        assert not any(warned(m, tmp_path) for m in (model, copy.deepcopy(model), model.to(torch.bfloat16)))

    @pytest.mark.parametrize("combination", ["svd", "cat"])
    def test_computed_adapters_are_quiet(self, combination, tmp_path):
        model = two_adapters()
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mix", combination_type=combination)
        model.set_adapter("mix")
        model.save_pretrained(tmp_path)

    def test_what_a_launch_or_no_directions_explain(self, tmp_path):
        assert not warned(step(adapted(directions=0)), tmp_path)
        model = step(adapted())
        loradash.prelaunch(model, progress=False)
        assert not warned(model, tmp_path)


def test_adapters_made_and_loaded_under_inference_mode(saved):
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(llama(), saved[1] / "adapter")
        loaded.state_dict()
        assert loradash.dash_state(loaded).step == 3
        assert gap(output(loaded.eval()), output(saved[0])) == 0


def test_the_model_card_tells_what_to_import(saved, tmp_path):
    model = adapted()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import loradash.integrations.peft") == 1 and card.startswith("---\nlibrary_name: peft")
    assert "### Framework versions" in card
    assert "base_model:" in (saved[1] / "adapter" / "README.md").read_text()


class TestFromLora:
    @pytest.fixture(scope="class")
    def lora(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("lora")
        settings = {
            "rank_pattern": {"first": 5},
            "target_modules": ["first", "middle", "last"],
            "modules_to_save": ["head"],
        }
        model = get_peft_model(Net(), LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, **settings))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss_of(model).backward()
            optimizer.step()
        model.eval().save_pretrained(folder)
        return model, folder

    def test_a_run_starts_at_a_plain_lora(self, lora):
        theirs, folder = lora
        model = from_lora(Net(), folder, directions=3, prelaunch_steps=0).eval()
        model.state_dict()
        assert gap(output(model), output(theirs)) < 1e-6 and model.peft_config["default"].lora_dropout == 0.1
        train(model, 2)
        assert all(view.launched and view.dash_sigma.any() for view in loradash.dash_layers(model).values())
        check_layers(model, ["default"])

    def test_beside_adapters_that_are_there(self, lora):
        theirs, folder = lora
        model = from_lora(two_adapters(), folder, "third", lora_dropout=0.0)
        assert model.active_adapter == "default"
        model.set_adapter("third")
        assert gap(output(model.eval()), output(theirs)) < 1e-6

    def test_what_is_no_plain_lora(self, lora, saved, tmp_path):
        with pytest.raises(ValueError, match="wanted a LoRA of PEFT's, got LORADASH"):
            from_lora(llama(), saved[1] / "adapter")
        with pytest.raises(ValueError, match="use_dora"):
            from_lora(Net(), changed(lora[1], tmp_path / "dora", {"use_dora": True}))
        for name, tensors in (
            ("less", lambda t: {k: v for k, v in t.items() if "middle.lora_A" not in k}),
            ("more", lambda t: {**t, "base_model.model.other.lora_A.weight": torch.zeros(2)}),
            ("shape", lambda t: {k: v[:1].clone() if "middle.lora_A" in k else v for k, v in t.items()}),
        ):
            base = Net()
            with pytest.raises(ValueError, match="does not fit the model"):
                from_lora(base, changed(lora[1], tmp_path / name, tensors=tensors))
            assert not layers_of(base) and torch.equal(output(base), output(Net()))
            assert all(p.requires_grad for p in base.parameters())
            model = two_adapters()
            with pytest.raises(ValueError, match="does not fit the model"):
                from_lora(model, tmp_path / name, "third")
            assert list(model.peft_config) == ["default", "other"]
            assert torch.equal(output(model), output(two_adapters()))


def test_settings_come_back_as_they_were(tmp_path):
    settings = config(rank_pattern={"first": 6}, svd="exact", exclude_modules=["head"])
    settings.save_pretrained(tmp_path)
    assert DashLoraConfig.from_pretrained(tmp_path).to_dict() == settings.to_dict()
