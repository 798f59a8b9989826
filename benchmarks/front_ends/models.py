"""A small LLaMA with random weights, the tokens that it is trained on, and what every arm of the comparison shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = 1024
HEAD = 64
EXAMPLES = 1 << 16
_LOGIT_STD = 4


@dataclass(frozen=True)
class Sizes:
    """A model and the batch that trains it; inner is the MLP's width, batch x tokens are the rows M of every product."""

    hidden: int
    inner: int
    layers: int
    batch: int
    tokens: int
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{self.dtype}, {self.layers} layers of {self.hidden}, {self.batch} x {self.tokens} tokens"

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(K, N) of every adapted layer."""
        square, wide = (self.hidden, self.hidden), (self.hidden, self.inner)
        return self.layers * [square, square, square, square, wide, wide, wide[::-1]]


class Shift(nn.Module):
    """Adds a trained vector to the embeddings: it stands in front of all layers, so backward passes through all of them.

    It is what trains in the frozen model, and it is in every arm.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.vector = nn.Parameter(torch.zeros_like(embedding.weight[0]))

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) + self.vector


def make_model(sizes: Sizes) -> nn.Module:
    """The same weights for the same sizes; everything is frozen but the `Shift`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.hidden // HEAD),
        max_position_embeddings=sizes.tokens,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(DTYPES[sizes.dtype]).requires_grad_(False)
    # Logits of the size of a trained model's: near zero, hardly anything that a layer does would show in the loss.
    nn.init.normal_(model.lm_head.weight, std=_LOGIT_STD * sizes.hidden**-0.5)
    model.model.embed_tokens = Shift(model.model.embed_tokens)
    return model


class Tokens(Dataset):
    """Random tokens, the same for the same index."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(VOCABULARY, (self.tokens,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}
