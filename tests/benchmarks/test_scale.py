"""The benchmark of several processes: what its page says, and that its models count what a step sends."""

from __future__ import annotations

import math

import pytest
from support.scale import CELLS

from benchmarks.scale import __main__ as scale
from benchmarks.scale import modelled, report

GOOD = {"compared": "losses", "gap": 2e-7, "tolerance": 1e-5, "error": None}
FAR = {**GOOD, "gap": 1e-3}
LOST = {"compared": "merge", "gap": math.inf, "tolerance": 0.0, "error": "RuntimeError: no"}


def count(sent, expected):
    return {"bytes": {"all_reduce": sent}, "calls": {"all_reduce": 1}, "modelled": expected}


CELLS_FOUND = {"ddp": {**dict.fromkeys(CELLS, GOOD), "train": FAR, "merge": LOST}}
COUNTS = {"ddp": {"frozen": count(100, 100), "after launch": count(250, None)}}


def test_the_page_tells_what_failed_and_what_did_not_run():
    text = report.page(CELLS_FOUND, COUNTS, {"zero3": "deepspeed is not installed"}, {"commit": "abc"})
    assert "| train | 1.0e-03 / 1e-05, too far | not run |" in text
    assert "| merge | failed | not run |" in text
    assert "| resume | 2.0e-07 / 1e-05 | not run |" in text
    assert "ZeRO-3 did not run: deepspeed is not installed." in text
    assert "| after launch | 250 (2.50) |" in text
    assert "commit abc" in text


def test_rows_have_the_gaps_and_the_bytes():
    rows = report.rows(CELLS_FOUND, COUNTS)
    assert len(rows) == len(CELLS) + 2
    assert rows[CELLS.index("load")]["what"] == "load elsewhere"
    assert [(row["bytes"], row["modelled bytes"], row["over frozen"]) for row in rows[-2:]] == [
        (100, 100, 1.0),
        (250, "", 2.5),
    ]


@pytest.mark.slow
def test_a_step_of_ddp_sends_what_trains(tmp_path):
    """Counted in two processes, but for the sizes of buckets that DDP tells about once."""
    found = scale.traffic("ddp", tmp_path)
    for training, base_trains in (
        ("frozen", False),
        ("before launch", False),
        ("after launch", False),
        ("all trains", True),
    ):
        trained = modelled.sizes("launch" in training, base_trains).trained
        assert found[training]["bytes"]["all_reduce"] == 4 * trained == found[training]["modelled"], training
    assert found["the launching step"]["modelled"] is None
