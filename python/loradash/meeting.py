"""Where processes wait for each other, however long the slowest takes.

A collective is no place to wait in. NCCL ends a process whose collective was started more than ten minutes ago (the
group's timeout), and gloo raises after thirty. So after work that may take one process much longer than another, each
says in the group's store that it has come, and asks now and then whether all have; then they go on together.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Protocol

import torch

# Pauses between two questions to the store, in seconds: they grow from the first to the last.
FIRST_PAUSE, LAST_PAUSE = 0.002, 1.0
# After so many seconds in which no process came and none advanced, one must have died: a layer takes minutes at most.
SILENCE = 2 * 3600.0
FAREWELL = 10.0


class Bar(Protocol):
    """What this file needs of tqdm."""

    n: Any

    def update(self, steps: int, /) -> Any: ...


class Meeting:
    """The processes of a group, which do one job in shares and meet after it. All must make it at the same time.

    Args:
        rank, processes: this one, and how many there are. Alone, nothing waits and nothing is stored.
        what: the job, for messages.
        bar: shows the sum of all processes' steps, as far as this process knows it.
        group: None for the default group.
    """

    def __init__(
        self,
        rank: int,
        processes: int,
        what: str,
        bar: Bar | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self._rank, self._processes, self._what, self._bar, self._group = rank, processes, what, bar, group
        self._steps = self._rounds = 0
        self._store = _store() if processes > 1 else None
        # A store may outlive the processes that wrote to it, so no two meetings have the same keys.
        name = [uuid.uuid4().hex]
        if self._store is not None:
            torch.distributed.broadcast_object_list(name, src=global_rank(group, 0), group=group)
        self._prefix = f"loradash/{name[0]}"

    def advance(self, steps: int) -> None:
        """Says that this process has done so many more steps of its share."""
        self._steps += steps
        self._show(self._steps if self._store is None else self._store.add(f"{self._prefix}/steps", steps))

    def _show(self, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(steps - self._bar.n)

    def is_lost(self) -> bool:
        """Has another process failed, so that the rest of this one's share is for nothing?"""
        return self._store is not None and self._store.check([f"{self._prefix}/failed"])

    def meet(self, error: BaseException | None = None) -> None:
        """Waits for all. Raises this process's error, or RuntimeError for another's.

        Every process must call this, with None where all went well. RuntimeError too where the others are not heard of any
        more.
        """
        try:
            texts = self._exchange("" if error is None else f"{type(error).__name__}: {error}")
        except Exception:
            # The store may have gone with its process; an error of this one tells more than that.
            if error is None:
                raise
        if error is not None:
            raise error
        for process, text in enumerate(texts):
            if text:
                raise RuntimeError(f"{self._what} failed in process {process}, the model is unchanged: {text}")

    def _exchange(self, text: str) -> list[str]:
        """What every process has to say, once all have come."""
        if self._processes == 1:
            return [text]
        if self._store is None:
            texts: list[str] = [""] * self._processes
            torch.distributed.all_gather_object(texts, text, group=self._group)
            return texts
        self._rounds += 1
        place = f"{self._prefix}/{self._rounds}"
        # Not every store takes empty values.
        self._store.set(f"{place}/{self._rank}", f":{text}")
        if text:
            self._store.set(f"{self._prefix}/failed", "yes")
        if self._store.add(f"{place}/came", 1) == self._processes:
            self._store.set(f"{place}/all", "yes")
        self._wait(place)
        if not self.is_lost():
            return [""] * self._processes
        found = [self._store.get(f"{place}/{process}").decode()[1:] for process in range(self._processes)]
        self._leave_last(place)
        return found

    def _leave_last(self, place: str) -> None:
        """After a failure programs end, and the store with the first process: it stays until the others have read all."""
        store: Any = self._store
        read, end = store.add(f"{place}/read", 1), time.monotonic() + FAREWELL
        while self._rank == 0 and read < self._processes and time.monotonic() < end:
            time.sleep(FIRST_PAUSE)
            read = store.add(f"{place}/read", 0)

    def _wait(self, place: str) -> None:
        store: Any = self._store
        heard, since, pause = (0, 0), time.monotonic(), FIRST_PAUSE
        while not store.check([f"{place}/all"]):
            news = store.add(f"{self._prefix}/steps", 0), store.add(f"{place}/came", 0)
            self._show(news[0])
            if news != heard:
                heard, since = news, time.monotonic()
            elif time.monotonic() - since > SILENCE:
                absent = [p for p in range(self._processes) if not store.check([f"{place}/{p}"])]
                raise RuntimeError(
                    f"{self._what}: nothing was heard for {SILENCE / 3600:g} hours of the processes "
                    f"{', '.join(map(str, absent))}; the model is unchanged"
                )
            time.sleep(pause)
            pause = min(LAST_PAUSE, 1.5 * pause)
        self._show(store.add(f"{self._prefix}/steps", 0))


def global_rank(group: torch.distributed.ProcessGroup | None, rank: int) -> int:
    """The rank in the default group of a process of some group."""
    return rank if group is None else torch.distributed.get_global_rank(group, rank)


def _store() -> Any:
    """The default group's store. None for MPI, which has none and whose collectives wait for ever."""
    return torch.distributed.distributed_c10d._get_default_store()
