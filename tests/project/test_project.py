"""The floors of the project, installs without the compiled part, distributed training."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The rooms of a package, floor by floor: a file may import those above it in its list. loradash may import loradash_kernels,
# never the other way.
FLOORS = {
    "loradash_kernels": (
        "_version", "files", "notices", "random", "calls", "backends", "packed_weights", "composite", "ops", "flops", "autograd",
        "arguments", "functional", "directions", "testing", "__init__",
    ),
    "loradash_kernels/backends": ("__init__", "extension", "tuning", "reference", "cpu", "cuda", "triton", "registry"),
    "loradash_kernels/backends/triton": (
        "__init__", "target", "kernels", "tiles", "problem", "strategies", "plan", "prelaunch", "backend",
    ),
    "loradash_kernels/backends/triton/plan": ("__init__", "forward", "backward"),
    "loradash_kernels/backends/triton/kernels": ("__init__", "common", "forward", "backward", "descriptor", "prelaunch"),
    "loradash_kernels/directions": (
        "__init__", "kernels", "linalg", "randomized_svd", "decompositions", "policy", "arguments", "checks", "decompose", "choice",
        "rates", "kept",
    ),
    "python/loradash": (
        "config", "distributed", "base_layers", "quantised", "linear", "state", "targets", "attention", "bypass", "model",
        "checkpoint", "peft_layout", "export", "background", "cache", "background_process", "prelaunch", "schedule", "plots", "analysis", "cli", "__init__",
    ),
}  # fmt: skip


def imports(file: Path) -> set[tuple[int, str]]:
    """(level, module) of every import statement in a file; level 0 is absolute."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(node.level, name or "") for name in names}
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_point_down(package):
    order, folder = FLOORS[package], ROOT / package
    rooms = {f.parent.name: f.parent for f in folder.glob("*/__init__.py")}
    files = {f.stem: f for f in folder.glob("*.py")}
    assert {*files, *rooms} == set(order), "a new file takes its place in the order of floors"
    for name, path in {**files, **rooms}.items():
        for file in [path] if path.suffix else path.rglob("*.py"):
            for level, module in imports(file):
                above = level - len(file.relative_to(folder).parts)
                first = module.split(".")[0]
                if level and above == 0:
                    assert order.index(first) < order.index(name), f"{file} imports {module}"
                elif not level and package.startswith("loradash_kernels"):
                    assert first != "loradash", f"{file} imports {module}"


def test_the_emulator_is_as_it_was_tested():
    """Its own tests take minutes and run when it changes: `make test-ptxsim` records what they passed with."""
    done = subprocess.run([sys.executable, ROOT / "tools" / "ptxsim" / "source_hash.py", "--check"])
    assert done.returncode == 0, "run `make test-ptxsim`"


def test_only_autograd_saves_tensors():
    users = [f.name for f in (ROOT / "loradash_kernels").glob("*.py") if "save_for_backward" in f.read_text()]
    assert users == ["autograd.py"]


def test_only_bindings_know_torch():
    files = [f for f in (ROOT / "csrc").rglob("*") if f.is_file()]
    users = [f for f in files if "torch/" in f.read_text() or "ATen/" in f.read_text()]
    assert users and {f.parent.name for f in users} == {"bindings"}


PURE = """
import sys, warnings
sys.modules["loradash_kernels._C"] = None  # as where nothing was compiled
import torch, loradash, loradash_kernels as lk
assert "compiled part is missing" in lk.available_backends()["cpu"]
choice = lk.explain_backend(torch.zeros(1, 1))
assert choice.backend == "reference" and "pip install" in choice.reasons["cpu"]
layer = loradash.DashLinear(8, 8, config=loradash.DashConfig(dropout=0.1))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    loradash.DashLinear(8, 8).double()(torch.randn(3, 8).double())  # documented: no kernel takes float64
    assert not said, said
    for _ in range(2):
        layer(torch.randn(3, 8, requires_grad=True)).sum().backward()
    message, = (str(w.message) for w in said)
    assert message.startswith("loradash_kernels: plain PyTorch") and "cpu: the compiled part is missing" in message
try:
    lk.dash_linear(torch.zeros(1, 8), layer.weight, lora_a=layer.lora_a, lora_b=layer.lora_b, backend="cpu")
except RuntimeError as error:
    assert "cannot run" in str(error)
else:
    raise SystemExit("an explicit backend must raise")
"""


def test_without_the_compiled_part():
    subprocess.run([sys.executable, "-c", PURE], check=True)


def test_imports_are_light():
    """Neither package imports what only an extra installs."""
    heavy = "matplotlib", "peft", "transformers", "triton.compiler"
    code = f"import sys, loradash, loradash_kernels; print([m for m in {heavy!r} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


WORKER = """
import os, sys, torch, warnings
from torch import nn
import torch.distributed as dist
import loradash
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
loradash.apply_dash(model, loradash.DashConfig(r=2, directions=2, prelaunch_steps=3, dropout=0.1))
ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=sys.argv[3] == "view")  # find_unused_parameters stays off: none is unused in either phase
schedule = loradash.DashSchedule(ddp, progress=False)
optimizer = torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=1e-2)
torch.manual_seed(rank)
for step in range(6):
    assert schedule.launched or not any(optimizer.state[layer.dash_sigma] for layer in loradash.dash_layers(model).values())
    optimizer.zero_grad()
    ddp(torch.randn(5, 16)).square().mean().backward()
    optimizer.step()
    schedule.step()
for name, tensor in model.state_dict().items():
    both = [torch.zeros_like(tensor.float()) for _ in range(2)]
    dist.all_gather(both, tensor.float().contiguous())
    assert torch.equal(*both), name
assert schedule.launched and all(layer.dash_sigma.abs().min() > 0 for layer in loradash.dash_layers(model).values())
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # every assertion has passed; the interpreter's exit now and then aborts in gloo's threads ("terminate called")
"""


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["own", "view"])
def test_ddp_before_and_after_launch(tmp_path, gradients):
    """Two gloo processes: every parameter gets a gradient in both phases, and both end with equal weights."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store"), gradients],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=600)
        assert worker.returncode == 0, errors
