"""What messages quote of other people's data: never more than a line holds."""

from collections.abc import Iterable
from itertools import islice
from typing import Any


def cut(value: Any, most: int = 80) -> str:
    """A value as text, or its beginning and three dots where that has more than `most` characters."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def excerpt(value: Any, most: int = 80) -> str:
    """A value as Python writes it, a long one cut."""
    return repr(cut(value, most)) if isinstance(value, str) else cut(repr(value), most)


def listed(names: Iterable[str], most: int = 12) -> str:
    """The first of some names, each of them cut."""
    some = [cut(name, 40) for name in islice(names, most + 1)]
    return ", ".join(some[:most]) + (", ..." if len(some) > most else "")
