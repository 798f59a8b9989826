"""The layer as the authors' code computes it, restated: what it costs is what is of interest here.

Their class (`loralib/layers_LoRA-Dash.py` of Chongjie-Si/Subspace-Tuning) adds the LoRA term in place; before launch it is
plain LoRA, afterwards it forms U diag(Δσ) Vᵀ as a dense matrix in every step and multiplies it with an x that is dropped anew.
The SVD that their forward takes at launch is left out: it is the price of one step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.sentiment.baselines import DenseDash
from loradash_kernels import Directions


class AuthorsLinear(DenseDash):
    """Adapters are of the weight's dtype, as theirs are."""

    launched = False

    def forward(self, x: Tensor) -> Tensor:
        result = F.linear(x, self.weight, self.bias)
        result += self.dropout(x) @ self.lora_a.t() @ self.lora_b.t() * self.scaling
        if self.launched:
            result += self.dash(self.dropout(x))
        return result

    @torch.no_grad()
    def launch(self, directions: Directions) -> None:
        self.dash_u.copy_(directions.u)
        self.dash_vt.copy_(directions.vt)
        self.launched = True
