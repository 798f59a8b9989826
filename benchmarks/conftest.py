"""Where `pytest benchmarks` runs: --device, by default the card where there is one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from benchmarks.support.device_timer import DeviceTimer
from benchmarks.support.measure import wanted_device
from loradash_kernels.timing import stopwatch_for

DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser):
    # The tests have an option of that name, which may be there when both are run together.
    with contextlib.suppress(ValueError):
        parser.addoption("--device", default=None, help="cpu, cuda or cuda:N; by default the card where there is one")


def pytest_configure(config):
    try:
        config.stash[DEVICE] = wanted_device(config.getoption("device"))
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config):
    device = config.stash[DEVICE]
    return f"benchmarks on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}"


def pytest_generate_tests(metafunc):
    # Sizes depend on the device: what fills a card takes minutes on a CPU.
    if "shape" in metafunc.fixturenames:
        from benchmarks.layers.variants import GPU_SHAPES, SHAPES

        on_gpu = metafunc.config.stash[DEVICE].type == "cuda"
        metafunc.parametrize("shape", GPU_SHAPES if on_gpu else SHAPES, ids=lambda s: "x".join(map(str, s)))


def pytest_collection_modifyitems(config, items):
    device = config.stash[DEVICE]
    if device.type == "cuda":
        timer = DeviceTimer(stopwatch_for(device))
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=timer))


@pytest.fixture(scope="session")
def device(pytestconfig):
    return pytestconfig.stash[DEVICE]
