"""The stages of the proof, in order: what each runs, how long it may take, and what its result depends on."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .stage import ROOT, Command, Context, Missing, Stage, Turn

GIB = 1 << 30
# What a process of PyTorch with its largest tests takes of a card, and the most that share one.
MEMORY_EACH, MOST_LANES = 10 * GIB, 8
KERNELS = ("csrc", "loradash_kernels", "setup.py")
TESTS = ("tests/conftest.py", "tests/support", "tests/gpu", "pyproject.toml")
PROOF = "benchmarks/proof"
# The rehearsal runs every so manieth test, in Triton's interpreter: it shows that the stages work.
REHEARSED = {"correct": "3/15", "integrate": "1/5"}


def module(name: str, *arguments: str, **environment: str) -> Command:
    return Command([sys.executable, "-m", name, *arguments], environment)


def doctor(context: Context, turn: Turn) -> Command:
    facts = context.of("doctor") / "facts.json"
    return module(f"{__package__}.doctor", "--out", str(facts), *(["--rehearse"] if context.rehearse else []))


def build(context: Context, turn: Turn) -> Command | Missing:
    if context.rehearse:
        return module(f"{__package__}.build", "--check")
    facts = context.facts
    if not facts["nvcc"] or not facts["compiler"]:
        return Missing(
            "no nvcc or no C++ compiler: the CUDA backend and its sanitizer run need them; Triton's does not"
        )
    out = context.of("build") / "cuda_check"
    home = {"CUDA_HOME": facts["CUDA_HOME"]} if facts["CUDA_HOME"] else {}
    return module(f"{__package__}.build", "--capability", capability(context), "--cuda-check", str(out), **home)


def capability(context: Context) -> str:
    return "{}.{}".format(*context.facts["card"]["capability"])


def lanes(context: Context) -> int:
    """How many processes share the card: most of their time goes into compiling on one core each."""
    if context.rehearse:
        return 1
    return max(1, min(MOST_LANES, context.facts["cores"] // 2, context.facts["card"]["memory"] // MEMORY_EACH))


def tests(stage: str, *paths: str) -> Callable[[Context, Turn], Command | Missing]:
    """The command of a stage that runs tests: a shard of them in each lane."""

    def command(context: Context, turn: Turn) -> Command | Missing:
        gone = [path for path in paths if not any((ROOT / path).rglob("test_*.py"))]
        if gone:
            return Missing(f"there are no tests in {', '.join(gone)}")
        # The options of pyproject.toml without those of plugins, which need not be installed here.
        plain = "addopts=--strict-markers --import-mode=importlib"
        argv = ["pytest", "-p", f"{__package__}.recorder", "-q", "-o", plain, "-p", "no:cacheprovider", "-m", "gpu"]
        argv += ["--continue-on-collection-errors", "--shard"]
        if context.rehearse:
            return Command([sys.executable, "-m", *argv, REHEARSED[stage], paths[0]], {"TRITON_INTERPRET": "1"})
        # Each lane thinks that all cores are its own.
        threads = str(max(1, context.facts["cores"] // turn.lanes))
        shared = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
        return Command([sys.executable, "-m", *argv, f"{turn.lane}/{turn.lanes}", "--device", "cuda", *paths], shared)

    return command


def sanitize(context: Context, turn: Turn) -> Command | Missing:
    if context.rehearse:
        return module(f"{__package__}.emulated")
    sanitizer, check = context.facts["compute-sanitizer"], context.of("build") / "cuda_check"
    if not sanitizer:
        return Missing("compute-sanitizer was not found; it comes with the CUDA toolkit")
    if not check.exists():
        return Missing("examples/cuda_check was not built, see the stage build")
    options = ["--sanitizer", sanitizer, "--cuda-check", str(check), "--lane", f"{turn.lane}/{turn.lanes}"]
    return module(f"{__package__}.sanitize", *options, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def stress(context: Context, turn: Turn) -> Command:
    where = ["--device", "cpu", "--seconds-each", "1"] if context.rehearse else []
    return module(f"{__package__}.stress", *where)


def prelaunch(context: Context, turn: Turn) -> Command:
    return module(f"{__package__}.prelaunch", *(["--device", "cpu", "--small"] if context.rehearse else []))


def bench(context: Context, turn: Turn) -> Command:
    return module(f"{__package__}.bench", *(["--rehearse"] if context.rehearse else []))


def tune(context: Context, turn: Turn) -> Command:
    if context.rehearse:
        return module(f"{__package__}.tune", "--rehearse")
    return module(f"{__package__}.tune", "--driver", context.facts["card"]["driver"], LORADASH_TUNE="1")


# Seconds: on a card 29 minutes together, and in the rehearsal more than it takes, on a machine that others use too.
STAGES = (
    # A machine that has just been started reads PyTorch from its disk for the first time.
    Stage("doctor", 60, 60, doctor),
    Stage("build", 220, 60, build, sources=(*KERNELS, "examples", "CMakeLists.txt"), patience=220),
    Stage(
        "correct",
        370,
        240,
        tests("correct", "tests/gpu/correct", "tests/operator"),
        complete=lambda code: code in (0, 1, 5),
        lanes=lanes,
        sources=(*KERNELS, *TESTS, "tests/operator"),
        patience=160,
    ),
    Stage(
        "integrate",
        170,
        240,
        tests("integrate", "tests/gpu/integrate"),
        complete=lambda code: code in (0, 1, 5),
        lanes=lanes,
        sources=(*KERNELS, *TESTS, "python"),
        # What torch.compile makes of a model takes a while.
        patience=150,
    ),
    Stage(
        "sanitize",
        240,
        240,
        sanitize,
        lanes=lanes,
        sources=(*KERNELS, "examples", f"{PROOF}/sanitize.py", f"{PROOF}/emulated.py"),
        patience=200,
    ),
    Stage("stress", 70, 120, stress, sources=(*KERNELS, f"{PROOF}/stress.py"), patience=60),
    Stage("prelaunch", 80, 120, prelaunch, sources=("loradash_kernels", f"{PROOF}/prelaunch.py"), patience=70),
    Stage(
        "bench",
        400,
        240,
        bench,
        sources=(*KERNELS, "benchmarks/layers", "benchmarks/prelaunch"),
        elastic=True,
        patience=240,
        fruitless=2,
        least=20,
    ),
    Stage("tune", 100, 120, tune, sources=(*KERNELS, f"{PROOF}/tune.py"), elastic=True, least=20),
)
