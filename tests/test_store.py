"""Prepared data on disk: the same as from the source, mapped, and made anew when the source changes."""

import os

import jax
import numpy as np
import pytest

from jaxfed import experiment
from jaxfed.config import config_of
from jaxfed.data import store


@pytest.fixture
def section(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(experiment, "LARGE", 100)
    path = tmp_path / "mine.csv"
    path.write_text(
        "user,item,time\n" + "".join(f"{u},{(u * 7 + i * i) % 40},{i}\n" for u in range(30) for i in range(8))
    )
    return config_of({"data": {"name": "csv", "path": str(path)}}).data


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def mapped(x):
    while not isinstance(x, np.memmap) and x is not None:
        x = x.obj if isinstance(x, memoryview) else getattr(x, "base", None)
    return isinstance(x, np.memmap)


def test_kept_data_are_the_data_mapped_from_disk(section, monkeypatch):
    want = experiment.read(section)
    same(experiment.load(section), want)
    monkeypatch.setattr(experiment, "read", lambda config: pytest.fail("read again"))
    got = experiment.load(section)
    same(got, want)
    train = got.population.train.values
    assert mapped(train)
    assert not train.flags.writeable


def test_a_changed_file_is_read_again(section):
    experiment.load(section)
    with open(section.path, "a") as file:
        file.write("99,1,0\n99,2,1\n99,3,2\n")
    assert len(experiment.load(section).source.users) == 31


@pytest.mark.parametrize("damage", ["head", "missing", "short"])
def test_damaged_data_are_made_anew(section, damage):
    want = experiment.load(section)
    folder = store.place(experiment.dataclasses.asdict(section))
    if damage == "head":
        (folder / "head").write_bytes(b"no pickle")
    elif damage == "missing":
        os.remove(folder / "0")
    else:
        (folder / "head").write_bytes((folder / "head").read_bytes()[:-20])
    same(experiment.load(section), want)
    same(store.kept(folder), want)


def test_every_file_of_the_data_is_looked_at(section, tmp_path):
    """Those that are found beside an .inter, in any form, and the parts of a folder."""

    def place(path):
        return store.place({"path": str(path)})

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
    monkeypatch.setattr(experiment, "LARGE", 10_000)
    experiment.load(section)
    assert store.kept(store.place(experiment.dataclasses.asdict(section))) is None
