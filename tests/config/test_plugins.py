"""Links, models and works of one's own: registered by a module that a configuration names, or an installed package."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomli_w

from jaxfed.cli import main
from jaxfed.config import plugins
from jaxfed.config.config_files import read_config
from jaxfed.config.overrides import override_config
from jaxfed.config.registry import REGISTRY, register
from jaxfed.config.schema import config_to_table, make_config
from tests.small import TABLE

MODULE = '''
import optax
from jaxfed.config.registry import register
from jaxfed.core.channel import at_client
from jaxfed.models.mf import mf


def scaled_update(factor: float = 0.5):
    """Multiplies every update.

    Args:
        factor: By what.
    """
    return at_client(optax.scale(factor))


register("channel", "my_scale", scaled_update)
register("model", "my_model", lambda num_items, num_users, dim=3: mf(num_items, num_users, dim))
'''
MINE = {**TABLE, "model": {"name": "my_model"}, "channel": [{"name": "my_scale", "factor": 0.25}, *TABLE["channel"]]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a module of one's own; all that it changes is as it was afterwards."""
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for section in REGISTRY:
        monkeypatch.setitem(REGISTRY, section, dict(REGISTRY[section]))
    yield tmp_path
    for name in ("my_module", "broken", "needy", "taken"):
        sys.modules.pop(name, None)


def jaxfed(*words, at):
    """The program as the command `jaxfed` starts it: without the working directory among Python's places."""
    command = [sys.executable, "-P", "-m", "jaxfed", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=at, env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_with_pieces_of_ones_own_is_trained_resumed_evaluated_and_swept(folder):
    (folder / "mine.toml").write_text(tomli_w.dumps({**MINE, "rounds": 2, "run": {"imports": ["my_module"]}}))
    jaxfed("train", "mine.toml", "--out", "a", at=folder)
    assert 'imports = [\n    "my_module",\n]' in (folder / "a" / "config.toml").read_text()
    jaxfed("train", "a/config.toml", "--rounds", 4, "--resume", at=folder)
    summary = json.loads((folder / "a" / "summary.json").read_text())
    assert summary["rounds"] == 4
    values = json.loads(jaxfed("evaluate", "a", "--json", at=folder))
    assert values["test/full/ndcg@10"] == summary["test/full/ndcg@10"]
    jaxfed("sweep", "mine.toml", "--grid", "channel.0.factor=0.25,1", "--out", "s", at=folder)
    rows = json.loads((folder / "s" / "results.json").read_text())
    assert [row["channel.0.factor"] for row in rows] == [0.25, 1]
    assert not any(row["problem"] for row in rows)


def test_a_module_is_named_on_the_command_line(folder):
    config = override_config(
        copy.deepcopy(MINE), ["--rounds", "3", "--run.imports", "my_module", "--channel.0.factor", "0.75"]
    )
    assert config.run.imports == ("my_module",)
    assert (config.channel[0].factor, config.rounds) == (0.75, 3)
    again = override_config(copy.deepcopy(TABLE), ["--run.imports=my_module", "--channel.0.name", "my_scale"])
    assert (again.channel[0].name, again.channel[0].factor) == ("my_scale", 0.5)


def test_other_options_of_run_stay(folder):
    config = override_config({**MINE, "run": {"keep": 5}}, ["--run.imports", "my_module", "json"])
    assert (config.run.keep, config.run.imports) == (5, ("my_module", "json"))


def test_its_configuration_is_the_same_in_another_process(folder):
    config = make_config({**MINE, "run": {"imports": ["my_module"]}})
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).channel[0].factor)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(config), capture_output=True, check=True)
    assert done.stdout == b"0.25\n"
    assert make_config(config_to_table(config)) == config


def test_help_lists_its_arguments(folder, monkeypatch, capsys):
    (folder / "mine.toml").write_text(tomli_w.dumps({**MINE, "run": {"imports": ["my_module"]}}))
    monkeypatch.setattr(sys, "argv", ["jaxfed", "train", "mine.toml", "--help"])
    with pytest.raises(SystemExit):
        main.main()
    assert "By what." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("nowhere", None, 'no module "nowhere": go to the folder that it lies in, or add that folder to PYTHONPATH'),
        ("nowhere.at.all", None, 'no module "nowhere.at.all": go to the folder'),
        ("my_module.py", None, '"my_module.py" is no name of a module: write my_module for my_module.py'),
        ("../my_module", None, '"../my_module" is no name of a module: write my_module for my_module.py'),
        ("", None, '"" is no name of a module'),
        ("broken", "x = (", "broken cannot be imported: SyntaxError: "),
        ("broken", "\n1 / 0", "broken cannot be imported: ZeroDivisionError: division by zero ("),
        ("needy", "import nowhere", "needy cannot be imported: ModuleNotFoundError: No module named 'nowhere' ("),
        (
            "taken",
            "from jaxfed.config.registry import register\nregister('channel', 'clip', lambda: None)",
            "taken cannot be imported: ValueError: register: the channel 'clip' is there already: choose another name",
        ),
    ],
)
def test_what_cannot_be_imported_is_one_line(folder, monkeypatch, capsys, name, text, problem):
    if text is not None:
        (folder / f"{name}.py").write_text(text)
    (folder / "mine.toml").write_text(tomli_w.dumps({**MINE, "run": {"imports": [name]}}))
    monkeypatch.setattr(sys, "argv", ["jaxfed", "train", "mine.toml"])
    with pytest.raises(SystemExit) as exit:
        main.main()
    told = capsys.readouterr().err
    assert exit.value.code == 2
    assert told.startswith(f"jaxfed: run.imports: {problem}")
    assert told.count("\n") == 1


def test_without_its_module_a_name_is_unknown():
    with pytest.raises(ValueError, match='no channel "my_scale"'):
        make_config(MINE)


@pytest.mark.parametrize("wrong", ["my_module", 3, [3]])
def test_imports_are_a_list_of_words(wrong):
    with pytest.raises(ValueError, match=r"^run\.imports: "):
        make_config({**TABLE, "run": {"imports": wrong}})


def test_register():
    with pytest.raises(ValueError, match="no section 'link'"):
        register("link", "x", lambda: None)
    register("channel", "clip", REGISTRY["channel"]["clip"])  # as it is


def test_the_example_of_the_guide(folder):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "runs.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (words,) = re.findall(r"`(--run\.imports .*?)`", page)
    (folder / "my_module.py").write_text(code)
    config = override_config(read_config("ml100k_fedavg"), words.split())
    assert (config.channel[1].name, config.channel[1].factor) == ("my_scale", 0.25)


def entry_point(value):
    return [metadata.EntryPoint("mine", value, plugins.GROUP)]


def test_plugins_of_installed_packages_are_imported(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(metadata, "entry_points", lambda group: entry_point("my_module"))
    plugins.import_entry_points.cache_clear()
    assert make_config(MINE).model.name == "my_model"


def test_a_plugin_of_a_package_that_is_broken_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: entry_point("nowhere"))
    plugins.import_entry_points.cache_clear()
    with pytest.raises(ValueError, match=r"^the plug-in mine \(nowhere\) of an installed package cannot be imported"):
        make_config({})
    plugins.import_entry_points.cache_clear()
