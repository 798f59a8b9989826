"""When the directions of LORADASH adapters are chosen, and of which."""

from __future__ import annotations

import loradash
import pytest
import torch

pytest.importorskip("peft", reason="needs PEFT")
pytest.importorskip("transformers", reason="needs transformers")

from support.peft_models import Net, adapted, config, layers_of, loss_of, train, two_adapters


@pytest.fixture
def both():
    return two_adapters()


def test_sigma_gets_no_optimizer_step_before_launch():
    model = adapted(prelaunch_steps=3)
    schedule = loradash.DashSchedule(model, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    sigma = layers_of(model)["base_model.model.first"].lora_dash_sigma["default"]
    launched = []
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        launched += [step] if schedule.step() else []
        assert ("step" in optimizer.state[sigma]) is (step > 2)
    assert launched == [2] and float(optimizer.state[sigma]["step"]) == 2


def test_adapters_launch_apart():
    model = adapted()
    model.add_adapter("other", config(prelaunch_steps=4))
    schedules = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        schedules[name] = loradash.DashSchedule(model, progress=False)
    model.set_adapter("default")
    train(model, 3, schedule=schedules["default"])
    launched = {
        name: [bool(layer.lora_dash_launched[name]) for layer in layers_of(model).values()] for name in schedules
    }
    assert launched == {"default": [True] * 3, "other": [False] * 3}
    with pytest.raises(RuntimeError, match="another adapter is active"):
        train(model, 1, schedule=schedules["other"])
    model.set_adapter("other")
    before = {n: t.clone() for n, t in model.state_dict().items() if ".default" in n}
    train(model, 5, schedule=schedules["other"])
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert schedules["other"].launched and loradash.dash_state(model).step == 5


def test_several_active_adapters_are_not_launched(both):
    both.base_model.set_adapter(["default", "other"])
    for call in (loradash.DashSchedule, loradash.prelaunch, loradash.dash_layers):
        with pytest.raises(ValueError, match=r"one LORADASH adapter at a time.*default, other"):
            call(both)


def test_the_directions_are_those_of_apply_dash():
    """The same A and B give the same directions through both doors."""
    model = train(adapted(target_modules=["first", "last"]), 1)
    plain = loradash.apply_dash(
        Net(), loradash.DashConfig(r=4, alpha=8, directions=3, target_modules=["first", "last"])
    )
    for name, view in loradash.dash_layers(model).items():
        layer = loradash.dash_layers(plain)[name]
        layer.lora_a.data, layer.lora_b.data = view.lora_a.data.clone(), view.lora_b.data.clone()
    ours = loradash.prelaunch(model, progress=False)
    theirs = loradash.prelaunch(plain, progress=False)
    for report, other in zip(ours, theirs, strict=True):
        assert report.name == other.name and torch.equal(report.index, other.index)
    for name, view in loradash.dash_layers(model).items():
        assert torch.equal(view.dash_u, loradash.dash_layers(plain)[name].dash_u)
    with pytest.raises(ValueError, match="launched already"):
        loradash.prelaunch(model, progress=False)


def test_a_kept_decomposition_serves(tmp_path):
    model = train(adapted(), 1)
    cache = loradash.SpectralCache(tmp_path)
    cache.start(model).wait()
    assert len(loradash.prelaunch(model, progress=False, cache=cache)) == 3


def test_a_merged_adapter_is_not_launched():
    model = train(adapted(), 1)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        loradash.prelaunch(model, progress=False)


@pytest.mark.parametrize("take_out", [lambda m: m.unload(), lambda m: m.delete_adapter("default")])
def test_an_adapter_taken_out_while_it_is_counted(take_out):
    model = two_adapters()
    schedule = loradash.DashSchedule(model, progress=False)
    take_out(model)
    with pytest.raises(
        RuntimeError, match=r"adapter default was taken out of the model|has no LoRA-Dash adapters any more"
    ):
        schedule.step()
