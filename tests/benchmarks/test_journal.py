"""Rows that survive a cut."""

from __future__ import annotations

import pytest

from benchmarks.support.journal import ATTEMPTS, Journal, append_line, read_lines


def test_rows_are_there_for_the_next_program(tmp_path):
    Journal(tmp_path).add({"key": "a", "ms": 1.5, "why": None})
    again = Journal(tmp_path)
    assert again.rows == [{"key": "a", "ms": 1.5, "why": None}] and again.keys == {"a"}


def test_a_line_that_was_cut_is_dropped(tmp_path):
    journal = Journal(tmp_path)
    journal.add({"key": "a"})
    with journal.path.open("a") as file:
        file.write('{"key": "b", "ms": 1')
    again = Journal(tmp_path)
    assert again.keys == {"a"}
    again.add({"key": "c"})
    assert [row["key"] for row in read_lines(journal.path)] == ["a", "c"]


def test_a_file_that_begins_with_a_cut_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": ')
    assert read_lines(path) == []
    append_line(path, {"key": "a"})
    assert read_lines(path) == [{"key": "a"}]


def test_what_json_does_not_know_is_refused_before_it_is_written(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        journal.add({"key": "a", "spread": float("inf")})
    assert read_lines(journal.path) == []


def test_what_brought_the_program_down_is_known(tmp_path):
    for attempt in range(ATTEMPTS):
        journal = Journal(tmp_path)
        assert not journal.ends_the_program("bad"), attempt
        journal.begin("bad")
    assert Journal(tmp_path).ends_the_program("bad")


def test_what_ended_did_not(tmp_path):
    for _ in range(3):
        journal = Journal(tmp_path)
        journal.begin("good")
        journal.end("good")
    journal.begin("cut once")
    assert not any(map(Journal(tmp_path).ends_the_program, ("good", "cut once")))
