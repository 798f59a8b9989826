"""Fused LoRA-Dash linear layers: stateless functions, tensors in and tensors out.

LoRA-Dash: Si et al., "Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning", ICLR 2025.
"""

from . import flops
from ._version import __version__
from .backends.registry import BackendChoice, available_backends, explain_backend
from .checkpointing import keep_projections
from .composite import operator_decompositions
from .directions.linalg import Triplets
from .directions.randomized_svd import batched_randomized_svd
from .directions.rates import (
    ChangeRates,
    Directions,
    change_rates,
    direction_accuracy,
    direction_recall,
    task_specific_directions,
)
from .functional import dash_linear, low_rank_update
from .group import GroupMember, dash_linear_group
from .packed_weights import enable_packed_weights, packed_weight_bytes

__all__ = [
    "BackendChoice",
    "ChangeRates",
    "Directions",
    "GroupMember",
    "Triplets",
    "__version__",
    "available_backends",
    "batched_randomized_svd",
    "change_rates",
    "dash_linear",
    "dash_linear_group",
    "direction_accuracy",
    "direction_recall",
    "enable_packed_weights",
    "explain_backend",
    "keep_projections",
    "low_rank_update",
    "operator_decompositions",
    "packed_weight_bytes",
    "task_specific_directions",
]

flops.register()
