"""What is said of files that are written in another way than they are read: what is wrong, and what mends it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxfed.data.data_text import describe_ratings, describe_times
from jaxfed.data.sources.files import read_interactions

EUROPE = "user;item;rating\n1;2;3,5\n2;3;4,0\n"


def written(tmp_path, text, name="a.csv"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def said(path, kind="csv", **options):
    """The one line that refuses a file."""
    with pytest.raises(ValueError, match=".") as error:
        read_interactions(path, kind, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        (EUROPE, "pass --data.delimiter ';' and --data.decimal ,"),
        (EUROPE.replace(",", "."), "pass --data.delimiter ';'"),
        ('"User-ID";"ISBN"\n"1";"a ""b"" c";\n', "pass --data.delimiter ';'"),
        ("user\titem\n1\t2\n", r"pass --data.delimiter '\t'"),
        ("user|item\n1|2\n", "pass --data.delimiter '|'"),
        ("1::1193::5::978300760\n", "pass --data.delimiter '::'"),
    ],
)
def test_another_delimiter_is_named_before_anything_else(tmp_path, text, mend):
    assert said(written(tmp_path, text)).endswith(f"is there: {mend}")


def test_the_other_way_round_and_as_told(tmp_path):
    assert said(written(tmp_path, "user,item\n1,2\n", "a.tsv"), "tsv").endswith("pass --data.delimiter ','")
    data = read_interactions(written(tmp_path, EUROPE), "csv", delimiter=";", decimal=",")
    assert data.interactions.rating.tolist() == [3.5, 4.0]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_folder_without_parts(tmp_path, kind):
    for name in ("bom.csv", "notes.txt"):
        written(tmp_path, "x", name)
    assert "a folder must hold parquet parts (*.parquet); it has bom.csv, notes.txt" in said(str(tmp_path), kind)


# --- times ----------------------------------------


def dated(tmp_path, times, head="time"):
    rows = "".join(f"{u},{u},{time}\n" for u, time in enumerate(times))
    return written(tmp_path, f"user,item,{head}\n{rows}")


@pytest.mark.parametrize(
    ("times", "form"),
    [
        (["15.07.2017 13:57", "02.01.2018 00:00", "15.07.2017 13:56"], "%d.%m.%Y %H:%M"),
        (["07/15/2017", "01/02/2018", "07/14/2017"], "%m/%d/%Y"),
    ],
)
def test_dates_of_another_form(tmp_path, times, form):
    path = dated(tmp_path, times)
    told = said(path)
    assert "pass --data.time-format for dates such as 15.07.2017 13:57 (%d.%m.%Y %H:%M)" in told
    assert told.endswith("or pass --data.time none (rows in their order, which changes the test items)")
    data = read_interactions(path, "csv", time_format=form)
    assert np.argsort(data.interactions.time).tolist() == [2, 0, 1]
    iso = read_interactions(dated(tmp_path, ["2018-01-02"], "time"), "csv")
    assert data.interactions.time[1] == iso.interactions.time[0]
    assert f"has '31.31.2017', which is no time of the form {form}, in row 2" in said(
        dated(tmp_path, [times[0], "31.31.2017"]), time_format=form
    )


def test_a_form_of_date_and_time_of_day_together(tmp_path):
    path = dated(tmp_path, ["01.02.2020,9:30", "01.02.2020,9:29"], "date,clock")
    data = read_interactions(path, "csv", time="date", time_of_day="clock", time_format="%d.%m.%Y %H:%M")
    assert np.diff(data.interactions.time).tolist() == [-60_000_000]


def test_a_time_of_day_beside_a_date(tmp_path):
    path = dated(tmp_path, ["2020-01-02,10:00:00", "2020-01-02,9:00:00"], "date,time")
    told = said(path)
    assert "'time' has '10:00:00', which is no time" in told
    assert told.endswith("; pass --data.time date and --data.time-of-day time")
    data = read_interactions(path, "csv", time="date", time_of_day="time")
    assert np.diff(data.interactions.time).tolist() == [-3_600_000_000]
    bad = dated(tmp_path, ["2020-01-02,10:00:00", "2020-01-02,25:00:00"], "date,time")
    assert "column 'time' has '25:00:00', which is no time of day" in said(bad, time="date", time_of_day="time")
    bad = dated(tmp_path, ["2020-01-02,10:00:00", "2020-13-02,10:00:00"], "date,time")
    assert "column 'date' has '2020-13-02', which is no date" in said(bad, time="date", time_of_day="time")


def test_numbers_and_dates_in_one_column(tmp_path):
    """A good value once was called bad: the first of the fewer."""
    told = said(dated(tmp_path, [1600000000, 1600000001, "2020-01-01"]))
    assert "'time' has '2020-01-01', a date, in row 3, but row 1 has a number, '1600000000': write all" in told
    told = said(dated(tmp_path, ["2020-01-01", 1600000000, 1600000001]))
    assert "'time' has '1600000000', a number, in row 2, but row 1 has a date, '2020-01-01'" in told
    assert "has 'soon', which is no time" in said(dated(tmp_path, [1600000000, "2020-01-01", "soon"]))


# --- ids and names of columns ----------------------------------------


@pytest.mark.parametrize("word", ["null", "NULL", "nan", "NaN", "NA", "na", "None", "n/a", "N/A", "Null", ""])
def test_words_that_stand_for_no_value_are_no_ids(tmp_path, word):
    told = said(written(tmp_path, f"user,item\n1,x\n2,{word}\n"))
    assert "column 'item' has " in told
    assert "no value" in told
    assert "in row 2" in told
    assert read_interactions(written(tmp_path, f"user,item\n1,x{word}\n"), "csv").items.tolist() == [f"x{word}"]


def test_columns_that_are_not_found(tmp_path):
    path = written(tmp_path, "customer,SKU,skew\n1,2,3\n")
    assert said(path, user="customer", item="sku").endswith("did you mean 'SKU'?")
    told = said(path, user="customer", item="SKU", keep="town")
    assert (
        "clients by 'town': no such column; choose one of user, silo, device, or a column: customer, SKU, skew" in told
    )
    assert "If the file has no header" in said(path)
    pyarrow.parquet.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    assert "header" not in said(str(tmp_path / "a.parquet"), "parquet")


# --- described ----------------------------------------


def test_times_are_dates_where_they_can_be():
    for unit in (1, 10**3, 10**6, 10**9):
        times = np.array([1_500_034_049, 1_600_000_000]) * unit
        assert describe_times(times) == "times 2017-07-14 12:07:29 to 2020-09-13 12:26:40 (UTC)"
    assert describe_times(np.array([0, 874])) == "times 0 to 874"
    none = ("columns: user is u, item is i, no time (rows keep the order of the file)",)
    assert describe_times(np.array([0, 874]), none) == "no times, rows in their order"
    assert describe_ratings(np.ones(3)) == "no ratings (every row counts 1)"
    assert describe_ratings(np.array([1.0, 4.0])) == "ratings 1 to 4, mean 2.500"
