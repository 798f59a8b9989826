"""The oldest frameworks that pyproject.toml allows, as arguments for pip; standard library only.

python tools/oldest.py       # prints e.g. peft==0.19.1 transformers==4.48 ...
"""

from __future__ import annotations

import re
from pathlib import Path

EXTRAS = ("peft", "transformers", "trl", "lightning", "accelerate", "quantised")
# What only the tests of front ends import.
TESTED_WITH = ("parameterized", "datasets", "diffusers")


def oldest(pyproject: str) -> list[str]:
    """name==version of the front ends' extras, and of what their tests import."""
    tables = dict(re.findall(r"^(\w+) = \[(.*?)\]$", pyproject, re.M | re.S))
    bounds = [re.findall(r'"([\w-]+)>=([\w.]+)', tables[extra]) for extra in (*EXTRAS, "test")]
    wanted = [pair for extra in bounds[:-1] for pair in extra]
    wanted += [(name, version) for name, version in bounds[-1] if name in TESTED_WITH]
    return [f"{name}=={version}" for name, version in wanted]


if __name__ == "__main__":
    print(*oldest((Path(__file__).parents[1] / "pyproject.toml").read_text()))
