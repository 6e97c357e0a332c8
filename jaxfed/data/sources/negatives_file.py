"""Files of negatives: tables with a user and an item a row, and lines `(user,item)` with negatives behind it, as the
public code of NCF has them."""

from pathlib import Path

import numpy as np

from jaxfed.core.excerpt import excerpt, shorten
from jaxfed.data.given_negatives import GivenNegatives
from jaxfed.data.sources.columns import read_ids
from jaxfed.data.sources.roles import find_columns
from jaxfed.data.sources.tables import Source, file_kind, read_content, read_source
from jaxfed.data.sources.text import FileFormat, decode_to_utf8


def read_negatives_file(path: Path, form: FileFormat, user: str, item: str) -> GivenNegatives:
    """The negatives of a file.

    Args:
        path: a table with a header, or lines of NCF's form.
        form: how the interactions are written; a file of the same kind is written so, too, but for its header.
        user: what the interactions call the column of users; where the file has none of that name, a usual one.
        item: the same of items.

    Raises:
        ValueError: there is no such file, or it cannot be read: one line that says why.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    kind = file_kind(path) or form.kind
    if path.is_file() and kind != "parquet":
        text = (
            decode_to_utf8(read_content(path), path, form.encoding, "--data.")
            .to_pybytes()
            .removeprefix(b"\xef\xbb\xbf")
        )
        if text.lstrip()[:1] == b"(":
            return parse_negative_lines(text.decode("utf-8", "replace"), path.name)
    own = form._replace(kind=kind, columns=(), delimiter=form.delimiter if kind == form.kind else "")
    return read_negatives_table(read_source(path, own), user, item)


def read_negatives_table(source: Source, user: str = "", item: str = "") -> GivenNegatives:
    """The negatives of a table with a user and an item a row. Raises ValueError where a column is missing."""
    wanted = {"user": user if user in source.columns else "", "item": item if item in source.columns else ""}
    found = find_columns(source, wanted)
    users, items = (read_ids(source, found[role]) for role in ("user", "item"))
    no_targets = np.zeros(0, "U1")
    return GivenNegatives(Path(source.name).name, users.number, items.number, users.names, items.names, no_targets)


def parse_negative_lines(text: str, name: str) -> GivenNegatives:
    """The negatives of lines `(user,item)`, the test item of a user, and the user's negatives with tabs between.

    Raises ValueError for a line of another form, and for a user with two lines.
    """
    users: dict[str, str] = {}
    user_of, ids = [], []
    for number, line in enumerate(text.splitlines(), 1):
        head, *negatives = line.strip().split("\t")
        user, _, target = (part.strip() for part in head[1:-1].partition(","))
        if not line.strip():
            continue
        if head[:1] + head[-1:] != "()" or not (user and target and negatives and all(negatives)) or "," in target:
            raise ValueError(
                f"{name}: line {number:,} is not (user,item) with negatives behind tabs: {excerpt(line, 40)}"
            )
        if user in users:
            raise ValueError(
                f'{name}: user "{shorten(user)}" has two lines, the second is line {number:,}: the test items of a '
                "user are ranked among the same negatives, write them in one line"
            )
        users[user] = target
        user_of.append(len(negatives))
        ids += negatives
    items, item = np.unique(np.array(ids), return_inverse=True)
    user_number = np.repeat(np.arange(len(users), dtype=np.int32), user_of)
    return GivenNegatives(
        name, user_number, item.astype(np.int32), np.array(list(users)), items, np.array(list(users.values()))
    )
