"""Checkpoints of a run, in one process; test_schemes.py has them between several."""

from __future__ import annotations

import dataclasses

import loradash
import pytest
import torch
import torch.distributed.checkpoint as dcp
from loradash import DashSchedule, dash_state
from support.schemes import LAUNCH, STEPS, network
from support.single import CONFIG, begin, steps
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
}


@pytest.mark.parametrize("start", [0, 2, LAUNCH, LAUNCH + 1])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_in_any_phase(tmp_path, kind, start):
    """Saving changes nothing for the run that goes on, and the run that resumes is that run, bit for bit."""
    make, options = OPTIMIZERS[kind]
    expected = steps(begin(make, **options), 0, STEPS)
    run = begin(make, **options)
    before = steps(run, 0, start)
    loradash.save_training(tmp_path / "run", *run)
    assert before + steps(run, start, STEPS) == expected
    again = begin(make, **options)
    torch.nn.init.normal_(again[0].head.bias)
    loradash.load_training(tmp_path / "run", *again)
    assert steps(again, start, STEPS) == expected[start:]


def test_further_objects_and_a_run_that_goes_back(tmp_path):
    """A scheduler of rates goes along; a run that has trained on, launched meanwhile, goes back."""
    run = begin()
    scheduler = torch.optim.lr_scheduler.StepLR(run[1], 1, gamma=0.5)
    steps(run, 0, 2)
    run[1].step()
    run[2].step()
    scheduler.step()
    loradash.save_training(tmp_path / "run", *run, rates=scheduler)
    expected = steps(run, 3, STEPS)
    assert run[2].launched
    scheduler.step()
    loradash.load_training(tmp_path / "run", *run, rates=scheduler)
    assert not run[2].launched and scheduler.last_epoch == 1
    assert steps(run, 3, STEPS) == expected


def test_frozen_weights_are_not_written(tmp_path):
    run = begin()
    steps(run, 0, LAUNCH + 1)
    loradash.dash_only(run[0])
    loradash.save_training(tmp_path / "run", *run)
    keys = FileSystemReader(tmp_path / "run").read_metadata().state_dict_metadata
    kept = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
    wanted = {
        key for key in run[0].state_dict() if not key.endswith(("up.weight", "up.bias", "down.weight", "down.bias"))
    }
    assert kept == wanted
    again = begin()
    loradash.load_training(tmp_path / "run", *again)
    assert dash_state(again[0]).dash_only and not again[0].blocks[0].up.lora_a.requires_grad
    assert steps(again, LAUNCH + 1, STEPS) == steps(run, LAUNCH + 1, STEPS)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"r": 5}, CheckpointException, "lora_a"),
        ({"prelaunch_steps": LAUNCH + 1}, ValueError, "prelaunch_steps"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, change, error, text):
    """With nothing changed."""
    run = begin()
    steps(run, 0, LAUNCH + 1)
    loradash.save_training(tmp_path / "run", *run)
    model = loradash.apply_dash(network(), dataclasses.replace(CONFIG, **change))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=text):
        loradash.load_training(tmp_path / "run", model, optimizer, DashSchedule(model, progress=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert dash_state(model).step == 0 and not optimizer.state


@pytest.mark.parametrize("start", [2, LAUNCH, LAUNCH + 1])
def test_a_recipe_of_torch_alone(tmp_path, start):
    """Right, or it raises: Δσ has a state of the optimizer from the step after launch on."""

    def state_of(run):
        model, optimizer = get_state_dict(*run[:2])
        return {"model": model, "optimizer": optimizer, "schedule": run[2]}

    run = begin()
    steps(run, 0, start)
    dcp.save(state_of(run), checkpoint_id=tmp_path)
    again = begin()
    state = state_of(again)
    if start <= LAUNCH:
        with pytest.raises(CheckpointException, match="dash_sigma"):
            dcp.load(state, checkpoint_id=tmp_path)
        return
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(*again[:2], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert dash_state(again[0]).step == start and again[2].launched
    assert steps(again, start, STEPS) == steps(run, start, STEPS)
