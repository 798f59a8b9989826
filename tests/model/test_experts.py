"""Experts' parameters with adapters: outputs, gradients, launch, files, merging, refusals."""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
from loradash import (
    DashConfig,
    DashSchedule,
    apply_dash,
    dash_layers,
    disable,
    hotswap_adapter,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    summary,
    unmerge,
    warm_up,
)
from loradash.data_parallel import frozen_buffers
from loradash.experts import DashExperts
from torch import nn
from torch.func import functional_call

pytest.importorskip("transformers", minversion="5")

from support.experts import BOTH, IDS, MODELS, NAMES, adapted, filled, logits, loss_of, moe, update_of


@pytest.fixture(scope="module")
def base():
    return moe()


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def test_an_adapter_without_update_changes_nothing(kind):
    base = moe(kind)
    before, keys = logits(base), list(base.state_dict())
    model = adapted(copy.deepcopy(base))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert set(keys) <= set(model.state_dict())
    # With values it is the model of W + ΔW, whichever of its parameters are adapted, and all ways in and out agree.
    for targets in (BOTH, BOTH[:1], BOTH[1:]):
        model = filled(adapted(copy.deepcopy(base), target_parameters=targets))
        found = logits(model)
        wanted = functional_call(
            base, {n: base.get_parameter(n) + d for n, d in update_of(model).items()}, (IDS,)
        ).logits
        assert (wanted - before).abs().max() > 0.1
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)
    with disable(model):
        assert torch.equal(logits(model), before)
    merge(model)
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    with disable(model):
        assert torch.equal(logits(model), before)
    unmerge(model)
    assert torch.equal(logits(model), found)
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == keys and not any(isinstance(m, DashExperts) for m in model.modules())
    trains = {n for n, p in base.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_transformers(implementation):
    base = moe("Mixtral", implementation)
    torch.testing.assert_close(logits(adapted(copy.deepcopy(base))), logits(base), rtol=1e-5, atol=1e-5)


def experts_module(name, **settings):
    """An experts module of transformers by itself, with values, and inputs for it."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kind = next(v for k, v in vars(module).items() if k.endswith("Experts") and v.__module__ == module.__name__)
    experts = kind(type("Config", (), {"_experts_implementation": "eager", **settings})())
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts, (torch.randn(9, 16), torch.randint(0, 4, (9, 2)), torch.rand(9, 2))


ALONE = {
    "nemotron_h": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 12,
        "moe_latent_size": None,
        "mlp_hidden_act": "relu2",
    },
    "aria": {"moe_num_experts": 4, "intermediate_size": 12},
    "muse_spark": {"num_local_experts": 4, "moe_hidden_size": 16, "moe_intermediate_size": 12, "post_norm_eps": 1e-6},
}


@pytest.mark.parametrize("name", ALONE)
def test_without_gate_stored_as_k_n_with_a_norm_behind(name):
    """The other variants that transformers' decorator knows."""
    experts, inputs = experts_module(name, hidden_size=16, hidden_act="silu", **ALONE[name])
    model = nn.Sequential(experts)
    wanted = experts(*inputs)
    apply_dash(model, DashConfig(r=2, directions=2, target_modules=[], target_parameters=r".*_proj"))
    torch.testing.assert_close(model[0](*inputs), wanted, rtol=1e-5, atol=1e-5)
    filled(model)
    found = model[0](*inputs)
    assert (found - wanted).abs().max() > 0.1
    merge(model)
    torch.testing.assert_close(model[0](*inputs), found, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_formula(kind):
    model = filled(adapted(moe(kind)))
    loss_of(model).backward()
    layers = dash_layers(model)
    ours = {(n, k): getattr(v, k).grad for n, v in layers.items() for k in ("lora_a", "lora_b", "dash_sigma")}
    plain = moe(kind)
    update = update_of(model)
    weights = {name: plain.get_parameter(name).detach() + delta for name, delta in update.items()}
    loss = functional_call(plain, weights, (), {"input_ids": IDS, "labels": IDS}).loss
    leaves = [getattr(layers[n], k) for n, k in ours]
    for found, wanted in zip(ours.values(), torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_dropout_is_one_mask_a_product_drawn_anew(base):
    model = filled(adapted(copy.deepcopy(base), dropout=0.4))
    still = logits(model)
    model.train()
    torch.manual_seed(5)
    one, other = logits(model), logits(model)
    torch.manual_seed(5)
    assert torch.equal(logits(model), one)
    assert (one - other).abs().max() > 1e-3 and (one - still).abs().max() > 1e-3
    # Recomputed in backward, the mask is the same.
    model.zero_grad()
    torch.manual_seed(5)
    loss_of(model).backward()
    wanted = dash_layers(model)[NAMES[0]].lora_a.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    loss_of(model).backward()
    torch.testing.assert_close(dash_layers(model)[NAMES[0]].lora_a.grad, wanted)


def test_beside_linear_layers():
    model = adapted(
        moe(num_hidden_layers=2),
        target_modules=["layers.0.self_attn.q_proj"],
        overrides={"down_proj": {"r": 5}},
        exclude_modules=["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
        trainable_modules=["lm_head"],
    )
    layers = dash_layers(model)
    assert list(layers) == ["model.layers.0.self_attn.q_proj", *NAMES]
    assert layers[NAMES[0]].lora_a.shape == (4, 3, 16) and layers[NAMES[1]].lora_b.shape == (4, 16, 5)
    assert {layers[n].weight.requires_grad for n in layers} == {False}
    adapters = sum(p.numel() for v in layers.values() for p in (v.lora_a, v.lora_b, v.dash_sigma))
    assert summary(model).adapters == adapters and summary(model).other_trainable == model.lm_head.weight.numel()
    assert {f"model.layers.0.mlp.experts.down_proj_{b}" for b in ("dash_u", "dash_vt", "launched")} <= frozen_buffers(
        model
    )
    with pytest.warns(UserWarning, match="leaves out 2 experts' parameters"):
        assert {run.name for run in warm_up(model, [4], progress=False)} == {"model.layers.0.self_attn.q_proj"}
    with pytest.warns(UserWarning, match="leaves out 2 experts' parameters"):
        assert warm_up(adapted(moe()), [4], progress=False) == []


def test_biases_train_where_they_are_wanted(tmp_path):
    base = moe("GptOss")
    model = adapted(copy.deepcopy(base), train_bias=True)
    loss_of(model).backward()
    bias = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj_bias")
    assert bias.grad.any() and not model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").requires_grad
    with torch.no_grad():
        bias.add_(0.5)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), tmp_path)), logits(model))


def test_other_dtypes(base):
    model = adapted(copy.deepcopy(base).bfloat16())
    layer = dash_layers(model)[NAMES[0]]
    assert layer.lora_a.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    filled(model)
    found = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), found, rtol=0.1, atol=0.1)
    model.float()
    unmerge(model)
    assert layer.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), found.float(), rtol=0.1, atol=0.1)


def test_compiled_whole(base):
    model = filled(adapted(copy.deepcopy(base)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))


class Unknown(nn.Module):
    """Stacked weights and a forward that nobody knows."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return torch.einsum("mk,enk->men", self.head(x), self.gate_up_proj)


def test_an_expression_over_a_block_takes_its_layers_and_leaves_its_experts_to_target_parameters():
    model = apply_dash(moe(), DashConfig(r=2, target_modules=r".*(attn|experts).*", target_parameters=BOTH))
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj"} < dash_layers(model).keys()


@pytest.mark.parametrize("wanted", [None, []])
def test_that_experts_are_left_out_is_said(wanted, tmp_path):
    """Unless an empty list says so; of a file it was said when it was trained."""
    model = moe()
    told = pytest.warns(UserWarning, match=r"experts of this model are parameters \(model\.layers\.0\.mlp")
    with told if wanted is None else contextlib.nullcontext():
        apply_dash(model, DashConfig(r=2, target_parameters=wanted))
    load_adapter(moe(), save_adapter(model, tmp_path))


def test_a_smaller_adapter_is_swapped_in(tmp_path):
    smaller = filled(adapted(moe(), r=2, directions=1, alpha=4))
    model = filled(adapted(moe()))
    held = [p.data_ptr() for p in model.parameters()]
    hotswap_adapter(model, save_adapter(smaller, tmp_path))
    torch.testing.assert_close(logits(model), logits(smaller))
    assert held == [p.data_ptr() for p in model.parameters()]


def test_a_part_that_does_not_fit_is_kept_for_a_later_unmerge():
    """As under FSDP1's summon_full_params, where the weight is whole and the part is flat."""
    layer = next(iter(dash_layers(adapted(moe())).values()))
    layer.unmerged = torch.zeros(5)
    with pytest.raises(ValueError, match=r"gate_up_proj: .*outside of summon_full_params"):
        layer.unmerge()
    assert layer.merged


def test_what_is_refused(base):
    def refused(match, model=base, **settings):
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=match):
            adapted(model, **settings)
        assert before == {n: p.requires_grad for n, p in model.named_parameters()} and not dash_layers(model)

    refused(
        r"'experts.up_proj' matches no parameter; .*: model.layers.0.mlp.experts.gate_up_proj",
        target_parameters=["experts.up_proj"],
    )
    refused(r"matches no parameter", target_parameters=[*BOTH, "gone"])
    refused(r"gate.weight is a parameter \(4, 16\) of MixtralTopKRouter", target_parameters=["gate.weight"])
    refused(r"q_proj.weight is a parameter .* of Linear", target_parameters=["q_proj.weight"])
    refused(
        r"down_proj_bias has shape \(4, 16\); of GptOssExperts gate_up_proj and",
        moe("GptOss"),
        target_parameters=["down_proj_bias"],
    )
    refused("forward is not known", Unknown(), target_parameters=["gate_up_proj"])
    refused(
        "overrides: 'none' matches no linear layer or experts' parameter",
        overrides={"down_proj": {"r": 2}, "none": {"r": 2}},
    )
    refused("matches none of the", target_parameters=None)
    refused(
        r"experts: its gate_up_proj, down_proj are adapted by target_parameters",
        target_modules=["experts"],
        target_parameters=None,
    )
    for spoil, match in (
        (lambda m: setattr(m, "_is_expert_parallel", True), "expert parallelism"),
        (lambda m: setattr(m.config, "_experts_implementation", "deepgemm"), "experts_implementation='deepgemm'"),
    ):
        model = moe()
        spoil(model.model.layers[0].mlp.experts)
        refused(match, model)
        model = adapted(moe())
        spoil(model.model.layers[0].mlp.experts)
        with pytest.raises(ValueError, match=match):
            logits(model)
    with pytest.raises(ValueError, match="adapters already"):
        adapted(adapted(copy.deepcopy(base)))
    whole = copy.deepcopy(base)
    experts = whole.model.layers[0].mlp.experts
    experts.forward = experts.forward
    refused("forward was replaced", whole)


class Chosen(nn.Module):
    """Experts as linear layers of their own, in a list."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, chosen):
        return torch.stack([self.experts[e](row) for row, e in zip(x, chosen, strict=True)])


def test_a_list_of_linear_experts_with_an_idle_one():
    torch.manual_seed(0)
    model = apply_dash(Chosen(), DashConfig(r=2, directions=2, prelaunch_steps=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = DashSchedule(model, progress=False)
    for step in range(2):
        model(torch.randn(4, 8), [0, 2, 0, 2]).square().sum().backward()
        optimizer.step()
        with pytest.warns(
            UserWarning,
            match=r"no gradient for 1 of 3.*experts\.1" if step == 0 else r"no update yet in 1 layers.*experts\.1",
        ):
            schedule.step()
    assert [bool(layer.launched) for layer in dash_layers(model).values()] == [True, False, True]


class Sizes:
    """A configuration that has whatever an experts module asks for: four experts, widths of 16."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_act") or "activation" in name:
            return "silu"
        if name == "moe_latent_size":
            return None
        if "eps" in name:
            return 1e-6
        if any(part in name for part in ("limit", "alpha", "beta", "scale")):
            return 1.5
        return 4 if "num" in name or "n_routed" in name or ("expert" in name and "size" not in name) else 16


@pytest.mark.slow
def test_all_experts_of_transformers():
    """Every module that has its decorator computes with adapters what its own forward computes."""
    import transformers.models

    seen = 0
    for file in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        for kind in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", file.read_text(), re.M):
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            torch.manual_seed(0)
            experts = getattr(module, kind)(Sizes())
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=0.3)
            chosen = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
            inputs = torch.randn(9, 16), chosen, torch.rand(9, 2)
            wanted = experts(*inputs)
            patterns = r".*\.((gate_)?up|down)_proj"
            model = apply_dash(nn.Sequential(experts), DashConfig(r=2, target_modules=[], target_parameters=patterns))
            assert len(dash_layers(model)) == 2, kind
            torch.testing.assert_close(model[0](*inputs), wanted, rtol=1e-4, atol=1e-4, msg=kind)
            seen += 1
    assert seen
