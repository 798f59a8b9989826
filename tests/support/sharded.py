"""What the checks of `support.sharded_worker` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@contextmanager
def raises(kind: type[BaseException], *words: str) -> Iterator[None]:
    """The block must raise an error of this kind whose text has all these words."""
    said = None
    try:
        yield
    except kind as error:
        said = str(error)
    assert said is not None, f"no {kind.__name__} was raised: {words}"
    missing = [word for word in words if word not in said]
    assert not missing, f"{missing} not in {said}"


class Meshes:
    """four: all processes. two_by_two: dp, tp."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.four = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
        self.two_by_two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        self.pair = self.two_by_two["tp"]
