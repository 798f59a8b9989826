"""The benchmark of the front ends, rehearsed: its arms agree, red checks end it, its Trainers go on by single steps."""

from __future__ import annotations

import csv
import gc
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from loradash import DashConfig, DashLinear

from benchmarks.front_ends import __main__ as program
from benchmarks.front_ends import arms, checks, memory, modelled
from benchmarks.front_ends.authors import AuthorsLinear
from benchmarks.front_ends.models import Sizes
from benchmarks.front_ends.training import TrainerRun

SMALL = Sizes(32, 64, layers=1, batch=1, tokens=16)


@pytest.fixture(autouse=True, scope="module")
def frozen_garbage():
    """Every Trainer collects garbage when it starts, and need not look through what the libraries hold; the program does this
    for itself, and leaves it so."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(program, "REHEARSED", (SMALL,))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_program_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "memory_of", memory.memory_here)
    assert program.main(["--rehearse", "--seconds", "0.5", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "front_ends.csv").open()))
    assert [(row["dtype"], row["arm"]) for row in rows] == [
        (dtype, name) for dtype in ("fp32", "bf16") for name, arm in arms.ARMS.items() if dtype in arm.dtypes
    ]
    for row in rows:
        assert float(row["step ms"]) > 0 and float(row["processor ratio"]) > 0
        assert int(row["saved bytes"]) <= int(row["peak bytes"]) < int(row["resident bytes"])
        assert (row["arm"] == arms.FROZEN) <= (float(row["ratio"]) == float(row["modelled FLOPs"]) == 1)
    assert {"cpu", "commit", "loss distance"} <= rows[0].keys()
    tables = (tmp_path / "front_ends.md").read_text()
    assert all(f"| {name} |" in tables for name in arms.ARMS)
    assert f"| {arms.LORADASH} / {arms.PEFT} |" in tables and f"| {arms.ACCELERATED} / {arms.PEFT} |" in tables
    assert f"| {arms.ACCELERATED} / {arms.PEFT_NARROW} |  |" in tables, "of float32 there is none"
    assert (tmp_path / "front_ends.png").stat().st_size > 10_000
    assert arms.LORADASH in capsys.readouterr().out


def _without_dash_term(monkeypatch):
    monkeypatch.setattr(AuthorsLinear, "dash", lambda self, x: 0.0)


def _without_gradient_of_b(monkeypatch):
    forward = AuthorsLinear.forward

    def broken(self, x):
        self.lora_b.register_hook(torch.zeros_like)
        return forward(self, x)

    monkeypatch.setattr(AuthorsLinear, "forward", broken)


@pytest.mark.parametrize("spoil", [_without_dash_term, _without_gradient_of_b])
def test_an_arm_that_is_wrong_ends_it(spoil, tmp_path, capsys, monkeypatch):
    """The other arm comes after the authors', whose losses it must give."""
    spoil(monkeypatch)
    monkeypatch.setattr(program, "timed", lambda *_: pytest.fail("times are taken in spite of a red check"))
    chosen = ["--arms", arms.AUTHORS, arms.DASH_LINEAR]
    assert program.main(["--rehearse", "--out", str(tmp_path), *chosen]) == 1
    said = capsys.readouterr().err
    assert "no times are given" in said and arms.DASH_LINEAR in said
    assert list(tmp_path.iterdir()) == []


def test_an_accelerator_that_gives_way_ends_it(tmp_path, monkeypatch):
    from peft.tuners.lora import Linear

    monkeypatch.setattr(arms, "_accelerated", arms._peft)
    arm = replace(arms.ARMS[arms.ACCELERATED], adapt=arms._accelerated)
    model = arms.build(arm, SMALL)
    assert any(type(module) is Linear for module in model.modules())
    with pytest.raises(checks.RedCheck, match="ran so"):
        checks.losses(arm, SMALL, tmp_path)
    # And where it gives way only in what is timed.
    with pytest.raises(checks.RedCheck, match="ran so"):
        program.timed([arm], SMALL, 0.01, tmp_path)


def test_checks_that_cannot_tell_formulas_apart_are_red():
    with pytest.raises(checks.RedCheck, match="tells nothing"):
        checks.check_power([[6.0, 6.0], [6.0, 6.02], [7.0, 7.0]], allowed=0.01)
    checks.check_power([[6.0, 6.0], [6.0, 6.04], [7.0, 7.0]], allowed=0.01)


def test_trainers_take_turns(tmp_path):
    """Two trainings, step by step, give what each gives alone; each is stepped as often as it was told to."""
    one, other = arms.ARMS[arms.PEFT], arms.ARMS[arms.AUTHORS]
    alone = [checks.losses(arm, SMALL, tmp_path, steps=2) for arm in (one, other)]
    models = [arms.build(arm, SMALL, dropout=0.0) for arm in (one, other)]
    with TrainerRun(models[0], SMALL, tmp_path) as first, TrainerRun(models[1], SMALL, tmp_path) as second:
        for _ in range(2):
            first.step()
            second.step()
            assert len(first.losses) == len(second.losses)
        assert [first.losses, second.losses] == alone


def test_what_a_training_raises_is_raised(tmp_path):
    model = arms.build(arms.ARMS[arms.FROZEN], SMALL)
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with TrainerRun(model, SMALL, tmp_path) as run:
        with pytest.raises(ZeroDivisionError):
            run.step()
        with pytest.raises(RuntimeError, match="over"):
            run.step()


def test_memory_in_a_process_of_its_own():
    """More rows are more activations, and the authors' form keeps a dense matrix for every layer."""
    found = memory.memory_of(arms.ARMS[arms.AUTHORS], SMALL)
    frozen = memory.memory_here(arms.ARMS[arms.FROZEN], SMALL)
    dense = 4 * sum(k * n for k, n in SMALL.linears)
    assert found["saved bytes"] > frozen["saved bytes"] + dense
    assert (
        memory.memory_here(arms.ARMS[arms.FROZEN], replace(SMALL, batch=2))["peak bytes"] > 1.5 * frozen["peak bytes"]
    )


@pytest.mark.parametrize("launched", [False, True])
def test_modelled_flops_of_a_layer(launched):
    """What the model says of ours is what PyTorch's counter counts."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.layers.variants import DIRECTIONS, RANK

    m, k, n, s = 16, 48, 80, DIRECTIONS if launched else 0
    layer = AuthorsLinear(torch.nn.Linear(k, n), RANK, DIRECTIONS, 2.0, 0.0)
    layer.FLAG = layer.warmup + 1 if launched else 0
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(m, k, requires_grad=True)).sum().backward()
    # The factors of a dense matrix are small, and some of their products are of s x s.
    wanted = modelled.layer_flops(modelled.AUTHORS, m, k, n, s)
    assert wanted <= counter.get_total_flops() <= 1.05 * wanted
    if launched:
        ours = DashLinear(k, n, config=DashConfig(r=RANK, directions=DIRECTIONS))
        with FlopCounterMode(display=False) as counter:
            ours(torch.randn(m, k, requires_grad=True)).sum().backward()
        assert counter.get_total_flops() == modelled.layer_flops(modelled.OURS, m, k, n, DIRECTIONS)
