"""LightningModules with adapters, and their training on one constant batch."""

from __future__ import annotations

import importlib

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from loradash import DashConfig, apply_dash, dash_layers, dash_parameter_groups
from loradash.integrations.lightning import DashCallback
from torch import nn

STEPS, LAUNCH, ACCUMULATION = 10, 4, 2
CONFIG = DashConfig(r=2, directions=2, prelaunch_steps=LAUNCH)
ROW = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh())


class Module(lightning.LightningModule):
    """Trains on one constant batch, since Lightning repeats batches of an epoch that is resumed in its middle."""

    config = CONFIG

    def __init__(self):
        super().__init__()
        self.backbone = self.adapted()
        self.head = nn.Linear(8, 3)
        self.losses = []

    def adapted(self):
        return apply_dash(body(), self.config)

    def forward(self, x):
        return self.head(self.backbone(x))

    def loss(self, x):
        return self(x[0]).square().mean()

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.losses.append(loss.detach().item())
        return loss

    def test_step(self, batch, index):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(dash_parameter_groups(self, lr=1e-2))


class InItself(Module):
    """apply_dash takes the LightningModule."""

    config = DashConfig(r=2, directions=2, prelaunch_steps=LAUNCH, trainable_modules=["head"])

    def __init__(self):
        super().__init__()
        apply_dash(self, self.config)

    def adapted(self):
        return body()


class Late(Module):
    """Makes its model where large ones are made."""

    def __init__(self):
        super().__init__()
        self.backbone = None

    def adapted(self):
        return None

    def configure_model(self):
        if self.backbone is None:
            self.backbone = apply_dash(body(), self.config)


class OfPeft(Module):
    def adapted(self):
        peft, door = pytest.importorskip("peft"), importlib.import_module("loradash.integrations.peft")
        return peft.get_peft_model(
            body(), door.DashLoraConfig(r=2, directions=2, prelaunch_steps=LAUNCH, target_modules=["0", "2"])
        )


def trainer_of(*callbacks, steps=STEPS, package=lightning, **settings):
    settings = {"accumulate_grad_batches": ACCUMULATION, "logger": False, "enable_checkpointing": False, **settings}
    return package.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


def batches(count=40):
    return torch.utils.data.DataLoader([ROW] * count, batch_size=1)


def fit(make, folder=None, resume=None, callback=None, extra=(), **settings):
    """A fresh module of a class, trained; with a folder, saved after every second step."""
    torch.manual_seed(0)
    module, callback = make(), callback or DashCallback(progress=False)
    saver = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)]
    settings = {"enable_checkpointing": bool(saver), **settings}
    trainer = trainer_of(callback, *extra, *saver, **settings)
    trainer.fit(module, batches(), ckpt_path=resume)
    return module, callback, trainer


def launched(module):
    return [bool(layer.launched) for layer in dash_layers(module).values()]


def same(module, other):
    ours, theirs = module.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    return all(torch.equal(ours[key], theirs[key]) for key in ours)
