"""What the documents tell their readers to type: every Python block runs, every command exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import typer
from loradash import DashSchedule, dash_layers, dash_state
from loradash.cli import app
from support import snippets
from support.snippets import PROVIDED, Block, Maker, Namespace, arithmetic, blocks_of, dash_model

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [b for file in DOCUMENTS for b in blocks_of(file.relative_to(ROOT).as_posix(), file.read_text())]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language == "bash"]
OWN_MODEL = "In your own model"
OPTIONAL = ("accelerate", "bitsandbytes", "datasets", "lightning", "peft", "torchao", "transformers", "trl")


@dataclass(frozen=True)
class Fixture:
    """What a block needs beyond `PROVIDED`, and what must be true when it has run."""

    names: Mapping[str, Maker] = field(default_factory=dict)
    then: Callable[[Namespace], None] = lambda names: None


def _launched_and_saved(names: Namespace) -> None:
    assert dash_state(names["model"]).step == snippets.BATCHES and names["schedule"].launched
    assert any(layer.dash_sigma.any() for layer in dash_layers(names["model"]).values())
    assert Path("adapter", "loradash_adapter.safetensors").is_file()


def _decomposes(names: Namespace) -> None:
    assert names["schedule"].cache is names["cache"]
    # The process is ended with its cache, which lies in this test's folder.
    running = names["cache"].start(names["model"])
    assert running.wait(timeout=240)


def _finite(names: Namespace) -> None:
    assert torch.isfinite(names["y"]).all() and names["found"].u.shape == names["u"].shape


def _divided(names: Namespace) -> None:
    placements = {type(layer.weight).__name__ for layer in dash_layers(names["model"]).values()}
    snippets.leave_group()
    assert placements == {"DTensor"}


def _training_saved(names: Namespace) -> None:
    assert Path("run", ".metadata").is_file()


def _sharded_and_saved(names: Namespace) -> None:
    snippets.leave_group()
    assert all(hasattr(layer.lora_b, "device_mesh") for layer in dash_layers(names["model"]).values())
    _training_saved(names)


ON_A_MESH = Fixture({"mesh": lambda names: snippets.lone_mesh()}, _divided)
FIXTURES: dict[tuple[str, str, int], Fixture] = {
    ("README.md", OWN_MODEL, 1): Fixture(then=_launched_and_saved),
    ("README.md", OWN_MODEL, 2): Fixture({"model": lambda names: dash_model()}, _decomposes),
    ("README.md", OWN_MODEL, 3): Fixture(arithmetic(), _finite),
    ("README.md", "Whole models, at scale", 1): Fixture(
        {"model": lambda names: dash_model(), "schedule": lambda names: DashSchedule(names["model"])}, _training_saved
    ),
    ("docs/tensor-parallel.md", OWN_MODEL, 1): ON_A_MESH,
    ("docs/tensor-parallel.md", OWN_MODEL, 2): ON_A_MESH,
    ("docs/distributed.md", "FSDP2", 1): Fixture({"mesh": lambda names: snippets.lone_mesh()}, _sharded_and_saved),
}
# Blocks that are no programs: (file, heading, number) -> why.
LISTED: dict[tuple[str, str, int], str] = {}


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A folder of its own, and a cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORADASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def needed(code: str) -> set[str]:
    """The frameworks that a block needs: by its imports, by those of our integrations, and by what it takes as imported."""
    words = set(re.findall(r"\w+", code))
    by_name = {module for module, names in snippets.IMPORTED.items() if words & {*names}}
    return {name for name in OPTIONAL if name in words | by_name}


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block):
    if block.key in LISTED:
        pytest.skip(LISTED[block.key])
    for framework in sorted({*needed(block.code), "transformers"}):
        pytest.importorskip(framework)
    fixture = FIXTURES.get(block.key, Fixture())
    fixture.then(snippets.run(block, {**PROVIDED, **fixture.names}))


def test_tables_speak_of_blocks_that_exist():
    """A heading that was renamed takes its fixture with it."""
    assert {*FIXTURES, *LISTED} <= {block.key for block in PYTHON} and not FIXTURES.keys() & LISTED.keys()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("total = unheard_of + 1", NameError),
        ("def later():\n    return unheard_of\n\nlater()", NameError),
        ("model = ...(", SyntaxError),
        ("from loradash import no_such_name", ImportError),
    ],
)
def test_blocks_that_do_not_run_are_found(code, error):
    with pytest.raises(error):
        snippets.run(Block("README.md", "", 1, "python", 1, code), PROVIDED)


def test_blocks_are_found():
    text = "# One\n```python\na\n```\n\n## Two\n```bash\nb\n```\n```python\nc\n\nd\n```\n ```python\ne\n ```\n"
    assert [(b.heading, b.number, b.language, b.line, b.code) for b in blocks_of("x.md", text)] == [
        ("One", 1, "python", 3, "a\n"),
        ("Two", 1, "bash", 8, "b\n"),
        ("Two", 1, "python", 11, "c\n\nd\n"),
        ("Two", 2, "python", 16, "e\n"),
    ]
    assert PYTHON and SHELL


def commands(text: str) -> list[list[str]]:
    """Words of every command of a shell's lines, without comments and the variables set for one."""
    lines = [shlex.split(part, comments=True) for line in text.splitlines() for part in line.split("&&")]
    return [words[next((i for i, w in enumerate(words) if "=" not in w), len(words)) :] for words in lines]


def complaint(words: list[str]) -> str | None:
    """What does not exist of a command of ours; None for others' commands."""
    match words:
        case ["make", *rest]:
            targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            unknown = [word for word in rest if "=" not in word and word not in targets]
            return f"no target {unknown} in the Makefile" if unknown else None
        case ["loradash", command, *rest]:
            known = typer.main.get_command(app).commands
            if command not in known:
                return f"no command {command!r} of loradash"
            options = {option for p in known[command].params for option in (*p.opts, *p.secondary_opts)}
            free = known[command].context_settings.get("ignore_unknown_options")
            unknown = [w for w in rest if w.startswith("--") and w.split("=")[0] not in options and not free]
            return f"no option {unknown} of loradash {command}" if unknown else None
        case ["python" | "python3", "-m", module, *_] if module.split(".")[0] in ("benchmarks", "loradash", "tools"):
            return None if importlib.util.find_spec(module) else f"no module {module}"
        case ["python" | "python3", file, *_] if file.endswith(".py"):
            return None if (ROOT / file).is_file() else f"no file {file}"
    return None


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_of_blocks_exist(block):
    assert [found for words in commands(block.code) if (found := complaint(words))] == []


@pytest.mark.parametrize(
    "file",
    [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"],
    ids=lambda f: f.relative_to(ROOT).as_posix(),
)
def test_commands_in_sentences_exist(file):
    said = re.findall(r"`((?:[A-Z_]+=\S+ )*(?:make|loradash|python) [^`]+)`", file.read_text())
    assert [found for text in said for words in commands(" ".join(text.split())) if (found := complaint(words))] == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("make test OFFLINE=1  # here", False),
        ("X=1 make no-such-target", True),
        ("cd x && make demo nonsense", True),
        ("loradash info", False),
        ("loradash decompose MODEL --dtype bfloat16", False),
        ("loradash decompose MODEL --no-such-option", True),
        ("loradash finetune --whatever 3", False),
        ("loradash no-such-command", True),
        ("OMP_NUM_THREADS=1 python -m benchmarks.layers.ratios --quick", False),
        ("python -m benchmarks.no_such_module", True),
        ("python tools/no_such_file.py", True),
        ("pip install anything", False),
    ],
)
def test_commands_that_do_not_exist_are_found(line, wrong):
    assert any(complaint(words) for words in commands(line)) is wrong
