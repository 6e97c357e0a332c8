"""`jaxfed data`: a shape is described, and data are made to it, as a user does it."""

import json
import sys

import pytest

from jaxfed.cli import main


def jaxfed(monkeypatch, capsys, *words):
    """(exit code, what it printed, its errors) of the program, in this process."""
    monkeypatch.setattr(sys, "argv", ["jaxfed", *map(str, words)])
    try:
        main.main()
        code = 0
    except SystemExit as end:
        code = end.code
    done = capsys.readouterr()
    return code, done.out, done.err


def test_a_shape_travels_without_the_data(monkeypatch, capsys, tmp_path):
    rows, shape = tmp_path / "rows.csv", tmp_path / "shape.json"
    code, told, _ = jaxfed(monkeypatch, capsys, "data", "shape", "--description", "small", "--write", rows)
    assert (code, told) == (0, "")
    code, told, _ = jaxfed(monkeypatch, capsys, "data", rows, "--json")
    assert code == 0
    found = json.loads(told)
    assert (found["users"], found["items"], found["rows"]) == (1336, 2068, 33_000)
    shape.write_text(told)
    config = tmp_path / "made.toml"
    config.write_text('[data]\nname = "shape"\ndescription = "shape.json"\n')  # beside the configuration
    code, told, _ = jaxfed(monkeypatch, capsys, "data", config)
    assert code == 0
    assert "1,336 users x 2,068 items, 33,000 interactions" in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--description", "none.json"], "no description 'none.json'"),
        (["--description", "{}"], "the key 'users' is missing"),
        (["--description", '{"user": 3}'], "unknown key 'user'; did you mean 'users'?"),
        (["--write", "rows.txt"], "ends in .csv or .parquet"),
    ],
)
def test_what_is_wrong_is_one_line(monkeypatch, capsys, words, says):
    code, told, error = jaxfed(monkeypatch, capsys, "data", "shape", *words)
    assert (code, told) == (2, "")
    assert says in error
    assert error.count("\n") == 1
