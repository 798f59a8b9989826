"""transformers' Trainer, one optimizer step at a time, so that several of them can be timed in turn within one process.

What is timed must be the Trainer's own loop: its data loader, gradient clipping, scheduler and callbacks cost time too. So the
loop is not taken apart: every Trainer runs `train()` in a thread of its own and waits at the end of each step until it is told
to go on. Only one of the threads runs at any time.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from .models import Sizes, Tokens

# Large enough that a wrong gradient shows in the loss after a step.
LEARNING_RATE = 1e-3
# Far above the roundings of gradients in float32, whose signs would else decide steps of full size.
EPSILON = 1e-5
# More than are ever asked for.
MOST_STEPS = 1 << 15
_M_ARENA_MAX = -8


def one_arena() -> None:
    """Has glibc serve all threads from one heap: in heaps of their own, memory is given back and asked for otherwise than in
    the main thread, which a Trainer usually runs in. To be called before there are threads; elsewhere than with glibc it does
    nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


class _Gate(TrainerCallback):
    """Ends every step by handing over to who asked for it."""

    def __init__(self) -> None:
        self.go, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.closing = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.arrived.release()
        self.go.acquire()
        control.should_training_stop = self.closing
        return control


class _RecordingTrainer(Trainer):
    """Keeps the loss of every step, and takes the examples in their order."""

    losses: list[Tensor]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss)
        return loss

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def make_trainer(
    model: nn.Module, sizes: Sizes, folder: Path, callbacks: Sequence[TrainerCallback] = ()
) -> _RecordingTrainer:
    """A Trainer as it comes: AdamW, gradient clipping, linear schedule. It neither writes nor reports anything."""
    transformers.utils.logging.set_verbosity(logging.ERROR)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=sizes.batch,
        max_steps=MOST_STEPS,
        learning_rate=LEARNING_RATE,
        adam_epsilon=EPSILON,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = _RecordingTrainer(model, arguments, train_dataset=Tokens(sizes.tokens), callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.losses = []
    return trainer


class TrainerRun:
    """A training that goes on by one optimizer step with every call of `step`. To be closed, or used as a context."""

    def __init__(self, model: nn.Module, sizes: Sizes, folder: Path, callbacks: Sequence[TrainerCallback] = ()) -> None:
        self._gate = _Gate()
        # The gate comes last: what other callbacks do at the end of a step belongs to it.
        self._trainer = make_trainer(model, sizes, folder, [*callbacks, self._gate])
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._train, daemon=True)

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss in self._trainer.losses]

    def _train(self) -> None:
        try:
            self._gate.go.acquire()
            if not self._gate.closing:
                self._trainer.train()
        except BaseException as error:
            self._error = error
        finally:
            self._gate.arrived.release()

    def step(self) -> None:
        """From the end of one optimizer step to the end of the next. The first call makes the optimizer, too.

        Raises what the training raised, and RuntimeError once it is over.
        """
        if self._thread.ident is None:
            self._thread.start()
        if not self._thread.is_alive():
            raise RuntimeError("this training is over")
        self._gate.go.release()
        self._gate.arrived.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the training after the step that it has come to."""
        self._gate.closing = True
        self._gate.go.release()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> TrainerRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
