"""What an install must be: light to import, and of use without the compiled part."""

from __future__ import annotations

import subprocess
import sys

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
    """Neither package imports what only an extra installs."""
    heavy = "matplotlib", "peft", "transformers", "triton.compiler"
    code = f"import sys, loradash, loradash_kernels; print([m for m in {heavy!r} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
