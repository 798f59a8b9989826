"""Shipped measurements: which entry holds for a call, what a damaged file does, how a file is written."""

from __future__ import annotations

import json

import pytest
import torch
from support.cards import OnCard, backward_call, forward_call

from loradash_kernels.backends import measurements, tuning
from loradash_kernels.backends.measurements import SHIPPED_FOLDER, Measurement, from_json, to_json, write_shipped

SOURCE = {"card": "a card", "driver": "580.65", "versions": "1, PyTorch 2", "commit": "abc1234"}
NAMES = ("library", "wide", "small")


@pytest.fixture
def shipped(card, cache, tmp_path):
    """Ships a table of these calls' keys, with fields changed, each with its fastest; on a pretended sm_90."""
    card(9, 0)
    folder = tmp_path / "shipped"
    folder.mkdir()

    def ship(*entries, file="a.json", source=SOURCE):
        table = {tuning.key("cuda", call)._replace(**fields): Measurement(name, {}) for call, name, fields in entries}
        write_shipped(folder / file, table, source)
        tuning.SHIPPED.forget()
        tuning.MEASURED.forget()

    return ship


def call_of(m=64, k=64, n=32, make=forward_call, dtype=torch.bfloat16, width=24):
    call = make(OnCard(dtype, (m, k)), width)
    weight, lora_b = torch.empty(n, k, dtype=dtype), torch.empty(n, width)
    return call._replace(weight=weight, lora_b=lora_b)


def chosen(call):
    return tuning.choose("cuda", call, lambda: NAMES, lambda name: None)


def test_the_same_call_on_the_same_card(shipped):
    assert chosen(call_of()) is None
    shipped((call_of(), "wide", {}))
    assert chosen(call_of()) == "wide"
    assert chosen(call_of(m=33)) == "wide", "the same power of two"
    assert chosen(call_of(m=65)) is None and chosen(call_of(m=32)) is None
    assert chosen(call_of(make=backward_call)) is None
    assert chosen(call_of(dtype=torch.float16)) is None
    assert chosen(call_of()._replace(weight=torch.empty(64, 32, dtype=torch.bfloat16).t())) is None
    assert tuning.choose("triton", call_of(), lambda: NAMES, lambda name: None) is None
    assert tuning.choose("cuda", call_of(), lambda: NAMES, lambda name: None, "tf32") is None


def test_other_versions_hold_too(shipped):
    shipped((call_of(), "wide", {"versions": "0.0.1"}))
    assert chosen(call_of()) == "wide"


def test_widths_of_one_padding(shipped):
    shipped((call_of(width=24), "wide", {}))
    assert [chosen(call_of(width=width)) for width in (8, 32, 33, 0)] == ["wide", "wide", None, None]


@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [
        (64, 32, "wide"),
        (128, 32, "wide"),
        (32, 16, "wide"),
        (130, 32, None),
        (64, 15, None),
        (31, 32, None),
        (0, 32, None),
    ],
)
def test_k_and_n_within_a_factor_of_two(shipped, k, n, expected):
    shipped((call_of(k=64, n=32), "wide", {}))
    assert chosen(call_of(k=k, n=n)) == expected


def test_the_nearest_holds(shipped):
    shipped((call_of(k=64), "wide", {}), (call_of(k=128), "small", {}))
    assert [chosen(call_of(k=k)) for k in (48, 80, 104, 200)] == ["wide", "wide", "small", "small"]


def test_of_equally_near_ones_that_with_the_same_tensors(shipped):
    seed = torch.zeros(2, dtype=torch.int64)
    with_dropout = call_of()._replace(seed=seed)
    shipped((with_dropout, "small", {}), (call_of(), "wide", {}))
    assert chosen(call_of()) == "wide" and chosen(with_dropout) == "small"


def test_the_card_before_its_architecture(shipped):
    """Even where the architecture's other card was measured nearer by."""
    other = {"card": "another card"}
    shipped((call_of(), "small", other))
    assert chosen(call_of()) == "small"
    shipped((call_of(), "small", other), (call_of(k=104), "wide", {}))
    assert chosen(call_of()) == "wide"
    shipped((call_of(), "small", {**other, "architecture": "sm_80"}))
    assert chosen(call_of()) is None


def test_the_local_store_wins(shipped):
    shipped((call_of(), "wide", {}))
    tuning.MEASURED.remember(tuning.key("cuda", call_of()), "library")
    assert chosen(call_of()) == "library"


def test_a_name_of_no_candidate(shipped):
    shipped((call_of(), "magic", {}))
    with pytest.warns(UserWarning, match="'magic', measured to be the fastest of cuda, is no candidate here"):
        assert chosen(call_of()) is None


def test_measuring_looks_past_what_is_shipped(shipped, monkeypatch):
    shipped((call_of(), "wide", {}))
    monkeypatch.setenv("LORADASH_TUNE", "1")
    monkeypatch.setattr(tuning, "tune", lambda name, candidates, run, device: "small")
    assert chosen(call_of()) == "small"


def test_is_named_with_its_source(shipped):
    shipped((call_of(), "wide", {}))
    said = tuning.known_of("cuda", OnCard.device)
    assert said == "measurements: 1 shipped: card a card, driver 580.65, versions 1, PyTorch 2, commit abc1234"
    assert tuning.known_of("triton", OnCard.device) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"measurements": []}',
        b'{"source": {}, "measurements": []}',
        b"\xff\xfe",
        json.dumps({"source": {**SOURCE, "commit": 7}, "measurements": []}).encode(),
        json.dumps({"source": SOURCE, "measurements": [{"owner": "cuda"}]}).encode(),
    ],
)
def test_a_damaged_file_is_ignored(shipped, tmp_path, text):
    """Once with a warning; the others hold."""
    shipped((call_of(), "wide", {}))
    (tmp_path / "shipped" / "b.json").write_bytes(text)
    tuning.SHIPPED.forget()
    with pytest.warns(UserWarning, match=r"b.json is damaged.*its measurements are ignored") as said:
        assert [chosen(call_of()) for _ in range(2)] == ["wide"] * 2
    assert len(said) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("rows", "64"), ("k", 1.5), ("card", 3), ("fastest", None), ("details", [])]
)
def test_fields_of_other_types_are_named(card, cache, field, value):
    card(9, 0)
    (entry,) = to_json({tuning.key("cuda", call_of()): Measurement("wide", {"rounds": 10})})
    assert from_json([entry]) == {tuning.key("cuda", call_of()): ("wide", {"rounds": 10})}
    with pytest.raises(ValueError, match=field):
        from_json([{**entry, field: value}])


def test_ships_what_was_measured_here(card, cache, tmp_path):
    card(9, 0)
    mine, path = tuning.key("cuda", call_of()), tmp_path / "card.json"
    details = {"milliseconds": {"wide": 1.0}}
    tuning.MEASURED.remember(mine, "wide", details)
    tuning.MEASURED.remember(mine._replace(card="another card"), "small")
    tuning.MEASURED.remember(mine._replace(versions="older"), "small")
    source = {name: SOURCE[name] for name in ("card", "driver", "commit")}
    assert tuning.ship(path, source) == 1
    found = json.loads(path.read_text())
    assert found["source"] == {**source, "versions": mine.versions}
    assert from_json(found["measurements"]) == {mine: ("wide", details)}
    for wrong, error in (({**source, "commit": ""}, "commit"), ({**source, "driver": "unknown"}, "driver")):
        with pytest.raises(ValueError, match=f"source lacks {error}"):
            tuning.ship(path, wrong)
    with pytest.raises(ValueError, match="no measurement"):
        tuning.ship(path, {**source, "card": "a third card"})


def test_what_ships_is_whole(recwarn):
    """Every file of the package is read without a warning, and each of its measurements is of the card that it names."""
    tables = measurements.ShippedTables(SHIPPED_FOLDER)
    known = tables.known()
    assert all(f"card {key.card}," in tables.source(key) for key in known)
    assert not recwarn.list
    assert (SHIPPED_FOLDER / "README.md").exists()
