"""Interactions whose parts are given: files for validation and test, or a column with the part of each row."""

import numpy as np

from jaxfed.data.sources.columns import read_ids, refuse_row
from jaxfed.data.sources.roles import NONE, find_column
from jaxfed.data.sources.tables import Source
from jaxfed.data.splits import TEST, TRAIN, VALID

WORDS = {
    TRAIN: ("train", "training"),
    VALID: ("valid", "validation", "val", "dev"),
    TEST: ("test", "testing"),
}


def read_part_column(source: Source, column: str) -> np.ndarray:
    """int8 [n]: the part of each row. Raises ValueError for a column that is not there, or a word that is no part."""
    found = read_ids(source, find_column(source, "part", column))
    parts = {word: part for part, words in WORDS.items() for word in words}
    part = np.array([parts.get(name.lower(), -1) for name in found.names.tolist()], np.int8)[found.number]
    refuse_row(
        part < 0, source, column, "{}, which is no part,", ": write train, valid (or validation, val, dev) or test"
    )
    return part


def check_part_options(part: str, valid: bool, test: bool) -> None:
    """Raises ValueError where parts are given twice, or validation without a test. valid, test: whether there is a file
    or a table of these rows."""
    if part and (valid or test):
        other = "test" if test else "valid"
        raise ValueError(f"data.part: parts are told by the column {part!r} or by data.{other}, not by both")
    if valid and not test:
        raise ValueError("data.valid: validation rows are given, and no test rows: give them, too (data.test)")


def roles_of_part(source: Source, roles: tuple[str, str, str, str]) -> tuple[str, str, str, str]:
    """The columns for user, item, rating and time of a table of held-out rows, which may lack times."""
    user, item, rating, time = roles
    return user, item, rating, time if not time or time in source.columns else NONE


def check_same_ratings(names: list[str], has_ratings: list[bool]) -> None:
    """Raises ValueError where some tables have ratings and others none."""
    if any(has_ratings) and not all(has_ratings):
        lacks, has = names[has_ratings.index(False)], names[has_ratings.index(True)]
        raise ValueError(
            f"{lacks}: no column of ratings is found, {has} has one: name it, or leave ratings out (data.rating = "
            f'"{NONE}")'
        )
