"""Keeps DistributedDataParallel from sending frozen buffers with every forward pass.

DDP broadcasts all buffers of the module it wraps before each forward pass in training. U, Vᵀ and the flag `launched` never
change there: they are equal in all processes once DDP has wrapped the model, which sends them once, and launch gives every
process the same. For a 7B model they are 80 MB a step.

DDP reads which names to leave out from the module it is given, and then leaves them out of the first sending too. So its
own set of names is completed after that, whatever was wrapped: the model, a part of it, or a larger one around it. For that a
hook of PyTorch's sees every registration of a submodule, in the whole program: it costs each 0.1 us, and changes none but
DDP's. It is made on import, as a model may come out of a pickle; where DDP has no such last step, all is sent as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .experts import expert_parameters
from .linear import DashLinear
from .parked import BUFFERS, Parked

FOREIGN = "_loradash_frozen"
"""An attribute of the class of layers that another framework made: the names of their dicts of such buffers, one an adapter."""
# DDP calls this at the end of its construction, after it has sent all parameters and buffers.
_LAST_STEP = "_ddp_init_helper"


_WRAPPED: weakref.WeakKeyDictionary[nn.Module, list[nn.Parameter]] = weakref.WeakKeyDictionary()
"""Every DistributedDataParallel there is, with the parameters that trained when it was made: it averages their gradients alone."""


def refuse_unaveraged(model: nn.Module, parameters: Iterable[Tensor], adapter: str) -> None:
    """Raises ValueError where a model is part of a DistributedDataParallel that knows nothing of these parameters."""
    wanted = {id(p) for p in parameters}
    for ddp, known in list(_WRAPPED.items()):
        if wanted - {id(p) for p in known} and model in set(ddp.modules()):
            raise ValueError(
                f"adapter {adapter!r} did not train when DistributedDataParallel was made, which would leave its gradients as "
                "they are in each process: make that anew, after set_adapter or train_adapters on the model inside"
            )


def refuse_refreezing(model: nn.Module, parameters: Iterable[Tensor], freeze: bool) -> None:
    """Raises ValueError where a model is part of a DistributedDataParallel to which these parameters, frozen or thawed now, are
    of the other kind: it would wait for a frozen one's gradient, and leave a thawed one's as it is in each process."""
    wanted = {id(p) for p in parameters}
    for ddp, known in list(_WRAPPED.items()):
        if model not in set(ddp.modules()):
            continue
        trained = wanted & {id(p) for p in known}
        unawaited = freeze and ddp.find_unused_parameters
        if not unawaited and (trained if freeze else wanted - trained):
            raise ValueError(
                "DistributedDataParallel averages the gradients of what trained when it was made: freeze or thaw A and B "
                "(dash_only, or load_adapter of such a file) in the model inside, and make that anew; with "
                "find_unused_parameters=True it lets them be frozen later"
            )


def frozen_buffers(module: nn.Module) -> set[str]:
    """Full names of the adapters' buffers in a module; all the names of a layer that occurs twice."""
    found: set[str] = set()
    for name, m in module.named_modules(remove_duplicate=False):
        if isinstance(m, DashLinear | Parked):
            found |= {f"{name}.{buffer}" for buffer in BUFFERS if buffer in m._buffers}
        found |= {f"{name}.{whole.parameter}_{buffer}" for whole in expert_parameters(m) for buffer in BUFFERS}
        for parts in getattr(type(m), FOREIGN, ()):
            found |= {f"{name}.{parts}.{adapter}" for adapter in m._modules[parts]._buffers}
    return {name.lstrip(".") for name in found}


def _when_wrapped(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """A hook on every registration of a submodule: DDP's own is where it takes the model in."""
    # The name is compared first, which costs all other modules least.
    if name == "module" and isinstance(parent, nn.parallel.DistributedDataParallel) and child is not None:
        _WRAPPED[parent] = [p for p in child.parameters() if p.requires_grad]
        names = frozen_buffers(child)
        if names:
            parent.__dict__[_LAST_STEP] = partial(_finish, parent, names)


def _finish(ddp: Any, names: set[str], *arguments: Any, **options: Any) -> Any:
    """DDP's last step of construction, for once in place of its method."""
    del ddp.__dict__[_LAST_STEP]
    ddp.parameters_to_ignore |= names
    ddp._assign_modules_buffers()
    return getattr(ddp, _LAST_STEP)(*arguments, **options)


register_module_module_registration_hook(_when_wrapped)
