"""Common options and fixtures: the device, every backend that can run on it, one seed, real LoRA factors where there are any.

    pytest                                    everything, on the CPU
    pytest -m gpu --device cuda               what is worth running on a card, there
    TRITON_INTERPRET=1 pytest -m gpu          the same without a card: reduced shapes, Triton's interpreter
    pytest -m gpu --device cuda --shard 2/8   an eighth of it, for eight processes that share a card

A test is marked `gpu` where it takes the fixture `device`, directly or through others (`backend`, `sizes`).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from support.devices import backends_on, shards_of, wanted_device, wanted_shard

from loradash_kernels.backends.triton import backend as triton_backend

# Processes of pytest-xdist have these set, and a console of rich would keep the width that it found when it was made.
for measure in ("COLUMNS", "LINES"):
    os.environ.pop(measure, None)

if triton_backend.interpreted():
    from support.interpreter import repair

    repair()

# Pre-launch selection is judged on real LoRA factors, which are no part of the repository: LORADASH_FACTORS names a file of
# them, by default one in a folder shared/ beside the checkout, which CI lays there; without a file these tests are skipped.
KEPT_FACTORS = Path(__file__).parents[2] / "shared" / "data" / "minilm_boolq_lora_r8_step100.safetensors"
FACTORS = Path(os.environ.get("LORADASH_FACTORS", KEPT_FACTORS))


def pytest_addoption(parser):
    # The benchmarks have an option of that name, which may be there when both are run together.
    with contextlib.suppress(ValueError):
        parser.addoption("--device", help="where tests marked gpu run: cpu (default), cuda or cuda:N")
    parser.addoption(
        "--shard",
        default="0/1",
        help="I/N: one of N parts of the selected tests, 0 <= I < N; heavy ones are in the first",
    )


def pytest_configure(config):
    config.stash[DEVICE] = wanted_device(config.getoption("device") or "cpu")
    wanted_shard(config.getoption("shard"))
    config.addinivalue_line("markers", "heavy: takes tens of GB of a card; no two run at a time")
    # Tests have PyTorch fill memory with NaN, which it does in its deterministic mode alone; there it warns of cuBLAS.
    config.addinivalue_line("filterwarnings", "ignore:Deterministic behavior was enabled")


DEVICE = pytest.StashKey[torch.device]()


def pytest_report_header(config):
    device = config.stash[DEVICE]
    card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"device: {device}{card}; Triton's interpreter: {'yes' if triton_backend.interpreted() else 'no'}"


def pytest_generate_tests(metafunc):
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and "backend" not in given:
        metafunc.parametrize("backend", backends_on(metafunc.config.stash[DEVICE]), indirect=True)


def pytest_itemcollected(item):
    if "device" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """After -k and -m have selected."""
    index, count = wanted_shard(config.getoption("shard"))
    shards = shards_of([item.get_closest_marker("heavy") is not None for item in items], count)
    config.hook.pytest_deselected(items=[item for item, shard in zip(items, shards, strict=True) if shard != index])
    items[:] = [item for item, shard in zip(items, shards, strict=True) if shard == index]


def pytest_runtest_teardown(item):
    if item.get_closest_marker("heavy") and item.config.stash[DEVICE].type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device(request):
    """The device that --device names. On a GPU libraries sum 16-bit products in float32, as the error rule assumes."""
    found = request.config.stash[DEVICE]
    if found.type == "cpu":
        yield found
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    with torch.cuda.device(found):
        yield found
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


@pytest.fixture
def backend(request, device):
    """Every backend that can run on the device."""
    return request.param


@pytest.fixture
def factors():
    """A file of LoRA factors that were trained on all-MiniLM-L6-v2."""
    if not FACTORS.is_file():
        pytest.skip(f"real LoRA factors are not at {FACTORS}; set LORADASH_FACTORS to a file of them")
    return FACTORS


@pytest.fixture
def process_group(monkeypatch):
    """This process alone as torch.distributed's world: a mesh of one on the CPU, for `fully_shard`."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
