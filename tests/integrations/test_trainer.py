"""`DashCallback` under transformers.Trainer: what is counted, logged and saved, and what is refused."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import loradash
import pytest
import torch
from loradash import DashSchedule, SpectralCache, dash_layers, dash_state, load_adapter
from torch import nn

transformers = pytest.importorskip("transformers")

from loradash.integrations.transformers import DashCallback  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from benchmarks.front_ends.resume import DOORS, llama, own_door, rows  # noqa: E402

X = torch.arange(3, 15)[None]


def trainer_of(model, folder, *callbacks, kind=transformers.Trainer, **given):
    """What is given goes to the trainer where that takes it, else to TrainingArguments."""
    defaults = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 3, "report_to": []}
    own = {key: given.pop(key) for key in ("eval_dataset", "optimizers", "data_collator") if key in given}
    args = transformers.TrainingArguments(
        str(folder), learning_rate=1e-2, disable_tqdm=True, use_cpu=True, **{**defaults, **given}
    )
    callbacks = list(callbacks) or [DashCallback(progress=False)]
    trainer = kind(model, args, train_dataset=rows(), callbacks=callbacks, **own)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def collated(batch):
    return {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer that went through 6 steps, launch at 4, with checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_of(own_door(), folder)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return trainer


def test_figures_are_logged_with_the_loss(run):
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["dash_step"] for entry in logged] == [1, 2, 3, 4, 5, 6]
    # Six layers, four directions each.
    assert [entry["dash_directions"] for entry in logged] == [0, 0, 0, 24, 24, 24]
    assert ["dash_sigma_norm" in entry for entry in logged] == [False, False, False, True, True, True]
    assert ["dash_rate_max" in entry for entry in logged] == [False, False, False, True, False, False]
    norms = [layer.dash_sigma.detach().norm() for layer in dash_layers(run.model).values()]
    assert logged[3]["dash_sigma_norm"] == 0 and logged[5]["dash_sigma_norm"] == pytest.approx(
        torch.stack(norms).norm()
    )
    assert 0 < logged[3]["dash_rate_mean"] < logged[3]["dash_rate_max"]


@pytest.mark.parametrize("folder", ["checkpoint-6", "final"])
def test_what_is_saved_is_an_adapter(run, folder):
    """It loads into a base model; from_pretrained refuses the folder instead of reading a base model."""
    path = f"{run.args.output_dir}/{folder}"
    model = load_adapter(llama(), path).eval()
    assert torch.equal(model(X).logits, run.model.eval()(X).logits) and dash_state(model).step == 6
    frozen = {name for name, p in llama().named_parameters()}
    assert not frozen & load_file(f"{path}/model.safetensors").keys()
    for reader in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        with pytest.raises(ValueError, match=r"these are LoRA-Dash adapters; load them by loradash\.load_adapter"):
            reader.from_pretrained(path)


def test_a_merged_model_is_saved_whole(run, tmp_path):
    model = copy.deepcopy(run.model).eval()
    loradash.merge(model)
    model.save_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(plain(X).logits, model(X).logits)
    loradash.unmerge(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "loradash_adapter.safetensors").exists()
    loradash.merge_and_unload(model).save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == dict(llama().named_parameters()).keys()
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(reread(X).logits, plain(X).logits)


def test_copies_save_themselves(run, tmp_path):
    for number, twin in enumerate((copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model)))):
        with torch.no_grad():
            next(iter(dash_layers(twin).values())).lora_b.fill_(number + 1)
        twin.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert saved["model.layers.0.self_attn.q_proj.lora_b"].eq(number + 1).all()


def test_adapters_that_were_frozen_are_saved(run, tmp_path):
    """Trainer resumes from this file, also where Δσ alone trains."""
    model = copy.deepcopy(run.model)
    loradash.dash_only(model)
    model.save_pretrained(tmp_path)
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(f"{run.args.output_dir}/final/model.safetensors").keys()
    )


def test_modules_trained_as_a_whole_are_saved(tmp_path):
    model = own_door(trainable_modules=["lm_head"])
    trainer = trainer_of(model, tmp_path, max_steps=1, save_steps=1)
    with pytest.warns(UserWarning, match="training ended at step 1 of 4, before launch: plain LoRA so far"):
        trainer.train()
    assert "lm_head.weight" in load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    twin = load_adapter(llama(), tmp_path / "checkpoint-1").eval()
    assert torch.equal(twin(X).logits, model.eval()(X).logits)


def test_resuming_says_nothing_of_missing_weights(run, tmp_path, caplog):
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        trainer_of(own_door(), tmp_path, max_steps=7).train(f"{run.args.output_dir}/checkpoint-6")
    finally:
        logger.removeHandler(caplog.handler)
    assert not [text for text in caplog.messages if "missing keys" in text or "unexpected keys" in text]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("best", [1, 5])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:loradash. training ended at step 1 of 4")
def test_the_best_checkpoint_brings_its_count_and_phase(best, door, tmp_path):
    """The steps before launch and after it, in turn, are those of the lowest loss."""
    if door == "peft":
        pytest.importorskip("peft")
    losses = [0.0 if step == best else 1.0 for step in range(1, 7)]
    model, at_best = DOORS[door](), {}

    class Evaluation(transformers.Trainer):
        def evaluate(self, *args, **kwargs):
            if self.state.global_step == best:
                at_best.update({key: t.clone() for key, t in model.state_dict().items()})
            return {"eval_loss": losses[self.state.global_step - 1]}

    often = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer_of(model, tmp_path, kind=Evaluation, eval_dataset=rows(2), **often).train()
    assert dash_state(model).step == best
    assert {bool(layer.launched) for layer in dash_layers(model).values()} == {best == 5}
    assert all(torch.equal(t, at_best[key]) for key, t in model.state_dict().items())
    if door == "apply_dash":
        assert dash_state(load_adapter(llama(), tmp_path / f"checkpoint-{best}")).step == best


def test_steps_that_were_skipped_do_not_count(tmp_path):
    """GradScaler, which accelerate takes for float16 on a card, skips the steps whose gradients overflow."""
    model = own_door()
    trainer = trainer_of(model, tmp_path, max_steps=8, max_grad_norm=0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**125, backoff_factor=2.0**-30)
    trainer.train()
    skipped = 8 - dash_state(model).step
    assert 1 <= skipped <= 4 and trainer.state.global_step == 8
    launch = [entry["step"] for entry in trainer.state.log_history if entry.get("dash_directions") == 24]
    assert launch[0] == 4 + skipped


class Copies(torch.optim.SGD):
    """Trains copies of the parameters, as DeepSpeed does: no hook tells whose they are."""

    def __init__(self, parameters):
        self.ours = list(parameters)
        super().__init__([p.detach().clone() for p in self.ours], lr=0.1)

    def step(self, closure=None):
        for group in self.param_groups:
            for copied, p in zip(group["params"], self.ours, strict=True):
                copied.grad = p.grad
        super().step()
        for copied, p in zip(self.param_groups[0]["params"], self.ours, strict=True):
            p.data.copy_(copied)


def test_skipped_steps_of_an_optimizer_that_no_hook_sees(tmp_path):
    class Overflowing(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            self.optimizer._is_overflow = self.state.global_step < 2
            return super().training_step(*args, **kwargs)

    model = own_door()
    optimizer = Copies(p for p in model.parameters() if p.requires_grad)
    trainer = trainer_of(model, tmp_path, kind=Overflowing, optimizers=(optimizer, None))
    trainer.train()
    assert dash_state(model).step == 4 and trainer.callback_handler.callbacks[-1].schedule.launched


class Head(nn.Module):
    """No model of transformers, with one inside it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)

    def forward(self, input_ids, labels):
        logits = self.head(self.body(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Around(nn.Module):
    """Has a model of transformers in it, whose save_pretrained Trainer does not call."""

    def __init__(self):
        super().__init__()
        self.lm = llama()

    def forward(self, input_ids, labels):
        return self.lm(input_ids=input_ids, labels=labels)


@pytest.mark.parametrize("kind", [Head, Around])
def test_models_that_are_not_transformers(kind, tmp_path):
    config = loradash.DashConfig(r=2, directions=2, prelaunch_steps=4, target_modules=["body", "head", "q_proj"])
    torch.manual_seed(0)
    base = kind()
    models = [loradash.apply_dash(copy.deepcopy(base), config) for _ in range(2)]
    for model, start in zip(models, (None, str(tmp_path / "checkpoint-3")), strict=True):
        trainer_of(model, tmp_path, remove_unused_columns=False, data_collator=collated).train(start)
        assert dash_state(model).step == 6
    assert all(map(torch.equal, *(model.state_dict().values() for model in models)))
    assert dash_state(load_adapter(base, tmp_path / "checkpoint-3")).step == 3


def test_compiled_models(tmp_path):
    losses = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_of(own_door(dropout=0.0), tmp_path, max_steps=5, save_steps=5, **compiled)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.state.log_history[-2]["dash_directions"] == 24
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.isfinite(load_adapter(llama(), tmp_path / "checkpoint-5")(X).logits).all()


class Reporter(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(logs.get("dash_step"))


def test_reporters_get_the_figures_of_a_callback_that_leads(tmp_path):
    callback, reporter = DashCallback(progress=False), Reporter()
    trainer = trainer_of(own_door(prelaunch_steps=1), tmp_path, reporter, callback, max_steps=2)
    callback.lead(trainer)
    trainer.train()
    assert reporter.seen[:2] == [1, 2]


def test_a_model_that_trainer_makes(tmp_path):
    """model_init is called once more when training starts."""
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, save_steps=5, report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-2
    )
    callback = DashCallback(progress=False)
    trainer = transformers.Trainer(model_init=lambda: own_door(), args=args, train_dataset=rows(), callbacks=[callback])
    for _ in range(2):
        trainer.train()
        assert dash_state(trainer.model).step == 5 and callback.schedule.launched
        assert (tmp_path / "checkpoint-5" / "loradash_adapter.safetensors").exists()


def test_callbacks_that_trainer_restores(run, tmp_path):
    trainer = trainer_of(own_door(), tmp_path, max_steps=8, restore_callback_states_from_checkpoint=True)
    trainer.train(f"{run.args.output_dir}/checkpoint-3")
    assert [e["step"] for e in trainer.state.log_history if e.get("dash_directions") == 24] == [4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="which would lose DashCallback's cache"):
        trainer_of(
            own_door(),
            tmp_path,
            DashCallback(cache=SpectralCache(tmp_path)),
            restore_callback_states_from_checkpoint=True,
        )


def test_without_transformers(monkeypatch):
    monkeypatch.delitem(sys.modules, "loradash.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'needs transformers, .*: pip install "loradash-kernels\[transformers\]"'):
        importlib.import_module("loradash.integrations.transformers")


def test_a_model_without_adapters(tmp_path):
    for make in (lambda: DashCallback(llama()), lambda: trainer_of(llama(), tmp_path)):
        with pytest.raises(ValueError, match="no LoRA-Dash adapters; call apply_dash"):
            make()


def test_plain_lora_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for make in (lambda: DashSchedule(model), lambda: trainer_of(model, tmp_path)):
        with pytest.raises(
            ValueError, match=r"not LoRA-Dash \(.*q_proj\): make it by get_peft_model\(model, DashLoraConfig"
        ):
            make()


def test_adapters_that_do_not_train(tmp_path):
    """PeftModel.from_pretrained freezes them unless it is asked otherwise."""
    trainer = trainer_of(own_door().requires_grad_(False), tmp_path)
    with pytest.raises(ValueError, match=r"nothing trains, .* wants is_trainable=True"):
        trainer.train()


def test_two_callbacks(tmp_path):
    trainer = trainer_of(own_door(), tmp_path, DashCallback(), DashCallback())
    with pytest.raises(ValueError, match="2 of the trainer's callbacks are a DashCallback; keep one"):
        trainer.train()


def test_a_schedule_that_is_stepped_beside_it(tmp_path):
    model = own_door()
    schedule = DashSchedule(model, progress=False)

    class Beside(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            schedule.step()

    with pytest.raises(RuntimeError, match="a later DashSchedule counts for this model"):
        trainer_of(model, tmp_path, DashCallback(progress=False), Beside()).train()


def test_checkpoints_without_a_count(run, tmp_path):
    """Saved by a trainer without the callback, or before there was one."""
    folder = Path(shutil.copytree(f"{run.args.output_dir}/checkpoint-6", tmp_path / "checkpoint-6"))
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["DashCallback"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=r"of global step 6 was saved without DashCallback, .* set dash_state\(model\)\.step"
    ):
        trainer_of(own_door(), tmp_path, max_steps=7).train(str(folder))
    model = own_door()
    dash_state(model).step = 6
    trainer_of(model, tmp_path, max_steps=8, save_steps=1).train(str(folder))
    assert dash_state(model).step == 8


def test_a_best_checkpoint_without_a_count(run, tmp_path):
    """Told when training is resumed, not when it is over."""
    folder = Path(shutil.copytree(run.args.output_dir, tmp_path / "run"))
    for step, change in ((3, {"stateful_callbacks": {}}), (6, {"best_model_checkpoint": f"{folder}/checkpoint-3"})):
        file = folder / f"checkpoint-{step}" / "trainer_state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    often = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "eval_dataset": rows(2)}
    trainer = trainer_of(own_door(), folder, max_steps=8, **often)
    with pytest.raises(ValueError, match="checkpoint-3, the best checkpoint so far, was saved without DashCallback"):
        trainer.train(str(folder / "checkpoint-6"))
    assert trainer.state.global_step == 6


class Breaking(transformers.TrainerCallback):
    """Fails once, between the optimizer's third step and its count."""

    calls = 0

    def on_optimizer_step(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise OSError("no space left")


def test_training_goes_on_after_one_that_broke_off(tmp_path):
    trainer = trainer_of(own_door(), tmp_path, Breaking(), DashCallback(progress=False), max_steps=3)
    with pytest.raises(OSError, match="no space"):
        trainer.train()
    trainer.train()
    assert dash_state(trainer.model).step == 5


def test_the_state_that_is_saved_after_training(run):
    run.save_state()
    state = json.loads(Path(run.args.output_dir, "trainer_state.json").read_text())
    counted = state["stateful_callbacks"]["DashCallback"]["attributes"]["counted"]
    assert (counted["step"], counted["launched"]) == (6, True)


def test_merged_adapters_do_not_train(run, tmp_path):
    model = copy.deepcopy(run.model)
    loradash.merge(model)
    with pytest.raises(ValueError, match=r"unmerge the model before train\(\): model.layers.0.self_attn.q_proj"):
        trainer_of(model, tmp_path).train()
