"""Runs that were stopped before, at and after launch and resumed, beside one that went through."""

from __future__ import annotations

import pytest

from benchmarks.front_ends import resume

NEEDS = {"trainer": "transformers", "accelerate": "accelerate", "lightning": "lightning"}


@pytest.mark.parametrize("door", resume.DOORS)
@pytest.mark.parametrize("arm", resume.ARMS)
def test_a_resumed_run_equals_one_that_went_through(arm, door, tmp_path):
    """In every loss and in all that the model holds, with dropout, to the bit."""
    for package in ("transformers", NEEDS[arm], *(["peft"] if door == "peft" else [])):
        pytest.importorskip(package)
    found = resume.gaps(arm, door, tmp_path)
    assert found == dict.fromkeys(resume.CHECKPOINTS, resume.Gap(0.0, 0.0))
