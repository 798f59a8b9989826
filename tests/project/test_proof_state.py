"""What the proof keeps: told when it cannot be read or written, carried to another machine, and never a pass by accident."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.proof import __main__ as program
from benchmarks.proof.bench import copy, give_back
from benchmarks.proof.doctor import NEEDED
from benchmarks.proof.ledger import Ledger, Row, rows_in
from benchmarks.proof.state import Record, State, Unusable, hash_of, restore

ROOT = Path(__file__).parents[2]


@pytest.fixture
def state(tmp_path):
    state = State(tmp_path / "card")
    state.facts = {"card": {"name": "A Card"}}
    state.put(Record("build", "passed", "2 passed", 3.5, 60.0, 1, "abc"))
    return state


def test_a_state_is_what_was_saved(state):
    found = State(state.folder).load()
    assert (found.records, found.facts) == (state.records, state.facts)
    assert State(state.folder / "nowhere").load().records == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 0}', '{"version": 1, "records": [{"name": "x"}]}'])
def test_an_unreadable_state_is_told(state, text):
    state.path.write_text(text)
    with pytest.raises(Unusable, match=r"cannot read .*state\.json.*--again all"):
        State(state.folder).load()


def test_a_full_disk_is_told(state):
    """Writing to /dev/full fails as on a full disk. What was there before stays."""
    state.path.with_suffix(".new").symlink_to("/dev/full")
    with pytest.raises(Unusable, match=r"cannot write .*No space left"):
        state.put(Record("bench", "passed"))
    assert [*State(state.folder).load().records] == ["build"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Unusable, match="cannot write"):
        State(tmp_path / "file" / "card").save()


def test_another_machine_goes_on_with_the_results(state, tmp_path):
    row = {"name": "a", "outcome": "measured", "seconds": 1.0, "detail": "", "values": {"ms": 2.0}}
    stage = {
        "name": "bench",
        "ending": "cut",
        "detail": "",
        "seconds": 9.0,
        "budget": 60.0,
        "starts": 2,
        "sources": "x",
    }
    proof = tmp_path / "proof.json"
    proof.write_text(
        json.dumps(
            {
                "facts": state.facts,
                "stages": [{**stage, "name": name, "rows": [row]} for name in ("build", "bench", "tune")],
            }
        )
    )
    folder = tmp_path / "other"
    restore(folder, proof)
    found = State(folder).load()
    # Programs that were built, and the table of what is fastest, lie in files that another machine lacks.
    assert {*found.records} == {"bench"} and not (folder / "build").exists()
    assert found.records["bench"] == Record(**stage)
    assert rows_in(folder / "bench") == [Row(**row)]
    proof.write_text("{}")
    with pytest.raises(Unusable, match=r"cannot go on from .*proof\.json"):
        restore(folder, proof)


def test_sources_are_hashed_by_content(tmp_path):
    (tmp_path / "a" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a" / "one.py").write_text("1")
    before = hash_of(["a"], tmp_path)
    (tmp_path / "a" / "_C.so").write_text("compiled")
    (tmp_path / "a" / "__pycache__" / "one.pyc").write_text("compiled")
    (tmp_path / "a" / "one.py").write_text("1")
    assert hash_of(["a"], tmp_path) == before
    (tmp_path / "a" / "two.py").write_text("1")
    assert hash_of(["a"], tmp_path) != before
    assert hash_of(["a/one.py"], tmp_path) != hash_of(["a/two.py"], tmp_path)


def test_rows_of_benchmarks_are_copied_line_by_line_and_given_back(tmp_path):
    file, ledger = tmp_path / "measured" / "rows.jsonl", Ledger(tmp_path / "rows-0.jsonl")
    assert copy(file, ledger, 0) == 0
    file.parent.mkdir()
    rows = [
        {"key": "a", "kind": "layer", "arm": "ours", "error": None, "left out": None, "step ms": 1.0},
        {"key": "b", "kind": "layer", "arm": "ours", "error": "wrong", "left out": None},
        {"key": "c", "kind": "layer", "arm": "PEFT LoRA", "error": "not installed", "left out": None},
        {"key": "d", "kind": "layer", "arm": "ours, cuda", "error": None, "left out": "no memory"},
    ]
    file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1])[:9])
    at = copy(file, ledger, 0)
    assert [row.name for row in ledger.rows()] == ["a"]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert copy(file, ledger, at) == file.stat().st_size
    found = ledger.rows()
    outcomes = {"a": "measured", "b": "failed", "c": "missing", "d": "missing"}
    assert {row.name: row.outcome for row in found} == outcomes and [row.values for row in found] == rows
    assert found[1].detail == "wrong" and found[3].detail == "no memory"
    file.unlink()
    give_back(file, found)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:1]


def test_without_a_card_it_says_so_and_ends_with_2(tmp_path):
    """As on any machine where PyTorch sees no GPU."""
    code = "import os, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; from benchmarks.proof.__main__ import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "--state", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == program.UNABLE, done.stdout + done.stderr
    assert "cannot run here: " in done.stdout and "REHEARSE=1" in done.stdout


def facts_of(monkeypatch, **facts) -> None:
    """What the doctor finds."""

    def examine(options, call):
        call.context.of("doctor").mkdir(parents=True)
        call.state.put(Record("doctor", "passed"))
        return {"card": {"name": "A Card"}, "packages": dict.fromkeys(NEEDED, "1"), **facts}

    monkeypatch.setattr(program, "examine", examine)


def test_packages_that_are_not_there_are_told_at_once(tmp_path, monkeypatch, capsys):
    facts_of(monkeypatch, packages={**dict.fromkeys(NEEDED, "1"), "rich": None})
    assert program.main(["--state", str(tmp_path)]) == program.UNABLE
    assert "cannot run here: rich not installed" in capsys.readouterr().out


def test_the_same_command_goes_on_where_another_machine_ended(tmp_path, monkeypatch, capsys):
    """And not again and again from there."""
    restored = []

    def stop(*_):
        raise KeyboardInterrupt

    facts_of(monkeypatch)
    monkeypatch.setattr(program, "restore", lambda *paths: restored.append(paths))
    monkeypatch.setattr(program, "run_stages", stop)
    for _ in range(2):
        assert program.main(["--state", str(tmp_path), "--resume", "proof.json"]) == program.CUT
    assert restored == [(tmp_path / "a-card", Path("proof.json"))]
    assert "--resume: not needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stages", "build,bake"], "'bake' is no stage"),
        (["--again", "bake"], "'bake' is no stage"),
        (["--budget", "build"], "'build' is no budget"),
        (["--budget", "bake=3"], "'bake' is no stage"),
    ],
)
def test_bad_arguments_are_told(arguments, words, capsys):
    with pytest.raises(SystemExit):
        program.parse(arguments)
    assert words in capsys.readouterr().err


PASSED, FAILED, CUT = {"ending": "passed"}, {"ending": "failed"}, {"ending": "cut"}
HELD, BROKEN, UNKNOWN, REHEARSED = ({"outcome": o} for o in ("passed", "failed", "not measured", "rehearsed"))


@pytest.mark.parametrize(
    ("endings", "verdicts", "rehearsal", "chosen", "through", "code"),
    [
        ({"build": PASSED, "bench": PASSED}, [HELD, HELD], False, ["build", "bench"], True, program.PASSED),
        ({"build": PASSED, "bench": PASSED}, [HELD, BROKEN], False, ["build", "bench"], True, program.FAILED),
        ({"build": PASSED, "bench": PASSED}, [HELD, UNKNOWN], False, ["build", "bench"], True, program.FAILED),
        ({"build": PASSED, "bench": PASSED}, [], False, ["build", "bench"], True, program.FAILED),
        ({"build": FAILED, "bench": PASSED}, [HELD], False, ["build", "bench"], True, program.FAILED),
        ({"build": {"ending": "missing"}}, [HELD], False, ["build"], True, program.FAILED),
        ({"build": {"ending": "over"}}, [HELD], False, ["build"], True, program.FAILED),
        ({"build": PASSED, "bench": CUT}, [UNKNOWN], False, ["build", "bench"], False, program.CUT),
        ({"build": PASSED}, [UNKNOWN], False, ["build"], True, program.PASSED),
        ({"build": PASSED}, [UNKNOWN], False, ["build"], False, program.CUT),
        ({"bench": PASSED}, [REHEARSED, UNKNOWN], True, ["bench"], True, program.PASSED),
        ({"bench": PASSED}, [UNKNOWN], True, ["bench"], True, program.FAILED),
    ],
)
def test_exit_codes(endings, verdicts, rehearsal, chosen, through, code):
    stages = [{"name": name, **ending} for name, ending in endings.items()]
    proof = {"stages": stages, "verdicts": verdicts, "rehearsal": rehearsal}
    assert program.code_of(proof, chosen, through) == code
