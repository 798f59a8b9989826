"""The benchmark of experts: what it compares is the same function, and its table."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5")

from benchmarks.layers import experts


def test_a_rehearsal(monkeypatch):
    shape = experts.Shape(4, 2, 16, 24, 12)
    monkeypatch.setattr(experts, "SHAPES", (shape,))
    monkeypatch.setattr(experts, "DTYPES", {"fp32": experts.DTYPES["fp32"]})
    found = {row["variant"]: row for row in experts.rows(1)}
    # ΔW of all experts, which PEFT keeps, is more than the two inputs and the P of ours.
    assert found[experts.OURS]["saved bytes"] < found["PEFT LoRA, grouped_mm"]["saved bytes"]
    assert found["frozen, eager"]["GFLOPs"] < found[experts.OURS]["GFLOPs"] < found["PEFT LoRA, eager"]["GFLOPs"]
    assert min(row["over frozen"] for name, row in found.items() if name.startswith("frozen")) == 1
    assert experts.table(list(found.values())).count("\n| fp32") == len(found) == 6


def test_a_wrong_function_is_not_timed(monkeypatch):
    shape = experts.Shape(4, 2, 16, 24, 12)
    monkeypatch.setattr(experts, "same_adapters", lambda model, peft_model: model)
    with pytest.raises(AssertionError):
        experts.check(shape)
