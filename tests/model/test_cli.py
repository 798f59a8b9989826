"""Where the commands run, and what `loradash info` says of machines with and without cards, which are pretended."""

from __future__ import annotations

import contextlib
import re
import subprocess
from types import SimpleNamespace

import loradash
import pytest
import torch
from loradash import DashConfig, analysis, apply_dash, cli, machine, save_adapter
from loradash.devices import chosen_device, devices
from safetensors.torch import save_file
from support.cards import OnCard
from support.choices import pretended
from torch import nn
from typer.testing import CliRunner

from loradash_kernels import timing
from loradash_kernels.backends import extension


def run(*arguments):
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture
def cards(monkeypatch):
    """Call it with a number of GPUs that PyTorch says it sees."""

    def see(count):
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)

    return see


def test_the_device_of_a_name(cards):
    cards(2)
    assert chosen_device(None) == chosen_device("cuda") == torch.device("cuda")
    assert chosen_device("cuda:1") == torch.device("cuda", 1) and chosen_device("cpu") == torch.device("cpu")
    assert list(map(str, devices())) == ["cpu", "cuda:0", "cuda:1"]
    cards(0)
    assert chosen_device(None) == torch.device("cpu") and list(map(str, devices())) == ["cpu"]


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (0, "cuda", r"--device 'cuda': PyTorch .* sees no GPU; `loradash info`"),
        (0, "cuda:3", "sees no GPU"),
        (1, "cuda:1", r"--device 'cuda:1': PyTorch sees 1 GPU, cuda:0$"),
        (4, "cuda:4", r"PyTorch sees 4 GPUs, cuda:0 to cuda:3"),
        (1, "meta", "only CPUs and GPUs of CUDA or ROCm are served"),
        (1, "gpu", "--device 'gpu' is no device; wanted cpu, cuda, cuda:1"),
        (1, "", "is no device"),
    ],
)
def test_devices_that_are_not_there(cards, count, name, message):
    cards(count)
    with pytest.raises(ValueError, match=message):
        chosen_device(name)


@pytest.mark.parametrize("command", ["decompose", "directions", "info", "finetune"])
def test_commands_say_that_there_is_no_gpu(cards, tmp_path, command):
    """In one line, before anything is read."""
    cards(0)
    where = {"decompose": [tmp_path], "directions": [tmp_path, tmp_path]}.get(command, [])
    code, text = run(command, *where, "--device", "cuda")
    assert code == 1 and "--device 'cuda': PyTorch" in text and "sees no GPU" in text


@pytest.fixture
def adapter(tmp_path):
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    save_file({f"model.{n}": t.clone() for n, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    apply_dash(model, DashConfig(r=2, directions=2))
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path


def test_decompose_works_on_the_device(adapter, monkeypatch):
    """On no real one here: weights go where the option says, rounded before."""
    seen = []
    monkeypatch.setattr(cli, "chosen_device", lambda name: torch.device("meta") if name == "cuda" else None)

    def keep(cache, weight, method):
        seen.append((weight.device.type, weight.dtype))
        return SimpleNamespace(route="tail")

    monkeypatch.setattr("loradash.cache.SpectralCache.keep", keep)
    code, text = run(
        "decompose", adapter / "base.safetensors", "--device", "cuda", "--dtype", "bfloat16", "--cache", adapter / "c"
    )
    assert code == 0 and seen == 2 * [("meta", torch.bfloat16)] and "2 weights on meta: tail 2" in text


def test_directions_work_on_the_device(adapter, monkeypatch):
    seen, real = [], analysis.change_rates
    monkeypatch.setattr(cli, "chosen_device", lambda name: torch.device("meta") if name == "cuda" else None)

    def rates(weight, a, b, **options):
        seen.append({t.device.type for t in (weight, a, b)})
        return real(torch.randn(weight.shape), torch.randn(a.shape), torch.randn(b.shape), **options)

    monkeypatch.setattr(analysis, "change_rates", rates)
    code, text = run("directions", adapter / "base.safetensors", adapter / "adapter", "--device", "cuda", "-s", 3)
    assert code == 0 and seen == [{"meta"}, {"meta"}] and "highest rate" in text


@contextlib.contextmanager
def machine_with(monkeypatch, capability, **options):
    """A machine with one card, as the choice of a backend and `info` look at it."""
    facts = dict.fromkeys(("card", "capability", "driver", "driver's CUDA"), "unknown")
    facts |= {"card": "NVIDIA Pretended", "capability": "{}.{}".format(*capability), "driver's CUDA": "12.4"}
    with pretended(capability, **options):
        compiled = extension.compiled()
        compiled.compiler, compiled.isa = (lambda: "12.2.0"), (lambda dtype: "avx2")
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        monkeypatch.setattr(machine, "card_facts", lambda device: facts)
        monkeypatch.setattr(
            machine,
            "_sample",
            lambda dtype, device: OnCard(dtype) if device.type == "cuda" else torch.empty(1, 1, dtype=dtype),
        )
        yield


def rows(text):
    """The backend of every dtype in the table of the card, which comes last."""
    *_, table = text.split("cuda:0:")
    return dict(re.findall(r"(float32|bfloat16|float16|float64) │ (\w+)", table))


def test_info_of_a_card_that_kernels_serve(monkeypatch):
    with machine_with(monkeypatch, (9, 0)):
        code, text = run("info")
    assert code == 0
    assert "cuda:0: NVIDIA Pretended, compute capability 9.0, driver unknown, which runs CUDA up to 12.4" in text
    found = rows(text)
    assert found == {"float32": "triton", "bfloat16": "cuda", "float16": "cuda", "float64": "reference"}
    assert "CUDA for [800, 860, 890]; compiler 12.2.0" in text and "instructions avx2" in text
    assert "slowly" not in text and "docs/install.md" not in text


@pytest.mark.parametrize(
    ("capability", "options", "wanted"),
    [
        ((8, 0), {"code": False, "triton_version": None}, "build the compiled part with a CUDA toolkit for sm_80"),
        ((12, 1), {"code": False, "triton_version": "3.2.0"}, "Triton 3.2.0 is too old"),
        ((7, 5), {}, "No kernel runs on sm_75"),
    ],
)
def test_info_tells_what_to_install(monkeypatch, capability, options, wanted):
    """Once for all dtypes that lack the same, and with the page."""
    with machine_with(monkeypatch, capability, **options):
        code, text = run("info", "--device", "cuda:0")
    assert code == 0 and rows(text)["bfloat16"] == "reference"
    assert wanted in text and "docs/install.md" in text and "Plain PyTorch computes bfloat16" in text
    assert "cpu: instructions" not in text


def test_info_of_a_cpu_without_the_compiled_part(monkeypatch):
    monkeypatch.setattr(extension, "missing_reason", "the compiled part is missing; build it with pip")
    monkeypatch.setattr(extension, "_module", None)
    code, text = run("info", "--device", "cpu")
    assert code == 0 and "compiled part: the compiled part is missing" in text
    assert "Plain PyTorch computes float32, bfloat16, float16 on cpu, slowly" in text and "docs/install.md" in text


DRIVERS = {
    "nvidia-smi": "NVIDIA GeForce RTX 3090, 535.183.01\n",
    "nvcc": "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 12.8, V12.8.93\n",
}


@pytest.fixture
def programs(monkeypatch):
    """Programs that answer; `DRIVERS` has what they say. Any other is not there."""

    def answer(command, **_options):
        program = command[0].rsplit("/", 1)[-1]
        if program not in DRIVERS:
            raise FileNotFoundError(program)
        return SimpleNamespace(stdout=DRIVERS[program])

    monkeypatch.setattr(subprocess, "run", answer)


@pytest.mark.parametrize(
    ("built", "why"), [("13.0", "for CUDA 13.0, for which the driver may be too old"), (None, "without CUDA")]
)
def test_info_of_a_card_that_pytorch_does_not_see(cards, programs, monkeypatch, built, why):
    cards(0)
    monkeypatch.setattr(torch.version, "cuda", built)
    code, text = run("info")
    assert code == 0 and "There is a card that PyTorch does not see (NVIDIA GeForce RTX 3090, 535.183.01)" in text
    assert why in text and "docs/install.md tells which build fits the driver" in text
    cards(1)
    assert machine.unseen_cards() is None


def test_the_toolkit_in_reach(programs, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda-12.8")
    assert machine.software()["toolkit"] == "nvcc 12.8, /opt/cuda-12.8/bin/nvcc"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert machine.software()["toolkit"].startswith("no nvcc")


def test_info_asks_for_the_facts_of_the_device(cards, monkeypatch):
    """The real function answers for every device, with "unknown" where nobody tells."""
    assert {"card", "capability", "driver", "driver's CUDA"} <= timing.card_facts("cpu").keys()
