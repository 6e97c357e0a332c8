"""MovieLens-100K (Harper and Konstan 2015, "The MovieLens datasets").

The rows are prepared once by a tensorflow-datasets builder of our own that needs no TensorFlow: array_record, one
example per user, and each row's place in the file, because 599 of the 943 users have equal times that decide their
test or validation item. array_record comes for Linux and for Macs with Apple's chips: elsewhere the raw files are read
anew each time, to the same rows.
"""

import contextlib
import hashlib
import importlib.util
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed.core.recipe import named
from jaxfed.data.features import Features, encode_features
from jaxfed.data.interactions import Dataset, Interactions, data_digest, number_ids
from jaxfed.data.sources.movielens_files import cache_folder, fetch_raw_files, user_examples

# digest of the rows in the order that our figures were measured on, and of them with the features
ORDER = "a4d1dd1189cca0a970fe7b5ad3c1b4adefb8e66c5546a184b8aa71fa091aae18"
FEATURES = "402fc110b9ff7e4cbff28a375e2eb67a5d54b46290196f4b0d97c2c3bb730d6e"


def build_tfds(files: dict[str, Path]) -> Path:
    """Prepares the tfds data set from raw files and returns its folder; prepared once for each content."""
    import tensorflow_datasets as tfds

    from jaxfed.data.sources.movielens_builder import JaxfedMl100k

    content = hashlib.sha256(b"".join(files[role].read_bytes() for role in sorted(files))).hexdigest()[:16]
    builder = JaxfedMl100k(data_dir=str(cache_folder() / "tfds" / content), file_format="array_record")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces itself on standard output
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=str(files["inter"].parent))
        )
    return Path(builder.data_path)


def load_prepared(files: dict[str, Path]) -> list[dict[str, Any]]:
    """The examples of the raw files, from the tfds data set made of them where this system can read one.

    A prepared copy that is damaged, which its checksums tell, is made anew.
    """
    if importlib.util.find_spec("array_record") is None:
        return list(user_examples(files))
    import tensorflow_datasets as tfds

    folder = build_tfds(files)
    try:
        return list(tfds.builder_from_directory(str(folder)).as_data_source("train"))
    except (RuntimeError, OSError, ValueError):
        shutil.rmtree(folder)
    return list(tfds.builder_from_directory(str(build_tfds(files))).as_data_source("train"))


def decode_text(word: str | bytes) -> str:
    """A word, which tfds gives as bytes."""
    return word.decode() if isinstance(word, bytes) else word


def check_content(data: Dataset) -> Dataset:
    """The data set with a note where it is not what our figures were measured on."""
    if data_digest(data, features=True) == FEATURES:
        return data._replace(features_follow=True)
    what = "features of users or items" if data_digest(data) == ORDER else "rows or their order"
    return data._replace(notes=(f"the {what} differ from the MovieLens-100K that our figures were measured on",))


@named("data", "ml-100k")
def encode_users(user: np.ndarray, attributes: dict[str, np.ndarray]) -> Features | None:
    """Age, gender and occupation of each user, from the attributes [n] of the user of each row."""
    one = np.unique(user, return_index=True)[1]  # a row of each user
    known = {name: attributes[name][one] for name in ("age", "gender", "occupation")}
    known["age"] = np.array([float(each or "nan") for each in known["age"]])
    return encode_features(known)


def ml_100k(folder: str = "") -> Dataset:
    """MovieLens-100K: 943 users, 1,682 items, 100,000 ratings in the order of u.data; features: age, gender and
    occupation of users, genres of items.

    Says so when the order of the rows, or the features, are not those that we measured on.

    Args:
        folder: Where the raw files lie, if you have them. Left out: they are fetched once.
    """
    users_rows = load_prepared(fetch_raw_files(folder))
    lengths = [len(example["row"]) for example in users_rows]

    def column(name):
        return np.concatenate([example[name] for example in users_rows])

    def per_row(name):
        return np.repeat([decode_text(example[name]) for example in users_rows], lengths)

    order = np.argsort(column("row"))
    user, users = number_ids(per_row("user")[order])
    item, items = number_ids(column("item")[order])

    def per_item(name):
        found = np.empty(len(items), object)
        found[item] = [decode_text(each) for each in column(name)[order]]
        return found.astype(str)

    rows = Interactions(user, item, column("rating")[order].astype(np.float32), column("time")[order].astype(np.int64))
    attributes = {name: per_row(name)[order] for name in ("age", "gender", "occupation", "zip_code")}
    data = Dataset(
        rows,
        users,
        items,
        per_item("title"),
        attributes,
        user_features=encode_users(user, attributes),
        item_features=encode_features({"genre": per_item("genres")}),
    )
    return check_content(data)
