"""Does a run that was stopped and resumed equal one that was not?

    OMP_NUM_THREADS=1 python -m benchmarks.front_ends.resume [--arm trainer] [--door apply_dash]

A minute. A tiny Llama with dropout trains for 10 optimizer steps of two batches and launches at step 4; fresh models resume from
the checkpoints of steps 2, 4 and 6. Prints the largest difference of the losses after the checkpoint, and of all that the
model holds at the end, to the run that went through: 0.0 on a CPU, where the same sums are made in the same order.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loradash import DashConfig, DashSchedule, apply_dash, dash_layers, dash_parameter_groups, dash_state
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

STEPS, LAUNCH, ACCUMULATION, BATCH = 10, 4, 2, 2
CHECKPOINTS = {"before launch": 2, "at launch": 4, "after launch": 6}
SETTINGS: dict[str, Any] = {"r": 4, "prelaunch_steps": LAUNCH, "target_modules": ["q_proj", "v_proj", "down_proj"]}
RATE = 1e-2


class Run(NamedTuple):
    """What a training left: the loss of every step, by its number; what the model held at the end; the count."""

    losses: dict[int, float]
    tensors: dict[str, Tensor]
    step: int
    launched: bool


class Gap(NamedTuple):
    """Largest differences of a resumed run to the one that went through."""

    loss: float
    tensors: float


def llama(**settings: Any) -> nn.Module:
    """30 thousand parameters, the same with every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(
        LlamaConfig(**{**size, **heads, "max_position_embeddings": 64, "pad_token_id": 0, **settings})
    )


def rows(count: int = 40, length: int = 12) -> list[dict[str, list[int]]]:
    """Tokenised sequences that count upwards, each number twice."""
    starts = torch.randint(3, 50, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    found = [[start + i // 2 for i in range(length)] for start in starts]
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * length} for ids in found]


def own_door(**settings: Any) -> nn.Module:
    return apply_dash(llama(), DashConfig(**{"alpha": 8, "directions": 4, "dropout": 0.1, **SETTINGS, **settings}))


def peft_door(**settings: Any) -> nn.Module:
    from loradash.integrations.peft import DashLoraConfig
    from peft import get_peft_model

    common = {"lora_alpha": 8, "directions": 4, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    return get_peft_model(llama(), DashLoraConfig(**{**common, **SETTINGS, **settings}))


DOORS: dict[str, Callable[..., nn.Module]] = {"apply_dash": own_door, "peft": peft_door}


def finished(model: nn.Module, losses: dict[int, float]) -> Run:
    launched = all(bool(layer.launched) for layer in dash_layers(model).values())
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Run(losses, tensors, dash_state(model).step, launched)


def with_trainer(model: nn.Module, folder: Path, resume_at: int | None) -> Run:
    from loradash.integrations.transformers import DashCallback
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=[DashCallback(model, progress=False)])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume_at}") if resume_at else None)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] > (resume_at or 0)]
    return finished(model, {entry["step"]: entry["loss"] for entry in logged})


def with_accelerate(model: nn.Module, folder: Path, resume_at: int | None) -> Run:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    # Without a generator of its own, a loader draws from that of dropout whenever it is started, after a resume too.
    own = torch.Generator()
    loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH, collate_fn=_collated, generator=own)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = DashSchedule(wrapped, progress=False)
    accelerator.register_for_checkpointing(schedule)
    step, losses = resume_at or 0, {}
    if resume_at is not None:
        accelerator.load_state(str(folder / str(resume_at)))
        loader = accelerator.skip_first_batches(loader, resume_at * ACCUMULATION)
    for batch in loader:
        with accelerator.accumulate(wrapped):
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        if accelerator.sync_gradients:
            step += 1
            losses[step] = loss.item()
            if resume_at is None and step in CHECKPOINTS.values():
                accelerator.save_state(str(folder / str(step)))
        if step == STEPS:
            break
    return finished(model, losses)


def with_lightning(model: nn.Module, folder: Path, resume_at: int | None) -> Run:
    """On one constant batch: Lightning gives a resumed epoch its first batches again. It leaves the generator of dropout as it
    is, too, so every batch seeds it by its number."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from loradash.integrations.lightning import DashCallback

    losses: dict[int, list[float]] = {}

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            before = losses.setdefault(self.global_step + 1, [])
            torch.manual_seed(self.global_step * ACCUMULATION + len(before))
            loss = self.model(**batch).loss
            before.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(dash_parameter_groups(self, lr=RATE))

    trainer = lightning.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATION,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            DashCallback(progress=False),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1),
        ],
    )
    batches = torch.utils.data.DataLoader(rows()[:BATCH] * STEPS * ACCUMULATION, batch_size=BATCH, collate_fn=_collated)
    trainer.fit(Module().train(), batches, ckpt_path=folder / f"step={resume_at}.ckpt" if resume_at else None)
    return finished(model, {step: sum(each) / len(each) for step, each in losses.items()})


def _collated(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


ARMS: dict[str, Callable[[nn.Module, Path, int | None], Run]] = {
    "trainer": with_trainer,
    "accelerate": with_accelerate,
    "lightning": with_lightning,
}


def gaps(arm: str, door: str, folder: Path) -> dict[str, Gap]:
    """For every checkpoint. Raises RuntimeError where a run did not do what is to be compared."""
    whole = _checked(ARMS[arm](DOORS[door](), folder, None), 0)
    found = {}
    for phase, step in CHECKPOINTS.items():
        resumed = _checked(ARMS[arm](DOORS[door](), folder, step), step)
        loss = max(abs(resumed.losses[k] - whole.losses[k]) for k in resumed.losses)
        found[phase] = Gap(loss, max(_distance(resumed.tensors[k], whole.tensors[k]) for k in whole.tensors))
    return found


def _checked(run: Run, after: int) -> Run:
    if not (run.launched and run.step == STEPS and set(run.losses) == set(range(after + 1, STEPS + 1))):
        raise RuntimeError(
            f"resumed from {after}: launched {run.launched}, step {run.step}, losses of {sorted(run.losses)}"
        )
    return run


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, action="append")
    parser.add_argument("--door", choices=DOORS, action="append")
    chosen = parser.parse_args()
    table = Table("front end", "adapted by", "resumed from", "loss", "model")
    for arm in chosen.arm or ARMS:
        for door in chosen.door or DOORS:
            with tempfile.TemporaryDirectory() as folder:
                for phase, gap in gaps(arm, door, Path(folder)).items():
                    table.add_row(arm, door, f"{CHECKPOINTS[phase]} ({phase})", f"{gap.loss:.1e}", f"{gap.tensors:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
