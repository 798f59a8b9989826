"""Export to PEFT: what the real PEFT serves has the model's outputs, or the export says why it cannot."""

from __future__ import annotations

import copy

import loradash
import pytest
import torch
from loradash import apply_dash, dash_layers, export_lora
from loradash.peft_layout import PREFIX
from safetensors.torch import load_file
from support.exported import X, config, served_like, settings_of, trained
from torch import nn

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """Linear layers, or given modules, under given names, one after the other."""

    def __init__(self, names, build=lambda: nn.Linear(8, 8)):
        super().__init__()
        for name in names:
            self.add_module(name, build())

    def forward(self, x):
        for module in self.children():
            x = torch.tanh(module(x))
        return x


def block():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def test_the_file(tmp_path):
    base = Net("ab")
    model = trained(apply_dash(copy.deepcopy(base), config()))
    served = served_like(base, model, tmp_path)
    merged = served.merge_and_unload()
    torch.testing.assert_close(merged(X), model(X), rtol=1e-5, atol=1e-5)
    read = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (read.r, read.lora_alpha, read.target_modules, read.modules_to_save) == (5, 5, {"a", "b"}, None)
    assert read.lora_dropout == 0.1 and read.task_type is None and read.base_model_name_or_path is None
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors[f"{PREFIX}a.lora_A.weight"].shape == (5, 8)


def test_mixed_ranks_become_one(tmp_path):
    base = Net("abc")
    model = trained(
        apply_dash(copy.deepcopy(base), config(overrides={"b": {"r": 6, "alpha": 3}, "c": {"directions": 0}}))
    )
    served_like(base, model, tmp_path)
    settings = settings_of(tmp_path)
    assert (settings["r"], settings["lora_alpha"]) == (8, 8)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    shapes = {k.removeprefix(PREFIX): t.shape for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert set(shapes.values()) == {(8, 8)} and len(shapes) == 6


@pytest.mark.parametrize("change", ["merged", "disabled", "half", "bfloat16 weight"])
def test_the_state_of_the_model_does_not_matter(tmp_path, change):
    base = Net("ab")
    model = trained(apply_dash(copy.deepcopy(base), config(trainable_modules=["b"])))
    wanted = model(X).detach()
    if change == "merged":
        loradash.merge(model)
        export_lora(model, tmp_path)
        assert model.a.merged
    elif change == "disabled":
        with loradash.disable(model):
            export_lora(model, tmp_path)
    else:
        model = model.half() if change == "half" else model
        if change != "half":
            model.a.weight.data = model.a.weight.data.bfloat16()
        export_lora(model, tmp_path)
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    tolerance = 2e-3 if change == "half" else 1e-5
    torch.testing.assert_close(served(X), wanted, rtol=tolerance, atol=tolerance)
    assert load_file(tmp_path / "adapter_model.safetensors")[f"{PREFIX}a.lora_B.weight"].dtype == torch.float32


def test_names_after_wrapping(tmp_path):
    base = Net("ab")
    model = trained(apply_dash(copy.deepcopy(base), config(trainable_modules=["b"])))
    wanted = model(X)
    model.a = torch.compile(model.a, backend="eager")
    model.b = torch.compile(model.b, backend="eager")
    export_lora(torch.compile(model, backend="eager"), tmp_path)
    served = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(served(X), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (["layer(1)", "layer1"], r"layer\(1\)"),
        (["w[0]", "w0"], r"w\[0\]"),
        (["a+b", "aab"], r"a\+b"),
        (["^x$", "x"], r"\^x\$"),
        (["x|y", "x", "y"], r"x\|y"),
        (["b{2}", "bb"], r"b\{2\}"),
        (["a\\d", "a1"], r"a\\d"),
    ],
)
def test_names_with_the_characters_of_expressions(tmp_path, names, targets):
    base = Net(names)
    served_like(base, trained(apply_dash(copy.deepcopy(base), config(target_modules=targets))), tmp_path)


def test_a_name_that_ends_another_is_told_apart(tmp_path):
    """PEFT takes a list for suffixes: "0" would hit "inner.0" too, so an expression for whole names takes its place."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    model = trained(apply_dash(copy.deepcopy(base), config(target_modules=r"0|2|1\.1")))
    served = served_like(base, model, tmp_path)
    assert settings_of(tmp_path)["target_modules"] == r"0|1\.1|2"
    hit = {name for name, module in served.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert hit == {"0", "2", "1.1"}
    whole = trained(apply_dash(copy.deepcopy(base), config()))
    served_like(base, whole, tmp_path)
    assert settings_of(tmp_path)["target_modules"] == ["0", "1.0", "1.1", "2"]


def test_many_layers_with_one_left_out(tmp_path):
    """PEFT shortens lists of more than twenty names."""
    base = nn.Sequential(*(Net("qv") for _ in range(12)))
    model = trained(apply_dash(copy.deepcopy(base), config(exclude_modules=["7.q"])))
    served = served_like(base, model, tmp_path, tolerance=1e-4)
    hit = {name for name, module in served.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert hit == set(dash_layers(model)) and len(hit) == 23


@pytest.mark.parametrize(
    ("names", "whole", "other"),
    [
        (["lm_head", "head"], "head", "lm_head"),
        (["A", "b"], "A", r"b\.lora_A"),
        (["base_layer", "b"], "base_layer", r"b\.base_layer"),
        (["default", "b"], "default", r"b\.lora_A\.default"),
        (["model", "b"], "model", "base_model"),
        (["out", "b"], "out", r"b\.lora_dropout"),
        # PEFT takes this name for an expression too.
        (["a[b]", "ab"], "a[b]", "ab"),
    ],
)
def test_modules_kept_whole_that_peft_would_mistake(tmp_path, names, whole, other):
    pattern = whole.replace("[", "\\[").replace("]", "\\]")
    model = trained(apply_dash(Net(names), config(trainable_modules=pattern)))
    with pytest.raises(ValueError, match=rf"{pattern} .*PEFT.* {other}"):
        export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_modules_kept_whole(tmp_path):
    base = Net(["lm_head", "head", "mid"])
    model = trained(apply_dash(copy.deepcopy(base), config(trainable_modules=["lm_head"])))
    served = served_like(base, model, tmp_path)
    wrappers = {n for n, m in served.base_model.model.named_modules() if hasattr(m, "modules_to_save")}
    assert wrappers == {"lm_head"} == set(settings_of(tmp_path)["modules_to_save"])
    with served.disable_adapter():
        torch.testing.assert_close(served(X), base(X))


def test_a_whole_module_whose_name_is_no_expression(tmp_path):
    model = trained(apply_dash(Net(["a(", "b"]), config(trainable_modules=["a("])))
    with pytest.raises(ValueError, match=r"a\( trained as a whole, and PEFT cannot read its name"):
        export_lora(model, tmp_path)


def test_whole_modules_with_parts_and_buffers(tmp_path):
    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(), Net(["last"], lambda: nn.BatchNorm1d(8)))

    model = apply_dash(build(), config(trainable_modules=["2"]))
    model.train()(X)
    served_like(build(), trained(model), tmp_path)


class Twice(nn.Module):
    """A module under two names of one parent."""

    def __init__(self, build=lambda: nn.Linear(8, 8)):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other = build(), nn.Linear(8, 8)
        self.again = self.first

    def forward(self, x):
        return self.again(torch.relu(self.other(self.first(x))))


@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_under_two_names_is_refused(tmp_path, whole):
    settings = config(trainable_modules=["first"]) if whole else config()
    model = trained(apply_dash(Twice(), settings))
    with pytest.raises(ValueError, match="first and again are one shared module"):
        export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{}, {"trainable_modules": ["first.2"]}])
def test_a_block_under_two_names_is_exported(tmp_path, settings):
    """Its layers have one parent, in which PEFT replaces them for both."""
    served_like(Twice(block), trained(apply_dash(Twice(block), config(**settings))), tmp_path)


def test_a_shared_layer_that_is_not_adapted(tmp_path):
    served_like(Twice(), trained(apply_dash(Twice(), config(target_modules=["other"]))), tmp_path)


class Tied(nn.Module):
    """An output layer over the weight of the embedding, held as one parameter or as two of one memory."""

    def __init__(self, one=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight if one else nn.Parameter(self.embed.weight.detach())

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.embed(x))))


TOKENS = torch.arange(11)


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("whole", ["embed", "head"])
def test_a_trained_module_tied_to_another_is_refused(tmp_path, one, merged, whole):
    # The head shares the weight that trains here: it cannot be adapted as well.
    targets = ["mid"] if one and whole == "embed" else None
    model = trained(apply_dash(Tied(one), config(trainable_modules=[whole], target_modules=targets)))
    if merged:
        loradash.merge(model)
    other = "head" if whole == "embed" else "embed"
    with pytest.raises(ValueError, match=f"{whole}.weight was trained and is tied to {other}.weight"):
        export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_modules_tied_and_trained_together(tmp_path):
    served_like(Tied(), trained(apply_dash(Tied(), config(trainable_modules=["embed", "head"]))), tmp_path, TOKENS)


def test_an_adapted_layer_over_a_tied_weight(tmp_path):
    model = trained(apply_dash(Tied(), config()))
    with pytest.warns(UserWarning, match="weight of head is tied.*merge_and_unload"):
        served_like(Tied(), model, tmp_path, TOKENS)


def test_parents_that_read_weights_are_refused(tmp_path):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8))
    apply_dash(model, config(target_modules=["linear1", "1"]))
    with pytest.raises(ValueError, match=r"0\.linear1: TransformerEncoderLayer reads the weight"):
        export_lora(trained(model), tmp_path)


def test_a_quantised_layer(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    if peft.__version__.startswith("0.19."):
        pytest.skip("PEFT 0.19 takes torchao's layers from transformers' quantiser alone")

    def build():
        torch.manual_seed(0)
        model = Net("ab", lambda: nn.Linear(64, 64))
        torchao.quantize_(model.a, torchao.Int8WeightOnlyConfig())
        return model

    x = torch.randn(3, 64)
    served_like(build(), trained(apply_dash(build(), config())), tmp_path, x, 1e-4)


def test_nothing_is_written_where_biases_trained(tmp_path):
    model = apply_dash(Net("ab"), config(train_bias=True))
    with pytest.raises(ValueError, match="train_bias"):
        export_lora(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
