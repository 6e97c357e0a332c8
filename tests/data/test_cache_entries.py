"""What is kept on disk is listed, and removed without touching anything else."""

import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from jaxfed.cli.main import main
from jaxfed.config import build
from jaxfed.config.schema import make_config
from jaxfed.data import cache_entries
from jaxfed.data.cache_entries import clear_cache, list_cache
from jaxfed.data.sources import movielens_files


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache with one of each kind."""
    root = tmp_path / "cache"
    monkeypatch.setenv("JAXFED_DATA", str(root))
    monkeypatch.setattr(build, "LARGE", 100)
    path = tmp_path / "mine.csv"
    path.write_text("user,item\n" + "".join(f"{u},{(u * 7 + i * i) % 40}\n" for u in range(30) for i in range(8)))
    build.load_data(make_config({"data": {"name": "csv", "path": str(path), "user_core": 2}}).data)
    for name in ("ml-100k/u.data", "ml-100k/SHA256SUMS", "tfds/00112233aabbccdd/jaxfed_ml100k/1.1.0/x.array_record"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x" * 100)
    (root / "ml-100k/SHA256SUMS").write_text(f"{'0' * 64}  u.data\n")
    (root / "xla").mkdir()
    (root / f"xla/jit_f-{'a1' * 32}-cache").write_text("program")
    (root / f"xla/jit_f-{'a1' * 32}-atime").write_text("now")
    return root


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["jaxfed", "data", *map(str, words)])
    main()


def files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}


def test_each_kind_is_listed_with_size_time_and_origin(root, monkeypatch, capsys, tmp_path):
    old = time.mktime((2024, 5, 6, 7, 8, 0, 0, 0, -1))
    for path in root.rglob("*"):
        os.utime(path, (old, old))
    entries = list_cache()
    assert [(entry.kind, entry.folder.name) for entry in entries[1:]] == [
        ("fetched", "ml-100k"),
        ("fetched", "00112233aabbccdd"),
        ("programs", "xla"),
    ]
    assert entries[0].size == sum(path.stat().st_size for path in entries[0].folder.iterdir())
    assert [entry.size for entry in entries[1:]] == [173, 100, 10]
    run(monkeypatch, "--cache")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"2024-05-06 07:08  {tmp_path}/mine.csv, user_core 2")
    assert re.fullmatch(r"fetched   ml-100k {11}173 bytes  2024-05-06 07:08", lines[1])
    assert lines[2].endswith("ml-100k, as tensorflow-datasets keeps it")
    assert lines[3].endswith("2 files of programs that JAX compiled")
    assert lines[4].startswith(f"{sum(entry.size for entry in entries) / 1e3:.1f} kB in {root}; ")


def test_text_models_and_vectors_are_listed_and_removed(root, monkeypatch):
    """What somebody else put beside them stays."""
    for name in ("minilm/model.safetensors", "minilm/notes.txt", f"text/{'ab' * 16}.npy", "text/tmpab_1.part"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x" * 100)
    (root / "text/other.npy").write_text("x")
    found = {entry.folder.name: (entry.kind, entry.size, entry.others) for entry in list_cache()}
    assert found["minilm"] == ("fetched", 100, 1)
    assert found["text"] == ("prepared", 200, 1)
    run(monkeypatch, "--cache", "clear")
    assert files(root) == {"minilm/notes.txt", "text/other.npy"}


def test_all_is_removed_and_it_is_said(root, monkeypatch, capsys):
    run(monkeypatch, "--cache", "clear")
    assert files(root) == set()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[:-1]] == [
        ["removed", kind] for kind in ("prepared", "fetched", "fetched", "programs")
    ]
    assert said[-1].endswith(f"removed from {root}")
    run(monkeypatch, "--cache")
    assert capsys.readouterr().out.startswith("0 bytes in ")


def test_one_kind_is_removed_alone(root, monkeypatch):
    before = files(root)
    run(monkeypatch, "--cache", "clear", "programs")
    assert before - files(root) == {each for each in before if each.startswith("xla/")}


def test_what_is_not_ours_stays(root, monkeypatch, capsys):
    prepared = next((root / "prepared").iterdir())
    outside = root.parent / "outside"
    shutil.copytree(prepared, outside)
    own = [
        "notes.txt",
        "prepared/thesis/0.npy",
        "prepared/0.npy",
        "xla/model.bin",
        "tfds/my_data/1.0.0/a",
        "ml-100k/README",
    ]
    own += [
        f"prepared/{prepared.name}/more.npy",
        "tfds/00112233aabbccdd/other/b",
        "ml-100k-old/u.data",
        "ml-100k/u.item",
    ]
    for name in own:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    (root / "prepared" / ("ab" * 12)).symlink_to(outside)
    (prepared / "99.npy").symlink_to(outside / "0.npy")
    own += [f"prepared/{'ab' * 12}", f"prepared/{prepared.name}/99.npy"]
    run(monkeypatch, "--cache", "clear")
    assert files(root) == set(own)
    assert len(list(outside.iterdir())) > 5
    said = capsys.readouterr().out
    assert said.count("(2 other files or folders stay in it)") == 2
    assert said.count("(1 other file or folder stays in it)") == 2


def test_a_copy_of_movielens_that_a_user_put_there_is_not_ours(tmp_path, monkeypatch):
    """Only what was fetched: it has a list of its sums, or is to the byte what earlier versions fetched."""
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    for name in ("u.data", "u.item", "u.user", "ml-100k.inter"):
        (folder / name).write_text("mine")
    assert list_cache(tmp_path) == []
    known = movielens_files.KNOWN | {"ml-100k.inter": movielens_files.file_sha256(folder / "ml-100k.inter")}
    monkeypatch.setattr(cache_entries, "KNOWN", known)
    assert [[part.name for part in entry.parts] for entry in list_cache(tmp_path)] == [["ml-100k.inter"]]


def test_what_another_process_may_be_writing_is_kept(root, monkeypatch, capsys):
    partial = root / "prepared" / f"{'cd' * 12}.xyz_12.partial"
    partial.mkdir()
    (partial / "0.npy").write_text("half")
    run(monkeypatch, "--cache", "clear", "prepared")
    assert (partial / "0.npy").exists()
    assert "kept prepared" in (said := capsys.readouterr().out)
    assert "another process may be writing it" in said
    old = time.time() - 2 * cache_entries.BEING_WRITTEN
    for path in (partial / "0.npy", partial):
        os.utime(path, (old, old))
    run(monkeypatch, "--cache", "clear", "prepared")
    assert not partial.exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users have no numbers here")
def test_what_belongs_to_another_user_is_kept(root, monkeypatch):
    before, user = files(root), os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert {left for _, left in clear_cache(list_cache())} == {"it belongs to another user"}
    assert files(root) == before


def test_what_cannot_be_removed_is_said(root, monkeypatch):
    def refuse(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert all("cannot be removed: Permission denied" in left for _, left in clear_cache(list_cache()))


def test_a_cache_that_is_cleared_twice_at_once_is_no_error(root):
    entries = list_cache()
    assert [left for _, left in clear_cache(entries)] == [left for _, left in clear_cache(entries)] == [""] * 4


def test_data_that_were_cleared_are_prepared_anew(root, tmp_path):
    section = make_config({"data": {"name": "csv", "path": str(tmp_path / "mine.csv"), "user_core": 2}}).data
    list(clear_cache(list_cache()))
    assert build.load_data(section).num_clients == 30
    assert [entry.kind for entry in list_cache()] == ["prepared"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cache", "clear", "xla"], 'no kind "xla" of what is kept: prepared, fetched, programs, or none'),
        (["--cache", "list", "--users", "5"], "unknown option --users"),
        (["--cache", "clear", "prepared", "fetched"], "name one kind, not more: fetched"),
        (["--cache", "prepared"], "--cache prepared: there are list and clear, with the kind behind them"),
        ([], "name a data set, a file or a configuration, or pass --cache"),
    ],
)
def test_mistakes_are_one_line(root, monkeypatch, capsys, words, message):
    before = files(root)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert files(root) == before


def test_a_head_of_any_content_is_listed(root):
    head = next((root / "prepared").iterdir()) / "head.json"
    for text in ("no JSON", "[]", "{}", '{"origin": 3}', '{"origin": {"name": "gone"}}'):
        head.write_text(text)
        assert list_cache()[0].kind == "prepared"
