"""DashCallback under Lightning: the launch at the same step however a run goes, resumed runs equal, misuse told."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from loradash import DashConfig, apply_dash, dash_layers, dash_parameter_groups, dash_state, merge
from torch import nn

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint  # noqa: E402
from loradash.integrations.lightning import DashCallback  # noqa: E402
from support.lightning_runs import (  # noqa: E402
    ACCUMULATION,
    CONFIG,
    LAUNCH,
    ROW,
    STEPS,
    InItself,
    Late,
    Module,
    OfPeft,
    batches,
    body,
    fit,
    launched,
    same,
    trainer_of,
)

# Lightning's own advice about workers, devices and intervals.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    module, *_ = fit(Module, folder)
    return module, folder


@pytest.mark.parametrize("step", [2, LAUNCH, 6])
def test_a_resumed_run_equals_one_that_went_through(whole, step):
    """Before launch, at launch, after launch: every loss and every number, exactly."""
    module, folder = whole
    resumed, callback, _ = fit(Module, resume=folder / f"step={step}.ckpt")
    assert dash_state(resumed).step == STEPS and all(launched(resumed))
    # Only the process in which the launch takes place has its reports.
    assert bool(callback.schedule.reports) == (step < LAUNCH)
    assert resumed.losses == module.losses[step * ACCUMULATION :]
    assert same(resumed, module)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accumulation(accumulation):
    """Optimizer steps count, batches do not."""
    for steps in (LAUNCH - 1, LAUNCH):
        early = pytest.warns(UserWarning, match="ended at step 3 of 4, before launch: plain LoRA so far")
        with early if steps < LAUNCH else contextlib.nullcontext():
            module, *_ = fit(Module, steps=steps, accumulate_grad_batches=accumulation)
        assert dash_state(module).step == steps
        assert all(launched(module)) == (steps == LAUNCH)
        assert len(module.losses) == steps * accumulation


def test_bf16_mixed(tmp_path):
    module, *_ = fit(Module, tmp_path, precision="bf16-mixed")
    assert all(launched(module)) and dash_state(module).step == STEPS
    resumed, *_ = fit(Module, resume=tmp_path / "step=2.ckpt", precision="bf16-mixed")
    assert resumed.losses == module.losses[2 * ACCUMULATION :]
    assert same(resumed, module)


@pytest.mark.parametrize("make", [InItself, Late, OfPeft])
def test_where_the_adapters_are(make, tmp_path):
    module, *_ = fit(make, tmp_path)
    resumed, *_ = fit(make, resume=tmp_path / "step=2.ckpt")
    assert all(launched(module)) and dash_state(module).step == STEPS
    assert same(resumed, module)


class Manual(Module):
    """Two steps on the adapters and one on the head in every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.phases = []

    def configure_optimizers(self):
        adapters = torch.optim.AdamW(dash_parameter_groups(self.backbone, lr=1e-2))
        return adapters, torch.optim.SGD(self.head.parameters(), lr=1e-2)

    def training_step(self, batch, index):
        adapters, head = self.optimizers()
        for optimizer in (adapters, head, adapters):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.phases.append(all(launched(self)))


def test_manual_optimization_and_several_optimizers():
    module, _, trainer = fit(Manual, steps=9, accumulate_grad_batches=1)
    assert trainer.global_step == 9 and dash_state(module).step == 6
    # The fourth step on the adapters is the sixth of all.
    assert module.phases == [False] * 5 + [True] * 4


def test_fit_goes_on():
    """A second fit, with the trainer's and the module's state as they are."""
    torch.manual_seed(0)
    module, callback = Module(), DashCallback(progress=False)
    trainer = trainer_of(callback, steps=3)
    with pytest.warns(UserWarning, match="before launch"):
        trainer.fit(module, batches())
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit(module, batches())
    assert dash_state(module).step == STEPS and all(launched(module))


def test_nothing_counts_after_an_exception():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                raise KeyError("stop")

    torch.manual_seed(0)
    module, callback = Module(), DashCallback(progress=False)
    with pytest.raises(KeyError):
        trainer_of(callback, Stop()).fit(module, batches())
    optimizer = torch.optim.SGD(dash_parameter_groups(module, 1e-2))
    module.loss(ROW[None]).backward()
    optimizer.step()
    assert dash_state(module).step == 2


class Recorded(lightning.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.figures = []

    def log_metrics(self, metrics, step=None):
        self.figures.append(dict(metrics))

    def __getattr__(self, name):
        raise AttributeError(name)


def test_figures():
    logger = Recorded()
    fit(Module, logger=logger, log_every_n_steps=3)
    told = [row for row in logger.figures if "dash_step" in row]
    assert [row["dash_step"] for row in told] == [3, 6, 9]
    assert [row["dash_directions"] for row in told] == [0, 4, 4]
    norms = [row.get("dash_sigma_norm") for row in told]
    assert norms[0] is None and 0 < norms[1] < norms[2]
    # Lightning goes on telling what it was told until the epoch ends.
    assert all(("dash_rate_max" in row, "dash_rate_mean" in row) == (row is not told[0],) * 2 for row in told)
    logger = Recorded()
    fit(Module, callback=DashCallback(progress=False, log=False), logger=logger, log_every_n_steps=1)
    assert not any("dash_step" in row for row in logger.figures)


def test_checkpoints_of_adapters_alone(tmp_path):
    def alone():
        return DashCallback(progress=False, adapters_only=True)

    module, *_ = fit(Module, tmp_path, callback=alone())
    file = tmp_path / "step=2.ckpt"
    kept = set(torch.load(file, weights_only=True)["state_dict"])
    assert set(module.state_dict()) - kept == {f"backbone.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    resumed, *_ = fit(Module, resume=file, callback=alone())
    assert resumed.losses == module.losses[2 * ACCUMULATION :]
    assert same(resumed, module)
    # Lightning's own check, where the callback does not say that weights may be missing.
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"backbone.0.weight\""):
        fit(Module, resume=file)
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"]["other"] = checkpoint["state_dict"].pop("backbone.0.lora_a")
    torch.save(checkpoint, tmp_path / "spoiled.ckpt")
    with pytest.raises(ValueError, match=r"lacks backbone.0.lora_a; other is not the model's"):
        fit(Module, resume=tmp_path / "spoiled.ckpt", callback=alone())


class Finetuning(BaseFinetuning):
    """Freezes the backbone until epoch 1, as Lightning's BackboneFinetuning does: all that is in it."""

    def freeze_before_training(self, module):
        self.freeze(module.backbone)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone, optimizer, lr=1e-2, initial_denom_lr=1)


@pytest.mark.parametrize("first", [True, False])
def test_finetuning_callbacks(first, tmp_path):
    """They thaw the pretrained weights with the module, and freeze the adapters again in a resumed run."""

    def run(resume=None):
        torch.manual_seed(0)
        module, callback = Module(), DashCallback(progress=False)
        callbacks = [callback, Finetuning()] if first else [Finetuning(), callback]
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = trainer_of(*callbacks, saver, accumulate_grad_batches=1, enable_checkpointing=True, steps=12)
        trainer.fit(module, batches(2), ckpt_path=resume)
        return module

    with pytest.warns(UserWarning, match=r"the weights of 0, 2 had been set to train .* frozen again"):
        module = run()
    plain = body()
    assert torch.equal(module.backbone[0].weight, plain[0].weight)
    # Two batches of epoch 0 train the head alone.
    assert dash_state(module).step == 10 and all(launched(module))
    with pytest.warns(UserWarning, match=r"backbone.0.bias, .* and . more was not what it had been .* restored"):
        resumed = run(tmp_path / "step=8.ckpt")
    assert same(resumed, module)
    assert dash_state(resumed).step == 10


@pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
def test_callbacks_that_freeze(whole, hook):
    """Before the optimizer is made of what trains, and after."""
    freeze = Callback()
    setattr(freeze, hook, lambda trainer, module, stage=None: module.backbone.requires_grad_(False))
    module, folder = whole
    with pytest.warns(UserWarning, match=r"backbone.0.lora_a, backbone.0.lora_b, .* and 2 more was not what"):
        resumed, *_ = fit(Module, resume=folder / "step=6.ckpt", extra=[freeze])
    assert same(resumed, module)


def test_a_checkpoint_read_for_a_test_brings_its_step(whole, tmp_path):
    module, callback = Module(), DashCallback(progress=False)
    trainer = trainer_of(callback)
    trainer.test(module, batches(1), ckpt_path=whole[1] / "step=6.ckpt", verbose=False)
    assert dash_state(module).step == 6 and all(launched(module))
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    saved = torch.load(tmp_path / "again.ckpt", weights_only=True)["callbacks"]["DashCallback"]
    assert saved["schedule"]["step"] == 6 and "backbone.0.lora_a" in saved["trained"]


def test_what_one_module_read_is_not_told_another(whole):
    callback = DashCallback(progress=False)
    trainer_of(callback).test(Module(), batches(1), ckpt_path=whole[1] / "step=2.ckpt", verbose=False)
    module, *_ = fit(Module, callback=callback)
    assert dash_state(module).step == STEPS and same(module, whole[0])


def test_running_averages_have_whole_directions():
    """The mean of zeros and of a unit vector would be none."""
    averaging = getattr(lightning.callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("Lightning before 2.6 has no EMAWeightAveraging")
    average = averaging(decay=0.5)
    module, callback, _ = fit(Module, extra=[average])
    for layer in dash_layers(module).values():
        torch.testing.assert_close(layer.dash_u.norm(dim=0), torch.ones(2))
        torch.testing.assert_close(layer.dash_vt.norm(dim=1), torch.ones(2))
    assert all(launched(module)) and not callback._averages


def test_runs_without_directions_end_in_silence():
    class Lora(Module):
        config = DashConfig(r=2, directions=0, prelaunch_steps=LAUNCH)

    fit(Lora, steps=2)


def test_adapters_alone_want_the_model_in_one_piece():
    """Strategies that shard it read a checkpoint themselves, and whole."""
    strategy = lightning.strategies.ModelParallelStrategy()
    with pytest.raises(
        ValueError, match="adapters_only=True: ModelParallelStrategy reads and writes the model's state"
    ):
        DashCallback(adapters_only=True).setup(SimpleNamespace(strategy=strategy), Module(), "fit")


def test_pytorch_lightning():
    """The same Lightning under its older name."""
    package = pytest.importorskip("pytorch_lightning")

    class Older(package.LightningModule):
        __init__, adapted, forward = Module.__init__, Module.adapted, Module.forward
        loss, training_step, configure_optimizers = Module.loss, Module.training_step, Module.configure_optimizers
        config = CONFIG

    # A zero-argument super() belongs to the class that it was written in.
    def start(self):
        package.LightningModule.__init__(self)
        self.backbone, self.head, self.losses = self.adapted(), nn.Linear(8, 3), []

    Older.__init__ = start
    torch.manual_seed(0)
    module, callback = Older(), DashCallback(progress=False)
    trainer_of(callback, package=package).fit(module, batches())
    assert dash_state(module).step == STEPS and all(launched(module))


def test_misuse(whole, tmp_path):
    class Plain(Module):
        def adapted(self):
            return body()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-2)

    with pytest.raises(ValueError, match="the model has no LoRA-Dash adapters"):
        fit(Plain)

    class Merged(Module):
        def on_fit_start(self):
            merge(self)

    with pytest.raises(ValueError, match="merged adapters do not train; unmerge the model before fit: 0, 2"):
        fit(Merged)

    class Partitioned(Module):
        def on_fit_start(self):
            # What the stages 1 and 2 of ZeRO leave on every parameter that they train.
            self.backbone[0].lora_a._hp_mapping = None

    with pytest.raises(ValueError, match=r"ZeRO trains this model.*DashSchedule\(engine\)"):
        fit(Partitioned)

    class TooLate(Plain):
        def on_fit_start(self):
            self.backbone = apply_dash(self.backbone, CONFIG)

    with pytest.raises(ValueError, match="no optimizer has the adapters' parameters; call apply_dash before"):
        fit(TooLate)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DashCallback`"):
        fit(Module, extra=[DashCallback()])
    without = torch.load(whole[1] / "step=2.ckpt", weights_only=True)
    del without["callbacks"]["DashCallback"]
    torch.save(without, tmp_path / "without.ckpt")
    with pytest.raises(ValueError, match="the checkpoint of global step 2 was written without DashCallback"):
        fit(Module, resume=tmp_path / "without.ckpt")

    class Told(Module):
        def on_fit_start(self):
            dash_state(self).step = 2

    resumed, *_ = fit(Told, resume=tmp_path / "without.ckpt")
    assert same(resumed, whole[0])


def test_another_run_length_before_launch_is_refused(whole):
    class Longer(Module):
        config = DashConfig(r=2, directions=2, prelaunch_steps=LAUNCH + 1)

    with pytest.raises(ValueError, match="prelaunch_steps"):
        fit(Longer, resume=whole[1] / "step=2.ckpt")


def test_without_lightning(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] in ("lightning", "pytorch_lightning"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "loradash.integrations.lightning")
    with pytest.raises(ImportError, match=r'needs Lightning: pip install "loradash-kernels\[lightning\]"'):
        importlib.import_module("loradash.integrations.lightning")


def test_an_older_lightning(monkeypatch):
    monkeypatch.setattr(lightning, "__version__", "2.4.0")
    monkeypatch.delitem(sys.modules, "loradash.integrations.lightning")
    with pytest.raises(ImportError, match=r"needs Lightning 2\.5 or newer, found 2\.4\.0, which itself resumes"):
        importlib.import_module("loradash.integrations.lightning")
