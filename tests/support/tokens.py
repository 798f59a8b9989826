"""A tokenizer that needs no file."""

from __future__ import annotations

from typing import Any

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]


def tokenizer() -> Any:
    """One token a word: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)
