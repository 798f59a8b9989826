"""LoRA-Dash for PyTorch models: a drop-in module, its schedule, checkpoints and export.

model = apply_dash(model, DashConfig(r=8, directions=8))
schedule = DashSchedule(model)
...  # after every optimizer.step():
schedule.step()
save_adapter(model, "adapter")
"""

from loradash_kernels import __version__

from . import data_parallel as _data_parallel  # noqa: F401
from .adapters import (
    active_adapter,
    adapter_names,
    add_adapter,
    delete_adapter,
    mixed_batch,
    set_adapter,
    train_adapters,
)
from .background import BackgroundDecomposition
from .cache import SpectralCache
from .checkpoint import AdapterError, load_adapter, save_adapter
from .combining import merge_adapters
from .config import DashConfig
from .counts import summary
from .export import export_lora
from .grouping import group_projections, ungroup_projections
from .hotswap import hotswap_adapter
from .linear import DashLinear
from .model import apply_dash, dash_only, disable, merge, unmerge
from .optimizer import dash_parameter_groups
from .prelaunch import LayerReport, prelaunch
from .schedule import DashSchedule
from .split import join_projections, split_projections
from .state import dash_layers, dash_state
from .training import load_training, save_training
from .unload import merge_and_unload
from .warming import WarmedUp, warm_up

__all__ = [
    "AdapterError",
    "BackgroundDecomposition",
    "DashConfig",
    "DashLinear",
    "DashSchedule",
    "LayerReport",
    "SpectralCache",
    "WarmedUp",
    "__version__",
    "active_adapter",
    "adapter_names",
    "add_adapter",
    "apply_dash",
    "dash_layers",
    "dash_only",
    "dash_parameter_groups",
    "dash_state",
    "delete_adapter",
    "disable",
    "export_lora",
    "group_projections",
    "hotswap_adapter",
    "join_projections",
    "load_adapter",
    "load_training",
    "merge",
    "merge_adapters",
    "merge_and_unload",
    "mixed_batch",
    "prelaunch",
    "save_adapter",
    "save_training",
    "set_adapter",
    "split_projections",
    "summary",
    "train_adapters",
    "ungroup_projections",
    "unmerge",
    "warm_up",
]
