"""What the rows of a device must show, fixed before any card was measured: pure functions over rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.layers.variants import COMPILED, OURS, PEFT, RANK

Row = dict[str, Any]
OVER_PEERS = 1.03
OVER_OUR_BEST = 1.03
OVER_FROZEN = {"forward": 1.05, "backward": 1.09}
TIMES = {"step": "device", "wall": "wall", "graph": "graph"}
# (K, N), dtype, and the fewest rows that fill a card.
SQUARE, SQUARE_DTYPE, FEWEST_ROWS = (4096, 4096), "bf16", 4096


@dataclass(frozen=True)
class Measured:
    """One number that a verdict looks at: ours over what it is compared with."""

    value: float
    limit: float
    where: str

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Verdict:
    """A claim and every number that it rests on; what is missing, and where ours failed.

    holds: None where nothing was measured or something is missing, unless what is there decides.
    """

    claim: str
    numbers: tuple[Measured, ...]
    missing: tuple[str, ...] = field(default=())
    failed: tuple[str, ...] = field(default=())

    @property
    def holds(self) -> bool | None:
        if self.failed or not all(number.holds for number in self.numbers):
            return False
        return None if self.missing or not self.numbers else True

    @property
    def worst(self) -> Measured | None:
        return max(self.numbers, key=lambda number: number.value / number.limit, default=None)

    def __str__(self) -> str:
        said = {True: "holds", False: "does not hold", None: "not decided"}[self.holds]
        worst = self.worst
        numbers = "nothing measured" if worst is None else f"worst {worst.value:.3f} ({worst.where})"
        beyond = sum(not number.holds for number in self.numbers)
        parts = [
            numbers,
            f"{beyond} of {len(self.numbers)} beyond the limit" if beyond else f"{len(self.numbers)} numbers",
        ]
        parts += [f"missing: {', '.join(self.missing)}"] * bool(self.missing)
        parts += [f"ours failed: {', '.join(self.failed)}"] * bool(self.failed)
        return f"{self.claim}: {said}. {'; '.join(parts)}"


def workload_of(row: Row) -> str:
    return "{dtype} {M}x{K}x{N}, r {r}, dropout {dropout:g}".format(**row)


def by_workload(rows: Iterable[Row], kind: str) -> dict[str, dict[str, Row]]:
    """Rows of a kind: workload -> arm -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(workload_of(row), {})[row["arm"]] = row
    return found


def _failures(groups: dict[str, dict[str, Row]]) -> tuple[str, ...]:
    """Where ours by default has an error in the place of times."""
    return tuple(
        f"{where}: {arms[OURS]['error']}" for where, arms in groups.items() if OURS in arms and arms[OURS]["error"]
    )


def _ratio(row: Row | None, name: str) -> float | None:
    """None where the arm has no such time."""
    return None if row is None else row.get(name)


def beside_peers(rows: Iterable[Row]) -> Verdict:
    """Ours by default over the better of PEFT and the compiled factored form: a step on the device, eager on the wall and as a
    CUDA graph. The device's time of all three must be there; another time of all three, where any of them has it."""
    numbers, missing, groups = [], [], by_workload(rows, "layer")
    for where, arms in groups.items():
        for time_ in TIMES:
            found = {arm: _ratio(arms.get(arm), f"{time_} ratio") for arm in (OURS, PEFT, COMPILED)}
            if time_ == "step" or any(found.values()):
                missing += [f"{TIMES[time_]} of {arm}, {where}" for arm, ratio in found.items() if ratio is None]
            ours, *peers = found.values()
            known = [ratio for ratio in peers if ratio is not None]
            if ours is not None and known:
                numbers.append(Measured(ours / min(known), OVER_PEERS, f"{TIMES[time_]}, {where}"))
    claim = f"ours by default takes at most {OVER_PEERS} of the better of {PEFT} and {COMPILED}"
    return Verdict(claim, tuple(numbers), tuple(missing), _failures(groups))


def beside_our_best(rows: Iterable[Row]) -> Verdict:
    """Ours by default over the fastest of every backend and strategy, pass by pass."""
    numbers, groups = [], by_workload(rows, "strategy")
    for where, arms in groups.items():
        for pass_ in OVER_FROZEN:
            over_ours = [(row[f"{pass_} over ours"], arm) for arm, row in arms.items() if row.get(f"{pass_} over ours")]
            if over_ours:
                ratio, arm = min(over_ours)
                numbers.append(Measured(1 / ratio, OVER_OUR_BEST, f"{pass_}, {arm}, {where}"))
    claim = f"ours by default takes at most {OVER_OUR_BEST} of our fastest strategy"
    return Verdict(claim, tuple(numbers), failed=_failures(groups))


def beside_frozen(rows: Iterable[Row]) -> Verdict:
    """Ours by default over the frozen layer at 4096 x 4096, pass by pass."""
    numbers, missing = [], []
    groups = {
        where: arms for where, arms in by_workload(rows, "layer").items() if _is_square(next(iter(arms.values())))
    }
    for where, arms in groups.items():
        for pass_, limit in OVER_FROZEN.items():
            ratio = _ratio(arms.get(OURS), f"{pass_} ratio")
            if ratio is None:
                missing.append(f"{pass_} of {OURS} at {where}")
            else:
                numbers.append(Measured(ratio, limit, f"{pass_}, {where}"))
    limits = " and ".join(f"{pass_} {limit}" for pass_, limit in OVER_FROZEN.items())
    claim = f"ours by default takes at most {limits} of the frozen layer at {SQUARE[0]} x {SQUARE[1]}"
    return Verdict(claim, tuple(numbers), tuple(missing), _failures(groups))


def _is_square(row: Row) -> bool:
    """Is it a workload that the limits over the frozen layer are for? A higher rank is more work."""
    sizes = (row["K"], row["N"]) == SQUARE and row["M"] >= FEWEST_ROWS
    return sizes and row["dtype"] == SQUARE_DTYPE and row["r"] <= RANK


def verdicts(rows: Iterable[Row]) -> dict[str, Verdict]:
    """Every verdict, by name."""
    rows = list(rows)
    return {
        "beside peers": beside_peers(rows),
        "beside our best": beside_our_best(rows),
        "beside frozen": beside_frozen(rows),
    }
