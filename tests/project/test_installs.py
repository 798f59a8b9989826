"""What an install must be: light to import, and of use without the compiled part."""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import loradash.integrations
import pytest

ROOT = Path(__file__).parents[2]
SCALE = "tensor", "fsdp", "checkpoint", "pipelining"
FRAMEWORKS = (
    "peft",
    "transformers",
    "trl",
    "lightning",
    "pytorch_lightning",
    "accelerate",
    "diffusers",
    "datasets",
    "bitsandbytes",
    "torchao",
)
INTEGRATIONS = sorted(found.name for found in pkgutil.iter_modules(loradash.integrations.__path__))
# The authors' layers, and what trainers' callbacks share, are plain PyTorch.
NEEDS_NOTHING = {"callbacks", "subspace_tuning"}

PURE = """
import sys, warnings
# This is how it looks where nothing was compiled.
sys.modules["loradash_kernels._C"] = None
import torch, loradash, loradash_kernels as lk
assert "compiled part is missing" in lk.available_backends()["cpu"]
choice = lk.explain_backend(torch.zeros(1, 1))
assert choice.backend == "reference" and "pip install" in choice.reasons["cpu"]
layer = loradash.DashLinear(8, 8, config=loradash.DashConfig(dropout=0.1))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    # No kernel takes float64, which is documented and no reason to warn.
    loradash.DashLinear(8, 8).double()(torch.randn(3, 8).double())
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
    """Neither package imports what only an extra installs, or what only several processes need."""
    heavy = "matplotlib", "triton.compiler", "deepspeed", *(f"torch.distributed.{n}" for n in SCALE), *FRAMEWORKS
    code = f"import sys, loradash, loradash_kernels; print([m for m in {heavy!r} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# What each integration says where no framework is there, as JSON; an empty text where it imports.
BARE = """
import importlib, json, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import loradash, loradash_kernels
import loradash.integrations
said = {}
for name in sys.argv[2].split(","):
    try:
        importlib.import_module(f"loradash.integrations.{name}")
    except ImportError as error:
        said[name] = str(error)
    else:
        said[name] = ""
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def bare_words():
    """The same in an interpreter that has none of the frameworks."""
    command = [sys.executable, "-c", BARE, ",".join(FRAMEWORKS), ",".join(INTEGRATIONS)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_an_integration_without_its_framework(bare_words, integration):
    """One sentence, which says what to install."""
    said = bare_words[integration]
    if integration in NEEDS_NOTHING:
        assert said == ""
        return
    (extra,) = re.findall(r"pip install '?\"?loradash-kernels\[(\w+)\]", said)
    assert extra in extras()
    assert "\n" not in said and not re.search(r"\. [A-Z]", said), said


def extras() -> set[str]:
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", declared, re.M))


def test_the_extra_of_peft_is_the_range_that_its_front_end_takes():
    pytest.importorskip("peft")
    from loradash.integrations.peft.versions import BELOW, OLDEST

    oldest, below = (".".join(map(str, bound)) for bound in (OLDEST, BELOW))
    assert f'peft = ["peft>={oldest},<{below}"]' in (ROOT / "pyproject.toml").read_text()
