"""torch.compile on the device: by default and with CUDA graphs ("reduce-overhead"). The rehearsal compiles with "aot_eager", which
traces the same graphs and generates no code: Inductor takes half a minute a graph on a CPU."""

from __future__ import annotations

import itertools

import loradash
import pytest
import torch
from support.steps import Step, judged, telling_case

from loradash_kernels import dash_linear
from loradash_kernels.testing import check_error_rule, make_case

MODES = ["default", "reduce-overhead"]


@pytest.fixture
def compile_here(device):
    """torch.compile(f, fullgraph=True) in a mode."""
    torch._dynamo.reset()

    def compiled(function, mode):
        if device.type == "cpu":
            return torch.compile(function, fullgraph=True, backend="aot_eager")
        return torch.compile(function, fullgraph=True, mode=mode)

    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_numbers_are_right(compile_here, device, sizes, mode, dtype):
    case = make_case(*sizes.tiles[0], 16, 8, dtype, adapter_dtype=torch.float32, device=device)
    step = Step(case, layer=compile_here(dash_linear, mode))
    # The third call replays what the second has captured.
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        step.run()
        check_error_rule(case, step.results())


@pytest.mark.parametrize("mode", MODES)
def test_each_call_draws_a_mask_for_both_passes(compile_here, device, sizes, mode):
    case = telling_case(sizes.tiles[0], torch.bfloat16, device)
    step, masks = Step(case, layer=compile_here(dash_linear, mode)), []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        step.run()
        masks.append(judged(case, step.results()))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(masks))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_trains_across_launch(compile_here, device, sizes, mode):
    """Pre-launch, launch and dash phase in one compiled model: nothing branches, so nothing is compiled again."""
    torch.manual_seed(0)
    k = sizes.tiles[0][1]
    model = torch.nn.Sequential(torch.nn.Linear(k, k), torch.nn.GELU(), torch.nn.Linear(k, k)).to(device)
    loradash.apply_dash(model, loradash.DashConfig(r=4, directions=2, prelaunch_steps=3))
    schedule = loradash.DashSchedule(model, progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    fast, x, target = compile_here(model, mode), torch.randn(24, k, device=device), torch.randn(24, k, device=device)
    losses, frames = [], []
    for _ in range(7):
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(fast(x), target)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        schedule.step()
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert schedule.launched and losses[-1] < losses[3] < losses[0]
    assert frames[0] == frames[-1], "launch compiled the model again"
