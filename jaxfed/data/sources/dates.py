"""ISO dates in words, of any precision and with or without a zone, as whole numbers in their order."""

import contextlib
import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ISO = (
    r"^(?P<year>\d{4})-?(?P<month>\d{2})-?(?P<day>\d{2})"
    r"(?:[Tt ]\s*(?P<hour>\d{2})(?::?(?P<minute>\d{2})(?::?(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,36}))?)?)?"
    r"\s*(?P<zone>[Zz]|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?)?$"
)
MIDNIGHT = r"[Tt ]\s*00:00(:00(\.0+)?)?$"
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
MOST = np.iinfo(np.int64).max


def join_day_and_time(day: pa.ChunkedArray, time: pa.ChunkedArray, between: str = "T") -> pa.ChunkedArray:
    """Words of both, where a date lies in one column and the time of day in another; 9:00 is 09:00 there."""
    day = pc.replace_substring_regex(day, MIDNIGHT, "")
    time = pc.replace_substring_regex(time, r"^(\d:)", r"0\1")
    return pc.binary_join_element_wise(day, time, pa.scalar(between, pa.large_string()))


def parse_dates_of_form(words: pa.ChunkedArray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n]: microseconds since 1970, bool [n]: no date of this form).

    Args:
        words: dates as they are written.
        form: how, in words of Python's strptime, as `%d.%m.%Y %H:%M`. Dates without a zone are taken for UTC.
    """
    coded = pc.dictionary_encode(words).unify_dictionaries()
    number = np.concatenate([np.asarray(chunk.indices) for chunk in coded.chunks])
    ticks, bad = [], []
    for word in coded.chunk(0).dictionary.to_pylist():
        try:
            date = datetime.datetime.strptime(word, form)
        except ValueError:
            date = None
        zoned = date and (date if date.tzinfo else date.replace(tzinfo=datetime.UTC))
        ticks.append((zoned - EPOCH) // datetime.timedelta(microseconds=1) if zoned else 0)
        bad.append(date is None)
    return np.array(ticks, np.int64)[number], np.array(bad)[number]


def parse_dates(words: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(int64 [n]: microseconds since 1970, or more, see `time_ticks`; bool [n]: no date; bool [n]: has a zone).

    Of those without a zone it is not known which; they are in order among themselves alone.
    """
    none, all_of = np.zeros(len(words), bool), np.ones(len(words), bool)
    for kind, zoned in ((pa.timestamp("us"), none), (pa.timestamp("us", "UTC"), all_of)):
        with contextlib.suppress(pa.ArrowException):  # the usual forms, fast
            return np.asarray(pc.cast(pc.cast(words, kind), pa.int64())), none, zoned
    found = pc.extract_regex(words, ISO)
    parts = {name: pc.struct_field(found, name) for name in ("fraction", "zone")}
    numbers = {
        name: digits_to_int(pc.struct_field(found, name))
        for name in ("year", "month", "day", "hour", "minute", "second")
    }
    seconds, possible = seconds_since_1970(**numbers)
    zone = np.asarray(parts["zone"].fill_null("")).astype(str)
    bad = np.asarray(found.is_null()) | ~possible
    return time_ticks(seconds - zone_offsets(zone), parts["fraction"].fill_null("")), bad, zone != ""


def digits_to_int(words: pa.ChunkedArray) -> np.ndarray:
    """Digits as numbers, 0 where there are none."""
    return np.asarray(pc.cast(pc.if_else(pc.equal(words.fill_null(""), ""), "0", words), pa.int64()).fill_null(0))


def seconds_since_1970(year, month, day, hour, minute, second) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n]: seconds since 1970, bool [n]: whether the calendar has such a day and the clock such a time)."""
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    first, after = months.astype("datetime64[D]"), (months + 1).astype("datetime64[D]")
    possible = (month >= 1) & (month <= 12) & (day >= 1) & (day <= (after - first).astype(np.int64))
    possible &= (hour < 24) & (minute < 60) & (second <= 60)  # a minute may have a leap second
    days = first.astype(np.int64) + day - 1
    return days * 86_400 + hour * 3600 + minute * 60 + second, possible


def zone_offsets(zone: np.ndarray) -> np.ndarray:
    """int64 [n]: how many seconds each zone (`+02:00`, `-0330`, `+02`, a word for UTC, or none) is ahead of UTC."""
    names, number = np.unique(zone, return_inverse=True)

    def ahead(name):
        digits = name[1:].replace(":", "").ljust(4, "0") if name[:1] in ("+", "-") else "0000"
        return (-1 if name[:1] == "-" else 1) * (int(digits[:2]) * 3600 + int(digits[2:]) * 60)

    return np.array([ahead(name) for name in names.tolist()], np.int64)[number]


def time_ticks(seconds: np.ndarray, fraction: pa.ChunkedArray) -> np.ndarray:
    """int64 [n]: microseconds, or where these do not tell all of them apart nanoseconds, or as a last resort ranks.

    fraction: the digits behind the point, words.
    """
    longest = max(pc.max(pc.utf8_length(fraction)).as_py() or 0, 9)
    width = -(-longest // 9) * 9
    padded = pc.utf8_rpad(fraction, width, "0")
    nines = [digits_to_int(pc.utf8_slice_codeunits(padded, low, low + 9)) for low in range(0, width, 9)]
    finer, nanoseconds = any(each.any() for each in nines[1:]), nines[0]
    if not finer and not (nanoseconds % 1000).any():
        return seconds * 1_000_000 + nanoseconds // 1000
    if not finer and np.abs(seconds).max() < MOST // 1_000_000_000:
        return seconds * 1_000_000_000 + nanoseconds
    return np.unique(np.stack([seconds, *nines], 1), axis=0, return_inverse=True)[1].astype(np.int64)


def arrow_ticks(values: pa.ChunkedArray) -> np.ndarray:
    """int64 [n]: dates and timestamps of Arrow in the same units."""
    unit = "ns" if getattr(values.type, "unit", "s") == "ns" else "us"
    zone = getattr(values.type, "tz", None)
    count = np.asarray(pc.cast(pc.cast(values, pa.timestamp(unit, zone)), pa.int64()))
    return count if unit == "us" or (count % 1000).any() else count // 1000
