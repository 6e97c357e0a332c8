"""The texts of items: titles, features, and what is missing."""

import numpy as np
import pytest

from jaxfed.data.features import encode_features
from jaxfed.data.interactions import select_rows
from jaxfed.data.item_descriptions import item_texts, note_texts
from jaxfed.data.loading import from_arrays, load

DATA = from_arrays([1, 1, 1, 2, 2, 2], ["a", "b", "c", "d", "b", "a"])
TITLES = np.array(["Alien", "Mr.", "c", "d"])  # of the last two the id stands for the title
KNOWN = encode_features(
    {"genre": np.array(["war comedy", "", "day", ""]), "list_price": np.array([10.0, np.nan, 2.5, np.nan])}
)


@pytest.mark.parametrize(
    ("titles", "features", "want"),
    [
        (None, None, ["", "", "", ""]),
        (TITLES, None, ["Alien", "Mr.", "", ""]),
        (None, KNOWN, ["comedy war list price 10", "", "day list price 2.5", ""]),
        (TITLES, KNOWN, ["Alien. comedy war list price 10", "Mr.", "day list price 2.5", ""]),
    ],
)
def test_texts(titles, features, want):
    data = DATA._replace(titles=titles, item_features=features)
    assert item_texts(data).tolist() == want


def test_texts_follow_their_items():
    data = DATA._replace(titles=TITLES, item_features=KNOWN)
    left = select_rows(data, np.array([False, True, True, False, True, False]))
    assert item_texts(left).tolist() == item_texts(data)[[1, 2]].tolist()


def test_notes_count_what_is_missing_and_cut():
    texts = np.array(["Alien", "", "", "x"])
    assert note_texts(texts) == ("2 of 4 items have no title and no features: their text is empty",)
    assert note_texts(texts[:1]) == ()
    assert note_texts(texts[:1], 1, 32) == ("1 of 1 texts of items are cut at 32 pieces",)


def test_movielens():
    """Films are called by their title, year and genres."""
    try:
        data = load("ml-100k")
    except ValueError as error:
        pytest.skip(str(error))
    texts = item_texts(data)
    assert len(texts) == 1682
    assert texts[data.items.tolist().index("1")] == "Toy Story (1995). Animation Children's Comedy"
    assert not note_texts(texts)
