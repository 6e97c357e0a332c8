"""Columns as ids, numbers and times: exact, trimmed, and the first value that cannot be is named with its row."""

import datetime
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.data.sources.columns import read_floats, read_ids, read_times
from jaxfed.data.sources.tables import table_source

BIG = 1 << 63


def source_of(*values, decimal="."):
    """A table with a column x of Arrow arrays or lists."""
    return table_source({"x": pa.chunked_array(values)}, "t")._replace(decimal=decimal)


def refused(function, words, *values, **more):
    """Whether one line refuses the column, with these words in it."""
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        function(source_of(*values, **more), "x")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


# --- ids ----------------------------------------

IDS = {
    "unsigned": (
        ["17659530066013933245", "9952871870344750906", "5"],
        ["17659530066013933245", "5", "9952871870344750906"],
    ),
    "one beyond 63 bits": ([str(BIG), str(BIG + 1), "12"], ["12", str(BIG), str(BIG + 1)]),
    "the largest that 63 bits hold": ([str(BIG - 1), str(BIG - 2), "12"], ["12", str(BIG - 2), str(BIG - 1)]),
    "beyond 53 bits beside a point": (
        ["9007199254740993", "9007199254740992", "5.0"],
        ["5.0", "9007199254740992", "9007199254740993"],
    ),
    "25 digits": (["9000000000000000000000001", "9000000000000000000000000"], ["9" + "0" * 24, "9" + "0" * 23 + "1"]),
    "fractions": (["0.4", "0.40", "2.8"], ["0.4", "0.40", "2.8"]),
    "zeros and points": (["7.0", "007", "7", "+7"], ["+7", "007", "7", "7.0"]),
    "whole numbers sort as numbers": (["10", "9", "0"], ["0", "9", "10"]),
    "blanks": ([" u1", "u1 ", "u1", "a b"], ["a b", "u1"]),
    "exponents": (["1e3", "1000"], ["1000", "1e3"]),
    "other digits": (["٣", "3"], ["3", "٣"]),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_are_the_words_they_are(name):
    written, names = IDS[name]
    found = read_ids(source_of(written), "x")
    assert found.names.tolist() == names
    assert found.words.tolist() == [each.strip() for each in written]
    halves = read_ids(source_of(written[:1], written[1:]), "x")  # of several chunks
    assert (halves.number == found.number).all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (pa.array([BIG, BIG + 1, 3], pa.uint64()), [str(BIG), str(BIG + 1), "3"]),
        (pa.array([3, 10], pa.uint64()), ["3", "10"]),
        (pa.array([3, 10], pa.int8()), ["3", "10"]),
        (pa.array([3.0, 10.0]), ["3", "10"]),
        (pa.array([3.5, 10.0]), ["3.5", "10"]),
        (pa.array([0.4, 3.0], pa.float32()), ["0.4", "3"]),
        (pa.array(np.array([0.5, 3.0], np.float16)), ["0.5", "3"]),
        (pa.array([float((1 << 53) - 1), 1.0]), ["9007199254740991", "1"]),
        (pa.array([Decimal(BIG * 10), Decimal(BIG * 10 + 1)]), [str(BIG * 10), str(BIG * 10 + 1)]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([b" ab", b"c"]), ["ab", "c"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array([7, 8]).dictionary_encode(), ["7", "8"]),
        (pa.array(["ab ", "c"], pa.string_view()), ["ab", "c"]),
        (pa.array(["ab", "c"], pa.large_string()), ["ab", "c"]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_ids_of_every_type(values, words):
    assert read_ids(source_of(values), "x").words.tolist() == words


def test_signed_hashes_are_ids():
    found = read_ids(source_of(["-9007199254740993", "12", "-9007199254740992"]), "x")
    assert found.names.tolist() == ["-9007199254740993", "-9007199254740992", "12"]


def test_ids_that_cannot_be():
    refused(read_ids, "'x' has no value (NaN or empty) in row 3", ["a", "b", " "])
    refused(read_ids, "'x' has no value (NaN or empty) in row 2", pa.array([1.0, float("nan")]))
    refused(read_ids, "'x' has the id -1 in row 2, which usually means a missing value", ["3", "-1"])
    refused(read_ids, "'x' has an id of over 1,000 characters in row 4", ["a", "b", "a", "c" * 1_000_000])
    refused(read_ids, "'x' has an id with a NUL character in row 2: remove it", ["a", "a\0"])
    refused(read_ids, "'x' holds binary that is no text", pa.array([b"\xff"]))
    refused(read_ids, "'x' holds struct<", pa.array([{"key" * 100: 1}]))


# --- numbers ----------------------------------------


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([" 3", "4.5 ", "1e2", "+7", "-.5"], [3, 4.5, 100, 7, -0.5]),
        (pa.array([Decimal("0.5"), Decimal("2.5")]), [0.5, 2.5]),
        (pa.array([True, False]), [1, 0]),
        (pa.array(["3", "4"]).dictionary_encode(), [3, 4]),
        (pa.array([3, 4]).dictionary_encode(), [3, 4]),
        (pa.array([3, 4], pa.uint64()), [3, 4]),
        (pa.array([3, 4], pa.float32()), [3, 4]),
    ],
)
def test_numbers_of_every_type(values, found):
    assert read_floats(source_of(values), "x").tolist() == found


def test_a_decimal_comma():
    assert read_floats(source_of(["3,5", "4"], decimal=","), "x").tolist() == [3.5, 4]
    refused(read_floats, "'x' has '1.000', which is no number, in row 2", ["3,5", "1.000"], decimal=",")
    from_file = source_of(["4", "3,5"])._replace(options="--data.")
    with pytest.raises(
        ValueError, match=r"'3,5', which is no number, in row 2; if that is a decimal comma, pass --data.decimal ,"
    ):
        read_floats(from_file, "x")


def test_numbers_that_cannot_be():
    refused(read_floats, "'x' has 'PG-13', which is no number, in row 2", ["3", "PG-13", "R"])
    refused(read_floats, "'x' has NaN, an infinity or no value in row 2", ["3", " nan ", "R"][:2])
    refused(read_floats, "'x' has 'inf', which is no number, in row 2", ["3", "inf", "R"])
    refused(read_floats, "'x' has NaN, an infinity or no value in row 2", pa.array([3.0, None]))
    refused(read_floats, "'x' holds list<", pa.array([[1]]))
    refused(read_floats, "'x' has 'aaaa", ["a" * 2_000_000])
    assert np.isnan(read_floats(source_of(["3", ""]), "x", gaps=True)).tolist() == [False, True]


# --- times ----------------------------------------


def moment(text):
    """A time of ISO by Python's own parser, in microseconds."""
    found = datetime.datetime.fromisoformat(text)
    found = found if found.tzinfo else found.replace(tzinfo=datetime.UTC)
    return (found - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)


@pytest.mark.parametrize(
    "values",
    [
        ["2020-09-13", "1969-12-31"],
        ["2020-09-13 12:26", "2020-09-13T12:26:40"],
        ["2020-09-13 12:26:40.5", "2020-09-13 12:26:40.25"],
        ["2020-09-13T12:26:40.123456Z", "2020-09-13T12:26:40Z"],
        ["2020-09-13 12:26:40+02:00", "2020-09-13 12:26:40.5-03:30", "2020-09-13 12:26:40Z"],
        ["2020-09-13T12:26:40+0200", "2020-09-13T12:26:40+02"],
        ["20200913T122640", "2020-02-29T00:00:00"],
        ["  2020-09-13 12:26:40", "0001-01-01 00:00:00 "],
    ],
)
def test_times_in_words_are_those_of_pythons_parser(values):
    assert read_times(source_of(values), "x").tolist() == [moment(each.strip()) for each in values]


@pytest.mark.parametrize("zone", ["Z", " UTC", " GMT", "+00:00", "z"])
@pytest.mark.parametrize("digits", ["", ".0", ".000000000", ",000"])
def test_words_for_the_same_time(zone, digits):
    assert read_times(source_of([f"2020-09-13 12:26:40{digits}{zone}"]), "x").tolist() == [
        moment("2020-09-13 12:26:40")
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-(10**10), 10**10), st.integers(0, 10**12 - 1)), min_size=1, max_size=8))
def test_times_of_any_precision_keep_their_order(moments):
    """Seconds since 1970 and twelve digits behind the point, of which each row writes as many as it needs."""
    epoch = datetime.datetime(1970, 1, 1)
    written = [f"{epoch + datetime.timedelta(seconds=s)}.{f:012}".rstrip("0").rstrip(".") for s, f in moments]
    found = read_times(source_of(written), "x")
    assert np.array_equal(
        np.unique(found, return_inverse=True)[1], [sorted({*moments}).index(each) for each in moments]
    )


def test_nanoseconds_where_microseconds_do_not_suffice():
    words = ["2020-09-13 12:26:40.000000001", "2020-09-13 12:26:40"]
    assert read_times(source_of(words), "x").tolist() == [1_600_000_000_000_000_001, 1_600_000_000_000_000_000]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_timestamps_of_arrow_are_what_their_words_are(unit, zone):
    stamps = pa.array([1_600_000_000, 3], pa.timestamp("s", zone)).cast(pa.timestamp(unit, zone))
    want = read_times(source_of(["2020-09-13 12:26:40", "1970-01-01 00:00:03"]), "x")
    assert read_times(source_of(stamps), "x").tolist() == want.tolist()
    days = pa.array([18_518, 0], pa.int32())
    for kind in (pa.date32(), pa.date64()):
        dated = read_times(source_of(days.cast(pa.date32()).cast(kind)), "x")
        assert dated.tolist() == read_times(source_of(["2020-09-13", "1970-01-01"]), "x").tolist()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["1600000000", " 5"], [1_600_000_000, 5]),
        (["1600000000.0", "5.0"], [1_600_000_000, 5]),
        (["1.6e9", "5"], [1_600_000_000, 5]),
        (["1600000000000000001.0", "1600000000000000000.0"], [1_600_000_000_000_000_001, 1_600_000_000_000_000_000]),
        (["1600000000.0000001", "1600000000.0000002", "1600000000.0000001"], [0, 1, 0]),
        (["1.5", "1.25", "1.75"], [1, 0, 2]),
        (pa.array([1.5, 1.25, 1.75]), [1, 0, 2]),
        (pa.array([Decimal("1.50"), Decimal("1.25")]), [1, 0]),
        (pa.array([5, 3], pa.uint32()), [5, 3]),
        (pa.array([b"5", b"3"]), [5, 3]),
    ],
)
def test_times_that_are_numbers(values, found):
    assert read_times(source_of(values), "x").tolist() == found


@pytest.mark.parametrize(
    "bad", ["0000-00-00 00:00:00", "2021-02-29 00:00:00", "2020-09-13 24:00:00", "13.09.2020", "soon", "2020-13-01"]
)
def test_the_time_that_cannot_be_is_named_with_its_row(bad):
    refused(read_times, f"'x' has '{bad}', which is no time", ["2020-09-13 12:26:40", "2020-09-13 12:26:40", bad])
    refused(read_times, "in row 3", ["2020-09-13 12:26:40", "2020-09-13 12:26:40", bad])


def test_times_that_cannot_be():
    refused(read_times, "'x' has no value in row 2", ["5", ""])
    refused(
        read_times, "'x' has '2020-01-01 00:00:00', a time without a time", ["2020-01-01T00:00Z", "2020-01-01 00:00:00"]
    )
    refused(
        read_times,
        "'x' has '2020-01-01T00:00Z', a time with a time zone, in row 2, but row 1 has none: write all",
        ["2020-01-01", "2020-01-01T00:00Z"],
    )
    refused(read_times, "'x' holds bool, which cannot be times", pa.array([True]))
    refused(read_times, "'x' holds uint64 beyond 64 bits", pa.array([BIG], pa.uint64()))
    refused(read_times, "'x' has NaN, an infinity or no value in row 2", pa.array([1.0, float("inf")]))
    refused(read_times, "'x' has 'zzz", ["z" * 2_000_000])
    refused(read_times, "which is no time", [f"2020-01-01 00:00:00.{'1' * 1_000_000}", *["2020-01-01"] * 10_000])
    refused(read_times, "'x' has 'soon', which is no time", ["5", "7", "soon", "9"])
    refused(read_times, "in row 3", ["5", "7", "soon", "9"])
    refused(read_times, "'x' has '0x10', which is no time", ["5", "0x10", "7"])


@pytest.mark.parametrize(
    ("day", "clock"),
    [
        (["2020-09-13", "2020-09-12"], ["12:26:40", "12:26:41"]),
        (["2020-09-13 00:00:00", "2020-09-12 00:00:00"], ["12:26:40", "12:26:41"]),
        (np.array(["2020-09-13", "2020-09-12"], "datetime64[ns]"), ["12:26:40", "12:26:41"]),
        (
            pa.array([18_518, 18_517]).cast(pa.int32()).cast(pa.date32()),
            pa.array([44_800, 44_801], pa.int32()).cast(pa.time32("s")),
        ),
        (["20200913", "20200912"], ["122640", "122641"]),
    ],
)
def test_date_and_time_of_day_in_two_columns(day, clock):
    source = table_source({"day": day, "clock": clock}, "t")
    assert read_times(source, "day", "clock").tolist() == [moment("2020-09-13 12:26:40"), moment("2020-09-12 12:26:41")]
    wrong = table_source({"day": ["2020-09-13", "2020-09-12"], "clock": ["12:26:40", "12h"]}, "t")
    with pytest.raises(ValueError, match="'clock' has '12h', which is no time of day .* in row 2"):
        read_times(wrong, "day", "clock")
