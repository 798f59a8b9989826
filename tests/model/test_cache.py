"""The cache of decompositions on disk: found again by its values, and never in the way of a launch."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
import warnings

import loradash
import pytest
import torch
from loradash import DashConfig, SpectralCache, apply_dash, prelaunch
from loradash.cache import STALE_SECONDS
from loradash.fingerprint import FORMAT, fingerprint
from safetensors.torch import load_file, save_file
from support.spectra import gaussian
from torch import nn

from loradash_kernels import task_specific_directions
from loradash_kernels.files import replace_file


@pytest.fixture
def cache(tmp_path):
    return SpectralCache(tmp_path / "spectra")


@pytest.fixture
def from_disk(monkeypatch):
    """Call it: from then on, decompositions come from disk or not at all."""

    def only():
        for name in ("decompose_to_keep", "task_specific_directions"):
            monkeypatch.setattr(f"loradash.cache.{name}", None)

    return only


def same(u, v):
    """The same columns, up to sign and the rounding of a library that is asked twice."""
    return bool(((u * v).sum(-2).abs() > 1 - 1e-4).all())


def assert_same(found, wanted):
    assert found.index.tolist() == wanted.index.tolist()
    assert same(found.u, wanted.u) and same(found.vt.mT, wanted.vt.mT)


@pytest.mark.parametrize(("n", "k"), [(384, 384), (96, 400)])
def test_the_same_directions(cache, n, k, from_disk):
    w, a, b = gaussian(n, k)
    first = cache.directions(w, a, b, 8, 2.0)
    from_disk()
    again = cache.directions(w.clone(), a, b, 8, 2.0)
    assert same(first.u, again.u) and same(first.vt.mT, again.vt.mT)
    assert cache.has(w) and not cache.has(w + 1)
    assert 0 < cache.size() < w.numel() * 4


LAYOUTS = {
    "rows": lambda w: w.clone(),
    # transformers' Conv1D has (K, N) in memory.
    "columns": lambda w: w.t().contiguous().t(),
    "sliced": lambda w: torch.cat((w, w), 1)[:, : w.shape[1]],
    "sliced columns": lambda w: torch.cat((w, w)).t().contiguous().t()[: w.shape[0]],
}


@pytest.mark.parametrize("found_as", LAYOUTS)
@pytest.mark.parametrize("made_as", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), [(48, 48), (20, 60), (60, 20), (1, 7)])
def test_found_in_any_layout(cache, n, k, made_as, found_as, from_disk):
    w, a, b = gaussian(n, k)
    wanted = task_specific_directions(w, a, b, min(n, 4), scaling=2.0)
    assert_same(cache.directions(LAYOUTS[made_as](w), a, b, min(n, 4), 2.0), wanted)
    from_disk()
    assert cache.has(LAYOUTS[found_as](w))
    assert_same(cache.directions(LAYOUTS[found_as](w), a, b, min(n, 4), 2.0), wanted)


@pytest.mark.parametrize("shape", [(48, 48), (32, 48), (48, 32)])
def test_the_transpose_is_another_weight_with_its_own_directions(cache, shape, from_disk):
    """Its sides are swapped, not confused, whatever the shape."""
    w, a, b = gaussian(*shape)
    cache.spectrum(w)
    a, b = b.t(), a.t()
    wanted = task_specific_directions(w.t(), a, b, 4, scaling=2.0)
    from_disk()
    assert_same(cache.directions(w.t().contiguous(), a, b, 4, 2.0), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_found_in_float32_and_back(cache, dtype, from_disk):
    """Both hold the same numbers; rounding them gives others."""
    w, a, b = gaussian(20, 60)
    rounded = w.to(dtype)
    cache.spectrum(rounded)
    wanted = task_specific_directions(rounded.float(), a, b, 4, scaling=2.0)
    from_disk()
    assert not cache.has(w) and not cache.has(rounded.double())
    assert_same(cache.directions(rounded.float(), a, b, 4, 2.0), wanted)
    assert_same(cache.directions(rounded, a, b, 4, 2.0), wanted)


def test_short_tail_is_replaced_for_good(cache):
    """More directions than the tail has triplets: all triplets take its place on disk."""
    w, a, b = gaussian(384, 384)
    assert cache.spectrum(w).route == "tail"
    # The tail has 32 triplets.
    found = cache.directions(w, a, b, 40, 2.0)
    assert found.u.shape == (384, 40)
    assert cache.spectrum(w).route != "tail"


def test_threads_share_a_cache(cache):
    w, a, b = gaussian(96, 400)
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.directions(w, a, b, 8, 2.0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(same(found[0].u, f.u) for f in found)


def trained(**config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    apply_dash(model, DashConfig(r=2, directions=3, **config))
    for layer in loradash.dash_layers(model).values():
        with torch.no_grad():
            layer.lora_b.normal_()
    return model


def assert_launched_alike(model, plain):
    prelaunch(plain, progress=False)
    for ours, theirs in zip(loradash.dash_layers(model).values(), loradash.dash_layers(plain).values(), strict=True):
        assert bool(ours.launched)
        assert same(ours.dash_u, theirs.dash_u) and same(ours.dash_vt.mT, theirs.dash_vt.mT)


def test_prelaunch_through_a_cache(cache, from_disk):
    model, again, plain = trained(), trained(), trained()
    prelaunch(model, progress=False, cache=cache)
    assert len(list(cache.folder.iterdir())) == 3
    assert_launched_alike(model, plain)
    from_disk()
    prelaunch(again, progress=False, cache=cache)
    assert all(layer.launched for layer in loradash.dash_layers(again).values())


def launch_with(cache):
    """A whole launch. Returns the warnings."""
    model = trained()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prelaunch(model, progress=False, cache=cache)
        plain = trained()
        assert_launched_alike(model, plain)
    texts = [str(w.message) for w in said if "loradash" in str(w.message)]
    assert all(text.startswith("loradash: ") for text in texts)
    return texts


FOLDERS = {
    "below a file": lambda tmp_path: tmp_path / "file" / "cache",
    "a file": lambda tmp_path: tmp_path / "file",
    "no name": lambda tmp_path: tmp_path / "null\0byte",
    "too long": lambda tmp_path: tmp_path / ("x" * 300),
    "a loop": lambda tmp_path: tmp_path / "loop" / "cache",
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_impossible_folders(tmp_path, kind):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cache = SpectralCache(FOLDERS[kind](tmp_path))
    said = launch_with(cache)
    assert len(said) == 1 and "cannot be written" in said[0]
    assert cache.size() == 0 and not cache.has(torch.ones(3, 4))
    with pytest.raises((OSError, ValueError)):
        cache.keep(torch.randn(3, 4))


def fails(number):
    def failing(*_args, **_options):
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize("call", ["os.open", "os.fsync", "os.replace", "pathlib.Path.write_bytes"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_disks_that_take_nothing(cache, monkeypatch, call, number):
    """Full, read-only, of another user: three layers, one warning."""
    monkeypatch.setattr(call, fails(number))
    said = launch_with(cache)
    assert len(said) == 1 and os.strerror(number) in said[0] and str(cache.folder) in said[0]


def test_files_that_cannot_be_read(cache, monkeypatch):
    launch_with(cache)
    monkeypatch.setattr("loradash.cache.safe_open", fails(errno.EACCES))
    said = launch_with(cache)
    assert len(said) == 1 and "cannot be read" in said[0]


def test_folder_that_may_not_be_entered(cache, monkeypatch):
    launch_with(cache)
    monkeypatch.setattr("pathlib.Path.is_file", fails(errno.EACCES))
    monkeypatch.setattr("os.scandir", fails(errno.EACCES))
    assert launch_with(cache) == [] and cache.size() == 0


def test_times_that_may_not_be_set(cache, monkeypatch, from_disk):
    """A shared cache of another user: its files are used all the same."""
    launch_with(cache)
    model, plain = trained(), trained()
    prelaunch(plain, progress=False)
    monkeypatch.setattr(os, "utime", fails(errno.EPERM))
    from_disk()
    with pytest.warns(UserWarning, match="loradash: .* cannot be noted") as said:
        prelaunch(model, progress=False, cache=cache)
    assert len(said) == 1 and all(layer.launched for layer in loradash.dash_layers(model).values())


def test_files_that_cannot_be_deleted(tmp_path, monkeypatch):
    cache = SpectralCache(tmp_path, max_bytes=1)
    monkeypatch.setattr("pathlib.Path.unlink", fails(errno.EPERM))
    said = launch_with(cache)
    assert len(said) == 1 and "cannot be deleted" in said[0]


def test_user_without_a_home(monkeypatch):
    monkeypatch.delenv("LORADASH_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert SpectralCache().folder.name == "spectra"
    monkeypatch.setenv("LORADASH_CACHE", "elsewhere")
    assert SpectralCache().folder.parts == ("elsewhere", "spectra")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty", "no tensors", "shape", "old", "folder"])
def test_damaged_files_are_made_anew(cache, damage):
    w, a, b = gaussian(96, 400)
    before = cache.directions(w, a, b, 8, 2.0)
    (file,) = cache.folder.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-10] ^= 64
    elif damage == "shape":
        # The file is sound, and another weight's.
        cache.spectrum(gaussian(20, 30)[0])
        (other,) = set(cache.folder.iterdir()) - {file}
        data = other.read_bytes()
    elif damage == "old":
        save_file(load_file(file), file, metadata={"format": "loradash-spectrum-1"})
        data = file.read_bytes()
    elif damage == "no tensors":
        save_file({}, file, metadata={"format": FORMAT, "route": "tail", "checksum": "none"})
        data = file.read_bytes()
    file.write_bytes({"truncated": data[: len(data) // 2], "text": b"not a tensor", "empty": b""}.get(damage, data))
    if damage == "folder":
        file.unlink()
        file.mkdir()
        # There is nothing to read either, which is no reason to warn.
        with pytest.warns(UserWarning, match="loradash: .* cannot be written"):
            assert same(cache.directions(w, a, b, 8, 2.0).u, before.u)
        return
    with pytest.warns(UserWarning, match="loradash: .* is damaged"):
        after = cache.directions(w, a, b, 8, 2.0)
    assert same(before.u, after.u)
    # The new file is whole.
    assert same(cache.directions(w, a, b, 8, 2.0).u, before.u)


def test_triplets_of_another_weight_are_not_used(cache):
    """A sound file under the wrong name: its triplets fail the check against W, and W is decomposed."""
    w, a, b = gaussian(96, 400)
    other, _, _ = gaussian(96, 400, seed=1)
    cache.spectrum(other)
    (file,) = cache.folder.iterdir()
    file.rename(cache.folder / f"{fingerprint(w).itself}.safetensors")
    with pytest.warns(UserWarning, match="loradash: .*fails its check"):
        found = cache.directions(w, a, b, 8, 2.0)
    assert_same(found, task_specific_directions(w, a, b, 8, scaling=2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.full((6, 8), torch.nan)}, "weight has values that are not finite"),
        ({"weight": torch.zeros(6)}, "weight has shape"),
        ({"lora_a": torch.full((2, 8), torch.inf)}, "lora_a has values that are not finite"),
        ({"lora_b": torch.zeros(5, 2)}, "lora_b has shape"),
        ({"s": 0}, "s is 0"),
        ({"s": 7}, "s is 7"),
    ],
)
def test_bad_input_raises(cache, changes, message):
    args = {"weight": torch.randn(6, 8), "lora_a": torch.ones(2, 8), "lora_b": torch.ones(6, 2), "s": 2}
    with pytest.raises(ValueError, match=message):
        cache.directions(**{**args, "scaling": 1.0, **changes})


def test_size_is_bounded(tmp_path):
    weights = [gaussian(96, 400, seed=s)[0] for s in range(5)]
    one = SpectralCache(tmp_path / "one")
    one.spectrum(weights[0])
    cache = SpectralCache(tmp_path / "many", max_bytes=int(2.5 * one.size()))
    for i, w in enumerate(weights):
        cache.spectrum(w)
        os.utime(cache.folder / f"{fingerprint(w).itself}.safetensors", (i, i))
        assert cache.size() <= cache.max_bytes
    assert [cache.has(w) for w in weights] == [False, False, False, True, True]


@pytest.mark.parametrize("max_bytes", [0, 10**9, 100_000])
def test_halves_of_files(tmp_path, max_bytes):
    """What killed processes left is deleted after a day; what somebody may be writing counts and stays."""
    cache = SpectralCache(tmp_path, max_bytes=max_bytes)
    w, later = gaussian(20, 60)[0], gaussian(20, 60, seed=1)[0]
    cache.spectrum(w)
    whole = cache.size()
    now = time.time()
    for name, age in (("a", STALE_SECONDS + 60), ("b", STALE_SECONDS - 600), ("c", 0)):
        half = tmp_path / f"{name * 40}.safetensors{name}.partial"
        half.write_bytes(bytes(60_000))
        os.utime(half, (now - age, now - age))
    assert cache.size() == whole + 180_000
    cache.spectrum(later)
    assert sorted(f.name[0] for f in tmp_path.glob("*.partial")) == ["b", "c"]
    assert cache.has(later) and cache.has(w) == (max_bytes != 100_000)


def test_only_its_own_files_are_counted_and_deleted(tmp_path):
    """A folder that holds a model, and downloads under way."""
    foreign = [tmp_path / name for name in ("model.safetensors", "model.safetensors.partial", "notes.txt")]
    for file in foreign:
        file.write_bytes(bytes(1000))
        os.utime(file, (0, 0))
    cache = SpectralCache(tmp_path, max_bytes=1)
    assert cache.size() == 0
    for seed in range(3):
        cache.spectrum(gaussian(20, 60, seed=seed)[0])
    assert all(file.is_file() for file in foreign)
    assert len(list(tmp_path.iterdir())) == len(foreign) + 1


def test_nothing_is_left_of_a_write_that_failed(cache, monkeypatch):
    monkeypatch.setattr(os, "replace", fails(errno.ENOSPC))
    with pytest.warns(UserWarning, match="not kept"):
        cache.spectrum(torch.randn(6, 8))
    assert list(cache.folder.iterdir()) == []


def test_mode_of_files_is_that_of_every_new_file(cache, tmp_path):
    """Whatever `replace_file` gives to adapters, spectra get too."""
    replace_file(tmp_path / "other", lambda name: open(name, "w").close())
    cache.spectrum(torch.randn(6, 8))
    (file,) = cache.folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
