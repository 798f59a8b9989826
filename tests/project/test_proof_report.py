"""What a proof says: failures are red in every file, what is missing is no pass, and the pictures are drawn."""

from __future__ import annotations

import copy
import csv
import io
import json
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest

from benchmarks.proof import documents, plots, report, schema
from benchmarks.proof.ledger import Ledger, Row
from benchmarks.proof.state import Record, State, hash_of

WORKLOAD = {
    "kind": "layer",
    "dtype": "bf16",
    "M": 4096,
    "K": 4096,
    "N": 4096,
    "r": 16,
    "dropout": 0.05,
    "error": None,
    "left out": None,
}
ABOUT = {"card": "A Card", "capability": "8.0", "driver": "580", "driver's CUDA": "13.0", "torch": "2.11"}
ABOUT |= {
    "throttled": "none",
    "power limit": "700 W",
    "late calls": 0,
    "cpu": "a CPU",
    "commit": "abc",
    "rehearsed": False,
}


def layer(arm: str, step: float, **values: float) -> dict:
    ratios = {f"{name} ratio": step for name in ("step", "forward", "backward")}
    return {"key": f"layer/{arm}", **WORKLOAD, "arm": arm, "step ms": step, **ratios, **values, **ABOUT}


def strategy(arm: str, over: float) -> dict:
    values = {f"{pass_} {name}": over for pass_ in ("forward", "backward") for name in ("ms", "ratio", "over ours")}
    return {**layer(arm, over), "key": f"strategy/{arm}", "kind": "strategy", **values}


@dataclass(frozen=True)
class Wanted:
    name: str
    sources: tuple[str, ...] = ()


STAGES = (Wanted("doctor"), Wanted("correct"), Wanted("prelaunch"), Wanted("bench"))
MEASURED = {"ratio": 0.2, "accuracy": 1.0, "recall": 1.0, "routes": "tail"}


@pytest.fixture
def folder(tmp_path):
    """A proof in which everything passed."""
    rows = {
        "doctor": [Row("Python", "passed")],
        "correct": [Row("test_a", "passed", 1.0), Row("test_b", "passed", 2.0, "planted: found")],
        "prelaunch": [Row("1 of 4096x4096", "passed", values=MEASURED)],
        "bench": [
            Row(values["key"], "measured", values=values)
            for values in (
                layer("frozen nn.Linear", 1.0),
                layer("PEFT LoRA", 1.4),
                layer("factored, compiled", 1.3),
                layer("ours", 1.04),
                strategy("cuda, library", 0.99),
            )
        ],
    }
    state = State(tmp_path / "card")
    state.facts = {"card": {"name": "A Card"}, "python": "3.12"}
    for name, found in rows.items():
        for row in found:
            Ledger(state.folder / name / "rows-0.jsonl").finish(row)
        state.put(Record(name, "passed", f"{len(found)} passed", 3.0, 60.0, 1, hash_of(())))
    return state.folder


def change(folder, stage, row=None, **fields) -> dict:
    """The proof after a row has changed, and fields of its stage's record."""
    state = State(folder).load()
    record = state.records[stage]
    if row is not None:
        Ledger(folder / stage / "rows-0.jsonl").finish(row)
    state.put(Record(**{**record.__dict__, **fields}))
    return gather(folder)


def gather(folder, rehearse=False) -> dict:
    proof = report.gather(folder, STAGES, rehearse)
    assert [*schema.problems(proof)] == []
    assert json.loads(json.dumps(proof)) == proof
    return proof


def outcomes(proof) -> dict[str, str]:
    return {verdict["name"]: verdict["outcome"] for verdict in proof["verdicts"]}


def test_all_passed(folder):
    proof = gather(folder)
    assert proof["result"] == "passed" and {*outcomes(proof).values()} == {"passed"}
    assert "passed" in documents.summary(proof) and "not run" not in documents.summary(proof)


def test_a_failing_test_turns_everything_red(folder):
    proof = change(folder, "correct", Row("test_c", "failed", 1.0, "assert 1 == 2"), ending="failed")
    assert proof["result"] == "failed"
    root = ElementTree.fromstring(documents.junit(proof))
    suite = next(suite for suite in root if suite.get("name") == "correct")
    assert suite.get("failures") == "2"
    assert {case.get("name") for case in suite if case.find("failure") is not None} == {"test_c", "the stage itself"}
    text = documents.markdown(proof)
    assert "Result: **failed**" in text and "`test_c`: assert 1 == 2" in text.split("## Failed")[1]


@pytest.mark.parametrize("ending", ["missing", "over"])
def test_what_was_not_measured_is_no_pass(folder, ending):
    assert change(folder, "correct", ending=ending)["result"] == "failed"


def test_what_is_cut_is_unfinished(folder):
    assert change(folder, "bench", ending="cut")["result"] == "unfinished"


def test_an_absent_stage_is_unfinished(folder):
    proof = report.gather(folder, [*STAGES, Wanted("tune")], False)
    assert (proof["result"], proof["absent"]) == ("unfinished", ["tune"])
    assert "tune" in documents.markdown(proof) and "not run" in documents.summary(proof)


def test_other_sources_are_stale(folder):
    stages = [Wanted("doctor"), Wanted("correct", ("setup.py",)), *STAGES[2:]]
    proof = report.gather(folder, stages, False)
    assert (proof["result"], proof["stale"]) == ("unfinished", ["correct"])


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (layer("ours", 1.35), "beside peers"),
        (layer("ours", 1.04, **{"forward ratio": 1.06}), "beside frozen"),
        (layer("ours", 1.04, **{"backward ratio": 1.10}), "beside frozen"),
        (strategy("cuda, library", 0.95), "beside our best"),
    ],
)
def test_a_broken_verdict_fails(folder, row, verdict):
    proof = change(folder, "bench", Row(row["key"], "measured", values=row))
    assert proof["result"] == "failed"
    assert outcomes(proof)[verdict] == "failed"
    assert "does not hold" in documents.summary(proof)


def test_a_verdict_without_numbers_is_no_pass(folder):
    lost = {**layer("ours", 1.0), "error": "no memory", **{f"{n} ratio": None for n in ("step", "forward", "backward")}}
    proof = change(folder, "bench", Row("layer/ours", "failed", values=lost))
    assert proof["result"] == "failed"
    assert "passed" not in (outcomes(proof)["beside peers"], outcomes(proof)["beside frozen"])


def test_a_verdict_that_lacks_a_peer_is_not_measured(folder):
    """What is there holds, and decides nothing."""
    peer = layer("PEFT LoRA", 1.3)
    none = {**peer, "left out": "not installed", **{f"{n} ratio": None for n in ("step", "forward", "backward")}}
    proof = change(folder, "bench", Row(peer["key"], "missing", values=none))
    assert outcomes(proof) == {"beside peers": "not measured", "beside our best": "passed", "beside frozen": "passed"}
    assert proof["result"] == "failed" and "of PEFT LoRA, bf16" in documents.summary(proof)
    suite = ElementTree.fromstring(documents.junit(proof)).find("testsuite[@name='verdicts']")
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")


def test_a_rehearsal_judges_no_number(folder):
    broken = layer("ours", 9.0)
    change(folder, "bench", Row(broken["key"], "measured", values=broken))
    proof = gather(folder, rehearse=True)
    assert proof["result"] == "passed" and {*outcomes(proof).values()} == {"rehearsed"}
    assert "no card ran anything" in documents.markdown(proof) and "no card ran anything" in documents.summary(proof)


def test_the_files(folder, tmp_path):
    """At most eight, below 16 MB; the pictures are pictures with something in them."""
    out = tmp_path / "out"
    (folder / "correct" / "log-0.txt").write_text("x" * 10_000_000 + "the end of the log")
    table = folder / "tune" / "table" / report.MEASUREMENTS
    table.parent.mkdir(parents=True)
    table.write_text("{}")
    assert report.write(gather(folder), folder, out) == []
    files = {path.name: path for path in out.iterdir()}
    assert {*files} == {
        *("proof.json", "junit.xml", "rows.csv", "report.md", "log.txt", "plots.png", "layers.png", "measurements.json")
    }
    assert all(path.stat().st_size < 1 << 24 for path in files.values())
    assert "the end of the log" in files["log.txt"].read_text()
    rows = [*csv.DictReader(io.StringIO(files["rows.csv"].read_text()))]
    assert [row["step ms"] for row in rows if row["arm"] == "ours"] == ["1.04"]
    assert "beside peers" in files["report.md"].read_text() and "PEFT LoRA" in files["report.md"].read_text()
    for name in ("plots.png", "layers.png"):
        assert colours(files[name]) > 20, f"{name} is blank"


def test_results_survive_what_a_picture_or_a_table_does(folder, tmp_path, monkeypatch):
    def broken(*arguments):
        raise KeyError("a field that is not there")

    monkeypatch.setattr(plots, "draw", broken)
    monkeypatch.setattr(report, "layers_text", broken)
    troubles = report.write(gather(folder), folder, tmp_path / "out")
    assert [text.partition(" could not")[0] for text in troubles] == ["plots.png", "the tables of layers"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Result: **passed**" in text and all(trouble in text for trouble in troubles)
    assert (tmp_path / "out" / "proof.json").exists() and (tmp_path / "out" / "layers.png").exists()


def colours(path) -> int:
    image = pytest.importorskip("matplotlib.image").imread(path)
    return len({tuple(pixel) for row in image[::5, ::5] for pixel in row})


def test_the_picture_shows_what_is_there(folder):
    """Numbers of the picture are those of the proof: bars of seconds, dots of verdicts, bars of pre-launch."""
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    proof = gather(folder)
    figure, (one, two, three) = pyplot.subplots(1, 3)
    plots.stages(one, proof["stages"])
    assert [bar.get_width() for bar in one.patches] == [60.0] * 4 + [3.0] * 4
    plots.verdicts(two, proof["verdicts"])
    drawn = sorted(x for line in two.lines for x in line.get_xdata() if len(line.get_xdata()) != 2 or x != 1)
    numbers = sorted(n["value"] / n["limit"] for v in proof["verdicts"] for n in v["numbers"])
    assert {round(x, 6) for x in numbers} <= {round(float(x), 6) for x in drawn}
    plots.prelaunch(three, [row for stage in proof["stages"] if stage["name"] == "prelaunch" for row in stage["rows"]])
    assert [bar.get_height() for bar in three.patches] == [0.2, 1.0, 1.0]
    pyplot.close(figure)


def test_control_characters_leave_the_files_readable(folder):
    proof = change(
        folder, "correct", Row("test_\x00d", "failed", 1.0, "\x1b[31mred\x1b[0m \x07 <&>\nmore"), ending="failed"
    )
    case = ElementTree.fromstring(documents.junit(proof)).find(".//testcase[@name='test_d']/failure")
    assert case is not None and case.text == "red  <&>\nmore"
    assert "\x1b" not in documents.markdown(proof)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("result",), "fine", "proof.result is 'fine', wanted one of"),
        (("rehearsal",), 1, "proof.rehearsal is 1"),
        (("stages", 0, "ending"), "done", "proof.stages[0].ending is 'done'"),
        (("stages", 1, "rows", 0, "seconds"), "1", "proof.stages[1].rows[0].seconds is '1'"),
        (("stages", 1, "rows", 0, "seconds"), True, "proof.stages[1].rows[0].seconds is True"),
        (("verdicts",), {}, "proof.verdicts is {}, wanted a list"),
        (("facts",), [], "proof.facts is []"),
        (("more",), 1, "proof has more, which is not in the schema"),
    ],
)
def test_the_schema_finds_what_is_wrong(folder, path, value, words):
    proof = copy.deepcopy(gather(folder))
    place = proof
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (found,) = schema.problems(proof)
    assert words in found


def test_the_schema_finds_what_is_lacking(folder):
    proof = gather(folder)
    del proof["stages"][0]["rows"]
    assert [*schema.problems(proof)] == ["proof.stages[0] lacks rows"]
    assert [*schema.problems([])] == ["proof is [], wanted an object"]
