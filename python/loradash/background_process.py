"""The process that `BackgroundDecomposition` starts: weights come in on standard input, one line of JSON answers each."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import TextIO

import torch
from safetensors.torch import load

from .background import LENGTH_BYTES
from .cache import SpectralCache


def serve(folder: str, max_bytes: int, answers: TextIO) -> None:
    """Decomposes every weight that arrives until standard input ends, which it does with the process that feeds it."""
    torch.set_num_threads(1)
    cache = SpectralCache(folder, max_bytes)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(messages,), daemon=True).start()
    while True:
        error = None
        try:
            cache.keep(load(messages.get())["weight"])
        except Exception as caught:
            # Whatever it is, the other side reports it.
            error = f"{type(caught).__name__}: {caught}"
        print(json.dumps({"error": error}), file=answers, flush=True)


def _receive(messages: queue.SimpleQueue[bytes]) -> None:
    """Runs in a thread of its own, so that the end of the input is noticed in the middle of a decomposition too."""
    source = sys.stdin.buffer
    while len(length := source.read(LENGTH_BYTES)) == LENGTH_BYTES:
        messages.put(source.read(int.from_bytes(length, "little")))
    os._exit(0)
