"""What stands around the kernels, on the device: fingerprints, warming up, the thread beside training, memory, commands."""

from __future__ import annotations

import loradash
import pytest
import torch
from loradash import DashConfig, SpectralCache, apply_dash, prelaunch, warm_up
from loradash.cli import app
from loradash.fingerprint import fingerprint
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner


@pytest.fixture
def card(device):
    if device.type != "cuda":
        pytest.skip("this is about a GPU's streams, memory or graphs")
    return device


def adapted(device, width=64, layers=3, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).to(device, dtype)
    apply_dash(model, DashConfig(**{"r": 4, "directions": 4, **settings}))
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.01)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_fingerprint_is_that_of_the_cpu(device, dtype):
    """In every layout: the sums are exact wherever they are taken."""
    for shape in ((300, 500), (1, 70), (1025, 33)):
        w = torch.randn(shape).to(dtype)
        expected = fingerprint(w)
        there = w.to(device)
        sliced = torch.cat((there, there), 1)[:, : shape[1]]
        for t in (there, sliced, there.t().contiguous().t()):
            assert fingerprint(t) == expected
        assert fingerprint(there.t()) == expected[::-1]


def test_warm_up_leaves_no_trace(device):
    model = adapted(device, dropout=0.1)
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    done = warm_up(model, rows=[32, 7], progress=False)
    assert {run.device.type for run in done} == {device.type} and {run.rows for run in done} == {32, 7}
    after = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    assert all(torch.equal(*pair) for pair in zip(states, after, strict=True))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_graph_is_captured_after_warm_up(card):
    """Nothing is left to be compiled: the first call of these rows is the captured one."""
    model = adapted(card, width=128, dtype=torch.bfloat16).eval()
    warm_up(model, rows=[48], progress=False)
    x = torch.randn(48, 128, device=card, dtype=torch.bfloat16)
    torch.cuda.synchronize(card)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))


def test_the_background_reads_from_the_device(device, tmp_path, monkeypatch):
    model, cache = adapted(device, width=48), SpectralCache(tmp_path)
    assert cache.start(model).wait(timeout=300)
    for name in ("decompose_to_keep", "task_specific_directions"):
        monkeypatch.setattr(f"loradash.cache.{name}", None)
    assert len(prelaunch(model, progress=False, cache=cache)) == 3
    assert all(layer.launched and layer.dash_u.device.type == device.type for layer in model)


def test_the_background_waits_for_the_stream_that_makes_the_weights(card, tmp_path):
    """They are still being written when it starts."""
    model, cache = adapted(card, width=64, layers=1), SpectralCache(tmp_path)
    values = torch.randn(64, 64, device=card)
    stream = torch.cuda.Stream(card)
    stream.wait_stream(torch.cuda.current_stream(card))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        model[0].weight.detach().copy_(values)
        background = cache.start(model)
    assert background.wait(timeout=300) and cache.has(values) and cache.has(values.cpu())


def test_batches_that_do_not_fit_are_halved(card, monkeypatch):
    """The allocator is allowed 14 copies of a weight: less than all eight layers and their LU factors, and more than one's."""
    model = adapted(card, width=2048, layers=8)
    torch.cuda.synchronize(card)
    torch.cuda.empty_cache()
    monkeypatch.setitem(prelaunch.__globals__, "batch_elements", lambda device: 2**40)
    tried, real = [], prelaunch.__globals__["task_specific_directions"]

    def directions(weight, *args, **options):
        tried.append(len(weight))
        return real(weight, *args, **options)

    monkeypatch.setitem(prelaunch.__globals__, "task_specific_directions", directions)
    allowed = torch.cuda.memory_allocated(card) + 14 * 4 * 2048**2
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(card).total_memory, card)
    try:
        reports = prelaunch(model, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)
    assert len(reports) == 8 and all(layer.launched for layer in model)
    # A batch may fail before it gets there, while its weights are stacked.
    assert max(tried) < 8 or tried.count(8) == 1
    assert len(tried) > 1


def test_commands(device, tmp_path):
    save_file({"a.weight": torch.randn(40, 40), "b.weight": torch.randn(20, 60)}, tmp_path / "base.safetensors")
    arguments = ["decompose", str(tmp_path / "base.safetensors"), "--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, [*arguments, "--device", str(device)])
    assert done.exit_code == 0 and f"2 weights on {device}" in done.output
    told = CliRunner().invoke(app, ["info", "--device", str(device)])
    assert told.exit_code == 0 and f"{device}: " in told.output and "bfloat16" in told.output
