"""Files of one's own, fit and unfit."""

import re
from functools import partial

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxfed.data.interactions import data_digest
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.files import from_arrow, read_interactions

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
    assert data.notes == (
        "columns: user is user_id, item is item_id, no rating (every row counts 1), no time (rows keep the order of "
        "the file)",
    )


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
        "cannot tell which column is user (columns: a, item_id, rating, timestamp): pass --data.user",
    ),
    "a file without a header": (
        ROWS,
        None,
        {},
        "(columns: u1, 10, 5.0, 3): pass --data.user and --data.item. If the file has no header, name all its",
    ),
    "a named column that is not there": (ROWS, HEADER, {"user": "user_i"}, "did you mean 'user_id'"),
    "a NaN rating": ([*ROWS, ("u3", 1, "nan", 1)], HEADER, {}, "'rating' has NaN, an infinity or no value in row 4"),
    "an infinite rating": ([*ROWS, ("u3", 1, "inf", 1)], HEADER, {}, "'rating' has NaN, an infinity"),
    "a rating in words": (
        [*ROWS, ("u3", 1, "good", 1)],
        HEADER,
        {},
        "'rating' has 'good', which is no number, in row 4",
    ),
    "a negative id": ([*ROWS, ("u3", -1, 1, 1)], HEADER, {}, "'item_id' has the id -1 in row 4, which usually means"),
    "a missing id": ([*ROWS, ("u3", "", 1, 1)], HEADER, {}, "'item_id' has no value"),
    "a time in words": ([(*row[:3], "06/18/2021") for row in ROWS], HEADER, {}, "has '06/18/2021', which is no time"),
    "user and item not named": (ROWS, ("a", "b", "rating", "time"), {}, "cannot tell which columns are user and item"),
    "a missing time": ([*ROWS, ("u3", 1, 1, "")], HEADER, {}, "'timestamp' has no value in row 4"),
    "an empty file": ([], HEADER, {}, "the table has no rows"),
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
    rows = [("1.0", 1, 1, 1), ("2.0", 2, 1, 2)]
    assert read_interactions(write(tmp_path / "b.csv", rows), "csv").users.tolist() == ["1.0", "2.0"]


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
        ({"rating": pa.array(["a", "b"])}, "'rating' has 'a', which is no number, in row 1"),
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

    names.write_text("What,title\n10.0,Ten\n")
    with pytest.raises(
        ValueError, match=r"no id in column 'What' matches an item of .* \(here: 10.0; in the interactions: 10, 20\)"
    ):
        read(titles=str(names))


# --- the files of others: see the kinds in tests/data/test_tables.py and tests/data/test_columns.py ---------------


def log(users=6, each=5, time=lambda row: row):
    """Rows of a log, (user, item, rating, time): `each` items of each user, mixed."""
    pairs = [(u, (3 * u + 7 * i) % 11) for i in range(each) for u in range(users)]
    return [(u, i, 1 + (u + i) % 5, time(row)) for row, (u, i) in enumerate(pairs)]


def histories(data, **more):
    """{user: (train, validation and test items)} by the source's ids."""
    source, population = prepare_population(data, **more)
    parts = population.train, population.valid, population.test
    return {name: [source.items[part.of(u)].tolist() for part in parts] for u, name in enumerate(population.user_names)}


def test_the_notes_say_which_columns_were_taken(tmp_path):
    path = write(tmp_path / "a.csv", log(), ("User-ID", "ISBN", "Book-Rating", "date"))
    data = read_interactions(path, "csv")
    assert data.notes == ("columns: user is User-ID, item is ISBN, rating is Book-Rating, time is date",)
    assert data.interactions.rating.tolist() == [row[2] for row in log()]


def test_a_rating_or_time_that_is_none(tmp_path):
    rows = [(u, i, "PG-13", "soon") for u, i, _, _ in log()]
    path = write(tmp_path / "a.csv", rows)
    with pytest.raises(ValueError, match=r"'PG-13', which is no number, in row 1; name another .* --data.rating none"):
        read_interactions(path, "csv")
    with pytest.raises(
        ValueError, match=r"'soon', which is no time .* in row 1; pass --data.time-format .* --data.time none"
    ):
        read_interactions(path, "csv", rating="none")
    data = read_interactions(path, "csv", rating="none", time="none")
    assert data.interactions.rating.tolist() == [1] * len(rows)
    assert data.interactions.time.tolist() == list(range(len(rows)))
    assert "no rating (every row counts 1), no time (rows keep the order of the file)" in data.notes[0]


def test_a_rating_beyond_32_bits_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", [*log(), (9, 9, "1e39", 1)])
    with pytest.raises(ValueError, match="'rating' has '1e39' in row 31, which is too large for a 32-bit"):
        read_interactions(path, "csv")


def test_a_word_that_is_also_a_column_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", [(*row, "x", "y", "z") for row in log()], (*HEADER, "none", "silo", "device"))
    with pytest.raises(ValueError, match="--data.rating none says that there is none, but a column is called so"):
        read_interactions(path, "csv", rating="none")
    with pytest.raises(ValueError, match="column 'item_id' cannot be the user and item at once"):
        read_interactions(path, "csv", user="item_id", item="item_id")
    for word in ("silo", "device"):
        data = read_interactions(path, "csv", keep=word)
        with pytest.raises(ValueError, match=f'data.clients = "{word}" assigns .* at random, but the data also have'):
            prepare_population(data, clients=word)
    assert prepare_population(data, clients="device", merge="devices")[1].num_clients == 6  # which takes a column


def test_a_column_that_is_named_for_one_role_is_not_guessed_for_another(tmp_path):
    path = write(tmp_path / "a.csv", [(u, i, i + 1, u) for u, i, *_ in log()], ("user", "item", "item_id", "score"))
    data = read_interactions(path, "csv", user="item_id")
    assert "user is item_id, item is item, rating is score" in data.notes[0]


def test_clients_are_users_even_where_a_column_is_called_user(tmp_path):
    path = write(tmp_path / "a.csv", [(*row, "one name") for row in log()], (*HEADER, "user"))
    data = read_interactions(path, "csv", keep="user")
    assert "clients are users, as user_id has them; the column called user is not read" in data.notes
    assert prepare_population(data, clients="user")[1].num_clients == 6
    own = write(tmp_path / "b.csv", log(), ("user", *HEADER[1:]))
    assert len(read_interactions(own, "csv", keep="user").notes) == 1


def test_a_column_called_client_is_one_like_others(tmp_path):
    """The program's own column of clients must not take its place where devices are told apart by it."""
    rows = [(*row, "phone" if row[1] % 2 else "desk") for row in log()]
    found = [
        prepare_population(
            read_interactions(write(tmp_path / f"{name}.csv", rows, (*HEADER, name)), "csv", keep=name),
            clients=name,
            merge="devices",
        )
        for name in ("client", "machine")
    ]
    assert found[0][1].names.tolist() == found[1][1].names.tolist()
    assert set(found[0][1].names[:2]) == {"0/desk", "0/phone"}


def test_groups_by_ids_of_64_bits(tmp_path):
    """Rounded to floats, they would be one organisation: one client."""
    rows = [(*row, (1 << 63) + row[0] % 3) for row in log()]
    data = read_interactions(write(tmp_path / "a.csv", rows, (*HEADER, "org")), "csv", keep="org")
    assert prepare_population(data, clients="org")[1].names.tolist() == [str((1 << 63) + i) for i in range(3)]


@pytest.mark.parametrize("time", [lambda row: 0, lambda row: row // 12], ids=["one time", "few times"])
def test_equal_times_keep_the_order_of_the_file(tmp_path, time):
    path = write(tmp_path / "a.csv", log(time=time))
    untimed = write(tmp_path / "b.csv", [row[:3] for row in log()], HEADER[:3])
    assert histories(read_interactions(path, "csv")) == histories(read_interactions(untimed, "csv"))


def test_how_many_held_out_items_ties_decide_is_said(tmp_path):
    rows = log(time=lambda row: 0 if row < 18 else row)
    rows[24:] = [(u, i, r, 100) for u, i, r, _ in rows[24:]]  # the last of each user
    rows[23] = (*rows[23][:3], 100)  # and the one before of one
    data = read_interactions(write(tmp_path / "a.csv", rows), "csv")
    told = "2 of 12 held-out items have the same time as another row of that user: the order of rows decided (a later"
    assert any(note.startswith(told) for note in prepare_population(data)[0].notes)
    untied = read_interactions(write(tmp_path / "b.csv", log()), "csv")
    assert not any("equal times" in note for note in prepare_population(untied)[0].notes)


def test_the_digest_knows_the_rule_for_ties(tmp_path):
    tied, untied = (
        read_interactions(write(tmp_path / "a.csv", log(time=time)), "csv") for time in (lambda row: 0, lambda row: row)
    )
    assert data_digest(untied) == data_digest(untied._replace(ties_in_order=False))
    assert data_digest(tied) != data_digest(tied._replace(ties_in_order=False))
    far = tied._replace(interactions=tied.interactions._replace(time=np.where(np.arange(30) < 15, 1 - 2**62, 2**62)))
    assert data_digest(far) != data_digest(far._replace(ties_in_order=False))


def test_a_decimal_comma_and_a_date_beside_the_time_of_day(tmp_path):
    rows = [(u, i, f"{r},5", f"2020-01-{1 + t // 10:02}", f"00:00:{t % 10:02}") for u, i, r, t in log()]
    path = write(tmp_path / "a.csv", rows, ("user", "item", "rating", "date", "clock"), ";")
    data = read_interactions(path, "csv", delimiter=";", decimal=",", time_of_day="clock")
    assert data.interactions.rating.tolist() == [row[2] + 0.5 for row in log()]
    assert np.argsort(data.interactions.time).tolist() == list(range(30))
    assert "time is date, time of day is clock" in data.notes[0]
    with pytest.raises(ValueError, match="the column of dates is missing: pass --data.time beside 'clock'"):
        read_interactions(path, "csv", delimiter=";", decimal=",", time="none", time_of_day="clock")
    with pytest.raises(ValueError, match="data.decimal is ';': a point or a comma"):
        read_interactions(path, "csv", decimal=";")


def test_titles_and_features_may_be_written_otherwise(tmp_path):
    path = write(tmp_path / "ratings.dat", log(), None, "::")
    (tmp_path / "movies.dat").write_text("".join(f"{i}::F\u00eate {i}::Drama|War\n" for i in range(11)), "latin-1")
    (tmp_path / "people.txt").write_text("".join(f"{u};{u},5\n" for u in range(6)))
    forms = {
        "titles": str(tmp_path / "movies.dat"),
        "titles_delimiter": "::",
        "titles_columns": ("item", "title", "genre"),
    }
    people = {
        "user_features": str(tmp_path / "people.txt"),
        "user_features_delimiter": ";",
        "user_features_columns": ("user", "size"),
        "decimal": ",",
    }
    goods = {f"item_features{key[6:]}": value for key, value in forms.items()} | {"item_features_encoding": "latin-1"}
    read = partial(read_interactions, path, "csv", delimiter="::", columns=("user", "item", "rating", "time"), **forms)
    data = read(titles_encoding="latin-1", **people, **goods)
    assert data.titles.tolist() == [f"F\u00eate {i}" for i in range(11)]
    assert data.user_features.names.tolist() == [f"size={u}.5" for u in range(6)]
    assert data.item_features.names.tolist() == ["genre=Drama", "genre=War"]
    with pytest.raises(ValueError, match="not UTF-8: pass --data.titles-encoding latin-1"):
        read()
    with pytest.raises(ValueError, match=r"but '\|' is there: pass --data.titles-delimiter '\|'"):
        read(
            titles=write(tmp_path / "names.csv", [(3, "Three")], ("item", "title"), "|"),
            titles_columns=(),
            titles_delimiter="",
        )


def test_a_long_title_is_cut_and_a_long_feature_refused(tmp_path):
    path = write(tmp_path / "a.csv", log())
    long = "x" * 1_000_000
    titles, words = tmp_path / "t.tsv", tmp_path / "f.tsv"
    titles.write_text(f"item\ttitle\n3\t{long}\n")
    found = read_interactions(path, "csv", titles=str(titles)).titles
    assert found[3] == "x" * 197 + "..."
    assert found.nbytes < 20_000
    words.write_text(f"item\tkind\n2\ta\n3\t{long}\n")
    with pytest.raises(ValueError, match="'kind' has over 10,000 characters in row 2"):
        read_interactions(path, "csv", item_features=str(words))
    words.write_text(f"item\tkind\n2\ta\n3\ta b {long[:5000]}\n")
    with pytest.raises(ValueError, match="'kind' has a word of over 1,000 characters in row 2"):
        read_interactions(path, "csv", item_features=str(words))


def test_recboles_types_are_honoured(tmp_path):
    path = write(
        tmp_path / "a.inter",
        log(),
        [f"{n}:{k}" for n, k in zip(HEADER, ("token", "token", "float", "float"), strict=True)],
        "\t",
    )
    header = ["item_id:token", "name:token_seq", "code:token", "tags:token_seq", "size:float", "place:float_seq"]
    rows = [
        (0, "The zero", "a, b", "x,1 y", 2, "0.5 1.5"),
        (1, "The one", "3", "y", "", "0.25"),
        (2, "The two", "c d", "", 3, ""),
    ]
    write(tmp_path / "a.item", rows, header, "\t")
    data = read_interactions(path, "inter")
    assert data.titles.tolist()[:3] == ["The zero", "The one", "The two"]
    known = data.item_features
    told = [{known.names[j] for j in known.numbers[i] if j < len(known.names)} for i in range(3)]
    assert told[0] == {"code=a, b", "tags=x,1", "tags=y", "size=2", "place.0=0.5", "place.1=1.5"}
    assert told[1] == {"code=3", "tags=y", "size=", "place.0=0.25", "place.1="}
    assert told[2] == {"code=c d", "tags=", "size=3", "place.0=", "place.1="}
    for row, words in (
        ((3, "x", "y", "z", "big", "1"), "'size' has 'big', which is no number, in row 4"),
        ((3, "x", "y", "z", "1", "1 2,5"), "'place' has '1 2,5', which are no numbers with blanks between, in row 4"),
        ((3, "x", "y", "z", "1", "1 " * 5000), "'place' has over 4,096 numbers in row 4"),
        ((3, "x", "y" * 1001, "z", "1", "1"), "'code' has over 1,000 characters in row 4"),
    ):
        write(tmp_path / "a.item", [*rows, row], header, "\t")
        with pytest.raises(ValueError, match=re.escape(words)):
            read_interactions(path, "inter")


def test_companions_that_are_found_are_mentioned(tmp_path):
    path = write(tmp_path / "a.inter", log(), delimiter="\t")
    assert len(read_interactions(path, "inter").notes) == 1
    write(tmp_path / "a.item", [(3, "Three")], ("item_id:token", "title:token_seq"), "\t")
    assert read_interactions(path, "inter").notes[1] == "a.item beside a.inter was found and read"
    write(tmp_path / "a.user", [(3, "x")], ("user_id:token", "kind:token"), "\t")
    assert read_interactions(path, "inter").notes[1] == "a.user and a.item beside a.inter were found and read"
    mine = write(tmp_path / "mine.csv", [(3, 3, "Trois")], ("user_id", "item_id", "title"))
    data = read_interactions(path, "inter", user_features=mine, item_features=mine, titles=mine)
    assert len(data.notes) == 1


class Stream:
    """Nothing but Arrow's C stream interface."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


def same(a, b):
    """Whether two data sets are equal, value by value and type by type."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(left).dtype == np.asarray(right).dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("form", ["table", "dict", "stream", "views"])
def test_tables_in_memory_give_what_a_file_gives(tmp_path, form):
    rows = [(f"u{u}", i, r + 0.5, f"2020-01-{t + 1:02} 12:00:00", "xy"[u % 2]) for u, i, r, t in log()]
    path = write(tmp_path / "a.csv", rows, (*HEADER, "shop"))
    things = [(i, f"Thing {i}", "a|b"[: 1 + 2 * (i % 2)], i * 7) for i in range(11)]
    goods = write(tmp_path / "goods.csv", things, ("item_id", "title", "kind", "size"))
    want = read_interactions(path, "csv", titles=goods, item_features=goods, keep="shop")

    def table(rows, header, dates=()):
        columns = dict(zip(header, map(np.array, zip(*rows, strict=True)), strict=True))
        columns |= {name: columns[name].astype("datetime64[ns]") for name in dates}
        if form == "views":  # as polars hands its words out
            return Stream(
                pa.table(
                    {n: pa.array(c, pa.string_view() if c.dtype.kind == "U" else None) for n, c in columns.items()}
                )
            )
        made = pa.table(columns)
        return {"table": made, "dict": columns, "stream": Stream(made)}[form]

    goods = table(things, ("item_id", "title", "kind", "size"))
    got = from_arrow(table(rows, (*HEADER, "shop"), ["timestamp"]), titles=goods, item_features=goods, keep="shop")
    same(got._replace(recipe=None), want)
    assert data_digest(got, features=True) == data_digest(want, features=True)


def test_tables_in_memory_that_cannot_be():
    for table, more, words in (
        ({"a": [1]}, {}, "interactions: cannot tell which columns are user and item (columns: a"),
        (
            {"user": [1], "item": [2], "rating": ["x"]},
            {},
            """'x', which is no number, in row 1; name another column, or pass rating="none\"""",
        ),
        ({"user": [1], "item": [2]}, {"titles": {"item": [2]}}, "titles: no column for title among item"),
        ({"user": [1], "item": [2]}, {"user_features": [3]}, "user_features: list is no table"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            from_arrow(table, **more)


@pytest.mark.parametrize(("unit", "is_said"), [(1, True), (1000, True), (10_000, False)])
def test_a_column_of_times_with_another_name_is_pointed_out(unit, is_said, tmp_path):
    """Without a column of times there is another protocol: nobody should come to it without a word."""
    path = write(
        tmp_path / "a.csv", [("u", f"i{n}", 1_600_000_000 * unit + n) for n in range(4)], ("user", "item", "when")
    )
    notes = read_interactions(path, "csv").notes
    assert ("the column 'when' is not read, and looks like times: pass --data.time when" in notes) == is_said
    assert len(read_interactions(path, "csv", time="none").notes) == 1  # the user has said so
    assert len(read_interactions(path, "csv", time="when").notes) == 1
