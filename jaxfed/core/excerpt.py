"""How messages quote other people's data: never more than a line holds, and no control characters."""

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

# C0 and C1 controls, line separators, controls of the direction of writing, halves of surrogate pairs
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shorten(value: Any, most: int = 80) -> str:
    """A value as text, or its beginning and three dots where that has more than `most` characters."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def excerpt(value: Any, most: int = 80) -> str:
    """A value as Python writes it, a long one cut."""
    return repr(shorten(value, most)) if isinstance(value, str) else shorten(repr(value), most)


def shorten_list(names: Iterable[str], most: int = 12, length: int = 40) -> str:
    """The first of some names, each of them cut to so many characters."""
    some = [shorten(name, length) for name in islice(names, most + 1)]
    return ", ".join(some[:most]) + (", ..." if len(some) > most else "")


def printable(text: str) -> str:
    """One line of text for a terminal: characters that would steer the terminal are replaced by their escapes.

    Titles, ids, names of columns and keys come from files of other people, and go through here before they are shown.

    Args:
        text: any text.

    Returns:
        The text without control characters; ESC, for example, is written as the four characters \\x1b.
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
