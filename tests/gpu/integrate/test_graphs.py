"""CUDA graphs: each replay draws a mask of its own, one for both passes. The rehearsal runs the captured step itself."""

from __future__ import annotations

import itertools

import loradash
import pytest
import torch
from support.devices import refusal
from support.matrix import poisoned
from support.steps import Recorded, Step, judged, telling_case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masks_differ_between_replays(backend, device, sizes, dtype):
    case = telling_case(sizes.tiles[0], dtype, device)
    if refusal(backend, dtype):
        with pytest.raises(RuntimeError, match=refusal(backend, dtype)):
            Step(case, backend).run()
        return
    recorded = Recorded(Step(case, backend))
    masks = [judged(case, recorded.replay()) for _ in range(3)]
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_seed_before_a_replay_decides_its_mask(device, sizes):
    case = telling_case(sizes.tiles[0], torch.bfloat16, device)
    recorded, masks = Recorded(Step(case)), []
    for seed in (7, 8, 7):
        torch.manual_seed(seed)
        masks.append(judged(case, recorded.replay()))
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


def test_a_replay_reads_what_is_there_now(device, sizes):
    """Inputs and adapters change in place between replays, as an optimizer changes them."""
    case = telling_case(sizes.tiles[0], torch.bfloat16, device)
    step = Step(case)
    recorded = Recorded(step)
    judged(case, recorded.replay())
    with torch.no_grad():
        for name in ("x", "lora_a", "lora_b", "dash_sigma"):
            step.leaves[name].mul_(-0.5)
            case.tensors[name].mul_(-0.5)
    with poisoned(device):
        judged(case, recorded.replay())


def test_a_graphed_training_loop(device, sizes):
    """A whole step, optimizer included, as one graph: the loss falls, and is that of the same loop in eager mode."""
    m, k, n = sizes.tiles[0]

    def losses(graphed: bool) -> list[float]:
        torch.manual_seed(0)
        layer = loradash.DashLinear(k, n, config=loradash.DashConfig(r=8, directions=4), device=device)
        x, target = torch.randn(m, k, device=device), torch.randn(m, n, device=device)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=n / 20)
        loss = torch.zeros((), device=device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            found = torch.nn.functional.mse_loss(layer(x), target)
            loss.copy_(found.detach())
            found.backward()
            optimizer.step()

        if not graphed:
            return [float(step() or loss) for _ in range(8)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first = [float(step() or loss) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return first + [float(graph.replay() or loss) for _ in range(5)]

    eager = losses(False)
    assert all(after < before for before, after in itertools.pairwise(eager))
    if device.type == "cuda":
        torch.testing.assert_close(losses(True), eager, rtol=1e-4, atol=0)
