"""Work of a thread beside training, on streams of its own: it neither waits for training's kernels nor holds them up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class SideStreams:
    """One stream for each GPU among the devices, which begins after all that is enqueued there now.

    To be made where the tensors were made, in the thread and under the stream of the program that owns them.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._streams = []
        for device in dict.fromkeys(d for d in devices if d.type == "cuda"):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            self._streams.append(stream)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """In this thread, what is enqueued within the block goes to these streams."""
        with contextlib.ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield


def borrow(t: Tensor) -> Tensor:
    """A tensor of another stream, detached, for use in the current one: its memory is not given away before that is done."""
    t = t.detach()
    if t.is_cuda:
        t.record_stream(torch.cuda.current_stream(t.device))
    return t
