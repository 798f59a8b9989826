"""Fused LoRA-Dash linear layers: stateless functions, tensors in and tensors out.

LoRA-Dash: Si et al., "Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning", ICLR 2025.
"""

from ._version import __version__
from .functional import dash_linear, low_rank_update
from .ops import BackendChoice, available_backends, explain_backend
from .weights import enable_packed_weights, packed_weight_bytes

__all__ = [
    "BackendChoice",
    "__version__",
    "available_backends",
    "dash_linear",
    "enable_packed_weights",
    "explain_backend",
    "low_rank_update",
    "packed_weight_bytes",
]
