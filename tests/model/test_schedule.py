"""The schedule: which steps count, what the optimizer sees of Δσ, layers that do not learn."""

from __future__ import annotations

import copy
import gc
import warnings

import loradash
import pytest
import torch
from loradash import DashConfig, DashSchedule, apply_dash, load_adapter, save_adapter
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

WIDTH = 32


def adapted(steps=3, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    return apply_dash(model, DashConfig(r=4, directions=4, prelaunch_steps=steps, **settings))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model):
    model(torch.randn(8, WIDTH)).square().mean().backward()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-3),
    "sgd": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sigma_starts_with_a_fresh_optimizer(name):
    """After launch Δσ moves, to rounding, as under an optimizer that sees it for the first time."""
    model = adapted(steps=20)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS[name](trainable(model))
    while not schedule.launched:
        optimizer.zero_grad()
        backward(model)
        # DDP wants a gradient for every parameter.
        assert all(layer.dash_sigma.grad is not None for layer in loradash.dash_layers(model).values())
        optimizer.step()
        assert all(not optimizer.state[layer.dash_sigma] for layer in loradash.dash_layers(model).values())
        schedule.step()
    sigma = model[0].dash_sigma
    twin = nn.Parameter(sigma.detach().clone())
    fresh = OPTIMIZERS[name]([twin])
    for _ in range(5):
        optimizer.zero_grad()
        backward(model)
        twin.grad = sigma.grad.clone()
        optimizer.step()
        fresh.step()
        schedule.step()
        assert sigma.any()
        torch.testing.assert_close(twin, sigma, rtol=1e-6, atol=0)


def test_a_resumed_run_trains_sigma_at_once(tmp_path):
    model = adapted(steps=1)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        schedule.step()
    file = save_adapter(model, tmp_path)
    # A schedule made before the adapter is loaded counts on as well.
    for early in (True, False):
        other = adapted(steps=1)
        schedule = DashSchedule(other, progress=False) if early else None
        load_adapter(other, file)
        schedule = schedule or DashSchedule(other, progress=False)
        optimizer = OPTIMIZERS["adamw"](trainable(other))
        before = other[0].dash_sigma.detach().clone()
        backward(other)
        optimizer.step()
        assert not torch.equal(other[0].dash_sigma, before)
        assert not schedule.step()
        assert loradash.dash_state(other).step == 4


@pytest.mark.parametrize("skipped", [1, 4])
def test_steps_that_grad_scaler_skips_do_not_count(skipped):
    """Its first scale is too large for most runs: the first steps overflow, and the optimizer takes none."""
    model = adapted(steps=3)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    counts = []
    for step in range(skipped + 5):
        optimizer.zero_grad()
        loss = model(torch.randn(8, WIDTH)).square().mean()
        scaler.scale(loss * (float("inf") if step < skipped else 1.0)).backward()
        if step < skipped:
            for p in trainable(model):
                p.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        counts.append(loradash.dash_state(model).step)
    assert counts[skipped:] == [1, 2, 3, 4, 5]
    assert all(bool(layer.launched) for layer in loradash.dash_layers(model).values())


def test_steps_that_a_fused_optimizer_skips_do_not_count():
    """GradScaler lets a fused optimizer see for itself that there was an overflow."""
    model = adapted(steps=100)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["fused"](trainable(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for overflows in (True, False, True, False, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, WIDTH)).square().mean() * (float("inf") if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert loradash.dash_state(model).step == 3


@pytest.mark.parametrize("by_name", [False, True])
def test_sigma_starts_fresh_where_a_closure_makes_the_gradients(by_name):
    model = adapted(steps=5)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))

    def closure():
        optimizer.zero_grad()
        backward(model)
        return 7.0

    while not schedule.launched:
        assert (optimizer.step(closure=closure) if by_name else optimizer.step(closure)) == 7.0
        assert not optimizer.state[model[0].dash_sigma]
        schedule.step()
    optimizer.step(closure)
    assert optimizer.state[model[0].dash_sigma]["step"] == 1


@pytest.mark.parametrize("how", ["prelaunch", "state dict", "adapter"])
def test_sigma_trains_however_it_was_launched(how, tmp_path):
    """Behind the schedule's back, and long before its step."""
    other = adapted()
    for layer in loradash.dash_layers(other).values():
        nn.init.normal_(layer.lora_b)
    loradash.prelaunch(other, progress=False)
    model = adapted(steps=100)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))
    backward(model)
    optimizer.step()
    schedule.step()
    if how == "prelaunch":
        loradash.prelaunch(model, progress=False)
    elif how == "state dict":
        model.load_state_dict(other.state_dict())
    else:
        load_adapter(model, save_adapter(other, tmp_path))
    backward(model)
    optimizer.step()
    schedule.step()
    assert model[0].dash_sigma.any()


def test_a_launched_model_that_gets_an_older_adapter_launches_again(tmp_path):
    model = adapted(steps=2)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))
    launched = []
    save_adapter(model, tmp_path)
    for step in range(6):
        if step == 3:
            load_adapter(model, tmp_path)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        launched.append(schedule.step())
    assert launched == [False, True, False, False, True, False]


def test_launch_waits_for_the_first_update():
    """A warm-up that starts at a learning rate of 0 takes a step that changes nothing."""
    model = adapted(steps=1)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    launched = []
    for _ in range(4):
        backward(model)
        optimizer.step()
        rate.step()
        launched.append(schedule.step())
    assert launched == [False, True, False, False]
    assert all(bool(layer.launched) for layer in loradash.dash_layers(model).values())


def test_calls_without_an_optimizer_step_do_not_count():
    """Accumulation of gradients: the schedule may be stepped with every batch."""
    model = adapted(steps=100)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))
    for batch in range(12):
        backward(model)
        if batch % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    assert loradash.dash_state(model).step == 3


def test_other_optimizers_count_by_the_call():
    """One that torch.optim does not know, or one for other parameters, tells nothing."""
    model = adapted(steps=100)
    schedule = DashSchedule(model, progress=False)
    other = nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(2)
    strange = torch.optim.SGD([other], 0.1)
    for _ in range(5):
        strange.step()
        schedule.step()
    assert loradash.dash_state(model).step == 5


def test_what_is_no_cache_is_refused_before_training():
    with pytest.raises(TypeError, match=r"cache must be a SpectralCache .*got str"):
        DashSchedule(adapted(), cache="folder")


def test_the_last_schedule_counts():
    model = adapted(steps=100)
    first = DashSchedule(model, progress=False)
    first.step()
    second = DashSchedule(model, progress=False)
    second.step()
    with pytest.raises(RuntimeError, match="a later DashSchedule counts"):
        first.step()
    assert loradash.dash_state(model).step == 2


def test_schedules_leave_nothing_behind():
    gc.collect()
    before = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    schedule = DashSchedule(adapted(), progress=False)
    assert len(_global_optimizer_pre_hooks) == before[0] + 1
    del schedule
    gc.collect()
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == before


def test_a_model_with_a_schedule_can_be_copied_and_pickled(tmp_path):
    model = adapted()
    DashSchedule(model, progress=False)
    twin = copy.deepcopy(model)
    torch.save(twin, tmp_path / "model.pt")
    assert loradash.dash_state(torch.load(tmp_path / "model.pt", weights_only=False)).schedules == 1


def test_a_schedule_is_copied_with_its_model(tmp_path):
    model = adapted(steps=2)
    model.schedule = DashSchedule(model, progress=False)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        optimizer = OPTIMIZERS["adamw"](trainable(twin))
        launched = []
        for _ in range(3):
            backward(twin)
            optimizer.step()
            launched.append(twin.schedule.step())
        assert launched == [False, True, False]
        assert bool(twin[0].launched)
        assert not bool(model[0].launched)


class Passing(nn.Module):
    """Uses one child's weight by a way that no reader of its code sees, and leaves another unused."""

    def __init__(self):
        super().__init__()
        self.used, self.passed, self.unused = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        module = self.passed
        return nn.functional.linear(self.used(x), module.weight, module.bias)


def test_layers_without_a_gradient_are_named_once():
    model = apply_dash(Passing(), DashConfig(r=2, directions=2, prelaunch_steps=50))
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))
    for step in range(3):
        backward(model)
        optimizer.step()
        # The gradients are gone before the schedule looks.
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            schedule.step()
        texts = [str(w.message) for w in said if "loradash" in str(w.message)]
        assert len(texts) == (step == 0), texts
        if texts:
            assert "no gradient for 2 of 3 adapted layers in the first step: passed, unused." in texts[0]


def test_frozen_adapters_are_told():
    model = adapted(steps=50)
    # get_peft_model and prepare_model_for_kbit_training freeze everything like this.
    model.requires_grad_(False)
    schedule = DashSchedule(model, progress=False)
    with pytest.warns(UserWarning, match="no adapter trains"):
        schedule.step()


def test_layers_may_get_other_names():
    """Wrapped in place, as DistributedDataParallel around a part of the model does."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    schedule = DashSchedule(apply_dash(model, DashConfig(r=2, directions=2)), progress=False)
    model[1] = nn.Sequential(model[1])
    schedule.step()


def test_layers_that_were_replaced_are_named():
    model = apply_dash(Passing(), DashConfig(r=2, directions=2, prelaunch_steps=50))
    schedule = DashSchedule(model, progress=False)
    model.unused = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(RuntimeError, match="replaced since DashSchedule was made: unused"):
        schedule.step()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_training_with_a_schedule(compiler):
    """Hooks on B do not break the graph; launch compiles nothing anew."""
    torch._dynamo.reset()
    model = adapted(steps=2)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    counter = torch._dynamo.utils.counters["stats"]
    graphs = []
    for _ in range(4):
        optimizer.zero_grad()
        backward(compiled)
        optimizer.step()
        schedule.step()
        graphs.append(counter["unique_graphs"])
    assert schedule.launched and graphs[0] == graphs[-1]


def test_prelaunch_keeps_what_was_trained():
    model = adapted(steps=1)
    schedule, optimizer = DashSchedule(model, progress=False), OPTIMIZERS["adamw"](trainable(model))
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        schedule.step()
    sigma = model[0].dash_sigma.detach().clone()
    with pytest.raises(ValueError, match=r"launched already, .* would lose their trained dash_sigma: 0, 1"):
        loradash.prelaunch(model, progress=False)
    found = schedule.reports[0]
    assert found.name == "0"
    directions = type("Found", (), {"u": model[0].dash_u.clone(), "vt": model[0].dash_vt.clone()})
    with pytest.raises(ValueError, match="0 is launched, and its trained dash_sigma would be lost"):
        model[0].launch(directions)
    assert torch.equal(model[0].dash_sigma, sigma)
    model[0].merge()
    with pytest.raises(ValueError, match="0 is merged; unmerge it before launch"):
        model[0].launch(directions)


def test_errors_of_prelaunch_name_the_layer():
    model = adapted()
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    nn.init.constant_(model[1].lora_b, float("nan"))
    with pytest.raises(ValueError, match="1: lora_b has values that are not finite"):
        loradash.prelaunch(model, progress=False)
    assert not any(bool(layer.launched) for layer in loradash.dash_layers(model).values())


def test_prelaunch_needs_the_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    apply_dash(model, DashConfig(r=2, directions=2))
    with pytest.raises(ValueError, match="on meta: 0"):
        loradash.prelaunch(model, progress=False)
    assert "phase=on meta" in repr(model)
