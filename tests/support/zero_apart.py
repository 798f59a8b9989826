"""ZeRO's own copies of parameters, and what cannot be right under it, each in words before training starts."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from loradash import (
    DashConfig,
    DashLinear,
    DashSchedule,
    apply_dash,
    dash_layers,
    dash_only,
    dash_state,
    load_adapter,
    load_training,
    merge,
    save_adapter,
    save_training,
    summary,
    unmerge,
)
from loradash.distributed import gathered
from safetensors.torch import load_file
from torch import nn

from .schemes import Run, batch, network, of_part
from .schemes.zero import settings

PARTS = ("lora_a", "lora_b", "dash_sigma", "dash_u", "dash_vt")


def settings_of(way: Any) -> DashConfig:
    return dataclasses.replace(way.config, dropout=0.0)


def fresh(way: Any) -> nn.Module:
    return apply_dash(network(), settings_of(way))


def step(way: Any, run: Run, number: int) -> float:
    x, target = (of_part(t, way.rank, 2) for t in batch(number))
    return way.step(run, x, target).item()


def alone(way: Any, model: nn.Module, steps: range) -> nn.Module:
    optimizer, schedule = way.optimizer(model), DashSchedule(model, progress=False)
    for number in steps:
        x, target = batch(number)
        way.loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = dash_layers(model).items()
    return {f"{n}.{key}": gathered(getattr(layer, key)).clone() for n, layer in layers for key in PARTS}


def check_equal(ours: nn.Module, theirs: nn.Module) -> None:
    wanted = values(theirs)
    for key, tensor in values(ours).items():
        torch.testing.assert_close(
            tensor, wanted[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def engine_of(way: Any, model: nn.Module, groups: object = None, **more: object) -> deepspeed.DeepSpeedEngine:
    optimizer = torch.optim.AdamW(groups, lr=1e-2) if groups is not None else way.optimizer(model)
    configuration = {**settings(way.stage), **more}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=configuration, dist_init_required=False)[0]


def refuses_mixed_groups(way: Any) -> None:
    """Δσ together with others: refused when the schedule is made, unless the directions are in place."""
    model = fresh(way)
    mixed = engine_of(way, model, list(model.head.parameters()))
    with pytest.raises(ValueError, match=r"has not got blocks\.0\.up\.lora_a.*apply_dash, then make the optimizer"):
        DashSchedule(mixed, progress=False)
    model = fresh(way)
    mixed = engine_of(way, model, [p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"Δσ shares a parameter group.*dash_parameter_groups"):
        DashSchedule(mixed, progress=False)


def refuses_a_blind_schedule(way: Any) -> None:
    """The module inside tells nothing of the engine."""
    model = fresh(way)
    before = values(model)
    engine = engine_of(way, model)
    blind = DashSchedule(model, progress=False)
    x, target = (of_part(t, way.rank, 2) for t in batch(0))
    engine.backward(way.loss(engine(x), target))
    with pytest.raises(RuntimeError, match=r"DashSchedule\(engine\)"):
        engine.step()
    assert all(torch.equal(t, before[key]) for key, t in values(model).items()), "a refused step changed something"
    del blind

    for made, words in ((engine, "wrapped in DeepSpeedEngine"), (engine.module, "adapters already")):
        with pytest.raises(ValueError, match=words):
            apply_dash(made, settings_of(way))
    plain = network()
    late = deepspeed.initialize(
        model=plain,
        optimizer=torch.optim.SGD(plain.parameters(), 0.1),
        config=settings(way.stage),
        dist_init_required=False,
    )[0]
    with pytest.raises(ValueError, match=r"deepspeed\.initialize has this model's parameters"):
        apply_dash(late.module, settings_of(way))


def loads_into_an_engine(way: Any, folder: Path) -> tuple[Run, nn.Module, Path]:
    """An adapter loaded into an engine is what its next step starts from, and what it launches from."""
    single = alone(way, fresh(way), range(3))
    file = save_adapter(single, folder / f"three.{way.rank}.safetensors")
    engine = engine_of(way, fresh(way))
    schedule = DashSchedule(engine, progress=False)
    load_adapter(engine, file)
    again = load_adapter(network(), file)
    alone(way, again, range(3, 7))
    run = Run(engine, engine.optimizer, schedule)
    for number in range(3, 7):
        step(way, run, number)
    assert schedule.launched
    check_equal(engine, again)
    assert str(summary(engine)) == str(summary(again))
    assert "directions=3, phase=dash" in repr(dash_layers(engine)["blocks.0.up"])
    return run, again, file


def merges_and_freezes(way: Any, folder: Path, run: Run, again: nn.Module, file: Path) -> None:
    """Frozen now, A and B would go on by their momentum."""
    engine = run.model
    with pytest.raises(ValueError, match=r"before deepspeed\.initialize"):
        dash_only(engine)
    assert not dash_state(engine).dash_only
    dash_only(again)
    frozen = save_adapter(again, folder / f"frozen.{way.rank}.safetensors")
    with pytest.raises(ValueError, match=r"before deepspeed\.initialize"):
        load_adapter(engine, frozen)
    engine.eval()
    y = engine(batch(9)[0])
    merge(engine)
    torch.testing.assert_close(engine(batch(9)[0]), y)
    load_adapter(engine, file)
    with torch.no_grad():
        torch.testing.assert_close(engine(batch(9)[0]), load_adapter(network(), file).eval()(batch(9)[0]))
    unmerge(engine)
    assert all(
        torch.equal(gathered(layer.weight), network().get_submodule(n).weight)
        for n, layer in dash_layers(engine).items()
    )

    for call in (save_training, load_training):
        with pytest.raises(ValueError, match=r"engine\.save_checkpoint"):
            call(folder / "training", engine, engine.optimizer, run.schedule)


def inside_gathered_parameters(way: Any, folder: Path, engine: Any, file: Path) -> None:
    """A user's own gathering: reading is right inside it, writing is refused."""
    inside = deepspeed.zero.GatheredParameters(list(engine.parameters())) if way.stage == 3 else nullcontext()
    with inside:
        whole = load_file(save_adapter(engine, folder / f"inside.{way.rank}.safetensors"))
        if way.stage == 3:
            with pytest.raises(RuntimeError, match="outside of deepspeed"):
                load_adapter(engine, file)
    assert all(torch.equal(t, load_file(file)[key]) for key, t in whole.items())


def accumulates(way: Any) -> None:
    """Small parameters that stage 3 keeps gathered; two batches a step, of which one counts."""
    engine = engine_of(
        way,
        fresh(way),
        zero_optimization={"stage": way.stage},
        gradient_accumulation_steps=2,
        train_micro_batch_size_per_gpu=2,
    )
    run = Run(engine, engine.optimizer, DashSchedule(engine, progress=False))
    for number in range(6):
        x, target = (of_part(t, way.rank, 2) for t in batch(number))
        for inputs, wanted in zip(x.chunk(2), target.chunk(2), strict=True):
            way.step(run, inputs, wanted)
    assert dash_state(engine).step == 6 and run.schedule.launched
    single = alone(way, fresh(way), range(6))
    check_equal(engine, single)
    merge(engine)
    engine.eval()
    torch.testing.assert_close(engine(batch(9)[0]), single(batch(9)[0]))
    unmerge(engine)
    torch.testing.assert_close(engine(batch(9)[0]), single(batch(9)[0]))


def takes_a_partitioned_base(way: Any) -> None:
    """A base model that was partitioned while it was built."""
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):
        base = network()
    apply_dash(base, settings_of(way))
    assert isinstance(base.blocks[0].up, DashLinear) and base.blocks[0].up.base is None
    engine = engine_of(way, base)
    run = Run(engine, engine.optimizer, DashSchedule(engine, progress=False))
    for number in range(6):
        step(way, run, number)
    assert run.schedule.launched and all(gathered(m.dash_sigma).any() for m in dash_layers(engine).values())


def trains_bfloat16(way: Any) -> None:
    """Bfloat16 weights and adapters, float32 copies."""
    engine = engine_of(way, fresh(way), bf16={"enabled": True})
    run = Run(engine, engine.optimizer, DashSchedule(engine, progress=False))
    losses = []
    for number in range(6):
        x, target = (of_part(t, way.rank, 2) for t in batch(number))
        losses.append(way.step(run, x.bfloat16(), target).item())
    assert run.schedule.launched and all(gathered(m.dash_sigma).any() for m in dash_layers(engine).values())


def keeps_apart(way: Any, folder: Path) -> None:
    """All of it, in every process of a `ZeRO` scheme."""
    refuses_mixed_groups(way)
    refuses_a_blind_schedule(way)
    run, again, file = loads_into_an_engine(way, folder)
    merges_and_freezes(way, folder, run, again, file)
    inside_gathered_parameters(way, folder, run.model, file)
    accumulates(way)
    if way.stage == 3:
        takes_a_partitioned_base(way)
    trains_bfloat16(way)
