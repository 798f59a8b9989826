"""The authors' MergedLinear on the group operator, beside restatements of loralib's and of CR_MR's."""

from __future__ import annotations

import copy

import pytest
import torch
from loradash.integrations.subspace_tuning import patch, unpatch
from support.authors import make_layer
from torch import nn
from torch.nn import functional as F

ENABLED = {"two of three": [True, False, True], "all": [True, True], "one": [False, True]}
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class MergedLinear(nn.Linear):
    """What both do: A of all enabled projections stacked, B of each in its own group of rows."""

    def __init__(self, k, n, r, enable_lora, transposed, convolved, bias=True):
        super().__init__(k, n, bias=bias)
        self.r, self.scaling, self.enable_lora, self.merged = r, 2.0 / r, enable_lora, False
        self.merge_weights, self.fan_in_fan_out, self.lora_dropout = True, transposed, nn.Dropout(0.0)
        count, rows = sum(enable_lora), n // len(enable_lora) * sum(enable_lora)
        self.weight.requires_grad = False
        if convolved:
            self.lora_A = nn.Linear(k, r * count, bias=False)
            self.lora_B = nn.Conv1d(r * count, rows, kernel_size=1, groups=count, bias=False)
        else:
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(r * count, k)), nn.Parameter(torch.randn(rows, r))
        if transposed:
            self.weight.data = self.weight.data.T

    def update(self):
        convolved = isinstance(self.lora_A, nn.Module)
        a, b = (self.lora_A.weight, self.lora_B.weight) if convolved else (self.lora_A, self.lora_B.unsqueeze(-1))
        delta = F.conv1d(a.unsqueeze(0), b, groups=sum(self.enable_lora)).squeeze(0)
        kept = torch.tensor(self.enable_lora).repeat_interleave(self.out_features // len(self.enable_lora))
        return torch.zeros(self.out_features, a.shape[1]).masked_scatter(kept[:, None], delta) * self.scaling

    def stored_update(self):
        return self.update().T if self.fan_in_fan_out else self.update()

    def train(self, mode=True):
        super().train(mode)
        if self.merge_weights and self.merged == mode:
            self.weight.data += self.stored_update() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        y = F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        return y if self.merged else y + self.lora_dropout(x) @ self.update().T


def merged_linear(enabled, **settings):
    torch.manual_seed(1)
    given = {"r": 2, "transposed": False, "convolved": False, **settings}
    return MergedLinear(8, 6 * len(enabled), enable_lora=enabled, **given)


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("enabled", ENABLED.values(), ids=ENABLED)
@pytest.mark.parametrize("settings", [{}, {"transposed": True}, {"convolved": True}, {"bias": False}], ids=str)
def test_outputs_and_gradients_are_theirs(enabled, settings):
    theirs = nn.Sequential(merged_linear(enabled, **settings))
    ours = copy.deepcopy(theirs)
    report = patch(ours)
    assert report.plain == ("0",) and not report.patched and not report.left and "no directions: 0" in str(report)
    assert isinstance(ours[0], MergedLinear) and ours.state_dict().keys() == theirs.state_dict().keys()
    for found, expected in zip(gradients(ours, X), gradients(theirs, X), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    before = ours(X)
    # In eval it merges by its own code; packed copies of the weight do not outlive that.
    torch.testing.assert_close(ours.eval()(X), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.train()(X), before, rtol=1e-5, atol=1e-5)
    unpatch(ours)
    assert type(ours[0]) is MergedLinear
    torch.testing.assert_close(ours(X), before, rtol=1e-5, atol=1e-5)


def test_dropout_is_one_draw_for_all_projections():
    """An element of x that is dropped reaches no projection."""
    layer = nn.Sequential(merged_linear([True, True]))
    layer[0].lora_dropout = nn.Dropout(0.5)
    patch(layer)
    x = torch.zeros(64, 8)
    x[:, 0] = 1.0
    update = layer(x) - F.linear(x, layer[0].weight, layer[0].bias)
    kept = update.abs().amax(1) > 1e-6
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(
        update[kept], (2.0 * layer[0].update()[:, 0]).expand(int(kept.sum()), -1), rtol=1e-4, atol=1e-5
    )


def test_beside_a_layer_with_directions():
    model = nn.Sequential(make_layer("loralib", "restated", 8, 8), merged_linear([True, False]))
    model[1].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"1\.lora_A.*save the model's state dict"):
        report = patch(model)
    assert report.patched == {"0": "loralib"} and report.plain == ("1",)
    with pytest.raises(ValueError, match="is adapted already"):
        patch(model)
    unpatch(model)
    assert type(model[1]) is MergedLinear and not hasattr(model[0], "run")


def test_what_is_left_alone():
    groups, trains, uneven = (merged_linear([True, True]) for _ in range(3))
    # The fork's convolution has two groups whatever is enabled.
    groups.lora_B = nn.Parameter(torch.zeros(12, 4))
    trains.weight.requires_grad_(True)
    uneven.enable_lora = [True] * 5
    model = nn.ModuleDict({"groups": groups, "trains": trains, "uneven": uneven})
    with pytest.raises(ValueError, match="groups: MergedLinear: A has 4 rows and B the shape"):
        patch(model)
    model["good"] = merged_linear([True, True])
    assert patch(model).left == {
        "groups": "MergedLinear: A has 4 rows and B the shape (12, 4), not r for each projection",
        "trains": "MergedLinear: its weight trains",
        "uneven": "MergedLinear: 12 outputs for 5 projections",
    }
