"""examples/cuda_check, rehearsed: its launches are executed by the emulator, its own loops judge the results."""

from __future__ import annotations

import re

import pytest
import torch
from support import cuda_emulation as emulation
from support.pretended_card import ROOT, PretendedCard

from loradash_kernels.testing import make_case

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulation.missing_tools() is not None, reason=str(emulation.missing_tools())),
]


def listed(capfd, *arguments, card=None):
    """{case: launches} as --list prints them."""
    assert (card or PretendedCard(108)).run("--list", *arguments) == 0
    found: dict[str, list[tuple]] = {}
    name = ""
    for line in capfd.readouterr().out.splitlines():
        launch = re.fullmatch(r"  (\w+) (\d+) (\d+) (\d+) threads (\d+) shared (\d+)", line)
        if launch:
            kernel, *numbers = launch.groups()
            x, y, z, threads, shared = map(int, numbers)
            found[name].append((kernel, (x, y, z), threads, shared))
        else:
            name = line
            found[name] = []
    return found


def test_every_kernel_has_a_case(capfd):
    """The tables of kernels are those of the PTX; without a case for one of them the exit code is 1."""
    found = listed(capfd)
    launched = {kernel for launches in found.values() for kernel, *_ in launches}
    assert launched == set(emulation.kernels("sm_80"))
    assert len(found) - 1 > 100


@pytest.mark.parametrize("processors", [0, 108])
def test_without_a_card_it_lists(capfd, processors):
    """What it would launch is the same as on an A100."""
    assert PretendedCard(processors).run(*(["--list"] if processors else []), "--only", "splits") == 0
    assert "  dy_32_24_bf16 3 6 1 threads 128 shared" in capfd.readouterr().out


def test_plans_what_the_operators_plan(capfd):
    found = listed(capfd, "--only", "splits-bf16-dropout")["splits-bf16-dropout"]
    case = make_case(1300, 1040, 1104, 16, 8, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.1)
    seed = torch.zeros(2, dtype=torch.int64)
    planned = [
        (name, tuple(grid), threads, shared)
        for pass_ in emulation.PASSES
        for name, grid, threads, shared, _ in emulation.plan(
            case, emulation.outputs(case), pass_, seed, None, emulation.CARDS["sm_80"], ""
        )[0]
    ]
    assert found == planned


def test_a_whole_name_is_that_case_alone(capfd):
    """Names of tiles are parts of one another's."""
    found = listed(capfd)
    assert {*listed(capfd, "--only", "128x128-rows-f16-whole")} == {"128x128-rows-f16-whole", "1 cases, 0 bad"}
    assert len(listed(capfd, "--only", "128x128-rows")) > 4 and "one_launch_128x128-rows-f16-whole" in found


@pytest.mark.parametrize(
    "case",
    [
        "64x64-rows-bf16-dropout",
        "any-columns-f16",
        "ranks-56-8-any-f16",
        "on-a-bias-any-bf16",
        "on-a-base-f16",
        "walk-64",
    ],
)
def test_cases_pass(capfd, case):
    card = PretendedCard()
    code = card.run("--only", case)
    assert (code, card.faults) == (0, []), capfd.readouterr().out
    assert card.launched and not card.memory


def test_a_wrong_result_is_found(capfd, monkeypatch):
    """A launch less, and what it should have written is NaN."""
    card = PretendedCard()
    launch = card.launch
    monkeypatch.setattr(card, "launch", lambda name, *rest: 0 if name == b"finish_sums" else launch(name, *rest))
    assert card.run("--only", "one-row") == 1
    assert re.search(r"one-row-bf16-dropout: d\w+\[0\] is -?nan", capfd.readouterr().out)


def test_a_planted_write_is_found():
    card = PretendedCard()
    assert card.run("--plant", "write") == 1
    (fault,) = card.faults
    assert fault.kind == "out-of-bounds" and "gemm" in card.launched[-1][0]


def test_a_planted_race_is_found():
    import ptxsim

    ptx = ptxsim.compile_cuda(str(ROOT / "examples" / "cuda_check" / "planted.cu"), arch="sm_80")
    with pytest.raises(ptxsim.SimError) as fault:
        ptxsim.load(ptx)["race"].launch(1, 64, [torch.zeros(64, dtype=torch.int32)])
    assert fault.value.kind == "shared-race"


def test_planted_barriers():
    """Each warp is at one of its own: that is the fault. The kernel ends nevertheless."""
    import ptxsim

    ptx = ptxsim.compile_cuda(str(ROOT / "examples" / "cuda_check" / "planted.cu"), arch="sm_80")
    module = ptxsim.load(ptx)
    (name,) = [name for name in module if "sync" in name]
    assert len(re.findall(r"\bbar(rier)?\.sync", ptx[ptx.index(f".entry {name}") :])) == 2
    out = torch.zeros(64, dtype=torch.int32)
    module[name].launch(1, 64, [out])
    assert out.tolist() == [1] * 32 + [2] * 32


@pytest.mark.parametrize("arguments", [["--plant", "nothing"], ["--only"], ["--what"], ["--only", "no such case"]])
def test_bad_arguments(arguments):
    assert PretendedCard().run(*arguments) == 2
