"""What the command line takes in good part, and what it says where it cannot."""

import sys

import pytest

from jaxfed.cli import launch, main
from jaxfed.cli.sweep import check_separators, parse_seeds
from jaxfed.config.overrides import override_config
from jaxfed.config.schema import make_config


@pytest.mark.parametrize("words", [["0", "1"], ["0,1"], ["0,", "1"], ["0", ",1"]])
def test_seeds_have_blanks_or_commas_between_them(words):
    assert parse_seeds(words) == [0, 1]


def test_seeds_that_are_none():
    with pytest.raises(ValueError, match="--seeds: x is no whole number"):
        parse_seeds(["1,x"])


@pytest.mark.parametrize("words", [["user", "item", "rating"], ["user,item,rating"], ["user, item, rating"]])
def test_names_of_columns_have_blanks_or_commas_between_them(words):
    made = override_config({"data": {"name": "csv", "path": "a.csv"}}, ["--data.columns", *words, "--seed", "3"])
    assert (made.data.columns, made.seed) == (("user", "item", "rating"), 3)
    made = override_config({"data": {"name": "csv", "path": "a.csv"}}, [f"--data.columns={','.join(words)}"])
    assert made.data.columns == ("user", "item", "rating")


def test_numbers_of_a_list_have_blanks_or_commas_between_them():
    for words in (["32", "16"], ["32,16"]):
        assert override_config({"model": {"name": "neumf"}}, ["--model.hidden", *words]).model.hidden == (32, 16)
    targets = override_config({}, ["--evaluation.targets", "a,b"]).evaluation.targets
    assert targets == ("a,b",)  # an id may have a comma


def test_values_of_a_grid_have_commas_between_them():
    check_separators(["--model.hidden", "32", "16", "--rounds=3"])
    for words in (["0.2"], ["--rounds=3", "0.2"]):
        with pytest.raises(ValueError, match=r"0.2 is no option: values of --grid have commas between them"):
            check_separators(words)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"rounds": "32"}, "rounds: '32' is not a whole number: write 32 without quotes"),
        ({"server": {"learning_rate": "0.5"}}, "is not a number: write 0.5 without quotes"),
        ({"work": {"by_row": "true"}}, "is not true or false: write true without quotes"),
        ({"rounds": "many"}, "rounds: 'many' is not a whole number"),
        ({"data": {"name": "csv", "path": 3}}, "data.path: 3 is not text in quotes"),
        ({"model": {"dim": 0}}, "model.dim is 0: it must be a whole number from 1 to 65,536"),
        ({"model": {"dim": -3}}, "model.dim is -3: it must be a whole number from 1 to 65,536"),
    ],
)
def test_values_of_another_type_are_told_what_they_should_be(table, words):
    with pytest.raises(ValueError, match=".") as error:
        make_config(table)
    assert str(error.value).endswith(words)


def test_a_command_that_is_misspelt(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxfed", "trian", "x"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert (stop.value.code, capsys.readouterr().err) == (2, 'jaxfed: no command "trian"; did you mean "train"?\n')
    help_text = main.make_parser().format_help()
    for name in main.COMMANDS:
        assert f"    {name} " in help_text
    assert help_text.count("\n    ") >= len(main.COMMANDS)


@pytest.mark.parametrize("words", [["jaxfed", "train", "x"], ["train", "x"]])
def test_launch_takes_the_command_as_one_types_it_alone(monkeypatch, words):
    started = []

    class Process:
        stdout = ()

        def __init__(self, command, **_):
            started.append(command[command.index("jaxfed") + 1 :])

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    monkeypatch.setattr(launch, "watch_processes", lambda *_: 0)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    args = main.make_parser().parse_args(["launch", "--processes", "2", "--", *words])
    assert launch.launch_processes(args) == 0
    assert started == [["train", "x"]] * 2
