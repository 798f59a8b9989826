"""The schedule's state: what a resumed run needs beside the model's and the optimizer's."""

from __future__ import annotations

import copy
import json
import warnings

import loradash
import pytest
import torch
from loradash import DashConfig, DashSchedule, apply_dash, dash_layers, dash_state
from torch import nn

WIDTH, LAUNCH = 32, 4


class Training:
    """A model, its optimizer and its schedule, and steps of two batches; what a checkpoint holds of them."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        config = DashConfig(**{"r": 4, "directions": 4, "prelaunch_steps": LAUNCH, **settings})
        self.model = apply_dash(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)), config)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-2)
        self.schedule = DashSchedule(self.model, progress=False)
        self.losses = []

    def batch(self, number, stepping):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
        loss = self.model(x).square().mean()
        loss.backward()
        if stepping:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self.schedule.step()

    def train(self, first, last):
        """Steps first + 1 to last. Returns those that launched."""
        launches = []
        for step in range(first + 1, last + 1):
            for half in (0, 1):
                if self.batch(2 * step + half, stepping=half == 1):
                    launches.append((step, half))
        return launches

    def checkpoint(self):
        return {
            "model": {key: t.clone() for key, t in self.model.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "schedule": json.loads(json.dumps(self.schedule.state_dict())),
        }

    def load(self, checkpoint, order=("model", "optimizer", "schedule")):
        for part in order:
            # An optimizer goes on in the very tensors that it is given.
            getattr(self, part).load_state_dict(copy.deepcopy(checkpoint[part]))


@pytest.fixture(scope="module")
def whole():
    """Ten steps that went through, and the checkpoints of each."""
    run = Training()
    checkpoints = {0: run.checkpoint()}
    for step in range(10):
        run.train(step, step + 1)
        checkpoints[step + 1] = run.checkpoint()
    return run, checkpoints


@pytest.mark.parametrize("order", [("model", "optimizer", "schedule"), ("schedule", "optimizer", "model")])
@pytest.mark.parametrize("step", [0, 2, 3, 4, 5, 7])
def test_a_resumed_run_equals_one_that_went_through(step, order, whole):
    """At step 3 the first batch comes without an optimizer step, and must not be taken for the one that launches."""
    run, checkpoints = whole
    resumed = Training()
    resumed.load(checkpoints[step], order)
    assert resumed.train(step, 10) == ([(LAUNCH, 1)] if step < LAUNCH else [])
    assert resumed.losses == run.losses[step:]
    for ours, theirs in zip(resumed.model.state_dict().values(), run.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.schedule.state_dict() == run.schedule.state_dict()


def test_going_back_in_the_same_process(whole):
    _, checkpoints = whole
    run = Training()
    run.train(0, 6)
    run.load(checkpoints[2], ("schedule", "model", "optimizer"))
    assert run.train(2, 6) == [(LAUNCH, 1)]
    assert dash_state(run.model).step == 6


@pytest.mark.parametrize("stepping", [True, False])
@pytest.mark.parametrize(("of_model", "of_schedule"), [(2, 7), (7, 2)])
def test_a_phase_that_is_not_the_model_s(of_model, of_schedule, stepping, whole):
    """The model is left alone: an optimizer of torch does not even step; of others the schedule cannot know."""
    _, checkpoints = whole
    run = Training()
    run.load({**checkpoints[of_model], "schedule": checkpoints[of_schedule]["schedule"]})
    before = [t.clone() for t in run.model.state_dict().values()]
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=f"is of step {of_schedule}, .* launch, and the model's .* from one checkpoint"
        ):
            run.batch(0, stepping)
    assert all(map(torch.equal, before, run.model.state_dict().values()))


GOOD = {"step": 2, "launched": False, "prelaunch_steps": LAUNCH, "dash_only": False, "watched": True, "assumed": 0}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**GOOD, "prelaunch_steps": 50}, "saved with prelaunch_steps=50, the model has 4; resume with the settings"),
        ({**GOOD, "step": -1}, "step in the state of a DashSchedule must be an integer of at least 0, got -1"),
        ({**GOOD, "step": True}, "step in .* must be an integer of at least 0, got True"),
        ({**GOOD, "step": 2.0}, r"step in .* must be an integer of at least 0, got 2\.0"),
        ({**GOOD, "launched": 1}, "launched in .* must be True or False, got 1"),
        ({**GOOD, "assumed": -3}, "assumed in .* must be an integer of at least 0, got -3"),
        ({**GOOD, "moons": 3}, r"has \['assumed', .*'watched'\], got \['assumed', .*'moons'"),
        ({"step": 2}, r"has \['assumed', .*'watched'\], got \['step'\]"),
        (None, r"has \['assumed', .*'watched'\], got None"),
    ],
)
def test_states_that_are_none(state, message):
    run = Training()
    with pytest.raises(ValueError, match=message):
        run.schedule.load_state_dict(state)
    assert dash_state(run.model).step == 0 and run.train(0, 5) == [(LAUNCH, 1)]


def test_a_step_that_was_not_counted(whole):
    """A checkpoint between the two calls would be a step behind its model."""
    run = Training()
    run.model(torch.ones(1, WIDTH)).sum().backward()
    run.optimizer.step()
    with pytest.raises(RuntimeError, match=r"call schedule\.step\(\) before saving"):
        run.schedule.state_dict()
    run.schedule.step()
    assert run.schedule.state_dict()["step"] == 1


def test_steps_that_were_assumed_are_taken_back_after_a_resume():
    """GradScaler skipped all steps before the checkpoint: only the first one that is taken shows it."""
    run = Training()
    for number in range(3):
        run.batch(number, stepping=False)
    state = run.schedule.state_dict()
    assert (state["step"], state["assumed"], state["watched"]) == (3, 3, False)
    resumed = Training()
    resumed.load(run.checkpoint())
    assert resumed.train(0, 1) == [] and dash_state(resumed.model).step == 1


def test_steps_of_other_optimizers_count_on(whole):
    """Those that no hook sees: DeepSpeed's, for one."""
    run = Training(prelaunch_steps=50)
    for _ in range(3):
        run.schedule.step()
    resumed = Training(prelaunch_steps=50)
    resumed.load(run.checkpoint())
    for _ in range(2):
        resumed.schedule.step()
    assert dash_state(resumed.model).step == 5


def test_what_trains_is_resumed():
    """dash_only freezes A and B, which no state dict says."""
    run = Training()
    run.train(0, 5)
    loradash.dash_only(run.model)
    run.train(5, 6)
    resumed = Training()
    resumed.load(run.checkpoint())
    assert not any(layer.lora_a.requires_grad for layer in dash_layers(resumed.model).values())
    for each in (run, resumed):
        each.train(6, 8)
    assert resumed.losses == run.losses[-2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load(Training().checkpoint(), ("model", "schedule"))
    assert all(layer.lora_a.requires_grad for layer in dash_layers(resumed.model).values())
