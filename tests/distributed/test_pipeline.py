"""A pipeline of two processes, against one process with the whole network."""

from __future__ import annotations

import json

import loradash
import pytest
import torch
from safetensors.torch import load_file
from support.pipeline_worker import adapted, begin, steps_of_one
from support.processes import run_processes
from support.schemes import STEPS

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of one process's checkpoints, its losses and its trained adapter."""
    folder = tmp_path_factory.mktemp("pipeline")
    run, losses = begin(adapted()), []
    for stop in (2, 6, STEPS):
        losses += steps_of_one(run, len(losses), stop)
        loradash.save_training(folder / f"one.{stop}", *run)
    loradash.save_adapter(run.model, folder / "whole.safetensors")
    return folder, losses


@pytest.fixture(scope="module")
def two(one):
    program = "from support.pipeline_worker import main; main()"
    return [json.loads(said) for said in run_processes(program, one[0], str(one[0]))]


@pytest.mark.slow
def test_losses_and_launch(one, two):
    assert two[0]["losses"] == [] and two[0]["launched"] and two[1]["launched"]
    assert two[1]["losses"] == pytest.approx(one[1], abs=TOLERANCE)


@pytest.mark.slow
def test_the_stages_files_are_the_whole_one_in_parts(one, two):
    whole = load_file(one[0] / "whole.safetensors")
    parts = [load_file(said["file"]) for said in two]
    assert parts[0].keys() | parts[1].keys() == whole.keys() and not parts[0].keys() & parts[1].keys()
    for name, tensor in (parts[0] | parts[1]).items():
        # The two vectors of a direction may have turned their signs together.
        ours, theirs = (t.float().abs() for t in (tensor, whole[name]))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("start", [2, 6])
def test_from_one_process_to_stages(one, two, start):
    assert two[1][f"from {start}"] == pytest.approx(one[1][start:], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("start", [2, 6])
def test_from_stages_to_one_process(one, two, start):
    run = begin(adapted())
    loradash.load_training(one[0] / f"two.{start}", *run)
    assert run.schedule.state.step == start and run.schedule.launched == (start == 6)
    assert steps_of_one(run, start, STEPS) == pytest.approx(one[1][start:], abs=TOLERANCE)


@pytest.mark.slow
def test_layers_that_differ_are_refused(two):
    """Where the schedules were not told: before anything was launched."""
    for said in two:
        assert 'group="self"' in said["refused"] and said["unchanged"]
