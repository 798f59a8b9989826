"""The schedule under accelerate: its state in `save_state`, and the example."""

from __future__ import annotations

import shutil

import pytest
import torch
from loradash import DashSchedule, dash_layers, dash_state, load_adapter

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from benchmarks.front_ends.resume import own_door  # noqa: E402
from examples import accelerate_finetune  # noqa: E402

SHORT = ["--cpu", "--steps", "8", "--prelaunch-steps", "4", "--save-every", "1"]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The folder and the losses of the example on a reduced budget."""
    folder = tmp_path_factory.mktemp("example")
    return folder, accelerate_finetune.main([*SHORT, "--out", str(folder)])


def test_the_example_saves_an_adapter(example):
    folder, losses = example
    assert len(losses) == 8
    model = load_adapter(accelerate_finetune.small_llama(), folder / "adapter")
    assert dash_state(model).step == 8
    assert all(bool(layer.launched) and layer.dash_sigma.any() for layer in dash_layers(model).values())


@pytest.mark.parametrize("step", [3, 4, 5])
def test_the_example_resumes(example, step, tmp_path):
    """Its loader shuffles, and its layers drop."""
    folder, losses = example
    shutil.copytree(folder / f"step-{step}", tmp_path / f"step-{step}")
    assert accelerate_finetune.main([*SHORT, "--out", str(tmp_path), "--resume"]) == losses[step:]


def test_the_example_without_a_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match="--resume: there is no checkpoint in"):
        accelerate_finetune.main([*SHORT, "--out", str(tmp_path), "--resume"])


def test_a_state_of_another_run_is_refused(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.register_for_checkpointing(DashSchedule(accelerator.prepare(own_door()), progress=False))
    accelerator.save_state(str(tmp_path))
    other = accelerate.Accelerator(cpu=True)
    model = other.prepare(own_door(prelaunch_steps=7))
    other.register_for_checkpointing(DashSchedule(model, progress=False))
    with pytest.raises(ValueError, match="saved with prelaunch_steps=4, the model has 7"):
        other.load_state(str(tmp_path))


def test_skipped_steps_under_accelerate():
    """GradScaler, which accelerate takes for float16 on a card, skips the steps whose gradients overflow."""
    model = own_door()
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**125, backoff_factor=2.0**-30)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = DashSchedule(model, progress=False)
    ids, taken = torch.arange(3, 15)[None], []
    for _ in range(5):
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        taken.append(not optimizer.step_was_skipped)
    assert not taken[0] and taken[-1]
    assert dash_state(model).step == sum(taken)
