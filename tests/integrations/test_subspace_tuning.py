"""Layers on our operator beside the authors': one seed, 300 steps, through launch; masks, counts, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from loradash import DashSchedule, dash_layers
from loradash.integrations import subspace_tuning
from loradash.integrations.subspace_tuning import Linear, patch
from support.authors import (
    CLASSES,
    DIALECTS,
    OPTIMIZERS,
    SOURCES,
    WIDTH,
    batches,
    losses_of,
    make_layer,
    make_model,
    skip_without,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.front_ends import parity

both_semantics = pytest.mark.parametrize("semantics", ["authors", "loradash"])


def schedule_for(model, semantics):
    return DashSchedule(model, progress=False) if semantics == "loradash" else None


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@both_semantics
def test_300_steps_are_those_of_the_authors(source, optimizer, semantics):
    """Without dropout our rules give the same numbers too, since a step is a forward call."""
    skip_without("loralib", source)
    gap = parity.compare("loralib", semantics, optimizer, source)
    assert gap.learned > 0.1, "the directions learn"
    assert gap.loss < 2e-6 and gap.parameters < 2e-4
    assert gap.directions < 1e-4, "the same directions in the same order"


def test_the_table_of_parity_has_a_row_for_every_training(monkeypatch, capsys):
    monkeypatch.setattr(parity, "compare", lambda dialect, *_: parity.Gap(1.5e-7, 2.5e-6, 3.5e-6, 0.5))
    parity.main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "1.5e-07" in line]
    assert [row[1::2] for row in rows] == [
        [dialect, semantics, optimizer, "1.5e-07", "2.5e-06", "3.5e-06"]
        for dialect in DIALECTS
        for semantics in ("authors", "loradash")
        for optimizer in OPTIMIZERS
    ]
    monkeypatch.setattr(parity, "CLONE", None)
    with pytest.raises(SystemExit):
        parity.main(["--source", "theirs"])
    assert "LORADASH_AUTHORS names no clone" in capsys.readouterr().err


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dialect", DIALECTS)
@both_semantics
def test_every_dialect_goes_through_launch_as_theirs(dialect, source, semantics):
    theirs = make_model(dialect, source, warmup=12)
    ours = copy.deepcopy(theirs)
    report = patch(ours, semantics)
    assert report.patched == {"0": dialect, "2": dialect} and not report.left
    wanted = losses_of(theirs, 24, "adamw")
    found = losses_of(ours, 24, "adamw", schedule_for(ours, semantics))
    assert (found - wanted).abs().max() < 1e-6
    # Adam's first step on a coordinate divides a gradient by its size, whose smallest ones are rounding.
    assert max(parity.parameter_gaps(ours, theirs).values()) < 5e-3


@both_semantics
def test_one_mask_or_two(semantics):
    """A layer whose LoRA term is the dropped x, and its dash term a thousand times the dropped x: what was dropped shows."""
    torch.manual_seed(0)
    layer = Linear(8, 8, r=8, lora_alpha=8, lora_dropout=0.5, bias=False, semantics=semantics)
    with torch.no_grad():
        layer.weight.zero_()
        for part in (layer.lora_A, layer.lora_B, layer.weight_u_top, layer.weight_vt_top):
            part.copy_(torch.eye(8))
        layer.lora_index.fill_(1000)
        layer.note_phase(True, 0)
    y = layer(torch.ones(64, 8))
    lora, dash = y % 1000, y // 1000
    kept = [float((term == 2).float().mean()) for term in (lora, dash)]
    assert set(lora.unique().tolist()) == set(dash.unique().tolist()) == {0.0, 2.0}
    assert all(0.4 < share < 0.6 for share in kept)
    assert torch.equal(lora, dash) == (semantics == "loradash")
    if semantics == "authors":
        assert 0.4 < float((lora == dash).float().mean()) < 0.6, "two independent draws"
    layer.eval()
    assert torch.allclose(layer(torch.ones(2, 8)), torch.full((2, 8), 1001.0))


def test_gradients_under_two_masks():
    """Against autograd through the two terms apart, with the masks that were drawn."""
    torch.manual_seed(0)
    layer = Linear(6, 5, r=2, lora_alpha=4, lora_dropout=0.25, semantics="authors").double()
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_index.normal_()
        layer.weight_u_top.normal_()
        layer.weight_vt_top.normal_()
        layer.note_phase(True, 0)
    x = torch.randn(3, 6, dtype=torch.double, requires_grad=True)

    def with_seed(*values):
        torch.manual_seed(3)
        leaves = dict(zip(("lora_A", "lora_B", "lora_index"), values[1:], strict=True))
        return torch.func.functional_call(layer, leaves, (values[0],))

    leaves = (x, layer.lora_A, layer.lora_B, layer.lora_index)
    assert torch.autograd.gradcheck(with_seed, leaves)


def test_calls_count_as_theirs_and_recomputation_does_not():
    theirs = make_layer("loralib", "restated", WIDTH, CLASSES, warmup=4)
    ours = copy.deepcopy(nn.Sequential(theirs))
    patch(ours, "authors")
    x = torch.randn(4, WIDTH)
    for call in range(3):
        theirs.train(call != 1), ours.train(call != 1)
        theirs(x), ours(x)
    assert ours[0].FLAG == theirs.FLAG == 3
    for reentrant in (True, False):
        twice = copy.deepcopy(ours)
        for _ in range(4):
            checkpoint(twice, x.clone().requires_grad_(), use_reentrant=reentrant).square().mean().backward()
            if twice[0].FLAG < 5:
                assert not bool(twice[0].launched)
        assert twice[0].FLAG == 5 and bool(twice[0].launched)
        assert twice[0].lora_index.grad.any() or not twice[0].lora_B.any()


@pytest.mark.parametrize("merge_weights", [True, False])
def test_cr_mr_merges_in_eval_as_theirs_and_comes_back(merge_weights):
    theirs = make_model("cr_mr", "restated", warmup=5)
    for layer in (theirs[0], theirs[2]):
        layer.merge_weights = merge_weights
    losses_of(theirs, 10)
    ours = copy.deepcopy(theirs)
    patch(ours, "authors")
    x, _ = next(batches(1))
    y = ours(x)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)
    assert ours[0].merged == theirs[0].merged == merge_weights
    assert torch.equal(ours.train()(x), y)
    ours[0].disable_adapters = True
    assert torch.equal(ours[0](x), nn.functional.linear(x, ours[0].weight, ours[0].bias))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_adam_on_sigma_begins_at_launch(dialect):
    """In theirs there is no gradient before it; a zero one would spend the bias correction."""
    model = make_model(dialect, "restated", warmup=8)
    patch(model)
    schedule = schedule_for(model, "loradash")
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    losses_of(model, 8, optimizer, schedule)
    sigmas = [layer.stored("dash_sigma") for layer in dash_layers(model).values()]
    assert schedule.launched and not any(optimizer.state[sigma] for sigma in sigmas)
    losses_of(model, 3, optimizer, schedule, skip=8)
    assert all(optimizer.state[sigma]["step"] == 3 and sigma.any() for sigma in sigmas)


@pytest.mark.parametrize("dialect", DIALECTS)
@both_semantics
def test_bfloat16_launches(dialect, semantics):
    model = make_model(dialect, "restated", warmup=5).bfloat16()
    patch(model, semantics)
    schedule = schedule_for(model, semantics)
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    for x, target in batches(8):
        optimizer.zero_grad()
        (model(x.bfloat16()) - target).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    for layer in dash_layers(model).values():
        assert bool(layer.launched) and layer.dash_sigma.any() and layer.dash_u.dtype == torch.bfloat16
        assert torch.allclose(layer.dash_u.float().t() @ layer.dash_u.float(), torch.eye(8), atol=0.05)


def test_the_package_offers_what_its_page_names():
    assert {"Linear", "patch", "unpatch", "convert"} <= set(subspace_tuning.__all__)
