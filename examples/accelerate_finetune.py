"""LoRA-Dash with accelerate: a small random Llama learns to count. Half a minute on a CPU.

    python examples/accelerate_finetune.py
    accelerate launch --num_processes 2 examples/accelerate_finetune.py

Needs `pip install "loradash-kernels[transformers,accelerate]"`. Every --save-every steps a checkpoint is written; with --resume the
run goes on from the last one, before launch or after it, as if it had not stopped. At the end the adapter lies in OUT/adapter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from loradash import DashConfig, DashSchedule, apply_dash, save_adapter, summary
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 128, 32


def small_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def counting(rows: int) -> TensorDataset:
    """Rows that count upwards from a random number, by 1 or by 2, modulo the size of the vocabulary."""
    generator = torch.Generator().manual_seed(1)
    start, by = (torch.randint(1, end, (rows, 1), generator=generator) for end in (VOCABULARY, 3))
    return TensorDataset((start + by * torch.arange(LENGTH)) % VOCABULARY)


def last_checkpoint(folder: Path) -> Path:
    found = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not found:
        raise SystemExit(f"--resume: there is no checkpoint in {folder}")
    return found[-1]


def train(options: argparse.Namespace) -> list[float]:
    """Returns the loss of every step that was taken."""
    set_seed(0)
    accelerator = Accelerator(cpu=options.cpu, gradient_accumulation_steps=2)
    config = DashConfig(r=8, alpha=16, directions=8, prelaunch_steps=options.prelaunch_steps, dropout=0.05)
    model = apply_dash(small_llama(), config)
    accelerator.print(summary(model))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    # The loader's own generator leaves that of dropout alone, so that a resumed run draws the same masks.
    loader = DataLoader(counting(4096), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(2))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = DashSchedule(model)
    accelerator.register_for_checkpointing(schedule)

    step, losses = 0, []
    if options.resume:
        checkpoint = last_checkpoint(options.out)
        accelerator.load_state(str(checkpoint))
        step = int(checkpoint.name.removeprefix("step-"))
        loader = accelerator.skip_first_batches(loader, 2 * step)

    model.train()
    bar = tqdm(total=options.steps, initial=step, disable=not accelerator.is_main_process, unit="step")
    for (rows,) in loader:
        if step >= options.steps:
            break
        with accelerator.accumulate(model):
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        launched = schedule.step()
        if not accelerator.sync_gradients:
            continue
        step += 1
        losses.append(loss.item())
        bar.update()
        bar.set_postfix(loss=f"{losses[-1]:.3f}", phase="dash" if schedule.launched else "pre-launch")
        if launched:
            routes = sorted({report.route for report in schedule.reports})
            accelerator.print(
                f"step {step}: directions of {len(schedule.reports)} layers launched ({', '.join(routes)})"
            )
        if step % options.save_every == 0:
            accelerator.save_state(str(options.out / f"step-{step}"))
    bar.close()

    accelerator.wait_for_everyone()
    file = save_adapter(accelerator.unwrap_model(model), options.out / "adapter")
    accelerator.print(f"adapter: {file}")
    accelerator.end_training()
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--prelaunch-steps", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    parser.add_argument("--cpu", action="store_true", help="though there is a GPU")
    return train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
