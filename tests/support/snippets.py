"""The documents' blocks of code: how they are found, and what a reader of them has at hand.

A Python block runs in a namespace of its own. A name that it uses and does not make is one that its reader has: `PROVIDED`
makes it, or, where a block wants another thing of that name, the table of tests/project/test_snippets.py does for that block.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from . import authors

TOKENS, VOCABULARY, HIDDEN = 8, 64, 32
# Launch comes at the method's step 100.
BATCHES = 102
WORDS = ("<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Block:
    """A fenced block. number: its place among those of its language under its heading, from 1."""

    file: str
    heading: str
    number: int
    language: str
    line: int
    code: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.file, self.heading, self.number

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def blocks_of(file: str, text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown document, in its order."""
    heading, start, language = "", None, ""
    counts: dict[tuple[str, str], int] = {}
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        fence = re.match(r"\s*```(\w*)", line)
        if start is not None:
            if fence:
                counts[heading, language] = counts.get((heading, language), 0) + 1
                code = "\n".join(lines[start : number - 1]) + "\n"
                yield Block(file, heading, counts[heading, language], language, start + 1, code)
                start = None
        elif fence:
            start, language = number, fence[1]
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()


class Namespace(dict):
    """Names of a program; what it has not made itself is made when it is first asked for, from what it has until then."""

    def __init__(self, makers: Mapping[str, Callable[[Namespace], Any]]) -> None:
        super().__init__(__name__="__snippet__")
        self._makers = makers

    def __missing__(self, name: str) -> Any:
        # KeyError sends Python on to the builtins, and from there to NameError.
        self[name] = self._makers[name](self)
        return self[name]


Maker = Callable[[Namespace], Any]


def run(block: Block, makers: Mapping[str, Maker]) -> Namespace:
    """Executes a Python block, and returns what it has made."""
    names = Namespace(makers)
    # Traceback's lines are those of the document.
    exec(compile("\n" * (block.line - 1) + block.code, block.file, "exec"), names)
    return names


def llama() -> nn.Module:
    """Two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )


def rows() -> list[dict[str, torch.Tensor]]:
    """Examples for a Trainer."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(WORDS), (BATCHES, TOKENS), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def batches() -> DataLoader:
    return DataLoader(rows(), batch_size=1)


def tokenizer() -> Any:
    """One token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def texts() -> Any:
    """Examples for TRL."""
    from datasets import Dataset

    return Dataset.from_dict({"text": ["abcabc", "bcdbcd", "cdecde", "defdef"]})


def dash_model() -> nn.Module:
    """Adapted by apply_dash."""
    from loradash import DashConfig, apply_dash

    return apply_dash(llama(), DashConfig(r=4, directions=4, target_modules=["q_proj", "v_proj"]))


def peft_model() -> nn.Module:
    """With plain LoRA of PEFT."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


STEPS: dict[str, Any] = {
    "output_dir": "out",
    "max_steps": BATCHES,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": [],
    "save_strategy": "no",
}
"""For a Trainer on the CPU: enough for a launch."""


def arguments() -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(**STEPS)


def sft_arguments() -> Any:
    """The same for TRL."""
    from trl import SFTConfig

    return SFTConfig(**STEPS, bf16=False, max_length=TOKENS)


def saved_llama() -> str:
    """The folder of a base model."""
    llama().save_pretrained("base")
    return "base"


def lightning_module(model: nn.Module) -> Any:
    """Trains what a model has that trains."""
    from lightning import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.model)

    return Module()


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def taken_from(module: str, name: str) -> Maker:
    """What the reader of a document has imported before."""
    return lambda names: getattr(importlib.import_module(module), name)


IMPORTED = {
    "peft": (
        "get_peft_model",
        "LoraConfig",
        "PeftModel",
        "AutoPeftModelForCausalLM",
        "prepare_model_for_kbit_training",
    ),
    "transformers": ("Trainer", "TrainingArguments", "AutoModelForCausalLM", "BitsAndBytesConfig"),
    "trl": ("SFTTrainer", "SFTConfig"),
    "accelerate": ("Accelerator",),
    "loradash": (
        "DashConfig",
        "DashSchedule",
        "apply_dash",
        "dash_parameter_groups",
        "export_lora",
        "merge_and_unload",
    ),
}

PROVIDED: dict[str, Maker] = {
    **{name: taken_from(module, name) for module, names in IMPORTED.items() for name in names},
    "torch": lambda names: torch,
    "L": lambda names: importlib.import_module("lightning"),
    "model": lambda names: llama(),
    "base": lambda names: llama(),
    "peft_model": lambda names: peft_model(),
    "authors_model": lambda names: authors.make_model("loralib", "restated"),
    "folder": lambda names: saved_llama(),
    "data": lambda names: batches(),
    "train_dataset": lambda names: rows(),
    "texts": lambda names: texts(),
    "args": lambda names: arguments(),
    "sft_args": lambda names: sft_arguments(),
    "tokenizer": lambda names: tokenizer(),
    "optimizer": lambda names: optimizer(names["model"]),
    "module": lambda names: lightning_module(names["model"]),
    "accelerator": lambda names: names["Accelerator"](cpu=True),
}


def lone_mesh() -> Any:
    """A mesh (dp, tp) of this one process, whose group is made here and ended by `leave_group`."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))


def leave_group() -> None:
    torch.distributed.destroy_process_group()


def arithmetic() -> dict[str, Maker]:
    """Tensors for the operators: M 5, K 24, N 16, r 4, s 8."""
    m, k, n, r, s = 5, 24, 16, 4, 8
    shapes = {
        "x": (m, k),
        "weight": (n, k),
        "bias": (n,),
        "a": (r, k),
        "b": (n, r),
        "u": (n, s),
        "vt": (s, k),
        "sigma": (s,),
    }
    makers: dict[str, Maker] = {name: lambda names, shape=shape: torch.randn(shape) for name, shape in shapes.items()}
    return {**makers, "base_layer": lambda names: nn.Linear(k, n)}
