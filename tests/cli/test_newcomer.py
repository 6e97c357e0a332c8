"""What somebody meets who has just installed it: help, built-in configurations, narrow terminals, defaults."""

import importlib.util
import io
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import docstring_parser
import numpy as np
import pytest
from rich.console import Console

from jaxfed.cli import main
from jaxfed.cli.init import starter_text
from jaxfed.cli.privacy import DRAWN
from jaxfed.cli.summary import print_summary
from jaxfed.config.config_files import built_in_configs, read_config
from jaxfed.config.docstrings import section_docstring
from jaxfed.config.options import section_arguments
from jaxfed.config.overrides import override_config
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import argument_types, config_to_table, make_config
from jaxfed.privacy.releases import RELATIONS, SAMPLERS
from jaxfed.training.runs import shared_runner
from jaxfed.training.terminal_table import print_table
from tests.programs import run_program as run

ROOT = Path(__file__).parents[2]
NAMES = [(section, name) for section in REGISTRY for name in REGISTRY[section]]


# --- help ----------------------------------------


@pytest.mark.parametrize(("section", "name"), NAMES)
def test_every_argument_of_the_registry_says_what_it_does(section, name):
    text = section_docstring(section, name)
    said = {each.arg_name: each.description for each in docstring_parser.parse(text).params}
    parts = {"optimizer": {"item", "user"}, "work": {"optimizer"}}.get(section, set())  # sections of their own
    assert argument_types(section, name).keys() - parts == said.keys()
    assert all(len(text) > 10 and text[0] != " " and text.endswith(".") for text in said.values()), said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train"], ["train", "ml100k_fedavg"]),
        (["train", "--rounds", "3"], ["train", "ml100k_fedavg", "--rounds", "3"]),
        (["train", "--help"], ["train", "--help"]),
        (["train", "synthetic_1k", "--resume"], ["train", "synthetic_1k", "--resume"]),
        (["evaluate"], ["evaluate"]),
        ([], []),
    ],
)
def test_train_has_a_default(words, expected):
    assert main.with_default_config(words) == expected
    assert main.DEFAULT_CONFIG in built_in_configs()


@pytest.mark.parametrize("name", ["ml100k_fedavg", "ml100k_private", "ml100k_fedbuff"])
def test_every_option_of_train_has_a_description(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    code, text, _ = run(monkeypatch, capsys, "train", name, "--help")
    assert code == 0
    options = re.split(r"\n(?:│ |  )(?=--[a-z])", text.partition("--help")[2])[
        1:
    ]  # in a box where there are such characters
    assert len(options) > 80
    for option in options:
        told = " ".join(option.replace("│", " ").split())
        assert re.search(r"[a-z]{3,}.*\. \(default:", told), option
    assert not {"--download", "--evaluation.channel"} & {each.split()[0] for each in options}  # they take no value
    assert "--download.L.name" in text


def test_what_needs_no_jax_does_not_import_it():
    """Which takes a second or more."""
    code = """
import sys
from jaxfed.cli.main import main
for words in (["--help"], ["--version"], ["train", "--help"], ["privacy", "calibrate", "--help"], ["reproduce", "-h"]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code
    assert "jax" not in sys.modules, words
    assert "numpy" not in sys.modules, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"jaxfed {version('jaxfed')} (JAX {version('jax')}, Python {sys.version.split()[0]})" in done.stdout
    own = "train", "sweep", "evaluate", "recommend", "data", "bench", "privacy", "init", "reproduce", "launch", "deploy"
    for name in own:
        assert re.search(rf"^    {name} +[A-Z]", done.stdout, re.MULTILINE), name


def test_the_words_of_privacy_are_those_of_its_accountant(monkeypatch, capsys):
    text = run(monkeypatch, capsys, "privacy", "calibrate", "--help")[1]
    assert all(word in text for word in RELATIONS)
    assert set(SAMPLERS) <= REGISTRY["cohort"].keys() | {"fixed"}
    assert set(DRAWN) == {"uniform" if name == "fixed" else name for name in SAMPLERS}
    asked = {"epsilon": 8, "delta": 1e-5, "population": 1000, "cohort": 100, "rounds": 9}
    words = ["calibrate", *(f"--{key}={value}" for key, value in asked.items()), "--sampler"]
    texts = [run(monkeypatch, capsys, "privacy", *words, name) for name in ("uniform", "fixed")]
    assert texts[0] == texts[1]
    assert texts[0][0] == 0


# --- configurations that come with the program ----------------------------------------


def test_a_name_is_a_configuration_that_comes_with_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = read_config(built_in_configs()["ml100k_ease"])
    assert read_config("ml100k_ease") == read_config("ml100k_ease.toml") == here
    (tmp_path / "ml100k_ease").write_text("rounds = 7\n")  # a file of that name comes first
    assert read_config("ml100k_ease") == {"rounds": 7}
    with pytest.raises(ValueError, match='of that name comes with jaxfed; did you mean "ml100k_fedavg"'):
        read_config("ml100k_fedavgg")
    with pytest.raises(ValueError, match=r'configs/ml100k_ease.toml: no such file.*; did you mean "ml100k_ease"\?$'):
        read_config("configs/ml100k_ease.toml")


def spelled(table):
    """The whole configuration, in which groups of an optimiser without a pace have the others'."""
    made = config_to_table(make_config(table))
    rest = made["work"]["optimizer"]
    for group in ("item", "user"):
        pace = {key: rest[key] for key in ("learning_rate", "weight_decay")} | {"per_example": False}
        rest[group] = pace | rest.get(group, {})
    return made


@pytest.mark.parametrize(
    "table", [{}, *map(read_config, built_in_configs().values())], ids=["defaults", *built_in_configs()]
)
def test_a_configuration_to_start_from_is_the_one_it_was_made_of(table):
    """As it is, and with every comment that is a key taken for one: so what it calls defaults are."""
    text = starter_text(table, "x.toml")
    assert config_to_table(make_config(tomllib.loads(text))) == config_to_table(make_config(table))
    assert spelled(tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))) == spelled(table)
    assert max(map(len, text.splitlines())) <= 120
    commented = [line for line in text.splitlines() if re.match(r"(# )?\w+ = ", line)]
    assert len(commented) > 60


def test_init_writes_what_can_be_trained_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u in range(9) for i in range(u % 5, 8)))
    assert run(monkeypatch, capsys, "init", "my.csv")[:2] == (0, "my.toml is written; now: jaxfed train my.toml\n")
    assert read_config("my.toml")["data"] == {"name": "csv", "path": "my.csv", "protocol": "loo-random"}
    before = (tmp_path / "my.toml").read_bytes()
    code, printed, said = run(monkeypatch, capsys, "init", "my.csv")
    assert (code, printed, said) == (2, "", "jaxfed: my.toml is there already: pass another --out\n")
    assert (tmp_path / "my.toml").read_bytes() == before
    assert run(monkeypatch, capsys, "init", "ml100k_ease", "--out", "mine.toml")[0] == 0
    here = config_to_table(make_config(read_config("ml100k_ease")))
    here["run"]["out"] = "runs/mine"
    assert config_to_table(make_config(read_config("mine.toml"))) == here
    (tmp_path / "sub").mkdir()
    assert run(monkeypatch, capsys, "init", "--out", "sub/a.toml")[0] == 0
    assert "jaxfed train sub/a.toml" in (tmp_path / "sub" / "a.toml").read_text()
    told = "jaxfed: --out no/a.toml: the folder no does not exist: create it first\n"
    assert run(monkeypatch, capsys, "init", "--out", "no/a.toml") == (2, "", told)
    (tmp_path / "x.dat").write_text("user,item\n1,2\n")
    told = "cannot tell the kind of x.dat from its ending: pass, for example, --data.name csv\n"
    assert run(monkeypatch, capsys, "init", "x.dat") == (2, "", f"jaxfed: {told}")
    assert run(monkeypatch, capsys, "init")[0] == 0
    wanted = config_to_table(make_config({})) | {
        "run": config_to_table(make_config({}))["run"] | {"out": "runs/config"}
    }
    assert config_to_table(make_config(read_config("config.toml"))) == wanted
    code, _, said = run(monkeypatch, capsys, "init", "ml100k_eas")
    assert (code, said.startswith("jaxfed: no configuration 'ml100k_eas' comes with jaxfed: name")) == (2, True)
    assert "ml100k_ease, " in said
    assert run(monkeypatch, capsys, "init", "nofile.csv") == (2, "", "jaxfed: nofile.csv: no such file\n")
    assert (
        "go with a file of data" in run(monkeypatch, capsys, "init", "ml100k_ease", "--user", "u", "--out", "n.toml")[2]
    )
    assert run(monkeypatch, capsys, "data", "my.toml")[1].startswith("9 users x 8 items")
    assert run(monkeypatch, capsys, "data", "synthetic_1k", "--users", "60")[1].startswith("60 users x ")


def test_init_reads_the_file_and_writes_the_options_that_it_takes(tmp_path, monkeypatch, capsys):
    """It once wrote a configuration that could not run."""
    monkeypatch.chdir(tmp_path)
    rows = (f"{u};{i};{1 + u % 5},5;2020-01-0{1 + i % 9} 10:00\n" for u in range(9) for i in range(u % 5, 8))
    (tmp_path / "semi.csv").write_text("customer number;SKU;Stars;purchased at\n" + "".join(rows))
    code, _, said = run(monkeypatch, capsys, "init", "semi.csv")
    told = "semi.csv: no ',' in its first line, but ';' is there: pass --data.delimiter ';' and --data.decimal ,"
    assert (code, said) == (2, f"jaxfed: {told}\n")
    assert not (tmp_path / "semi.toml").exists()
    words = [
        "--delimiter",
        ";",
        "--decimal",
        ",",
        "--user",
        "customer number",
        "--data.item=SKU",
        "--time",
        "purchased at",
    ]
    code, _, said = run(monkeypatch, capsys, "init", "semi.csv", *words)
    assert code == 0, said
    options = {"delimiter": ";", "decimal": ",", "user": "customer number", "item": "SKU", "time": "purchased at"}
    suggested = {"protocol": "loo-clean"}
    assert read_config("semi.toml")["data"] == {"name": "csv", "path": "semi.csv"} | options | suggested
    assert "9 users x 8 items" in run(monkeypatch, capsys, "data", "semi.toml")[1]


def test_no_message_sends_people_to_an_index_that_does_not_have_us():
    for path in [*(ROOT / "jaxfed").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        assert "install jaxfed" not in path.read_text(), path


def test_a_runs_folder_stands_for_its_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('rounds = 7\n[data]\nname = "csv"\npath = "here.csv"\n')
    (tmp_path / "run" / "here.csv").write_text("")
    assert read_config("run") == {"rounds": 7, "data": {"name": "csv", "path": "run/here.csv"}}
    with pytest.raises(ValueError, match=r"^\. is a folder, but not that of a run \(no config.toml\)"):
        read_config(".")


@pytest.mark.parametrize(
    "words", [["train", "city.csv"], ["sweep", "city.csv", "--seeds", "1", "2"], ["privacy", "probe", "city.csv"]]
)
def test_data_are_no_configuration(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "city.csv").write_text("user,item\n1,2\n")
    said = (
        "city.csv is data, not a configuration: `jaxfed init city.csv` writes one, or pass CONFIG --data.path city.csv"
    )
    assert run(monkeypatch, capsys, *words) == (2, "", f"jaxfed: {said}\n")


def test_a_file_where_a_runs_folder_belongs(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.toml").write_text("rounds = 1\n")
    for words in (["evaluate"], ["recommend", "--user", "1"], ["privacy", "spent"]):
        code, _, said = run(monkeypatch, capsys, *words, tmp_path / "c.toml")
        assert (code, said.count("\n")) == (2, 1)
        assert "c.toml is a file: name the folder of a run" in said


def test_a_path_alone_says_what_kind_of_file_the_data_are(tmp_path, monkeypatch):
    for path, kind in (("my.csv", "csv"), ("MY.TSV.gz", "tsv"), ("a.inter", "inter"), ("x/parts.parquet", "parquet")):
        made = make_config({"data": {"path": path}}).data
        assert (made.name, made.path) == (kind, path)
    assert make_config({"data": {"path": "a.dat", "delimiter": "::"}}).data.name == "csv"
    assert override_config({"data": {"path": "a.csv"}}, ["--data.path", "b.dat"]).data.name == "csv"
    with pytest.raises(ValueError, match=r'cannot tell the kind of a.dat from its ending: say it with name = "csv"'):
        make_config({"data": {"path": "a.dat"}})
    (tmp_path / "c.toml").write_text('[data]\npath = "my.csv"\n')
    (tmp_path / "my.csv").write_text("")
    monkeypatch.chdir(tmp_path.parent)
    assert make_config(read_config(tmp_path / "c.toml")).data.path == str(tmp_path / "my.csv")


def test_names_that_begin_alike_are_all_listed():
    with pytest.raises(ValueError, match="ml100k_apfl, ml100k_bert4rec, ml100k_code_decoder, .*ml100k_two_tower$"):
        read_config("ml100k")


def test_each_configuration_has_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    """Both once went to runs/run, where the second was told to go on with the first."""
    monkeypatch.chdir(tmp_path)
    small = 'rounds = 1\n[data]\nname = "synthetic"\nusers = 20\nitems = 30\nmean_length = 6.0\n[model]\ndim = {}\n'
    for name, dim in (("a", 2), ("b", 3)):
        (tmp_path / f"{name}.toml").write_text(small.format(dim))
    assert run(monkeypatch, capsys, "train", "a.toml")[0] == 0
    assert (tmp_path / "runs" / "a" / "summary.json").exists()
    code, _, said = run(monkeypatch, capsys, "train", "b.toml", "--out", "runs/a")
    wanted = "runs/a already holds a run of another configuration (model.dim: 2 -> 3): pass another --out"
    assert (code, said) == (2, f"jaxfed: {wanted}\n")
    code, _, said = run(monkeypatch, capsys, "train", "runs/a", "--resume")
    assert code == 0
    assert "runs/a is finished (1 rounds)" in said


# --- narrow terminals ----------------------------------------


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_figures_are_never_cut_however_narrow_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    metrics = ("hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr", "auc", "er@10")
    parts = ("val/full", "val/sampled", "test/full", "test/personal/sampled")
    values = {f"{part}/{m}": (17 * i + j) / 1000 for i, part in enumerate(parts) for j, m in enumerate(metrics, 1)}
    print_summary(values, "runs/x: test of the best round")
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= columns
    for word in (*(f"{value:.4f}" for value in values.values()), *metrics, *parts):
        assert len(re.findall(rf"(?<![\w/.]){re.escape(word)}(?![\w/.@])", printed)) >= 1, word
    assert (printed.count("┏") == 1) == (columns > 80)


def test_words_that_do_not_fit_are_folded_and_figures_are_not():
    out = Console(file=io.StringIO(), width=50)
    words = "cohort.size 500 is larger than the population of 20 clients: set it to at most 20"
    lines = [["*", "0.1", "0.1654 ± 0.0031", "12", ""], ["", "0.5", "", "", words]]
    print_table(out, "a sweep", ["", "rate", "val full ndcg@10", "seeds", "problem"], lines, labels=2)
    printed = out.file.getvalue()
    assert "0.1654 ± 0.0031" in printed
    assert "…" not in printed
    assert "".join(words.split()) in "".join(re.findall(r"[^\s│┃─━┏┓┡┩└┘┳╇┴]+", printed))
    assert max(map(len, printed.splitlines())) <= 50


# --- defaults ----------------------------------------


def test_a_file_of_sixty_people_and_nothing_else_is_learnt(tmp_path):
    """The quick one of scripts/defaults.py: on a file that somebody brings, with no word but a few rounds."""
    spec = importlib.util.spec_from_file_location("defaults", ROOT / "scripts" / "defaults.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    run, found = shared_runner(), {}
    for method, words in (("popularity", script.POPULARITY), ("defaults", ["--rounds", "20"])):
        path = script.write_people(tmp_path / "people.csv", 0)
        summary, problem = run(override_config({}, [*path, *words, "--run.out", str(tmp_path / method)]))
        assert not problem
        found[method] = np.array([summary[f"{part}/ndcg@10"] for part in ("val/full", "test/full", "test/sampled")])
    assert (found["defaults"] > found["popularity"]).all()
    assert found["defaults"].mean() > 1.2 * found["popularity"].mean()  # 60 people: each figure is off by some .03


@pytest.mark.parametrize("section", ["optimizer", "server"])
def test_rates_that_nobody_gave_suit_the_optimiser(section):
    """A step of one is no step for an optimiser whose steps are as long as its rate."""
    rates = {name: section_arguments(section, name)["learning_rate"] for name in REGISTRY[section]}
    assert {name for name, rate in rates.items() if rate > 0.1} <= {"sgd", "solve"}
    whole = make_config({"work": {"optimizer": {"name": "adam"}}})
    assert config_to_table(whole) == config_to_table(make_config({"work": {"optimizer": {}}}))
