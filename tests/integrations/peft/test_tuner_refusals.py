"""What the LORADASH tuner refuses, in words and with the model unchanged."""

from __future__ import annotations

import contextlib
import importlib
import sys

import loradash
import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs PEFT")
pytest.importorskip("transformers", reason="needs transformers")

from loradash.integrations.peft import DashLoraConfig, DashLoraModel
from loradash.integrations.peft.registration import PEFT_TYPE, register
from loradash.integrations.peft.versions import check_version
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.peft_models import Net, adapted, config, llama, llama_config, output, two_adapters


@pytest.fixture
def both():
    return two_adapters()


def twice():
    linear = nn.Linear(4, 4)
    return nn.ModuleDict({"a": nn.Linear(4, 4), "b": linear, "c": nn.ModuleDict({"b": linear})})


class Bypassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) @ self.b.weight


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"layer_replication": [(0, 1)]}, "layer_replication"),
        ({"target_parameters": ["first.weight"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"directions": -1}, "^directions must be"),
        ({"prelaunch_steps": 1.5}, "prelaunch_steps"),
        ({"svd": "fast"}, "svd"),
        ({"r": 0}, "^r must be"),
        ({"lora_alpha": 0}, "^lora_alpha: alpha must be"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"rank_pattern": {"first": 0}}, r"rank_pattern\['first'\]"),
        ({"loradash_format": 2}, "newer loradash"),
    ],
)
def test_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


@pytest.mark.parametrize(
    ("make", "targets", "words"),
    [
        (
            lambda: nn.ModuleDict({"a": nn.Linear(4, 4), "e": nn.Embedding(4, 4)}),
            ["a", "e"],
            "e .Embedding.*linear",
        ),
        (lambda: nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Conv2d(4, 4, 1)}), ["a", "c"], "c .Conv2d.*linear"),
        (
            lambda: nn.ModuleDict({"a": nn.Linear(4, 4), "m": nn.MultiheadAttention(4, 1)}),
            ["a", "m"],
            "m .Multihead",
        ),
        (lambda: twice(), ["a", "b"], "several names"),
        (lambda: Bypassing(), ["a", "b"], "Bypassing.forward multiplies by its weight"),
    ],
)
def test_targets_leave_the_model_as_it_was(make, targets, words):
    model = make()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, config(target_modules=targets))
    assert [type(m) for m in model.modules()] == before and not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_that_is_refused_is_not_added(both):
    before = output(both)
    both.base_model.model.head = nn.Embedding(4, 4)
    with pytest.raises(ValueError, match=r"head .Embedding"):
        both.add_adapter("third", config(target_modules=["first", "head"]))
    both.base_model.model.head = Net().head
    assert list(both.peft_config) == ["default", "other"] and torch.equal(output(both), before)


def test_a_model_adapted_by_somebody_else():
    for model, words in (
        (loradash.apply_dash(Net()), "apply_dash"),
        (get_peft_model(Net(), LoraConfig(target_modules=["first"])).base_model.model, "another method of PEFT"),
        (adapted(), "one of PEFT's already"),
    ):
        with pytest.raises(ValueError, match=words), pytest.warns() if "PEFT" in words else contextlib.nullcontext():
            get_peft_model(model, config())


def test_functions_of_apply_dash_name_pefts(both, tmp_path):
    for call, words in (
        (loradash.merge, "merge_adapter"),
        (loradash.unmerge, "unmerge_adapter"),
        (lambda m: loradash.disable(m).__enter__(), "disable_adapter"),
        (lambda m: loradash.save_adapter(m, tmp_path), "save_pretrained"),
        (lambda m: loradash.load_adapter(m, tmp_path), "load_adapter"),
    ):
        with pytest.raises(TypeError, match=words):
            call(both)
    with pytest.raises(ValueError, match="PEFT"):
        loradash.apply_dash(both)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ".*(q_proj|lm_head)"])
def test_targets_tied_to_the_embedding(targets):
    model = llama(tie_word_embeddings=True)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="ensure_weight_tying: an adapter of lm_head"):
        get_peft_model(model, llama_config(target_modules=targets, ensure_weight_tying=True))
    assert [type(m) for m in model.modules()] == before


def test_what_would_lose_a_part(both):
    settings = config()
    settings._register_custom_module({nn.Linear: nn.Linear})
    with pytest.raises(ValueError, match="_register_custom_module"):
        both.add_adapter("custom", settings)
    both.add_adapter("biased", config(lora_bias=True, target_modules=["first"]))
    with pytest.raises(ValueError, match="lora_bias: PEFT would leave the biases of biased out"):
        both.add_weighted_adapter(["default", "biased"], [1.0, 1.0], "sum", "cat")
    assert list(both.peft_config) == ["default", "other", "biased"]


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.22.0", "0.22.0.dev0", "1.0"])
def test_versions_outside_the_range(version):
    with pytest.raises(
        ImportError, match=rf"from 0\.19\.1 on and below 0\.22, and {version} is installed: pip install"
    ):
        check_version(version)


@pytest.mark.parametrize("version", ["0.19.1", "0.20.0", "0.21.2", "0.21.3.dev0+local"])
def test_versions_within(version):
    check_version(version)


def test_without_peft(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("loradash.integrations.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs PEFT: pip install 'loradash-kernels\[peft\]'"):
        importlib.import_module("loradash.integrations.peft")


def test_the_name_is_registered_once():
    register(DashLoraConfig, DashLoraModel)
    with pytest.raises(ImportError, match="peft has a method LORADASH already"):
        register(LoraConfig, DashLoraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is DashLoraConfig
