"""Prepared data on disk: the same as from the source, mapped, and made anew when the source changes."""

import json
import os
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfed.config import build
from jaxfed.config.schema import config_to_table, make_config
from jaxfed.config.settings import replace_arguments
from jaxfed.data import cache


@pytest.fixture
def section(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "LARGE", 100)
    path = tmp_path / "mine.csv"
    path.write_text(
        "user,item,time\n" + "".join(f"{u},{(u * 7 + i * i) % 40},{i}\n" for u in range(30) for i in range(8))
    )
    return make_config({"data": {"name": "csv", "path": str(path)}}).data


def same(a, b):
    """The same but for what is said of how it was read."""
    a, b = (each._replace(source=each.source._replace(notes=())) for each in (a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def mapped(x):
    while not isinstance(x, np.memmap) and x is not None:
        x = x.obj if isinstance(x, memoryview) else getattr(x, "base", None)
    return isinstance(x, np.memmap)


def test_kept_data_are_the_data_mapped_from_disk(section, monkeypatch):
    want = build.read_data(section)
    same(build.load_data(section), want)
    monkeypatch.setattr(build, "read_data", lambda config: pytest.fail("read again"))
    got = build.load_data(section)
    same(got, want)
    train = got.population.train.values
    assert mapped(train)
    assert not train.flags.writeable


def test_a_changed_file_is_read_again(section):
    build.load_data(section)
    with open(section.path, "a") as file:
        file.write("99,1,0\n99,2,1\n99,3,2\n")
    assert len(build.load_data(section).source.users) == 31


def kept(section):
    return cache.read_cache(cache.cache_place(config_to_table(section)), build.KEPT)


def flip(path, place=0.5, bit=1):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= bit
    path.write_bytes(data)


DAMAGE = {
    "head": lambda folder: (folder / "head.json").write_bytes(b"no JSON"),
    "another JSON": lambda folder: (folder / "head.json").write_text("[]"),
    "no head": lambda folder: os.remove(folder / "head.json"),
    "short": lambda folder: os.truncate(folder / "head.json", 50),
    "missing": lambda folder: os.remove(folder / "0.npy"),
    "a flipped bit": lambda folder: flip(folder / "0.npy", 1.0),
    "a flipped bit in a head": lambda folder: flip(folder / "head.json"),
    "zeros": lambda folder: (folder / "1.npy").write_bytes(bytes((folder / "1.npy").stat().st_size)),
    "a row fewer": lambda folder: os.truncate(folder / "1.npy", (folder / "1.npy").stat().st_size - 8),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_are_made_anew_and_it_is_said(section, damage):
    want = build.read_data(section)
    build.load_data(section)
    folder = cache.cache_place(config_to_table(section))
    DAMAGE[damage](folder)
    assert kept(section)[0] is None
    again = build.load_data(section)
    assert [note for note in again.source.notes if f"prepared data in {folder} were damaged" in note]
    same(again, want)
    same(kept(section)[0], want)
    assert build.load_data(section).source.notes == want.source.notes


def test_no_byte_of_what_is_kept_can_change_unnoticed(section):
    """Of 2,226 damages to what was a pickle and bare arrays, 708 once came back as other data."""
    build.load_data(section)
    folder = cache.cache_place(config_to_table(section))
    random = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in random.random(12):
            flip(path, place, 1 << int(random.integers(8)))
            assert kept(section)[0] is None, (path, place)
            path.write_bytes(whole)
    assert kept(section)[0] is not None


class Trap:
    """A pickle that runs something."""

    def __reduce__(self):
        return os.mkdir, ("PWNED",)


def test_nothing_that_is_read_is_run(section, tmp_path, monkeypatch):
    """Whoever may write to a shared cache could once have anything run."""
    monkeypatch.chdir(tmp_path)
    want = build.read_data(section)
    build.load_data(section)
    folder = cache.cache_place(config_to_table(section))
    for name in ("head", "head.json", "0.npy"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
        same(build.load_data(section), want)
    np.save(folder / "0.npy", np.array([Trap()], object), allow_pickle=True)
    head = json.loads((folder / "head.json").read_text())
    head["files"][0] = [(folder / "0.npy").stat().st_size, cache.stored_file_sha256(folder / "0.npy")]
    head["sha256"] = cache.head_digest(head)
    (folder / "head.json").write_text(json.dumps(head))
    same(build.load_data(section), want)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("how", ["others may write", "another owner"])
def test_a_folder_of_others_is_not_read(section, monkeypatch, how):
    want = build.load_data(section)
    folder = cache.cache_place(config_to_table(section))
    if how == "others may write":
        folder.chmod(0o777)
    else:
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        monkeypatch.setattr(cache, "SYSTEM", -1)
    assert kept(section)[0] is None
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = build.load_data(section)
    same(again, want)
    assert [note for note in again.source.notes if f"prepared data in {folder} are not used" in note]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == [folder.name]  # nothing half-written is left


def test_what_is_kept_is_for_this_user_alone(section):
    old = os.umask(0)
    try:
        build.load_data(section)
    finally:
        os.umask(old)
    assert cache.cache_place(config_to_table(section)).stat().st_mode & 0o777 == 0o700


def test_data_of_another_section_do_not_pass_for_these(section, tmp_path):
    build.load_data(section)
    folder = cache.cache_place(config_to_table(section))
    other = replace_arguments(section, user_core=1)
    folder.rename(cache.cache_place(config_to_table(other)))
    assert kept(other)[0] is None


def test_one_file_is_prepared_once_by_any_of_its_names(section, monkeypatch):
    folder = cache.cache_place(config_to_table(section))
    monkeypatch.chdir(os.path.dirname(section.path))
    assert cache.cache_place(config_to_table(replace_arguments(section, path="mine.csv"))) == folder


def test_no_room_to_keep_them_is_said_and_stops_nothing(section, monkeypatch):
    want = build.read_data(section)

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    again = build.load_data(section)
    same(again, want)
    assert "cannot be kept in" in again.source.notes[-1]
    assert not os.listdir(cache.cache_place(config_to_table(section)).parent)


@pytest.mark.parametrize("more", [{"label": "rating"}, {"cold": 0.2}, {"clients": "device"}, {"clients": "silo"}])
def test_all_that_data_may_hold_comes_back(section, more):
    rows = (f"{u},{(u * 7 + i * i) % 40},{i}\n" for u in range(40) for i in range(8))
    Path(section.path).write_text("user,item,rating\n" + "".join(rows))
    asked = replace_arguments(section, **more)
    want = build.read_data(asked)
    same(build.load_data(asked), want)
    got = kept(asked)[0]
    same(got, want)
    assert type(got.population) is type(want.population)


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(TypeError, match="set cannot be kept"):
        cache.flatten_value({"a": {1}}, [])
    with pytest.raises(TypeError, match="ndarray cannot be kept"):
        cache.flatten_value(np.array([{}], object), [])


def test_every_file_of_the_data_is_looked_at(section, tmp_path):
    """Those that are found beside an .inter, in any form, and the parts of a folder."""

    def place(path):
        return cache.cache_place({"path": str(path)})

    inter, parts = tmp_path / "a.inter", tmp_path / "parts"
    inter.write_text("user_id\titem_id\n")
    parts.mkdir()
    for path, file in ((inter, tmp_path / "a.item.gz"), (inter, tmp_path / "a.USER"), (parts, parts / "0.parquet")):
        before = place(path)
        file.write_text("x")
        assert place(path) != before
        after = place(path)
        file.write_text("xy")
        assert place(path) != after


def test_small_data_are_not_kept(section, monkeypatch):
    monkeypatch.setattr(build, "LARGE", 10_000)
    build.load_data(section)
    assert kept(section) == (None, "")
