"""LoRA-Dash under transformers.Trainer and TRL's trainers: `DashCallback`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from loradash_kernels.files import replace_bytes, replace_file

from ..cache import SpectralCache
from ..checkpoint import save_adapter
from ..distributed import is_sharded
from ..schedule import DashSchedule
from ..state import dash_layers, dash_state, host_of, plain_name
from .callbacks import Figures, frozen_names, refuse_zero, warn_without_launch

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        f"loradash.integrations.transformers needs transformers, which cannot be imported ({error}): "
        'pip install "loradash-kernels[transformers]"'
    ) from error


class DashCallback(TrainerCallback, ExportableState):
    """Launches LoRA-Dash within `transformers.Trainer` and TRL's trainers: `Trainer(model, ..., callbacks=[DashCallback(model)])`.

    It counts the steps that the optimizer took (not the batches of gradient accumulation, nor steps skipped by GradScaler)
    and launches at `prelaunch_steps`. `trainer_state.json` carries the count, so that `train(resume_from_checkpoint=...)`
    with a fresh model goes on as if it had not stopped. With `load_best_model_at_end` the count becomes the best
    checkpoint's, like the model.

    A checkpoint of an `apply_dash` model holds `loradash_adapter.safetensors`, for `load_adapter(base_model, folder)`, beside
    what Trainer resumes from. Models of transformers are saved without their frozen weights, by Trainer, `trainer.save_model`
    and `model.save_pretrained`, from the callback's first look at them on; from_pretrained, which would silently make a base
    model of such a folder, raises there. For a whole model merge, or `merge_and_unload`, first. Of other models Trainer saves
    all, and `trainer.save_model` no adapter file. PEFT models are saved by PEFT. Δσ stays in float32 where TRL casts all that trains to bfloat16 (QLoRA).

    Logged with the loss: dash_step, dash_directions (how many are in place) and, after launch, dash_sigma_norm (over all
    layers); once, dash_rate_mean and dash_rate_max of the chosen directions. They stand in `log_history` and on the console;
    reporters (TensorBoard, W&B) run before other callbacks, and get them after `lead(trainer)`.

    Args:
        model: looked at before Trainer looks at it, where it exists already: Trainer's own refusal of a quantised model does
            not say what to do instead.
        progress: a bar for pre-launch.
        cache: decompositions of the frozen weights, as for `DashSchedule`.

    Attributes:
        schedule: that of the running or last training; its `reports` have the rates of every layer.

    Raises ValueError, when Trainer is made or starts, for a model without adapters, with merged or frozen ones, a quantised
    model that is no PeftModel, one that DeepSpeed's ZeRO trains, a second DashCallback, and a checkpoint (the best one so far too) saved without one.
    """

    def __init__(
        self, model: nn.Module | None = None, progress: bool = True, cache: SpectralCache | None = None
    ) -> None:
        self.progress, self.cache = progress, cache
        self.schedule: DashSchedule | None = None
        self._figures: Figures | None = None
        if model is not None:
            _check_model(model)

    def lead(self, trainer: Trainer) -> None:
        """Puts this callback before the reporters of its trainer, so that they get its figures too."""
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps of this callback."""
        # Trainer asks at the start of a training as well, where one that broke off may have left a step uncounted.
        known = self.schedule is not None and not self.schedule.is_behind
        counted = self.schedule.state_dict() if self.schedule is not None and known else None
        return {"args": {"progress": self.progress}, "attributes": {"counted": counted}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.restore_callback_states_from_checkpoint and self.cache is not None:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True makes every callback anew from JSON, which would lose "
                "DashCallback's cache; leave it at False: DashCallback restores its own state"
            )
        _prepare(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        # Trainer's model_init makes another model than the one at the end of its __init__.
        _prepare(model)
        _check_training(model)
        refuse_zero(model)
        name = type(self).__name__
        entry = state.stateful_callbacks.get(name)
        if isinstance(entry, list):
            raise ValueError(f"{len(entry)} of the trainer's callbacks are a {name}; keep one")
        self.schedule = DashSchedule(model, self.progress, self.cache)
        self._figures = Figures(self.schedule)
        if state.global_step > 0:
            self._resume(state.global_step, entry)
        if args.load_best_model_at_end:
            # Better now than at the end of training.
            self._count_of_best(state)
        # Trainer writes into this entry, and the checkpoint's own may lack it.
        state.stateful_callbacks[name] = self.state()

    def _resume(self, global_step: int, entry: dict[str, Any] | None) -> None:
        assert self.schedule is not None
        counted = _counted(entry)
        if counted is not None:
            self.schedule.load_state_dict(counted)
        elif self.schedule.state.step == 0:
            raise ValueError(
                f"the checkpoint of global step {global_step} was saved without {type(self).__name__}, so nothing says how many "
                "steps its adapters have taken; set dash_state(model).step to that number before train()"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Optimizers that no hook sees (DeepSpeed's) tell accelerate of an overflow.
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._running().step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The adapter's own file, where saving the model did not write it: for models that are not transformers', and for
        sharded ones, which all processes gather together."""
        model = kwargs["model"]
        if host_of(model) is not None:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved = isinstance(_uncompiled(model), PreTrainedModel)
        if _is_sharded(model) or (args.should_save and not saved and folder.is_dir()):
            save_adapter(model, folder)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._figures is not None and "loss" in kwargs["logs"]:
            figures = self._figures()
            kwargs["logs"].update(figures)
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counted = self._count_of_best(state) if args.load_best_model_at_end else None
        if counted is not None:
            self._running().load_state_dict(counted)
        # trainer.save_state() writes it as it is.
        state.stateful_callbacks[type(self).__name__] = self.state()
        warn_without_launch(self._running())

    def _count_of_best(self, state: Any) -> dict[str, Any] | None:
        """None where there is no best checkpoint, or none any more: then Trainer keeps the model as it is."""
        best, name = state.best_model_checkpoint, type(self).__name__
        if best is None or not Path(best).is_dir():
            return None
        saved = json.loads((Path(best) / "trainer_state.json").read_text())
        counted = _counted(saved["stateful_callbacks"].get(name))
        if counted is None:
            raise ValueError(
                f"{best}, the best checkpoint so far, was saved without {name}, so nothing says how many steps its adapters "
                "have taken; train without load_best_model_at_end"
            )
        return counted

    def _running(self) -> DashSchedule:
        if self.schedule is None:
            raise RuntimeError("DashCallback was added after training began; add it before trainer.train()")
        return self.schedule


def _prepare(model: nn.Module) -> None:
    _check_model(model)
    _save_adapters_alone(model)
    _keep_sigma_exact(model)


def _keep_sigma_exact(model: nn.Module) -> None:
    """Δσ in float32: TRL casts what trains over a quantised model to bfloat16, which would lose Δσ's small steps.

    FSDP wants one dtype of all that trains, and is left with it.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        return
    for layer in dash_layers(model).values():
        if layer.dash_sigma.dtype.itemsize < 4:
            layer.dash_sigma.data = layer.dash_sigma.data.float()


def _check_model(model: nn.Module) -> None:
    dash_state(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if (
        host_of(model) is None
        and getattr(model, "is_quantized", False)
        and not getattr(quantizer, "is_qat_trainable", 0)
    ):
        raise ValueError(
            "Trainer trains a quantised model only as a PeftModel: instead of apply_dash call get_peft_model(model, "
            "DashLoraConfig(...)), with DashLoraConfig of loradash.integrations.peft"
        )


def _check_training(model: nn.Module) -> None:
    merged = [name for name, layer in dash_layers(model).items() if layer.merged]
    if merged:
        raise ValueError(f"merged adapters do not train, unmerge the model before train(): {', '.join(merged[:4])}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing trains, every parameter is frozen: PeftModel.from_pretrained wants is_trainable=True, and "
            "disable_adapter_layers() is undone by enable_adapter_layers()"
        )


def _counted(entry: Any) -> dict[str, Any] | None:
    """The schedule's state in what a checkpoint keeps of the callback."""
    return None if entry is None else entry["attributes"]["counted"]


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _pretrained(model: nn.Module) -> PreTrainedModel | None:
    """The model of transformers in a wrapped model, the outermost one."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _is_sharded(model: nn.Module) -> bool:
    return any(is_sharded(layer.lora_a) for layer in dash_layers(model).values())


def _save_adapters_alone(model: nn.Module) -> None:
    """Has `model.save_pretrained`, by which Trainer saves, write adapters and not the frozen weights. Idempotent."""
    found = _pretrained(model)
    if found is not None and host_of(model) is None and "save_pretrained" not in found.__dict__:
        _AdaptersAlone(found)


NO_MODEL = "none, these are LoRA-Dash adapters; load them by loradash.load_adapter(base_model, folder)"
"""Where config.json names the file of the weights, and that file its format: from_pretrained raises, and shows it."""


class _AdaptersAlone:
    """Takes the place of `save_pretrained` of a transformers model with adapters.

    transformers would save whatever is in the model under the names of its layers, and from_pretrained would then read the
    base model, without a word about the adapters. A model that is merged, or has no adapters any more, is saved as ever.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._attach()

    def _attach(self) -> None:
        # What is left out of a file is no news to Trainer when it loads the file.
        self.model._keys_to_ignore_on_save = sorted(frozen_names(self.model))
        self.model.__dict__["save_pretrained"] = self

    def _detach(self) -> None:
        del self.model.__dict__["save_pretrained"], self.model.__dict__["_keys_to_ignore_on_save"]

    def _save_whole(self, *arguments: Any, **options: Any) -> None:
        self._detach()
        try:
            self.model.save_pretrained(*arguments, **options)
        finally:
            if dash_layers(self.model):
                self._attach()

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        layers = dash_layers(self.model).values()
        if not layers or any(layer.merged for layer in layers):
            self._save_whole(save_directory, is_main_process=is_main_process, state_dict=state_dict, **options)
            return
        if options.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True: save the adapter first and upload the folder, or call model.push_to_hub(...)"
            )
        if not is_main_process:
            return
        frozen = frozen_names(self.model)
        tensors = self.model.state_dict() if state_dict is None else state_dict
        kept = {
            key: t.detach().cpu().contiguous().clone() for key, t in tensors.items() if plain_name(key) not in frozen
        }
        folder = Path(save_directory)
        replace_file(folder / "model.safetensors", lambda file: save_file(kept, file, metadata={"format": NO_MODEL}))
        config = {**json.loads(self.model.config.to_json_string()), "transformers_weights": NO_MODEL}
        replace_bytes(folder / "config.json", json.dumps(config, indent=2).encode())
        # One process cannot gather what is sharded: `on_save` does, in all of them.
        if not _is_sharded(self.model):
            save_adapter(self.model, folder)
