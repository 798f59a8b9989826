"""Settings: what is refused, one form for what is accepted, the way through JSON, settings that match nothing."""

from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from loradash import DashConfig
from loradash.config import matches, unmatched

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("r", [0, -1, 4.5, 8.0, True, "8", None, NAN, np.float32(4), torch.tensor(4)]),
        ("directions", [-1, 2.5, False, "2", None, INF]),
        ("prelaunch_steps", [-1, 100.0, True, None, [3]]),
        ("alpha", [0, -1, NAN, INF, -INF, True, "16", None, 10**400, 1 + 2j, Decimal(3), np.bool_(True)]),
        ("dropout", [-0.1, 1, 1.0, NAN, INF, False, "0.1", None]),
        ("use_rslora", [1, 0, "False", None]),
        ("train_bias", [1, 0.0, "True", None]),
        ("svd", ["lanczos", None, 1, ["auto"]]),
        (
            "target_modules",
            ["", "layer(", "*", [""], ["a", 1], [None], 3, b"ab", {"q": 1}, [b"ab"], "(?P<a", np.array("a")],
        ),
        ("exclude_modules", ["", "[", {"a", ""}, 1.5]),
        ("trainable_modules", ["", "a{2,1}", ("a", None), True]),
        (
            "overrides",
            [None, [("a", {})], {"": {}}, {1: {}}, {"(": {}}, {"a": 4}, {"a": None}, {"a": {"dropout": 0.5}}],
        ),
        (
            "overrides",
            [{"a": {"r": 4.5}}, {"a": {"r": 0}}, {"a": {"alpha": NAN}}, {"a": {"directions": "2"}}, {"a": {1: 2}}],
        ),
    ],
)
def test_refused_values_are_named(setting, values):
    for value in values:
        with pytest.raises(ValueError, match=setting):
            DashConfig(**{setting: value})
        with pytest.raises(ValueError, match=setting):
            DashConfig.from_dict({setting: value})


def test_a_refusal_says_what_was_and_what_was_wanted():
    with pytest.raises(ValueError, match=r"r must be an integer of at least 1, got 4\.5"):
        DashConfig(r=4.5)
    with pytest.raises(ValueError, match=r"overrides\['out'\]\['r'\] must be an integer of at least 1, got True"):
        DashConfig(overrides={"out": {"r": True}})
    with pytest.raises(ValueError, match=r"target_modules must be a regular expression \(.*\), got 'a\('"):
        DashConfig(target_modules="a(")


ACCEPTED = [
    {},
    {"r": np.int64(4), "alpha": np.float32(0.3), "directions": np.uint8(2), "prelaunch_steps": np.int32(0)},
    {"alpha": Fraction(1, 3), "dropout": np.float64(0.1), "use_rslora": np.bool_(True), "svd": np.str_("exact")},
    {"target_modules": {"b", "a"}, "exclude_modules": frozenset("ba"), "trainable_modules": ["z", "a"]},
    {"target_modules": ("b", "a"), "exclude_modules": (n for n in "ba"), "trainable_modules": {"x": 1}.keys()},
    {"target_modules": r".*\.(q|v)_proj", "exclude_modules": [], "trainable_modules": np.array(["a", "b"])},
    {"overrides": {r"b\.\d+": {"r": np.int64(2), "alpha": np.float32(1)}, "a": {"directions": 0}, "c": {}}},
]


@pytest.mark.parametrize("values", ACCEPTED)
def test_what_is_accepted_survives_a_dict_and_json(values):
    if "exclude_modules" in values:
        # A generator serves once.
        values = {**values, "exclude_modules": list(values["exclude_modules"])}
    config = DashConfig(**values)
    assert DashConfig.from_dict(config.to_dict()) == config
    written = json.loads(json.dumps(config.to_dict()))
    assert written == config.to_dict()
    read = DashConfig.from_dict(written)
    assert read == config
    assert dataclasses.replace(config) == config


def test_one_form_whatever_the_container():
    wanted = ["a", "b"]
    for value in ({"b", "a"}, ["a", "b"], ("a", "b"), iter("ab"), np.array(["a", "b"])):
        assert DashConfig(target_modules=value).target_modules == wanted
    assert DashConfig(target_modules=["b", "a"]).target_modules == ["b", "a"]
    assert type(DashConfig(r=np.int64(4)).r) is int
    assert type(DashConfig(alpha=np.float32(2)).alpha) is float
    assert type(DashConfig(alpha=16).alpha) is int


def test_settings_do_not_follow_the_callers_dict():
    given = {"a": {"r": 4}}
    config = DashConfig(overrides=given)
    given["a"]["r"] = 5
    given["b"] = {}
    assert config.overrides == {"a": {"r": 4}}


@pytest.mark.parametrize("values", [None, [], "r", 3, {"rank": 3}, {"r": 3, 7: 1}])
def test_dicts_that_are_no_settings(values):
    with pytest.raises(ValueError, match="settings"):
        DashConfig.from_dict(values)


def test_names_match_whole_or_by_dotted_suffix():
    assert matches("a.q", ["q"]) and matches("q", ("q",)) and not matches("aq", ["q"])
    assert matches("a.q", r".*q") and not matches("a.q", "q") and not matches("a.q", None)


LINEAR = ["encoder.0.q", "encoder.0.v", "head"]
MODULES = ["", "encoder", "encoder.0", *LINEAR]


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({}, []),
        ({"exclude_modules": ["q", "head"], "trainable_modules": ["encoder"], "overrides": {"v": {}}}, []),
        ({"exclude_modules": r".*\.q", "trainable_modules": "enc.*", "overrides": {r".*\d\.v": {}}}, []),
        ({"target_modules": ["q", "query"]}, []),
        ({"exclude_modules": ["q", "lm_head"]}, ["exclude_modules: 'lm_head' matches no linear layer"]),
        ({"exclude_modules": ["encoder"]}, ["exclude_modules: 'encoder' matches no linear layer"]),
        ({"exclude_modules": "q"}, ["exclude_modules: 'q' matches no linear layer"]),
        ({"trainable_modules": ["heads", "score"]}, ["'heads' matches no module", "'score' matches no module"]),
        ({"trainable_modules": "head."}, ["trainable_modules: 'head.' matches no module"]),
        ({"overrides": {"head": {}, "out": {"r": 2}}}, ["overrides: 'out' matches no linear layer"]),
        ({"overrides": {"encoder": {"r": 2}}}, ["overrides: 'encoder' matches no linear layer"]),
    ],
)
def test_settings_that_match_nothing(values, messages):
    found = unmatched(DashConfig(**values), LINEAR, MODULES)
    assert len(found) == len(messages)
    assert all(message in problem for message, problem in zip(messages, found, strict=True))
