"""Adapters on disk: round trips, resuming in both phases, files that are damaged or do not fit, merged and sharded models."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap

import loradash
import pytest
import torch
from loradash import AdapterError, DashConfig, DashSchedule, apply_dash, load_adapter, save_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))


CONFIG = DashConfig(r=3, directions=2, prelaunch_steps=4, trainable_modules=["4"], overrides={"2": {"r": 5}})
X, LABELS = torch.randn(16, 20, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def train(model, steps, momentum=None):
    schedule = DashSchedule(model, progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
        schedule.step()
    return model


def trained(steps=6):
    return train(apply_dash(network(), CONFIG), steps)


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("adapted", [False, True])
def test_round_trip(tmp_path, steps, adapted):
    model = trained(steps)
    file = save_adapter(model, tmp_path)
    other = apply_dash(network(), CONFIG) if adapted else network()
    load_adapter(other, file)
    assert torch.equal(other(X), model(X))
    assert loradash.dash_state(other).step == steps
    assert loradash.dash_state(other).config == CONFIG
    assert [bool(x.launched) for x in loradash.dash_layers(other).values()] == [steps >= 4] * 2


@pytest.mark.parametrize("cut", [2, 5])
def test_resumed_training_is_the_same_training(tmp_path, cut):
    """Stopped before or after launch and resumed: bit for bit the weights of a run that was not stopped."""
    whole = trained(8)
    resumed = train(load_adapter(network(), save_adapter(trained(cut), tmp_path)), 8 - cut)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_paths(tmp_path):
    model = trained()
    assert save_adapter(model, tmp_path / "deep" / "folder").name == "loradash_adapter.safetensors"
    assert save_adapter(model, tmp_path / "one.safetensors") == tmp_path / "one.safetensors"
    load_adapter(network(), tmp_path / "deep" / "folder")


def damaged(tmp_path, kind):
    file = save_adapter(trained(), tmp_path / "a.safetensors")
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("{'a': 1}" * 100)
    elif kind == "foreign":
        save_file({"a": torch.zeros(2)}, file, metadata={"format": "pt"})
    elif kind == "missing":
        file.unlink()
    return file


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "foreign", "missing"])
@pytest.mark.parametrize("adapted", [False, True])
def test_damaged_files(tmp_path, kind, adapted):
    file = damaged(tmp_path, kind)
    model = apply_dash(network(), CONFIG) if adapted else network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        load_adapter(model, file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert adapted == any(isinstance(m, loradash.DashLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(20, 31), nn.Tanh(), nn.Linear(31, 20), nn.Tanh(), nn.Linear(20, 3)),
            "has shape",
        ),
        (lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20)), "has no place|does not fit"),
        (
            lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Linear(20, 9), nn.Linear(9, 3)),
            "missing|shape",
        ),
        (lambda: apply_dash(network(), DashConfig(r=2)), "shape|missing|place"),
    ],
)
def test_other_models(tmp_path, other, message):
    file = save_adapter(trained(), tmp_path)
    model = other()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    file = save_adapter(trained(2), tmp_path)
    before = file.read_bytes()

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(6), tmp_path)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_trained_biases_travel(tmp_path):
    config = DashConfig(r=2, directions=1, prelaunch_steps=2, train_bias=True)
    model = train(apply_dash(network(), config), 3)
    assert torch.equal(load_adapter(network(), save_adapter(model, tmp_path))(X), model(X))
    with pytest.raises(ValueError, match="train_bias"):
        loradash.export_lora(model, tmp_path)


def test_no_adapters(tmp_path):
    with pytest.raises(ValueError, match="apply_dash"):
        save_adapter(network(), tmp_path)


# --- headers ---------------------------------------------------------------------------------------------------------

GOOD = {"config": CONFIG.to_dict(), "step": 6, "dash_only": False}


def rewritten(tmp_path, header=None, tensors=None, **about):
    """An adapter file with another header, or with some of its tensors replaced."""
    file = save_adapter(trained(), tmp_path / "a.safetensors")
    text = json.dumps({**GOOD, **about}) if header is None else header
    save_file({**load_file(file), **(tensors or {})}, file, metadata={"format": "loradash-1", "loradash": text})
    return file


def refused(file, message, model=None):
    """Loading raises an AdapterError that names the file, and leaves the model, adapted or not, as it was."""
    for victim in (network(), trained(3)) if model is None else (model,):
        before = {k: v.clone() for k, v in victim.state_dict().items()}
        state = getattr(victim, "_loradash_state", None)
        remembered = state and (state.config, state.step, state.dash_only)
        with pytest.raises(AdapterError, match=message) as caught:
            load_adapter(victim, file)
        assert str(file) in str(caught.value)
        after = victim.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(v, before[k]) for k, v in after.items())
        assert (state and (state.config, state.step, state.dash_only)) == remembered


@pytest.mark.parametrize(
    "header",
    ["", "{", "[]", "null", "3", '"a"', "[" * 100_000, "{}", '{"config": {}}', '{"config": [], "step": 1}', "\ud800"],
)
def test_headers_that_are_no_settings(tmp_path, header):
    refused(rewritten(tmp_path, header.encode("utf-8", "replace").decode()), "cannot be read")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"step": -1}, "step must be an integer of at least 0, got -1"),
        *(({"step": value}, "step must be") for value in (1.5, "3", True, None, [1], {})),
        *(({"dash_only": value}, "dash_only must be") for value in (1, "true", None)),
        *(({"config": value}, "settings must be") for value in (None, 3, "r", [["r", 3]])),
        ({"config": {"rank": 3}}, "unknown settings"),
        ({"config": {"r": "3"}}, "r must be"),
        ({"config": {"alpha": float("nan")}}, "alpha must be"),
        ({"config": {"target_modules": "a("}}, "target_modules must be a regular expression"),
        ({"config": {"overrides": {"(": {"r": 3}}}}, "overrides must be a regular expression"),
        ({"config": {"overrides": {"2": {"r": None}}}}, "overrides"),
        ({"config": {**GOOD["config"], "target_modules": ["nope"]}}, "fit the model: .*(is no target|has no place)"),
        ({"config": {**GOOD["config"], "r": 4}}, r"fit the model: 0.lora_a .* \(4, 20\)"),
        ({"config": {**GOOD["config"], "overrides": {}}}, r"fit the model: 2.lora_a .* \(3, 30\)"),
        ({"config": {**GOOD["config"], "directions": 1}}, r"fit the model: 0.dash_sigma .* \(1,\)"),
        ({"config": {**GOOD["config"], "train_bias": True}}, "0.bias is (missing|kept by one alone)"),
        ({"config": {**GOOD["config"], "trainable_modules": None}}, "4.bias (has no place|is kept by one alone)"),
    ],
)
def test_settings_in_a_file_are_checked(tmp_path, about, message):
    refused(rewritten(tmp_path, **about), message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"0.lora_a": torch.full((3, 20), float("nan"))}, "0.lora_a is not finite"),
        ({"0.dash_sigma": torch.tensor([1, float("inf")])}, "0.dash_sigma is not finite"),
        ({"0.lora_a": torch.zeros(3, 20, dtype=torch.int32)}, "0.lora_a is torch.int32, the model wants torch.float32"),
        ({"0.lora_a": torch.full((3, 20), 1e300, dtype=torch.float64)}, "overflows"),
        ({"0.launched": torch.tensor(2)}, "0.launched is torch.int64"),
        ({"0.launched": torch.tensor([True])}, "0.launched has shape"),
        ({"0.lora_c": torch.zeros(2)}, "0.lora_c has no place"),
    ],
)
def test_tensors_in_a_file_are_checked(tmp_path, tensors, message):
    refused(rewritten(tmp_path, tensors=tensors), message)


def test_files_of_before_dash_only_was_kept(tmp_path):
    file = rewritten(tmp_path, json.dumps({"config": CONFIG.to_dict(), "step": 6}))
    assert not loradash.dash_state(load_adapter(network(), file)).dash_only


def test_folders_in_the_place_of_files(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    refused(tmp_path / "a.safetensors", "cannot be read")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "a.safetensors", "cannot be read")
    with pytest.raises(OSError, match="file"):
        save_adapter(trained(), tmp_path / "file" / "a.safetensors")


def test_an_adapter_too_large_for_half_precision(tmp_path):
    big = trained()
    big[0].lora_b.data[0, 0] = 1e5
    big[4].weight.data[0, 0] = -1e5
    file = save_adapter(big, tmp_path / "a.safetensors")
    for adapted in (False, True):
        half = (trained(3) if adapted else network()).half()
        refused(file, "4.weight is torch.float32, the model wants torch.float16, which overflows", half)
    fitting = load_adapter(trained(3).half(), save_adapter(trained(), tmp_path / "b"))
    assert torch.equal(fitting[0].lora_b, trained()[0].lora_b.half())


# --- models that cannot take an adapter, or only with care ------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_without_values_is_refused(tmp_path, adapted):
    file = save_adapter(trained(), tmp_path)
    model = network().to("meta")
    if adapted:
        apply_dash(model, CONFIG)
    with pytest.raises(AdapterError, match=r"meta.*0\..*materialise"):
        load_adapter(model, file)
    assert adapted == isinstance(model[0], loradash.DashLinear)


def test_a_whole_module_without_values_is_refused(tmp_path):
    file = save_adapter(trained(), tmp_path)
    model = network()
    model[4].to("meta")
    with pytest.raises(AdapterError, match=r"meta.*4\.weight"):
        load_adapter(model, file)
    assert type(model[0]) is nn.Linear


def test_models_that_cannot_be_copied(tmp_path):
    """A generator, a local hook and a tensor with a history: none of them concerns the adapter."""
    model = network()
    model.generator = torch.Generator()
    model.history = (torch.ones(2, requires_grad=True) * 2,)
    model[1].register_forward_hook(lambda *_: None)
    assert torch.equal(load_adapter(model, save_adapter(trained(), tmp_path))(X), trained()(X))


@pytest.mark.parametrize("kind", ["first", "second"])
def test_a_merged_model_takes_another_adapter(tmp_path, kind):
    model, new = trained(6), trained(8 if kind == "first" else 3)
    file = save_adapter(new, tmp_path)
    loradash.merge(model)
    load_adapter(model, file)
    assert all(layer.merged for layer in loradash.dash_layers(model).values())
    torch.testing.assert_close(model(X), new(X), rtol=1e-5, atol=1e-5)
    loradash.unmerge(model)
    assert torch.equal(model(X), new(X))


def test_a_merge_that_fails_leaves_the_old_adapter_merged(tmp_path, monkeypatch):
    model, file = trained(6), save_adapter(trained(8), tmp_path)
    loradash.merge(model)
    before, outputs, state = {k: v.clone() for k, v in model.state_dict().items()}, model(X), loradash.dash_state(model)
    whole, failures = loradash.DashLinear.merge, ["once"]

    def failing(layer):
        if layer is model[2] and failures:
            raise ValueError(f"overflows {failures.pop()}")
        whole(layer)

    monkeypatch.setattr(loradash.DashLinear, "merge", failing)
    with pytest.raises(AdapterError, match=r"cannot be merged.*overflows once"):
        load_adapter(model, file)
    assert all(layer.merged for layer in loradash.dash_layers(model).values())
    assert torch.equal(model(X), outputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (state.step, state.config) == (6, CONFIG)


def test_a_merged_model_saves_the_same_file(tmp_path):
    config = DashConfig(r=2, directions=1, prelaunch_steps=2, train_bias=True, trainable_modules=["4"])
    model = train(apply_dash(network(), config), 3)
    plain = load_file(save_adapter(model, tmp_path / "plain"))
    loradash.merge(model)
    merged = load_file(save_adapter(model, tmp_path / "merged"))
    assert plain.keys() == merged.keys() and {"0.bias", "4.weight"} <= plain.keys()
    assert all(torch.equal(t, merged[k]) for k, t in plain.items())


def test_tied_modules_are_saved_and_loaded(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
        model[2].weight = model[1].weight
        return model

    model = apply_dash(tied(), DashConfig(r=2, directions=1, trainable_modules=["1", "2"]))
    model[2].weight.data.normal_()
    other = load_adapter(tied(), save_adapter(model, tmp_path))
    assert other[2].weight is other[1].weight
    assert torch.equal(other[1].weight, model[1].weight)


def test_state_that_is_no_tensor_is_named(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    model = apply_dash(nn.Sequential(nn.Linear(4, 4), Odd(4, 4)), DashConfig(r=2, trainable_modules=["1"]))
    with pytest.raises(ValueError, match=r"1\._extra_state is a dict"):
        save_adapter(model, tmp_path)


def test_names_do_not_depend_on_wrappers(tmp_path):
    """Blocks that were compiled or checkpointed after apply_dash: the file fits a plain model, and the other way round."""
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper").checkpoint_wrapper

    def wrapped(model):
        model[0], model[4] = torch.compile(model[0], backend="eager"), torch.compile(model[4], backend="eager")
        model[2] = wrapper(model[2])
        return model

    plain = trained()
    file = save_adapter(wrapped(trained()), tmp_path / "wrapped")
    assert load_file(file).keys() == load_file(save_adapter(plain, tmp_path / "plain")).keys()
    assert torch.equal(load_adapter(network(), file)(X), plain(X))
    other = wrapped(trained(2))
    load_adapter(other, file)
    assert torch.equal(other[0].lora_b, plain[0].lora_b) and torch.equal(other[4].weight, plain[4].weight)
    assert other[2].config.r == 5


def test_parameters_in_pieces_are_not_saved(tmp_path):
    model = trained()
    model[0].lora_a = nn.Parameter(model[0].lora_a.detach().flatten()[:7])  # what FSDP1 leaves between two forwards
    with pytest.raises(ValueError, match=r"0\.lora_a has shape \(7,\), wanted \(3, 20\).*summon_full_params"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


# --- state -----------------------------------------------------------------------------------------------------------


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_dash_only_travels(tmp_path):
    model = trained()
    loradash.dash_only(model)
    file = save_adapter(model, tmp_path / "only")
    assert trains(model) == {"0.dash_sigma", "2.dash_sigma", "4.weight", "4.bias"}
    for other in (network(), trained(2)):
        load_adapter(other, file)
        assert trains(other) == trains(model) and loradash.dash_state(other).dash_only
    everything = trained()
    load_adapter(model, save_adapter(everything, tmp_path / "all"))
    assert trains(model) == trains(everything) and not loradash.dash_state(model).dash_only


def test_loading_thaws_nothing_that_the_user_froze(tmp_path):
    model = trained().requires_grad_(False)
    load_adapter(model, save_adapter(trained(3), tmp_path))
    assert not trains(model)


def test_a_schedule_made_before_loading_counts_on(tmp_path):
    model = apply_dash(network(), CONFIG)
    schedule, state = DashSchedule(model, progress=False), loradash.dash_state(model)
    load_adapter(model, save_adapter(trained(2), tmp_path))
    schedule.step()
    assert loradash.dash_state(model) is state and state.step == 3


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o027, 0o640)])
def test_files_take_the_permissions_of_new_ones(tmp_path, mask, mode):
    model, old = trained(), os.umask(mask)
    try:
        file = save_adapter(model, tmp_path)
        file.chmod(0o600)
        save_adapter(model, tmp_path)
        loradash.export_lora(model, tmp_path / "peft")
    finally:
        os.umask(old)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.rglob("*") if f.is_file()}
    assert len(modes) == 3 and set(modes.values()) == {mode}


def test_no_settings_can_make_a_file_that_does_not_load(tmp_path):
    numpy = pytest.importorskip("numpy")
    config = DashConfig(
        r=numpy.int64(3), alpha=numpy.float32(0.3), target_modules={"2", "0"}, exclude_modules=frozenset({"4"}),
        overrides={"2": {"r": numpy.int32(5), "alpha": numpy.float64(2)}},
    )  # fmt: skip
    model = train(apply_dash(network(), config), 2)
    file = save_adapter(model, tmp_path)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["loradash"])["config"] == config.to_dict()
    other = load_adapter(network(), file)
    assert loradash.dash_state(other).config == config
    assert torch.equal(other(X), model(X))


# --- sharded ---------------------------------------------------------------------------------------------------------

SHARDED = """
import sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import loradash
from loradash import DashConfig, DashSchedule, apply_dash, export_lora, load_adapter, save_adapter

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
config = DashConfig(r=3, directions=3, prelaunch_steps=2, trainable_modules=["4"], train_bias=True)  # 3 rows: uneven shards

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))

def sharded(layers):
    model = apply_dash(network(), config)
    for layer in (model[0], model[2], model[4]) if layers else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

x = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
for layers in (True, False):  # of the root's own parameters, a forward leaves gathered copies behind
    model = sharded(layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    schedule = DashSchedule(model, progress=False)
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        y = model(x)
    mine = save_adapter(model, f"{folder}/{layers}{rank}.safetensors")
    common = save_adapter(model, f"{folder}/{layers}.safetensors")
    dist.barrier()
    files = [f"{folder}/{layers}{name}.safetensors" for name in ("0", "1", "")]
    assert len({open(f, "rb").read() for f in files}) == 1, "the processes wrote different files"
    plain = load_adapter(network(), mine)
    torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)
    again = sharded(layers)
    with torch.no_grad():
        again(x)
    load_adapter(again, common)
    assert type(again[0].lora_a).__name__ == "DTensor"
    with torch.no_grad():
        torch.testing.assert_close(again(x), y, rtol=1e-5, atol=1e-5)
    loradash.dash_state(again).config = loradash.dash_state(plain).config = DashConfig(
        **{**config.to_dict(), "train_bias": False}
    )
    export_lora(again, f"{folder}/sharded{layers}{rank}")
    export_lora(plain, f"{folder}/plain{layers}{rank}")
    one, two = (open(f"{folder}/{k}{layers}{rank}/adapter_model.safetensors", "rb").read() for k in ("sharded", "plain"))
    assert one == two
print("done")
sys.stdout.flush()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_models_save_load_and_export(tmp_path):
    """FSDP2 in two processes: files have whole tensors, each process takes its shards back."""
    pytest.importorskip("torch.distributed.fsdp")
    (tmp_path / "script.py").write_text(textwrap.dedent(SHARDED))
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(rank), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 and "done" in text for p, text in zip(processes, outputs, strict=True)), outputs
