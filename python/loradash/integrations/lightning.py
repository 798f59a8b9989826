"""LoRA-Dash under Lightning's Trainer: `DashCallback`, for the packages `lightning` and `pytorch_lightning` alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..cache import SpectralCache
from ..schedule import DashSchedule
from ..state import dash_layers, dash_state, plain_name
from .callbacks import Figures, adapter_ids, frozen_names, refuse_zero, warn_without_launch

try:
    from lightning.pytorch import __version__ as _version
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning import __version__ as _version
        from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError(
            'loradash.integrations.lightning needs Lightning: pip install "loradash-kernels[lightning]"'
        ) from error

if tuple(map(int, _version.split(".")[:2])) < (2, 5):
    raise ImportError(
        f"loradash.integrations.lightning needs Lightning 2.5 or newer, found {_version}, which itself resumes gradient "
        'accumulation one batch off: pip install "loradash-kernels[lightning]"'
    )


class DashCallback(Callback):
    """Launches LoRA-Dash within Lightning's Trainer: `Trainer(callbacks=[DashCallback()])`.

    The LightningModule is adapted itself or has an adapted model in it, from its __init__ or configure_model:
    `self.model = apply_dash(model, config)`, or a PEFT model. Every step of an optimizer that has the adapters counts, and
    none of other optimizers: under gradient accumulation, mixed precision, manual optimization and with several optimizers
    alike. The launch follows the step of number `prelaunch_steps` before anything else happens.

    Checkpoints carry the count, and `fit(ckpt_path=...)` with a fresh model goes on as if it had not stopped. (Lightning
    itself gives an epoch that was stopped in its middle the batches of its beginning again.) Finetuning callbacks freeze
    their modules at the start of a resumed run too, the adapters in them as well, and thaw the pretrained weights later:
    what trained when the checkpoint was written trains again, the weights of adapted layers stay frozen, and a warning
    names both. `load_from_checkpoint` reads the tensors and not the count, which is the callback's.

    Where training ends before launch, a warning says so. Running averages of the weights (Lightning's WeightAveraging) get
    the directions at launch.

    Logged after the optimizer's steps that Lightning logs: dash_step, dash_directions (how many are in place) and, after
    launch, dash_sigma_norm (over all layers); once, dash_rate_mean and dash_rate_max of the chosen directions.

    Args:
        progress: a bar for pre-launch.
        cache: decompositions of the frozen weights, as for `DashSchedule`.
        adapters_only: leave frozen parameters out of the checkpoints' state dict. Resume with the same setting and the same
            pretrained weights in the model. Checkpoints of `save_weights_only` are whole. Not for strategies that shard the
            model (FSDP, ModelParallel) or DeepSpeed.
        log: log the figures above.

    Attributes:
        schedule: that of the running or last fit; its `reports` have the rates of every layer.

    Raises ValueError when training starts, for a module without adapters or with merged ones, adapters that no optimizer has, and a checkpoint
    that was written without this callback; before, for adapters_only with such a strategy, and where a checkpoint lacks more
    than frozen parameters.
    """

    def __init__(
        self,
        progress: bool = True,
        cache: SpectralCache | None = None,
        adapters_only: bool = False,
        log: bool = True,
    ) -> None:
        # Lightning puts a method of its own at self.log.
        self.progress, self.cache, self.adapters_only, self.logs = progress, cache, adapters_only, log
        self.schedule: DashSchedule | None = None
        self._hook: Any = None
        self._averages: list[nn.Module] = []
        self._ours: set[int] = set()
        # What a checkpoint held, and the module that has read it.
        self._saved: dict[str, Any] | None = None
        self._read_by = 0
        self._figures: Figures | None = None
        self._stepped = False
        self._weights_unseen = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.adapters_only:
            # FSDP, ModelParallel and DeepSpeed: they would miss what is left out.
            if trainer.strategy.restore_checkpoint_after_setup:
                raise ValueError(
                    f"adapters_only=True: {type(trainer.strategy).__name__} reads and writes the model's state in ways of its own, "
                    "and whole; leave it at False, or train by a strategy that keeps the model in one piece (ddp)"
                )
            # What may be missing is looked at in on_load_checkpoint.
            pl_module.strict_loading = False

    def state_dict(self) -> dict[str, Any]:
        if self.schedule is None or self._saved is not None:
            return self._saved or {}
        model = self.schedule.model
        return {
            "schedule": self.schedule.state_dict(),
            "trained": sorted(plain_name(name) for name, p in model.named_parameters() if p.requires_grad),
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Before configure_optimizers, which may ask what trains."""
        saved = checkpoint["callbacks"].get(self.state_key)
        if saved:
            self._saved, self._read_by = saved, id(pl_module)
            dash_state(pl_module).step = saved["schedule"]["step"]
            _train_again(pl_module, saved["trained"])
        if self.adapters_only:
            _check_keys(pl_module, checkpoint["state_dict"])

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.adapters_only:
            frozen = frozen_names(pl_module)
            tensors = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: t for key, t in tensors.items() if plain_name(key) not in frozen}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        state = dash_state(pl_module)
        self._stop()
        merged = [name for name, layer in dash_layers(pl_module).items() if layer.merged]
        if merged:
            raise ValueError(f"merged adapters do not train; unmerge the model before fit: {_some(merged)}")
        refuse_zero(pl_module)
        self.schedule = DashSchedule(pl_module, self.progress, self.cache)
        if self._saved is not None and self._read_by == id(pl_module):
            self.schedule.load_state_dict(self._saved["schedule"])
            # Callbacks may have frozen anew since the checkpoint was read.
            _train_again(pl_module, self._saved["trained"])
        elif trainer.global_step > 0 and state.step == 0:
            raise ValueError(
                f"the checkpoint of global step {trainer.global_step} was written without DashCallback, so nothing says how "
                "many steps its adapters have taken; set dash_state(model).step to that number before fit"
            )
        self._saved = None
        self._ours = adapter_ids(pl_module)
        train = any(p.requires_grad for p in pl_module.parameters() if id(p) in self._ours)
        if train and not any(self._in(optimizer) for optimizer in trainer.optimizers):
            raise ValueError(
                "no optimizer has the adapters' parameters; call apply_dash before configure_optimizers (in __init__ or "
                "configure_model), and give the optimizer dash_parameter_groups(self, lr=...)"
            )
        self._figures = Figures(self.schedule)
        self._averages = [found for c in trainer.callbacks if (found := getattr(c, "_average_model", None)) is not None]
        self._weights_unseen = True
        # Hooks on all optimizers run in the order of their making: the schedule's comes first, and has seen the step.
        self._hook = register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.schedule is not None and self._in(optimizer):
            if self.schedule.step():
                _tell_averages(self._averages, self.schedule.model)
            self._stepped = True

    def _in(self, optimizer: Optimizer) -> bool:
        """Are adapters among its parameters?"""
        return any(id(p) in self._ours for group in optimizer.param_groups for p in group["params"])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._weights_unseen = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # Finetuning callbacks thaw at the start of an epoch, before or after this callback's turn.
        if self._weights_unseen:
            _freeze_weights(pl_module)
            self._weights_unseen = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._stepped or self._figures is None:
            return
        self._stepped = False
        interval = trainer.log_every_n_steps
        if self.logs and interval > 0 and trainer.global_step % interval == 0:
            pl_module.log_dict({name: float(figure) for name, figure in self._figures().items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._stop()
        if self.schedule is not None:
            warn_without_launch(self.schedule)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._averages = []


def _tell_averages(averages: Iterable[nn.Module], model: nn.Module) -> None:
    """Gives running averages of the model (WeightAveraging's) its directions: vectors of unit length, which the average of
    these and of zeros is not."""
    for average in averages:
        ours = dash_layers(model)
        for name, layer in dash_layers(average).items():
            for part in ("dash_u", "dash_vt", "launched"):
                getattr(layer, part).copy_(getattr(ours[name], part))


def _train_again(model: nn.Module, trained: Iterable[str]) -> None:
    """Gives parameters the requires_grad that they had, by the names of those that trained."""
    wanted, changed = set(trained), []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (plain_name(name) in wanted):
            parameter.requires_grad_(not parameter.requires_grad)
            changed.append(plain_name(name))
    if changed:
        warnings.warn(
            f"loradash: requires_grad of {_some(changed)} was not what it had been when the checkpoint was written (finetuning "
            "callbacks freeze again when a run is resumed); restored",
            stacklevel=3,
        )


def _freeze_weights(model: nn.Module) -> None:
    thawed = []
    for name, layer in dash_layers(model).items():
        if layer.weight.requires_grad:
            layer.weight.requires_grad_(False)
            thawed.append(name)
    if thawed:
        warnings.warn(
            f"loradash: the weights of {_some(thawed)} had been set to train (finetuning callbacks do, when they thaw a "
            "module); frozen again, since the adapters stand for their updates",
            stacklevel=3,
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def _check_keys(model: nn.Module, found: Iterable[str]) -> None:
    kept, wanted = {plain_name(key) for key in found}, {plain_name(key) for key in model.state_dict()}
    missing, foreign = sorted(wanted - kept - frozen_names(model)), sorted(kept - wanted)
    problems = [f"it lacks {_some(missing)}"] if missing else []
    problems += [f"{_some(foreign)} is not the model's"] if foreign else []
    if problems:
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems)}")
