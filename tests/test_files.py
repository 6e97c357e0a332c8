"""Files of one's own, fit and unfit."""

import re
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxfed.data.files import read_interactions

ROWS = [("u1", 10, 5.0, 3), ("u2", 7, 1.0, 1), ("u1", 7, 2.5, 2)]
HEADER = ("user_id", "item_id", "rating", "timestamp")


def write(path, rows=ROWS, header=HEADER, delimiter=","):
    lines = [delimiter.join(header)] if header else []
    path.write_text("\n".join([*lines, *(delimiter.join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def check(data):
    assert data.users[data.interactions.user].tolist() == ["u1", "u2", "u1"]
    assert data.items[data.interactions.item].tolist() == ["10", "7", "7"]
    assert data.items.tolist() == ["7", "10"]
    assert data.interactions.rating.tolist() == [5.0, 1.0, 2.5]
    assert data.interactions.time.tolist() == [3, 1, 2]


def test_csv_tsv_inter_and_parquet_give_the_same(tmp_path):
    check(read_interactions(write(tmp_path / "a.csv"), "csv"))
    check(read_interactions(write(tmp_path / "a.tsv", delimiter="\t"), "tsv"))
    typed = [f"{name}:{kind}" for name, kind in zip(HEADER, ("token", "token", "float", "float"), strict=True)]
    check(read_interactions(write(tmp_path / "a.inter", header=typed, delimiter="\t"), "inter"))
    table = pa.table(dict(zip(HEADER, map(list, zip(*ROWS, strict=True)), strict=True)))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    check(read_interactions(str(tmp_path / "a.parquet"), "parquet"))


def test_columns_can_be_mapped_named_or_guessed(tmp_path):
    path = write(tmp_path / "a.csv", header=("who", "what", "stars", "when"))
    check(read_interactions(path, "csv", user="who", item="what", rating="stars", time="when"))
    check(read_interactions(write(tmp_path / "b.csv", header=None), "csv", columns=HEADER))
    check(read_interactions(write(tmp_path / "c.csv", header=("User ID", "movieId", "rating", "Timestamp")), "csv"))
    check(
        read_interactions(
            write(tmp_path / "ratings.dat", header=None, delimiter="::"), "csv", delimiter="::", columns=HEADER
        )
    )


def test_without_time_the_order_is_time_and_without_rating_a_row_counts_one(tmp_path):
    data = read_interactions(write(tmp_path / "a.csv", [row[:2] for row in ROWS], HEADER[:2]), "csv")
    assert data.interactions.time.tolist() == [0, 1, 2]
    assert data.interactions.rating.tolist() == [1, 1, 1]
    assert "the order of its rows is taken for time" in data.notes[0]


@pytest.mark.parametrize(
    ("times", "order"),
    [
        (["2020-01-02", "2020-01-01", "2021-05-05"], [1, 0, 2]),
        (["2020-01-01 10:00:00", "2020-01-01 09:59:59", "2020-01-01 10:00:01"], [1, 0, 2]),
        (["2020-01-01T10:00:00Z", "2020-01-01T09:59:59Z", "2020-01-01T10:00:01Z"], [1, 0, 2]),
        (["2020-01-01T10:00:00+02:00", "2020-01-01T08:59:59+01:00", "2020-01-01T10:00:01Z"], [1, 0, 2]),
        ([1.5, 1.25, 1.75], [1, 0, 2]),
        ([1e9, 9e8, 2e9], [1, 0, 2]),
    ],
)
def test_times_keep_their_order(tmp_path, times, order):
    rows = [(u, i, r, t) for (u, i, r, _), t in zip(ROWS, times, strict=True)]
    data = read_interactions(write(tmp_path / "a.csv", rows), "csv")
    assert np.argsort(data.interactions.time).tolist() == order


def test_titles_beside_an_inter_file(tmp_path):
    path = write(tmp_path / "a.inter", delimiter="\t")
    (tmp_path / "a.item").write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\n7\tSeven\t1995\n")
    assert read_interactions(path, "inter").titles.tolist() == ["Seven (1995)", "10"]


def test_a_column_for_clients_is_kept(tmp_path):
    path = write(tmp_path / "a.csv", [(*row, "x") for row in ROWS], (*HEADER, "shop"))
    assert read_interactions(path, "csv", keep="shop").columns["shop"].tolist() == ["x"] * 3
    assert read_interactions(path, "csv").columns == {}


BAD = {
    "a missing column": (
        ROWS,
        ("a", "item_id", "rating", "timestamp"),
        {},
        "the user? Pass --data.user, of a, item_id",
    ),
    "a named column that is not there": (ROWS, HEADER, {"user": "user_i"}, "did you mean 'user_id'"),
    "a NaN rating": ([*ROWS, ("u3", 1, "nan", 1)], HEADER, {}, "'rating' has NaN, an infinity or no value in row 4"),
    "an infinite rating": ([*ROWS, ("u3", 1, "inf", 1)], HEADER, {}, "'rating' has NaN, an infinity"),
    "a rating in words": ([*ROWS, ("u3", 1, "good", 1)], HEADER, {}, "'rating' holds string, not numbers"),
    "a negative id": ([*ROWS, ("u3", -1, 1, 1)], HEADER, {}, "'item_id' has a negative id in row 4"),
    "a missing id": ([*ROWS, ("u3", "", 1, 1)], HEADER, {}, "'item_id' has no value"),
    "a time in words": ([(*row[:3], "06/18/2021") for row in ROWS], HEADER, {}, "like '06/18/2021' that are no times"),
    "user and item not named": (ROWS, ("a", "b", "rating", "time"), {}, "the user and the item? Pass --data.user and"),
    "a fractional id": ([*ROWS, ("u3", 1.5, 1, 1)], HEADER, {}, "'item_id' has an id that is no whole number in row 4"),
    "a missing time": ([*ROWS, ("u3", 1, 1, "")], HEADER, {}, "'timestamp' has no value in row 4"),
    "an empty file": ([], HEADER, {}, "the file is empty"),
    "a shop missing": (
        [(*row, shop) for row, shop in zip(ROWS, ("x", "", "y"), strict=True)],
        (*HEADER, "shop"),
        {"keep": "shop"},
        "'shop' has no value (NaN or empty) in row 2",
    ),
    "a column twice": (
        ROWS,
        ("user_id", "item_id", "rating", "item_id"),
        {},
        "the columns item_id occur more than once",
    ),
    "ragged rows": ([*ROWS, ("u3", 1)], HEADER, {}, "cannot be read as csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_unfit_files_are_refused_in_words(tmp_path, name):
    rows, header, more, words = BAD[name]
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_interactions(write(tmp_path / "a.csv", rows, header), "csv", **more)
    assert "\n" not in str(error.value)


def test_ids_in_words_stay_as_they_are_written(tmp_path):
    rows = [("007", 1, 1, 1), ("7", 2, 1, 2), ("1e3", 3, 1, 3)]
    assert sorted(read_interactions(write(tmp_path / "a.csv", rows), "csv").users.tolist()) == ["007", "1e3", "7"]
    rows = [("1.0", 1, 1, 1), ("2.0", 2, 1, 2)]  # as pandas writes whole numbers of a column with gaps
    assert read_interactions(write(tmp_path / "b.csv", rows), "csv").users.tolist() == ["1", "2"]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_parquet_times_keep_every_tick(tmp_path, unit):
    ticks = [1_600_000_000_000_000_001, 1_600_000_000_000_000_000, 1_600_000_000_000_000_002]
    times = pa.array(ticks if unit == "ns" else [t // 10**9 + i for i, t in enumerate(ticks)], pa.timestamp(unit))
    users = pa.array(["a", "b", "a"]).dictionary_encode()
    table = pa.table({"user_id": users, "item_id": [1, 2, 3], "timestamp": times})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    data = read_interactions(str(tmp_path / "a.parquet"), "parquet")
    assert len(set(data.interactions.time.tolist())) == 3
    assert np.argsort(data.interactions.time).tolist() == ([1, 0, 2] if unit == "ns" else [0, 1, 2])
    assert data.users.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"timestamp": pa.array([[1], [2]])}, "'timestamp' holds list"),
        ({"user_id": pa.array([[1], [2]])}, "'user_id' holds list"),
        ({"rating": pa.array(["a", "b"])}, "'rating' holds string"),
    ],
)
def test_parquet_columns_of_a_kind_that_cannot_be(tmp_path, column, words):
    table = pa.table({"user_id": [1, 2], "item_id": [1, 2], "rating": [1, 2], "timestamp": [1, 2]} | column)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=words):
        read_interactions(str(tmp_path / "a.parquet"), "parquet")


def test_a_quote_in_a_title_is_a_quote(tmp_path):
    path = write(tmp_path / "a.inter", delimiter="\t")
    (tmp_path / "a.item").write_text('item_id:token\tmovie_title:token_seq\n7\t"Un\n10\tDeux"\n')
    assert read_interactions(path, "inter").titles.tolist() == ['"Un', 'Deux"']


def test_files_that_are_not_there_or_not_what_they_say(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_interactions(str(tmp_path / "none.csv"), "csv")
    with pytest.raises(ValueError, match="data.path is empty"):
        read_interactions("", "csv")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read_interactions(str(tmp_path / "a.parquet"), "parquet")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="cannot be read as csv|is empty"):
        read_interactions(str(tmp_path / "empty.csv"), "csv")


def test_titles_know_the_items_column_of_the_interactions(tmp_path):
    path, names = tmp_path / "a.csv", tmp_path / "names.csv"
    path.write_text("Who,What\n1,10\n1,20\n")
    names.write_text("What,title\n10,Ten\n")
    read = partial(read_interactions, path, "csv", user="Who", item="What")
    assert read(titles=str(names)).titles.tolist() == ["Ten", "20"]
    names.write_text("What,naming\n10,Ten\n")
    with pytest.raises(ValueError, match="no column for title among What, naming: call them item_id and title"):
        read(titles=str(names))
