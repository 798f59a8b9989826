"""Parameter groups: everything that trains, once, Δσ apart, under every wrapper and in transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from loradash import DashConfig, DashSchedule, apply_dash, dash_layers, dash_only, dash_parameter_groups, dash_state
from support.networks import CONFIG, X, network
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Blocks(nn.Module):
    """Adapted layers with biases, a norm, an embedding that trains, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.frozen = nn.Embedding(5, 8), nn.Embedding(5, 8)
        self.first, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.norm(self.first(self.embedding(tokens) + self.frozen(tokens))))


def blocks(**settings):
    torch.manual_seed(0)
    settings = {"trainable_modules": ["embedding", "norm", "head"], "train_bias": True, **settings}
    return apply_dash(Blocks(), DashConfig(r=2, directions=2, target_modules=["first"], **settings))


def names(groups):
    return {group["name"]: group["names"] for group in groups}


def test_groups():
    model = blocks()
    groups = dash_parameter_groups(model, lr=1e-3, sigma_lr=1e-1, weight_decay=0.1)
    assert names(groups) == {
        "adapters": ["first.lora_a", "first.lora_b"],
        "sigma": ["first.dash_sigma"],
        "others": ["embedding.weight", "head.weight"],
        "others_no_decay": ["first.bias", "norm.weight", "norm.bias", "head.bias"],
    }
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "adapters": (1e-3, 0.1),
        "sigma": (1e-1, 0.0),
        "others": (1e-3, 0.1),
        "others_no_decay": (1e-3, 0.0),
    }
    found = dict(model.named_parameters())
    given = [(name, p) for group in groups for name, p in zip(group["names"], group["params"], strict=True)]
    assert all(found[name] is p for name, p in given)
    assert {name for name, _ in given} == {name for name, p in found.items() if p.requires_grad}


def test_defaults():
    groups = dash_parameter_groups(blocks(trainable_modules=None, train_bias=False), lr=1e-3)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("adapters", 1e-3, 0.0), ("sigma", 1e-3, 0.0)]
    (sigma,) = (g for g in dash_parameter_groups(blocks(), 1e-3, sigma_weight_decay=0.5) if g["name"] == "sigma")
    assert sigma["weight_decay"] == 0.5


def test_layers_and_weights_that_occur_twice():
    shared = nn.Linear(8, 8)
    head = nn.Linear(8, 8, bias=False)
    model = nn.ModuleDict({"a": shared, "b": shared, "head": head, "tied": nn.Linear(8, 8, bias=False)})
    model["tied"].weight = head.weight
    apply_dash(model, DashConfig(r=2, directions=2, target_modules=["a"], trainable_modules=["head"]))
    assert names(dash_parameter_groups(model, 1e-3)) == {
        "adapters": ["a.lora_a", "a.lora_b"],
        "sigma": ["a.dash_sigma"],
        "others": ["head.weight"],
    }


def test_after_dash_only():
    model = blocks(trainable_modules=None, train_bias=False)
    for layer in dash_layers(model).values():
        layer.launched.fill_(True)
    dash_only(model)
    assert names(dash_parameter_groups(model, 1e-3)) == {"sigma": ["first.dash_sigma"]}


def test_a_peft_model():
    peft = pytest.importorskip("peft")
    from loradash.integrations.peft import DashLoraConfig

    config = DashLoraConfig(r=2, directions=2, target_modules=["first"], modules_to_save=["head"])
    model = peft.get_peft_model(Blocks(), config)
    model.add_adapter("other", config)
    where = "base_model.model.first"
    assert names(dash_parameter_groups(model, 1e-3)) == {
        "adapters": [f"{where}.lora_A.default.weight", f"{where}.lora_B.default.weight"],
        "sigma": [f"{where}.lora_dash_sigma.default"],
        "others": ["base_model.model.head.modules_to_save.default.weight"],
        "others_no_decay": ["base_model.model.head.modules_to_save.default.bias"],
    }


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), None, "1e-3", True, torch.tensor(1.0)])
def test_rates_are_positive_numbers(value):
    with pytest.raises(ValueError, match="lr must be a positive finite number, got"):
        dash_parameter_groups(blocks(), value)
    if value is not None:
        with pytest.raises(ValueError, match="sigma_lr must be a positive finite number, got"):
            dash_parameter_groups(blocks(), 1e-3, sigma_lr=value)


def test_bad_input():
    for setting in ("weight_decay", "sigma_weight_decay"):
        with pytest.raises(ValueError, match=f"^{setting} must be a finite number of at least 0, got -1"):
            dash_parameter_groups(blocks(), 1e-3, **{setting: -1})
    with pytest.raises(ValueError, match="the model has no LoRA-Dash adapters"):
        dash_parameter_groups(nn.Linear(2, 2), 1e-3)
    with pytest.raises(ValueError, match="the weights of adapted layers train, first, beside adapters"):
        dash_parameter_groups(blocks().requires_grad_(True), 1e-3)
    with pytest.raises(ValueError, match="nothing of the model trains"):
        dash_parameter_groups(blocks().requires_grad_(False), 1e-3)


def test_a_schedule_of_rates_keeps_their_ratio():
    model, tokens = blocks(prelaunch_steps=2), torch.arange(5)
    optimizer = torch.optim.AdamW(dash_parameter_groups(model, 1e-2, sigma_lr=1e-1))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    schedule = DashSchedule(model, progress=False)
    for _ in range(3):
        model(tokens).square().sum().backward()
        last = {group["name"]: group["lr"] for group in optimizer.param_groups}
        optimizer.step()
        schedule.step()
        scheduler.step()
        optimizer.zero_grad()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["adapters"] < 1e-2
    assert rates["sigma"] == pytest.approx(10 * rates["adapters"], rel=1e-12)
    # Adam's first step moves every number by its rate: one step after launch.
    torch.testing.assert_close(
        model.first.dash_sigma.detach().abs(), torch.full((2,), last["sigma"]), rtol=1e-3, atol=0
    )


def test_the_optimizer_state_goes_through_a_file(tmp_path):
    model = blocks()
    optimizer = torch.optim.AdamW(dash_parameter_groups(model, 1e-2))
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = torch.optim.AdamW(dash_parameter_groups(blocks(), 1e-2))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [g["name"] for g in other.param_groups] == ["adapters", "sigma", "others", "others_no_decay"]


def test_wrapped_models(process_group):
    """FSDP2, DistributedDataParallel, torch.compile: the same groups, and an optimizer that steps."""

    def made():
        return apply_dash(network(), CONFIG)

    sharded = made()
    fully_shard(sharded[0], mesh=process_group)
    fully_shard(sharded, mesh=process_group)
    expected = names(dash_parameter_groups(made(), 1e-3))
    for model in (sharded, nn.parallel.DistributedDataParallel(made()), torch.compile(made(), backend="eager")):
        groups = dash_parameter_groups(model, 1e-3)
        assert {k: [n.removeprefix("module.") for n in each] for k, each in names(groups).items()} == expected
        optimizer = torch.optim.AdamW(groups)
        model(X).sum().backward()
        optimizer.step()
        assert all(p.grad is not None for g in groups for p in g["params"])
    assert isinstance(dash_parameter_groups(sharded, 1e-3)[0]["params"][0], DTensor)


def test_transformers_trainer_takes_the_optimizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = apply_dash(network(), CONFIG)

        def forward(self, x, labels=None):
            return {"loss": self.body(x).square().mean()}

    model = Regression()
    schedule = DashSchedule(model, progress=False)
    optimizer = torch.optim.AdamW(dash_parameter_groups(model, lr=1e-2, sigma_lr=1e-1))

    class Step(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            schedule.step()

    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=8, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"x": x, "labels": 0} for x in X]
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[Step()]
    )
    trainer.train()
    assert dash_state(model).step == 8
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert set(rates) == {"adapters", "sigma", "others", "others_no_decay"}
    # The Trainer's linear schedule ends at zero, for all groups.
    assert all(rate == 0 for rate in rates.values())
    assert all(bool(layer.dash_sigma.abs().max() > 1e-2) for layer in dash_layers(model).values())
