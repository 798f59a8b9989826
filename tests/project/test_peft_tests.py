"""The comparison that `make peft-tests` makes: what differs is seen, a reason is held to its words, what never fused is told."""

from __future__ import annotations

import socket

import pytest

from tools.oldest import oldest
from tools.peft_tests import __main__ as command
from tools.peft_tests import compare, explained, hub, report
from tools.peft_tests.runs import Test as Ended

WHY = explained.Reason(("loradash",), "refuses .* here", "a method of its own", "::test_b")


def ended(name: str, outcome: str = "passed", message: str = "", **calls: int) -> Ended:
    return Ended(f"tests/test_mixed.py::test_{name}", outcome, message, 0.1, calls)


def compared(monkeypatch, off, on, switch="loradash"):
    monkeypatch.setattr(compare, "REASONS", (WHY,))
    outcomes = {("test_mixed", "off"): off, ("test_mixed", switch): on}
    return outcomes, compare.differences(outcomes)


def test_equal_outcomes_differ_in_nothing(monkeypatch):
    tests = [ended("a", fused=2), ended("b", "failed", "as ever")]
    outcomes, found = compared(monkeypatch, tests, tests)
    assert found == [] and command.faults(outcomes, found) == []
    assert "No test ended otherwise." in report.as_markdown(outcomes, found, {})


@pytest.mark.parametrize(
    ("on", "names"),
    [
        ([ended("a", "failed", "wrong sums"), ended("b")], ["a"]),
        # As gone as failed, and as new.
        ([ended("b")], ["a"]),
        ([ended("a"), ended("b"), ended("c")], ["c"]),
        # The reason for b is in what it says, and only b has it.
        ([ended("a"), ended("b", "failed", "it refuses that elsewhere")], ["b"]),
        ([ended("a", "failed", "it refuses that here"), ended("b")], ["a"]),
    ],
)
def test_what_differs_without_a_reason_is_a_fault(monkeypatch, on, names):
    on = [*on, ended("d", fused=1)]
    outcomes, found = compared(monkeypatch, [ended("a"), ended("b"), ended("d")], on)
    assert [one.test.rsplit("_")[-1] for one in found] == names and found[0].reason is None
    (fault,) = command.faults(outcomes, found)
    assert f"test_{names[0]}" in fault
    assert "NOT EXPLAINED" in report.as_markdown(outcomes, found, {})


def test_a_reason_explains(monkeypatch):
    outcomes, found = compared(monkeypatch, [ended("b")], [ended("b", "failed", "it refuses that here", fused=1)])
    assert [one.reason for one in found] == [WHY] and command.faults(outcomes, found) == []
    assert WHY.why in report.as_markdown(outcomes, found, {})
    assert compare.stale(found) == [] and compare.stale([]) == [WHY]


def test_a_run_that_never_fused_proves_nothing(monkeypatch):
    off, on = [ended("a")], [ended("a", **{"PEFT: merged": 3})]
    for switch in ("accelerated", "launched"):
        outcomes, found = compared(monkeypatch, off, on, switch)
        assert found == [] and "no call ran fused" in " ".join(command.faults(outcomes, found))
        assert "3: PEFT: merged" in report.as_markdown(outcomes, found, {})


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", socket.getaddrinfo)
    monkeypatch.setattr(hub.Closed, "do_not_wait", lambda self: None)
    closed = hub.Closed()
    assert socket.getaddrinfo("127.0.0.1", 80) and not closed.asked
    with pytest.raises(socket.gaierror, match="out of reach"):
        socket.getaddrinfo("huggingface.co", 443)
    assert closed.asked


def test_rows_for_other_tuners_are_taken_out():
    """And no others: of one mark alone, of its own list, and never the last."""
    peft = pytest.importorskip("peft")
    from tools.peft_tests.switches import keep_plain_lora

    def left(*lists):
        keep_plain_lora([pytest.mark.parametrize(("a", "b"), rows).mark for rows in lists])
        return list(lists)

    lora, other = ("a", peft.LoraConfig), ("b", peft.LoHaConfig)
    assert left([lora, other, ("c", 1)], [1, 2]) == [[lora, ("c", 1)], [1, 2]]
    assert left([peft.LoHaConfig(), peft.LoraConfig]) == [[peft.LoraConfig]]
    assert left([other]) == [[other]]
    assert left([lora, other], [other, lora]) == [[lora, other], [other, lora]]


def test_the_oldest_frameworks():
    """One version for each bound of a front end's extra, none for what others need."""
    declared = """
peft = ["peft>=0.19.1,<0.22"]
transformers = ["transformers>=4.48"]
trl = ["trl>=0.14"]
lightning = ["lightning>=2.4"]
accelerate = ["accelerate>=1.0"]
quantised = ["bitsandbytes>=0.46; platform_system == 'Linux'", "torchao>=0.16; platform_system == 'Linux'"]
test = [
    "loradash-kernels[demo]",
    "pytest>=8",
    "diffusers>=0.32",
]
"""
    assert oldest(declared) == [
        "peft==0.19.1",
        "transformers==4.48",
        "trl==0.14",
        "lightning==2.4",
        "accelerate==1.0",
        "bitsandbytes==0.46",
        "torchao==0.16",
        "diffusers==0.32",
    ]
