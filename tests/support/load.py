"""Other work on the device, beside what is tested."""

from __future__ import annotations

import torch


class Load:
    """Products on other streams of a GPU, enqueued with every `add`; on the CPU, which has no streams, nothing."""

    def __init__(self, device: torch.device, streams: int = 2, size: int = 1024) -> None:
        self.streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            self.streams = [torch.cuda.Stream(device) for _ in range(streams)]
            self.operand = torch.randn(size, size, device=device, dtype=torch.bfloat16)
            torch.cuda.synchronize(device)

    def add(self, products: int = 4) -> None:
        for stream in self.streams:
            with torch.cuda.stream(stream):
                for _ in range(products):
                    self.operand @ self.operand
