"""The site, the README and CONTRIBUTING: their code runs, their configurations build, what they name is there."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfed.bench.reproduce import format_cell
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.overrides import override_config
from jaxfed.config.schema import make_config
from jaxfed.core.federate import federate
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"generated", "_build"} & set(page.parts)]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WITH_TOML = [name for name, page in zip(NAMES, PAGES, strict=True) if "```toml" in page.read_text()]


def blocks(text, language):
    """The blocks of code of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_examples_of_extending_run_together(tmp_path):
    space = {}
    (tmp_path / "jaxfed").mkdir()
    for code in blocks((ROOT / "docs/design/extending.md").read_text(), "python"):
        exec(code, space)
        (tmp_path / "jaxfed" / "example.py").write_text(code)
        for check in (["check"], ["format", "--check"]):  # what is copied from there passes `make test`
            command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
    data = load_data(make_config({"data": {"name": "synthetic", "users": 30, "items": 40, "mean_length": 5.0}}).data)
    made = build_from_config(make_config({"cohort": {"size": 10}, "model": {"dim": 4}}), data)
    model = space["scaled"](data.population.num_items, 1, dim=4)
    keys = make_run_keys(0)
    sgd = space["optax"].sgd(0.1)
    methods = space["clipped_fedavg"](model, sgd, bound=0.01), space["fedavg"](model, sgd)
    for algorithm in (federate(method, space["damped_mean"](), 30) for method in methods):
        state = algorithm.init(model.init(keys.model), keys.memory)
        before = np.asarray(state.shared.params["tables"]["item"].rows)
        state, info = algorithm.step(state, prepare_round(made, 0, 0).cohort, keys.rounds)
        assert (np.asarray(state.shared.params["tables"]["item"].rows) != before).any()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(info))
    assert float(info["damped/clients"]) == 10
    assert initial_arrays(made, 0)
    source = space["striped_data"]()
    assert len(source.users) == 20
    assert np.bincount(source.interactions.user).tolist() == [10] * 20


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 20
    assert code.count("rounds=200, evaluate_every=20") == 1
    exec(code.replace("rounds=200, evaluate_every=20", "rounds=4, evaluate_every=2"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["2", "4"]
    assert 0 < float(lines[2].split()[0]) < 1
    assert lines[3] == "None"  # no noise, no epsilon
    assert (tmp_path / "runs" / "mine" / "config.toml").is_file()


@pytest.fixture(scope="module")
def population():
    """A thousand users, on whom every configuration of the site can be built."""
    return load_data(make_config({"data": {"name": "synthetic", "users": 1000, "items": 1600}}).data)


@pytest.mark.parametrize(
    "page", [name for name, page in zip(NAMES, PAGES, strict=True) if "```toml" in page.read_text()]
)
def test_configurations_on_a_page_build(page, population):
    for text in blocks((ROOT / page).read_text(), "toml"):
        config = make_config(tomllib.loads(text))
        if config.data.clients == "user" and not config.data.cold:
            build_from_config(config, population)


def commands(text):
    """The lines of a page's blocks that begin with `jaxfed`, without their comments."""
    lines = [line.split("  #")[0].strip() for code in blocks(text, "(?:text)?") for line in code.splitlines()]
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?jaxfed (train|sweep|privacy probe)\b", line)]


@pytest.mark.parametrize("page", NAMES)
def test_commands_on_a_page_are_options(page):
    """`jaxfed train` and `sweep` with configurations and options that there are."""
    for line in commands((ROOT / page).read_text()):
        words = line.split()[2:]
        path = next(word for word in words if not word.startswith("--") and word != "probe")
        if not path.startswith("configs/"):
            continue
        words = [word for word in words[words.index(path) + 1 :] if word not in ("--resume", "--profile", "--central")]
        if "--grid" in words:
            words = words[: words.index("--grid")]
        if "--out" in words:
            del words[words.index("--out") : words.index("--out") + 2]
        override_config(read_config(ROOT / path), words)


@pytest.mark.parametrize("page", NAMES)
def test_what_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    assert "@@" not in text
    folders = "configs|tests|scripts|jaxfed|docs|core|channels|training"
    for path in set(re.findall(rf"(?<![\w/.])(?:{folders})/[\w/]+\.(?:toml|py|md)\b", text)):
        assert (ROOT / path).exists() or (ROOT / "jaxfed" / path).exists(), path
    for target, _ in set(re.findall(r"\]\(((?![a-z]+:)[^)#]+)(#[^)]*)?\)", text)):
        there = (ROOT / page).parent / target
        assert there.exists() or "generated" in there.parts, target
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)`?(?=\s+#|`)", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_front_pages_are_short():
    """Who comes here for the first time reads these; the rest is on the site."""
    assert len(README.encode()) <= 8 * 1024
    assert len((ROOT / "CONTRIBUTING.md").read_bytes()) <= 3 * 1024


def test_the_citation_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_table_of_the_readme_is_that_of_the_results():
    results = {row["name"]: row for row in json.loads((ROOT / "configs/results/ml100k.json").read_text())}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if " | ." in line]
    assert len(rows) >= 8
    for name, *cells in rows:
        row = results[re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", name).removesuffix(": LEAKY")]
        assert row["leaky"] == ("LEAKY" in name)
        keys = ("test/sampled/hr@10", "test/sampled/ndcg@10", "test/full/hr@10", "test/full/ndcg@10")
        assert cells[:4] == [format_cell(row, key) for key in keys], name
        assert cells[4:] == [f"{row[key] / 1e6:,.2f}" for key in ("bytes_up", "bytes_down")], name


def build_site(out, execute):
    """Builds the site in `out`; what Sphinx warns of fails."""
    missing = [name for name in ("sphinx", "myst_nb", "sphinx_book_theme") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"{missing[0]} is missing: install the extra `docs`")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    command += ["-D", "nb_execution_mode=force"] if execute else ["-t", "quick"]
    command += [str(ROOT / "docs"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-5000:]


def test_the_site_builds_without_warnings(tmp_path):
    """Without running the notebooks; every registered name is on the page of keys."""
    from jaxfed.config.registry import REGISTRY

    build_site(tmp_path, execute=False)
    keys = (tmp_path / "reference/generated/configuration.html").read_text()
    assert all(name in keys for section in REGISTRY.values() for name in section)
    assert all((tmp_path / f"tutorials/{name}.html").exists() for name in ("own_data", "own_file"))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_notebooks_run(tmp_path):
    build_site(tmp_path, execute=True)


def test_scripts_find_the_place_of_their_table():
    """Each `write_page` of a script has its markers in a page; names with values are those of the published runs."""
    named = {'f"compression, seeds: {len(args.seeds)}"': ["compression, seeds: 1", "compression, seeds: 3"]}
    named |= {'f"privacy, {population:,} clients"': ["privacy, 943 clients", "privacy, 100,000 clients"]}
    texts = {page: (ROOT / page).read_text() for page in NAMES}
    asked = [
        name
        for script in (ROOT / "scripts").glob("*.py")
        for call in re.findall(r"write_page\(args.page, (f?\"[^\"]+\")", script.read_text())
        for name in named.get(call, [call.strip('"')])
    ]
    assert len(asked) == 7
    for name in asked:
        assert sum(f"<!-- table: {name} -->" in text for text in texts.values()) == 1, name


def load_script(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_scripts_have_the_form_of_the_published_ones():
    """So that a script that runs anew changes figures, and nothing else."""
    asynchrony, attacks = load_script("asynchrony"), load_script("attacks")
    row = dict.fromkeys(asynchrony.METRICS, 0.1357) | {"time": 16856.2, "share": 0.2108, "best": 0.0877, "age": 1.9}
    line = asynchrony.line(asynchrony.label("fedbuff", 128), row | {"dropped": 110, "total": 22000.0})
    assert line == "| FedBuff, buffer of 64 | 16,856 | 0.21 | .0877 | .136 | .136 | .136 | .136 | 1.9 | 110 | 22,000 |"
    page = (ROOT / "docs/results/asynchrony.md").read_text()
    assert asynchrony.HEAD in page
    assert line.split("|")[1] in page
    options = argparse.Namespace(fraction=0.2, clients=128, bound=10.0, row_bound=0.3)
    case = {"ER@10": 0.1, "last": 0.2, "HR@10": 0.3, "HR@10, 99": 0.4}
    names = attacks.defences(128, 0.2, 10.0, 0.3)
    made = attacks.markdown({name: {"clean": case, "attacked": case} for name in names}, attacks.labels(options))
    page = (ROOT / "docs/results/robustness.md").read_text()
    head, rule, *lines = made.splitlines()
    assert f"{head}\n{rule}" in page
    assert all(line.split("|")[1] in page for line in lines)
    assert lines[0].endswith("| .100 | .100 | .200 | .300 | .300 | .400 | .400 |")
