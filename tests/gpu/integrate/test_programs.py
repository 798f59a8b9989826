"""The layer in programs: mixed precision with a scaler of gradients, checkpointing, streams, threads."""

from __future__ import annotations

import contextlib
import threading

import loradash
import pytest
import torch
from support.load import Load
from support.steps import Step, judged, telling_case
from torch import nn
from torch.utils.checkpoint import checkpoint

from loradash_kernels import dash_linear


def network(width, device, dropout=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).to(device)
    return loradash.apply_dash(model, loradash.DashConfig(r=4, directions=2, dropout=dropout, prelaunch_steps=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaler(device, sizes, dtype):
    """Float32 weights under autocast, through launch: the loss falls; a step whose gradients overflow changes nothing."""
    model = network(sizes.tiles[0][1], device)
    schedule = loradash.DashSchedule(model, progress=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.SGD(parameters, lr=1.0), torch.amp.GradScaler(device.type, init_scale=2.0**10)
    x, target = (torch.randn(32, sizes.tiles[0][1], device=device) for _ in range(2))
    losses = []

    def step(factor=1.0):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            y = model(x)
            assert y.dtype == dtype
            loss = nn.functional.mse_loss(y.float(), target)
        scaler.scale(loss * factor).backward()
        assert all(p.grad.dtype == torch.float32 for p in parameters if p.grad is not None)
        scaler.step(optimizer)
        scaler.update()
        return float(loss.detach())

    for _ in range(8):
        losses.append(step())
        schedule.step()
    assert schedule.launched and losses[-1] < losses[0] and scaler.get_scale() == 2.0**10
    before = [p.detach().clone() for p in parameters]
    step(factor=float("inf"))
    assert scaler.get_scale() < 2.0**10
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_mask_again(backend, device, sizes, reentrant):
    """Forward twice, backward once, all with one mask."""

    def layer(x, *args, **options):
        return checkpoint(lambda x: dash_linear(x, *args, **options), x, use_reentrant=reentrant)

    step = Step(telling_case(sizes.tiles[0], torch.bfloat16, device), backend, layer)
    masks = []
    for _ in range(2):
        step.run()
        masks.append(judged(step.case, step.results()))
    assert not torch.equal(*masks)


def test_a_checkpointed_model_has_the_gradients_of_a_plain_one(device, sizes):
    model, x = network(sizes.tiles[0][1], device), torch.randn(32, sizes.tiles[0][1], device=device)
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.1)
    gradients = []
    for wrapped in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(3)
        wrapped(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def stream_of(device):
    """A context: a new stream of a GPU, which waits for what is enqueued; on the CPU, which has none, nothing."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def test_side_streams(backend, device, sizes):
    """Steps on four streams at once, beside a load, from memory of NaN: every one is right. The rehearsal takes them one after
    the other."""
    load, results = Load(device), []
    cases = [telling_case(sizes.tiles[i % 2], torch.bfloat16, device) for i in range(4)]
    steps = [(Step(case, backend), stream_of(device)) for case in cases]
    for _ in range(sizes.repeats // 3):
        for step, stream in steps:
            load.add(1)
            with stream:
                # A step's workspace is what its stream gave back last.
                torch.full((1 << 20,), torch.nan, device=device)
                step.run()
                results.append((step.case, step.results()))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for case, found in results:
        judged(case, found)


def test_threads(backend, device, sizes):
    """Four threads, each with a stream and a step of its own; in the rehearsal Triton's one after the other, since its
    interpreter knows no threads."""
    steps = [Step(telling_case(sizes.tiles[0], torch.bfloat16, device), backend) for _ in range(4)]
    errors = []

    def work(step):
        try:
            with stream_of(device):
                for _ in range(2):
                    step.run()
                    judged(step.case, step.results())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
        if backend == "triton" and device.type == "cpu":
            thread.join()
    for thread in threads:
        thread.join()
    assert not errors, errors
