"""Which column of a table is the user, the item, the rating, the time: as it is told, or by its name."""

import difflib
import re

from jaxfed.core.excerpt import excerpt, shorten, shorten_list
from jaxfed.data.sources.tables import Source

# what a column may be called where the user does not say, in small letters and without blanks, - and _
NAMES = {
    "user": ("userid", "user", "uid", "visitorid", "customerid", "customer", "reviewerid", "memberid"),
    "item": (
        "itemid",
        "item",
        "iid",
        "movieid",
        "productid",
        "product",
        "trackid",
        "artistid",
        "bookid",
        "asin",
        "isbn",
    ),
    "rating": ("rating", "ratings", "bookrating", "score", "stars", "overall", "label"),
    "time": ("timestamp", "time", "datetime", "date", "ts", "unixreviewtime"),
    "title": ("title", "movietitle", "booktitle", "name", "itemname"),
}
UNITS = (1, 1_000, 1_000_000, 1_000_000_000)  # of a second, in which times are counted
EPOCHS = 100_000_000, 4_200_000_000  # seconds since 1970 that are taken for dates: of 1973 to 2103
LOOK = 1000  # rows by which a column is known
OPTIONAL = {"rating": "every row counts 1", "time": "rows keep the order of the file"}  # where there is none
NONE = "none"  # the word for it


def option_name(source: Source, key: str, value: str = "") -> str:
    """How an option about a table is written: on the command line, or for a table in memory in Python."""
    if not source.options:
        return f'{key}="{value}"' if value else key
    return f"{source.options}{key.replace('_', '-')}{' ' if value else ''}{value}"


def single_column_hint(source: Source) -> str:
    """A hint where there is a single column."""
    one = len(source.columns) == 1 and source.text
    return f"; one column only: is {option_name(source, 'delimiter')} right?" if one else ""


def find_column(source: Source, role: str, name: str, taken: tuple[str, ...] = ()) -> str:
    """The column that plays a role: `name`, or where that is empty the first of the usual names that is not `taken`, or
    none. Raises ValueError for a name that is not there."""
    if name and name in source.columns:
        return name
    if name:
        same = [each for each in source.columns if each.lower() == name.lower()]
        near = same or difflib.get_close_matches(name, source.columns, 1)
        hint = f"; did you mean {excerpt(near[0])}?" if near else ""
        raise ValueError(
            f"{source.name}: no column {excerpt(name)} for {role} among {shorten_list(source.columns)}{hint}"
        )
    free = {re.sub(r"[\s_-]", "", each.lower()): each for each in reversed(source.columns) if each not in taken}
    return next((free[usual] for usual in NAMES[role] if usual in free), "")


def find_columns(source: Source, wanted: dict[str, str]) -> dict[str, str]:
    """The column of each role, "" where there is none or the user says that there is none.

    Raises ValueError where user or item have none, one column has two roles, or `none` is a column's name.
    """
    requested = {role: name for role, name in wanted.items() if not (role in OPTIONAL and name == NONE)}
    for role in wanted.keys() - requested.keys():
        if NONE in source.columns:
            raise ValueError(
                f"{source.name}: {option_name(source, role, NONE)} says that there is none, but a column is called so: "
                "rename it"
            )
    named = tuple(filter(None, requested.values()))
    if repeated := [name for name in named if named.count(name) > 1]:
        roles = " and ".join(role for role, name in requested.items() if name == repeated[0])
        raise ValueError(f"{source.name}: column {excerpt(repeated[0])} cannot be the {roles} at once")
    found = {role: find_column(source, role, name, named) for role, name in requested.items()}
    if missing := [role for role in ("user", "item") if not found[role]]:
        options, which = " and ".join(option_name(source, role) for role in missing), " and ".join(missing)
        which = f"which columns are {which}" if len(missing) > 1 else f"which column is {which}"
        headless = f". If the file has no header, name all its columns with {option_name(source, 'columns')}"
        more = single_column_hint(source) or (headless if source.options and source.text else "")
        raise ValueError(
            f"{source.name}: cannot tell {which} (columns: {shorten_list(source.columns)}): pass {options}{more}"
        )
    return dict.fromkeys(wanted, "") | found


def describe_columns(found: dict[str, str]) -> str:
    """What was taken for what, for the reader."""
    names = {role: f"{role} is {shorten(column, 40)}" for role, column in found.items() if column}
    rest = [f"no {role} ({why})" for role, why in OPTIONAL.items() if not found[role]]
    return f"columns: {', '.join([*names.values(), *rest])}"


def find_unread_times(source: Source, read: set[str]) -> str:
    """The first column that is not read and whose first values are all seconds, or parts of them, since 1970; "": there
    is none."""
    for column in source.columns:
        values = [str(each) for each in source.table[column][:LOOK].to_pylist()] if column not in read else []
        numbers = [int(each) for each in values if re.fullmatch(r"\d{9,19}", each)]
        if (
            values
            and len(numbers) == len(values)
            and any(EPOCHS[0] * unit <= min(numbers) and max(numbers) <= EPOCHS[1] * unit for unit in UNITS)
        ):
            return column
    return ""
