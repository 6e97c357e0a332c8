"""The options of files of interactions."""

from typing import NamedTuple

from jaxfed.data.sources.text import FileFormat


class FileOptions(NamedTuple):
    """How interactions lie in a file, and what lies beside it.

    Args:
        path: The file of interactions; parquet may be a folder of parts. Any file may be gzipped.
        kind: csv, tsv, parquet or inter. Fields of csv may be quoted, those of the others are taken as they are.
        user: Column of user ids. Empty: found by usual names (user_id, user, ...). No id may be missing: empty, null,
            nan, na, n/a or none, in any case.
        item: Column of item ids. Empty: found by usual names (item_id, movie_id, ...).
        rating: Column of ratings. Empty: found by usual names (rating, score, ...). `none`, or no such column: every
            row counts 1.
        time: Column of times, numbers or ISO dates. Empty: found by usual names (timestamp, date, ...). `none`, or no
            such column: the order of the rows counts as time.
        delimiter: Field delimiter, one or more characters. Empty: from the kind of file. With a tab or several
            characters, quotes are ordinary characters.
        columns: Names of all columns, if the file has no header.
        titles: File with item ids and titles.
        user_features: File with user ids and any other columns. Columns of words are sets of features, numbers are put
            in buckets.
        item_features: File with item ids and any other columns, in the same way. RecBole's .user and .item files beside
            an .inter file are found without these options.
        keep: Column to keep, for clients that are its values.
        valid: File of the validation rows, written as the one of `path`, which then has the train rows. Empty: taken
            from the train rows, as `protocol` says.
        test: File of the test rows, written as the one of `path`, which then has the train rows. Empty: held out as
            `protocol` says.
        part: Column with the part of each row: train, valid (or validation, val, dev) or test, in any case.
        negatives: File of the items that each user's held-out items are ranked among, in place of drawn ones: a table
            with a user and an item a row, or lines (user,item) with negatives behind tabs, as NCF has them.
        domains: More files of interactions, of the same format as that of `path`. Each of all these files is a domain,
            named as the file without its ending. Users with one id are one user; items of two files are different
            items, and are called domain/id. The column `domain` says of which file a row is.
        time_of_day: Column with the time of day, if `time` holds only dates.
        time_format: How dates are written if not as ISO dates, in words of strptime: %d.%m.%Y %H:%M for 15.07.2017
            13:57. With `time_of_day`: of both columns, with a blank between.
        encoding: Encoding of the file, such as latin-1. Empty: utf-8.
        decimal: Decimal separator of numbers in all of these files: a point or a comma.
        titles_delimiter: Field delimiter of the titles file, one or more characters. Empty: from the kind of file.
        titles_encoding: Encoding of the titles file. Empty: utf-8.
        titles_columns: Names of all columns, if the titles file has no header.
        user_features_delimiter: Field delimiter of the file of user features, one or more characters. Empty: from the
            kind of file.
        user_features_encoding: Encoding of the file of user features. Empty: utf-8.
        user_features_columns: Names of all columns, if the file of user features has no header.
        item_features_delimiter: Field delimiter of the file of item features, one or more characters. Empty: from the
            kind of file.
        item_features_encoding: Encoding of the file of item features. Empty: utf-8.
        item_features_columns: Names of all columns, if the file of item features has no header.
    """

    path: str = ""
    kind: str = "csv"
    user: str = ""
    item: str = ""
    rating: str = ""
    time: str = ""
    delimiter: str = ""
    columns: tuple[str, ...] = ()
    titles: str = ""
    user_features: str = ""
    item_features: str = ""
    keep: str = ""
    time_of_day: str = ""
    time_format: str = ""
    encoding: str = ""
    decimal: str = "."
    titles_delimiter: str = ""
    titles_encoding: str = ""
    titles_columns: tuple[str, ...] = ()
    user_features_delimiter: str = ""
    user_features_encoding: str = ""
    user_features_columns: tuple[str, ...] = ()
    item_features_delimiter: str = ""
    item_features_encoding: str = ""
    item_features_columns: tuple[str, ...] = ()
    valid: str = ""
    test: str = ""
    part: str = ""
    negatives: str = ""
    domains: tuple[str, ...] = ()

    @property
    def columns_of_roles(self) -> tuple[str, str, str, str]:
        """The columns of users, items, ratings and times."""
        return self.user, self.item, self.rating, self.time

    @property
    def beside(self) -> dict[str, str]:
        """The files beside it, by what they tell."""
        return {"titles": self.titles, "user_features": self.user_features, "item_features": self.item_features}

    def format_beside(self, role: str) -> FileFormat:
        """How one of the files beside it is written."""
        delimiter, encoding, columns = (getattr(self, f"{role}_{key}") for key in ("delimiter", "encoding", "columns"))
        return FileFormat("", delimiter, encoding, columns, self.decimal)


class ColumnChoice(NamedTuple):
    """Which columns of a table of interactions are read."""

    roles: tuple[str, str, str, str]  # user, item, rating and time; "": found by usual names
    clock: tuple[str, str]  # `time_of_day` and `time_format`
    keep: str  # a column for clients that are its values; "": none
    part: str  # of the parts of rows; "": there is none
