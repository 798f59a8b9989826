"""Experts' parameters with adapters: launch, files, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from loradash import (
    AdapterError,
    DashSchedule,
    SpectralCache,
    dash_layers,
    load_adapter,
    merge,
    prelaunch,
    save_adapter,
    unmerge,
)

from loradash_kernels import task_specific_directions

pytest.importorskip("transformers", minversion="5")

from support.experts import BOTH, NAMES, adapted, filled, logits, loss_of, moe


@pytest.fixture(scope="module")
def base():
    return moe()


@pytest.fixture(scope="module")
def trained(base):
    """Three steps, launched at the second; expert 2 never gets a row."""
    # A token's score for it would be the largest only where it is positive.
    model = adapted(copy.deepcopy(base), dropout=0.1).train()
    gate = model.model.layers[0].mlp.gate
    forward = gate.forward
    gate.forward = lambda x: tuple(t if i < 2 else torch.where(t == 2, 3, t) for i, t in enumerate(forward(x)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule, launches, before = DashSchedule(model, progress=False), [], {}
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = before or {
            n: [t.detach().clone() for t in (v.lora_a, v.lora_b)] for n, v in dash_layers(model).items()
        }
        if len(launches) == 1:
            before = {n: [t.detach().clone() for t in (v.lora_a, v.lora_b)] for n, v in dash_layers(model).items()}
            with pytest.warns(UserWarning, match=r"no update yet in 2 layers.*gate_up_proj\[2\], .*down_proj\[2\]"):
                launches.append(schedule.step())
        else:
            launches.append(schedule.step())
    del gate.forward
    return model.eval(), schedule, launches, before


def test_launch_finds_every_experts_directions(trained, base):
    model, schedule, launches, before = trained
    assert launches == [False, True, False]
    assert [report.name for report in schedule.reports] == [f"{name}[{e}]" for name in NAMES for e in (0, 1, 3)]
    for name, layer in dash_layers(model).items():
        a, b = before[name]
        wanted = task_specific_directions(
            base.get_parameter(name)[[0, 1, 3]], a[[0, 1, 3]], b[[0, 1, 3]], 2, scaling=layer.scaling
        )
        torch.testing.assert_close(layer.dash_u[[0, 1, 3]].abs(), wanted.u.abs(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.dash_vt[[0, 1, 3]].abs(), wanted.vt.abs(), rtol=1e-3, atol=1e-4)
        assert layer.launched and layer.dash_sigma[[0, 1, 3]].all()
        # The idle one is still the base's.
        assert not any(t[2].any() for t in (layer.lora_b, layer.dash_u, layer.dash_vt, layer.dash_sigma))


def test_files_copies_and_resuming(trained, base, tmp_path):
    model, schedule, _, _ = trained
    wanted = logits(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), wanted)
    resumed = DashSchedule(loaded)
    assert resumed.launched and resumed.state.step == schedule.state.step == 3
    again = load_adapter(adapted(copy.deepcopy(base), dropout=0.1), tmp_path)
    assert torch.equal(logits(again), wanted)
    merge(again)
    with pytest.raises(ValueError, match=r"gate_up_proj is merged; unmerge"):
        again.load_state_dict(loaded.state_dict())
    with pytest.raises(ValueError, match="merged model, whose adapters would count twice"):
        copy.deepcopy(loaded).load_state_dict(again.state_dict())
    unmerge(again)
    again.load_state_dict(loaded.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert torch.equal(logits(other), wanted)
    # A copy has adapters of its own.
    copied = copy.deepcopy(model)
    dash_layers(copied)[NAMES[0]].lora_b.data.zero_()
    assert torch.equal(logits(model), wanted) and not torch.equal(logits(copied), wanted)
    with pytest.raises(AdapterError, match="does not fit"):
        load_adapter(moe("Mixtral", num_local_experts=3), tmp_path)
    with pytest.raises(AdapterError, match="is no target"):
        load_adapter(
            adapted(copy.deepcopy(base), target_parameters=BOTH, r=3, dropout=0.1, overrides={}), _renamed(tmp_path)
        )


def _renamed(folder):
    """The same file, whose settings name one of the parameters alone."""
    from loradash.checkpoint import FILE_NAME
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(str(folder / FILE_NAME), "pt") as opened:
        header = dict(opened.metadata())
    header["loradash"] = header["loradash"].replace(', "experts.down_proj"', "")
    other = folder / "other.safetensors"
    save_file(load_file(folder / FILE_NAME), str(other), metadata=header)
    return other


def test_launch_from_a_cache(base, tmp_path):
    found = []
    for cache in (None, SpectralCache(tmp_path)):
        model = filled(adapted(copy.deepcopy(base)), launched=False)
        if cache is not None:
            cache.start(model).wait()
        reports = prelaunch(model, progress=False, cache=cache)
        assert len(reports) == 8
        found.append([layer.dash_u.abs() for layer in dash_layers(model).values()])
    for plain, cached in zip(*found, strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"launched already.*gate_up_proj"):
        prelaunch(model, progress=False)
