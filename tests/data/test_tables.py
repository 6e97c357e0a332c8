"""Files as tables: kinds, quotes, encodings, packing, and what cannot be read."""

import csv
import gzip
import io
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.data.sources import text
from jaxfed.data.sources.tables import companions, file_kind, read_source, table_source
from jaxfed.data.sources.text import FileFormat, own_buffer, read_text


def content(source):
    """{column: values}."""
    return source.table.to_pydict()


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.csv", "csv"),
        ("A.CSV", "csv"),
        ("b.Tsv.GZ", "tsv"),
        ("ml.inter", "inter"),
        ("ml.ITEM.gz", "item"),
        ("x.parquet", "parquet"),
        ("ratings.dat", ""),
        ("ratings.dat.gz", ""),
        ("csv", ""),
        ("a.gz", ""),
    ],
)
def test_the_ending_says_the_kind_in_any_case_and_packed(name, kind):
    assert file_kind(name) == kind


@pytest.mark.parametrize(
    ("name", "delimiter"),
    [("a.csv", ","), ("a.CSV", ","), ("a.tsv", "\t"), ("a.inter", "\t"), ("a.item", "\t"), ("a.dat", "::")],
)
def test_every_kind_may_be_gzipped(tmp_path, name, delimiter):
    rows = f"a{delimiter}b\n1{delimiter}x\n2{delimiter}y\n"
    form = FileFormat(delimiter=delimiter if name == "a.dat" else "")
    plain = read_source(written(tmp_path / name, rows), form)
    assert content(plain) == {"a": ["1", "2"], "b": ["x", "y"]}
    assert content(read_source(written(tmp_path / f"{name}.gz", gzip.compress(rows.encode())), form)) == content(plain)
    hidden = written(tmp_path / f"hidden-{name}", gzip.compress(rows.encode()))  # the ending does not say it
    assert content(read_source(hidden, form)) == content(plain)


def test_parquet_may_be_gzipped_and_come_in_parts(tmp_path):
    table = pa.table({"a": list(range(24))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    written(tmp_path / "b.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert content(read_source(tmp_path / "b.parquet.gz")) == table.to_pydict()
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "_SUCCESS").write_text("")
    for part in (7, 3, 11, 0, 1, 2, 4, 5, 6, 8, 9, 10):
        pyarrow.parquet.write_table(table[2 * part : 2 * part + 2], parts / f"part-{part:05}.parquet")
    assert file_kind(parts) == "parquet"
    assert content(read_source(parts)) == table.to_pydict()
    with pytest.raises(ValueError, match="a folder; only parquet files may come in parts"):
        read_source(parts, FileFormat("csv"))


def test_damaged_packing_is_refused(tmp_path):
    packed = gzip.compress(b"a,b\n" + b"1,2\n" * 1000)
    for number, damaged in enumerate([packed[:-4], packed[: len(packed) // 2], packed[:-8] + bytes(8)]):
        with pytest.raises(ValueError, match="cannot be read as csv"):
            read_source(written(tmp_path / f"{number}.csv.gz", damaged))


# --- quotes ----------------------------------------


def test_a_quote_is_a_letter_where_fields_have_tabs(tmp_path):
    """A name that begins with a quote, twice: all rows between are one field to whoever reads quotes."""
    rows = [f"{i % 24}\t{i}\t" + '"' * (i in (21, 151)) + f"song {i}" for i in range(240)]
    for name, form in (("a.tsv", FileFormat()), ("a.txt", FileFormat(delimiter="\\t")), ("a.inter", FileFormat())):
        table = content(read_source(written(tmp_path / name, "\n".join(["user\titem\tname", *rows])), form))
        assert len(table["user"]) == 240
        assert table["name"][21] == '"song 21'
    dotted = written(tmp_path / "a.dat", '1::"Great Performances" Cats (1998)\n2::"X\n')
    assert content(read_source(dotted, FileFormat(delimiter="::", columns=("item", "title"))))["title"] == [
        '"Great Performances" Cats (1998)',
        '"X',
    ]


def test_quoted_fields_have_delimiters_quotes_and_line_ends(tmp_path, monkeypatch):
    """Also where a line end in quotes lies at the end of a block that is parsed by itself."""
    monkeypatch.setattr(text, "BLOCK", 1 << 10)
    names = [f'x{i}, "y"\n{"z" * (i % 50)}' for i in range(400)]
    quoted = "".join('"' + name.replace('"', '""') + f'",{i}\n' for i, name in enumerate(names))
    assert content(read_source(written(tmp_path / "a.csv", f"name,number\n{quoted}")))["name"] == names


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('1,"a"b\n2,c\n', "the quotes in row 1 are not those of csv"),
        ('1,a\n2,"b\n3,c\n4,"d\n', "the quotes in row 2 are not those of csv"),
        ('1,a\n2,"b\n', "the quotes in row 2 are not those of csv"),
        ('1,"a \\"b\\" c"\n', "the quotes in row 1 are not those of csv"),
    ],
)
def test_quotes_that_are_not_those_of_csv_are_refused(tmp_path, rows, words):
    """A parser that goes on takes what is between for one field: rows vanish."""
    with pytest.raises(ValueError, match=words):
        read_source(written(tmp_path / "a.csv", f"user,name\n{rows}"))
    path, names = written(tmp_path / "b.csv", rows), ("user", "name")
    with pytest.raises(ValueError, match=words):
        read_source(path, FileFormat(columns=names))


def test_blanks_before_a_quote_and_quotes_inside_of_a_field(tmp_path):
    table = read_source(written(tmp_path / "a.csv", 'user, name, size\n1, "a, b", 5" long\n\n2,"c ""d""",6\n'))
    assert content(table) == {"user": ["1", "2"], "name": ["a, b", 'c "d"'], "size": ['5" long', "6"]}


rows_of_text = st.lists(st.lists(st.text('ab ,;"\n\t7é'), min_size=2, max_size=2), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(rows_of_text, st.sampled_from(",;"))
def test_what_csv_writes_is_what_is_read(rows, delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["x", "y"], *rows])
    table = read_text(own_buffer(out.getvalue().encode()), "t", FileFormat("csv", delimiter), "")
    assert [list(row.values()) for row in table.to_pylist()] == rows


@settings(max_examples=300, deadline=None)
@given(st.text('ab ,"\n\r', max_size=30))
def test_any_text_is_refused_or_read_as_by_csv(content):
    """Python's csv, strict, is the reference: what is read without an error is what it reads, but for blanks."""
    try:
        table = read_text(own_buffer(f"x,y\n{content}".encode()), "t", FileFormat("csv"), "")
    except ValueError:
        return
    strict = csv.reader(io.StringIO(content, newline=""), strict=True, skipinitialspace=True)
    read = [[field.lstrip(" ") for field in row.values()] for row in table.to_pylist()]
    assert read == [[field.lstrip(" ") for field in row] for row in strict if row]


# --- headers ----------------------------------------


def test_a_colon_in_a_header_is_a_type_in_recboles_files_alone(tmp_path):
    header = "event:user,Unnamed: 0,Unnamed: 0.1, event:token \n1,2,3,4\n"
    source = read_source(written(tmp_path / "a.csv", header))
    assert source.columns == ["event:user", "Unnamed: 0", "Unnamed: 0.1", "event:token"]
    assert source.types == {}
    source = read_source(written(tmp_path / "a.inter", "user_id:token\ta:b:float_seq\tevent:user\n1\t2\t3\n"))
    assert source.columns == ["user_id", "a:b", "event:user"]
    assert source.types == {"user_id": "token", "a:b": "float_seq"}


@pytest.mark.parametrize("kind", ["csv", "tsv", "inter"])
def test_a_byte_order_mark_is_no_part_of_a_header(tmp_path, kind):
    rows = "user_id,item_id\n1,2\n".replace(",", "," if kind == "csv" else "\t")
    path = written(tmp_path / f"a.{kind}", rows.encode("utf-8-sig"))
    assert read_source(path).columns == ["user_id", "item_id"]


def test_many_columns_are_refused_before_they_are_read(tmp_path):
    wide = ",".join(f"c{i}" for i in range(100_000)) + "\n" + ",".join(["1"] * 100_000) + "\n"
    with pytest.raises(ValueError, match="100,000 columns, at most 10,000 are read"):
        read_source(written(tmp_path / "a.csv", wide))
    with pytest.raises(ValueError, match="10,001 columns"):
        table_source({f"c{i}": [1] for i in range(10_001)}, "t")
    some = ",".join(f"c{i}" for i in range(3_000)) + "\n" + ",".join(["1"] * 3_000) + "\n"
    assert len(read_source(written(tmp_path / "b.csv", some)).columns) == 3_000


def test_names_that_occur_twice_are_cut(tmp_path):
    name = "n" * 70_000
    with pytest.raises(ValueError, match="occur more than once: rename them") as error:
        read_source(written(tmp_path / "a.csv", f"{name},{name}\n1,2\n"))
    assert len(str(error.value)) < 300


# --- encodings and values ----------------------------------------


def test_an_encoding_is_an_option_which_the_error_names(tmp_path):
    path = written(tmp_path / "a.csv", "id,name\n1,plain\n2,Café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"byte 0xe9 in line 3 is not UTF-8: pass --data.titles-encoding latin-1"):
        read_source(path, options="--data.titles-")
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_source(path)
    assert content(read_source(path, FileFormat(encoding="latin-1")))["name"] == ["plain", "Café"]
    header = written(tmp_path / "b.csv", "id,naïf\n1,x\n".encode("latin-1"))
    with pytest.raises(ValueError, match="byte 0xef in line 1"):
        read_source(header)
    wide = written(tmp_path / "c.csv", "id,name\n1,Café\n".encode("utf-16"))
    with pytest.raises(ValueError, match="begins as UTF-16 does: pass --data.encoding utf-16"):
        read_source(wide, options="--data.")
    assert content(read_source(wide, FileFormat(encoding="utf-16")))["name"] == ["Café"]
    for encoding, words in (("latin-x", "no encoding 'latin-x'"), ("ascii", "not ascii"), ("hex", "no encoding 'hex'")):
        with pytest.raises(ValueError, match=words):
            read_source(path, FileFormat(encoding=encoding))


def test_one_long_value_is_read_and_never_quoted_in_full(tmp_path):
    long = "x" * 2_000_000
    assert content(read_source(written(tmp_path / "a.csv", f'a,b\n"{long}",1\n')))["a"] == [long]
    assert content(read_source(written(tmp_path / "a.tsv", f"a\tb\n{long}\t1\n")))["a"] == [long]
    with pytest.raises(ValueError, match="row 2 has 3 fields, the header has 2") as error:
        read_source(written(tmp_path / "b.csv", f"a,b\n1,2\n{long},1,2\n"))
    assert len(str(error.value)) < 300


def test_a_row_beyond_what_is_parsed_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 1 << 20)
    with pytest.raises(ValueError, match="a row is longer than 1 MB"):
        read_source(written(tmp_path / "a.csv", "a,b\n" + "x" * 3_000_000 + ",1\n"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.inter"])
@pytest.mark.parametrize("content", ["", "\n\n", "user_id\n", "﻿"])
def test_files_without_rows(tmp_path, name, content):
    with pytest.raises(ValueError, match="has no rows"):
        read_source(written(tmp_path / name, content))


def test_rows_of_other_lengths_are_named(tmp_path):
    with pytest.raises(ValueError, match="row 2 has 1 fields, the header has 2"):
        read_source(written(tmp_path / "a.csv", "a,b\n1,2\n3\n"))
    with pytest.raises(ValueError, match="row 3 has 3 fields, columns names 2: name all columns"):
        read_source(written(tmp_path / "a.csv", "1,2\n3,4\n5,6,7\n"), FileFormat(columns=("a", "b")))
    with pytest.raises(ValueError, match="row 2 has 1 fields, the header has 2"):
        read_source(written(tmp_path / "a.csv", 'a,b\n5",2\n3\n'))


@pytest.mark.parametrize("delimiter", ["\n", '"', '::"'])
def test_what_is_no_delimiter(tmp_path, delimiter):
    with pytest.raises(ValueError, match="a delimiter must not contain a quote or a line end"):
        read_source(written(tmp_path / "a.csv", "a,b\n1,2\n"), FileFormat(delimiter=delimiter))


def test_a_delimiter_of_several_characters_or_bytes(tmp_path):
    path = written(tmp_path / "a.dat", "1::x\x1fy::3\n")
    assert content(read_source(path, FileFormat(delimiter="::", columns=("a", "b", "c"))))["b"] == ["x\x1fy"]
    path = written(tmp_path / "b.dat", "1¦x¦3\n")
    assert content(read_source(path, FileFormat(delimiter="¦", columns=("a", "b", "c"))))["b"] == ["x"]


# --- what lies beside, and in memory ----------------------------------------


def test_companions_of_an_inter_file(tmp_path):
    for name in ("ml.inter", "ml.user", "ml.ITEM.gz", "other.item", "ml.item.bak"):
        written(tmp_path / name, "x")
    assert companions(tmp_path / "ml.inter") == {"user": tmp_path / "ml.user", "item": tmp_path / "ml.ITEM.gz"}
    assert companions(tmp_path / "ML.inter") == {}
    assert companions(tmp_path / "ml.csv") == {}
    assert companions(tmp_path / "nowhere" / "ml.inter.gz") == {}


def test_tables_in_memory():
    assert content(table_source({" a ": np.array([1, 2])}, "t")) == {"a": [1, 2]}
    assert content(table_source(pa.record_batch({"a": [1, 2]}), "t")) == {"a": [1, 2]}
    for wrong, words in (
        ([1, 2], "list is no table"),
        ({}, "t: the table has no rows"),
        ({"a": []}, "t: the table has no rows"),
        ({"a": np.zeros((2, 2))}, "cannot be read as a table"),
        ({"a": [1], "b": [1, 2]}, "cannot be read as a table"),
        ({"a": [1], "a ": [1]}, "the columns a occur more than once"),
        ({"a": [object()]}, "cannot be read as a table"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            table_source(wrong, "t")
        assert "\n" not in str(error.value)


def test_what_arrow_reads_is_its_own():
    """Bytes of Python's that one of Arrow's threads still holds at the interpreter's end abort the program."""
    ours = b"a,b\n1,2\n" * 100
    before = sys.getrefcount(ours)
    kept = own_buffer(ours)
    assert kept.to_pybytes() == ours
    assert sys.getrefcount(ours) == before
