"""Tiny models of transformers with random weights, whose every linear layer is adapted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS, HEADS, TOKENS = 64, 32, 2, 2, 64


def _llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            max_position_embeddings=TOKENS,
            use_cache=False,
        )
    )


def _gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=layers,
        n_head=HEADS,
        n_positions=TOKENS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config)
    # Without a name for its loss the model logs a warning in its forward pass, at which the graph breaks.
    model.loss_type = "ForCausalLM"
    return model


def _t5(layers: int) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=HIDDEN // HEADS,
            d_ff=2 * HIDDEN,
            num_layers=layers,
            num_heads=HEADS,
            dropout_rate=0.0,
            use_cache=False,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def _bert(layers: int) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            intermediate_size=2 * HIDDEN,
            max_position_embeddings=TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


@dataclass(frozen=True)
class Whole:
    """A model and the names of its linear layers."""

    make: Callable[[int], nn.Module]
    targets: tuple[str, ...]
    layers: int = LAYERS

    def model(self) -> nn.Module:
        """The same weights in every call."""
        torch.manual_seed(0)
        return self.make(self.layers).train()


MODELS = {
    "Llama": Whole(_llama, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "GPT-2": Whole(_gpt2, ("c_attn", "c_proj", "c_fc")),
    "T5": Whole(_t5, ("q", "k", "v", "o", "wi", "wo")),
    "BERT": Whole(_bert, ("query", "key", "value", "dense")),
}


# To see what compiles it takes no second layer.
SHALLOW = {name: replace(whole, layers=1) for name, whole in MODELS.items()}


def batch(rows: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Tokens (rows, tokens), which are their own labels."""
    draw = torch.Generator().manual_seed(1000 * seed + 100 * rows + tokens)
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=draw)
    return {"input_ids": ids, "labels": ids}


def loss_of(model: Any, rows: int, tokens: int, seed: int = 0) -> Tensor:
    """A forward pass of the model, compiled or not."""
    return model(**batch(rows, tokens, seed)).loss
