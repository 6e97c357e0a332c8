"""Items as texts: what a person calls them, and what else is known of them."""

import numpy as np

from jaxfed.data.features import Features
from jaxfed.data.interactions import Dataset


def item_texts(data: Dataset) -> np.ndarray:
    """The text of each item: its title, and then the names of its features.

    A number among the features is said with its column, as in `price 10`. An id that stands for a missing title is no
    text. An item of which nothing is known has the empty text.

    Args:
        data: A data set.

    Returns:
        str [items]: for MovieLens-100K `Toy Story (1995). Animation Children's Comedy`.

    Example:
        >>> import jaxfed as jf
        >>> data = jf.data.from_arrays([1, 1, 1], ["a", "b", "c"])
        >>> jf.data.item_texts(data._replace(titles=["Alien", "Brazil", "c"])).tolist()
        ['Alien', 'Brazil', '']
    """
    ids = data.items.tolist()
    titles = [""] * len(ids) if data.titles is None else list(map(str, data.titles))
    titles = ["" if title == item else title for title, item in zip(titles, ids, strict=True)]
    described = describe_features(data.item_features) if data.item_features else [""] * len(ids)
    joined = [
        f"{title}{'' if title.endswith('.') else '.'} {words}" if title and words else title or words
        for title, words in zip(titles, described, strict=True)
    ]
    return np.array(joined)


def is_number(word: str) -> bool:
    """Whether a word is written as a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def describe_features(features: Features) -> list[str]:
    """The words of each item's features, with blanks between."""

    def describe(name: str) -> str:
        column, _, value = name.partition("=")
        return f"{column.replace('_', ' ')} {value}" if is_number(value) else value

    words = [*map(describe, features.names.tolist()), ""]  # the last is what is unused
    return [" ".join(filter(None, (words[number] for number in row))) for row in features.numbers.tolist()]


def note_texts(texts: np.ndarray, cut: int = 0, width: int = 0) -> tuple[str, ...]:
    """What a reader is to know of the texts of a data set.

    Args:
        texts: str [items].
        cut: how many of them are longer than a model reads.
        width: the pieces that it reads.

    Returns:
        Notes.
    """
    notes, empty = [], int((texts == "").sum())
    if empty:
        notes.append(f"{empty:,} of {len(texts):,} items have no title and no features: their text is empty")
    if cut:
        notes.append(f"{cut:,} of {len(texts):,} texts of items are cut at {width} pieces")
    return tuple(notes)
