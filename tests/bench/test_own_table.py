"""`jaxfed reproduce --table FILE`, as a user runs it: rows by rules for the data, and what is written of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxfed.bench import own_table
from jaxfed.bench.reproduce import TableRow
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config
from jaxfed.config.suggestions import collect_facts, read_file, suggest_table
from jaxfed.config.untuned import RULE
from jaxfed.models.closed_form import MOST_DENSE
from jaxfed.training.runs import make_cached_loader
from tests.bench.test_reproduce import run

NDCG = "test/full/ndcg@10"
OTHERS = {
    "tiny": TableRow("popularity", seeds=(0, 1)),
    "factors": TableRow("fedavg", "--model.dim 4", (0, 1)),
    "no": TableRow("fedavg", "--cohort.name uniform --cohort.size 500"),
    "leak": TableRow("counter", "--data.protocol compat-pfedrec"),
}


def write_rows(path, users=40, items=60, length=12, times=True):
    """Users who take what others like them take, in a column that must be named."""
    random, lines = np.random.default_rng(0), []
    for who in range(users):
        weights = np.where(np.arange(items) % 3 == who % 3, 9.0, 1.0)
        taken = random.choice(items, length, replace=False, p=weights / weights.sum())
        lines += [f"{who},{item}" + f",{time}" * times for time, item in enumerate(taken)]
    path.write_text("\n".join(["who,item_id" + ",timestamp" * times, *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.csv")


@pytest.fixture(scope="module")
def unordered(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "unordered.csv", times=False)


def read_rows(out):
    return {row["name"]: row for row in json.loads((out / "results.json").read_text())}


def test_the_whole_table_as_a_user_makes_it(rows, tmp_path, monkeypatch, capsys):
    """Its figures, errors and tests are those of the runs' own files; a second time nothing is run or read again."""
    monkeypatch.setattr(own_table, "QUICK", 2)
    out = tmp_path / "t"
    words = ["--table", rows, "--user", "who", "--out", out, "--quick"]
    code, printed, said = run(monkeypatch, capsys, *words)
    assert code == 0, said
    found = read_rows(out)
    assert (*found,) == own_table.ROWS_BY_RULE
    assert "rule: model.l2_grid = (" in said
    users = {}
    for name, row in found.items():
        folder = Path(own_table.run_folder(out, name, 0))
        summary, users[name] = json.loads((folder / "summary.json").read_text()), np.load(folder / "users.npz")
        for part in ("full", "sampled"):
            for metric in ("hr@10", "ndcg@10"):
                figure, each = f"test/{part}/{metric}", users[name][f"test/{part}/{metric}"]
                assert row[figure] == summary[figure] == pytest.approx(each.mean(), rel=1e-5)
                assert row[f"{figure}_se"] == pytest.approx(np.std(each, ddof=1) / 40**0.5)
        assert (row["protocol"], row["users"], row["quick"]) == ("loo-clean", 40, True)
        assert row["command"].startswith(f"jaxfed reproduce --table {rows} --user who --quick --only ")
    for base in ("popularity", "item-kNN", "EASE"):
        for name in found.keys() - {base}:
            p = stats.ttest_rel(users[name][NDCG], users[base][NDCG]).pvalue
            alike = (users[name][NDCG] == users[base][NDCG]).all()
            assert found[name][f"minus {base}_p"] == pytest.approx(1.0 if alike else p)
            assert found[name][f"minus {base}"] == pytest.approx(found[name][NDCG] - found[base][NDCG], abs=1e-6)
    assert found["EASE"][NDCG] > found["popularity"][NDCG]  # these users have groups of taste
    text = (out / "table.md").read_text()
    for word in (
        "EASE with transitions: QUICK",
        "40 users; protocol loo-clean",
        "99 uniform, 5 draws (fewer for some users",
    ):
        assert word in text
        assert word in printed

    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.*") if file.parent != out}
    again = run(monkeypatch, capsys, *words)
    assert again[:2] == (0, printed)
    assert again[2].count("is finished") == 6
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.*") if file.parent != out} == before


def test_rows_follow_the_rules_for_the_data(rows):
    """And not MovieLens-100K: what `jaxfed init` suggests, what iALS takes from the data, the empty configuration."""
    file = read_file(str(rows), ["--user", "who"])
    tables = own_table.make_rule_tables(file, collect_facts(file.clients))
    assert (*tables,) == own_table.ROWS_BY_RULE
    configs = {name: make_config(table) for name, table in tables.items()}
    for name, model in (("EASE", "ease"), (own_table.TRANSITIONS, "transitions")):
        suggested = suggest_table(file, model)[0]
        assert suggested["evaluation"].pop("history") == "all"  # which rows that are trained in rounds do not know
        assert tables[name] == suggested
        assert configs[name].model.l2_grid == configs["EASE"].model.l2_grid
        assert len(configs[name].model.l2_grid) == 3
    assert (configs["item-kNN"].model.name, configs["item-kNN"].server.name) == ("item_knn", "solve")
    ials = configs["iALS (FCF)"]
    assert (ials.model.name, ials.model.density, ials.model.unobserved) == ("ials", 0.0, 0.0)
    assert ials.rounds == 40
    assert ials.evaluation.every == 1  # validation chooses one of them
    mf = configs["FedAvg of MF"]
    assert mf == make_config({"data": tables["EASE"]["data"]})
    assert mf.rounds == RULE["rounds"]
    assert mf.work.optimizer.item.per_example
    for config in configs.values():
        assert (config.data, config.evaluation.history) == (configs["EASE"].data, "train")
    assert not any("history" in line for line in own_table.describe_rules(file))
    assert own_table.SEEDS.keys() < {*own_table.ROWS_BY_RULE}


def test_a_large_catalogue_takes_neighbours(tmp_path):
    path = tmp_path / "large.csv"
    items = range(MOST_DENSE + 25)
    path.write_text("user,item\n" + "".join(f"{item // 5},{item}\n" for item in items))
    file = read_file(str(path), [])
    facts = collect_facts(file.clients)
    tables = own_table.make_rule_tables(file, facts)
    assert tables["EASE"]["model"]["neighbours"] > 0
    assert own_table.TRANSITIONS not in tables
    # beyond what a sum over pairs can be, what needs none is left
    assert (*own_table.make_rule_tables(file, facts._replace(pairs=10**12)),) == (
        "popularity",
        "iALS (FCF)",
        "FedAvg of MF",
    )


def test_given_negatives_that_are_few(rows, tmp_path):
    """All rows have the cut-offs that they leave, and a table needs NDCG@10."""
    text = rows.read_text().splitlines()
    users = sorted({line.split(",")[0] for line in text[1:]})
    path = tmp_path / "negatives.csv"

    def read(many):
        made = [f"{user},{item}" for user in users for item in pick(many, user)]
        path.write_text("\n".join(["user,item", *made]) + "\n")
        return read_file(str(rows), ["--user", "who", "--negatives", str(path)])

    def pick(many, user):
        own = {line.split(",")[1] for line in text[1:] if line.split(",")[0] == user}
        return sorted({line.split(",")[1] for line in text[1:]} - own)[:many]

    file = read(12)
    for table in own_table.make_rule_tables(file, collect_facts(file.clients)).values():
        assert make_config(table).evaluation.at == (5, 10)
    file = read(6)
    with pytest.raises(ValueError, match="fewer than 9 given negatives"):
        own_table.make_rule_tables(file, collect_facts(file.clients))


def test_data_without_an_order(unordered, tmp_path, monkeypatch, capsys):
    """Random rows are held out, unless the order of the file is asked for; transitions are left out."""
    monkeypatch.setattr(own_table, "QUICK", 2)
    words = ["--table", unordered, "--user", "who", "--quick"]
    code, _, said = run(monkeypatch, capsys, *words, "--out", tmp_path / "t", "--only", "popularity", "EASE")
    assert code == 0, said
    assert said.count(f"no row {own_table.TRANSITIONS}: the data do not say in which order") == 1
    found = read_rows(tmp_path / "t")
    assert {row["protocol"] for row in found.values()} == {"loo-random"}
    assert "minus item-kNN" not in found["EASE"]
    assert "minus popularity" in found["EASE"]
    asked = [*words, "--protocol", "loo-clean", "--out", tmp_path / "u", "--only", "popularity"]
    assert run(monkeypatch, capsys, *asked)[0] == 0
    assert read_rows(tmp_path / "u")["popularity"]["protocol"] == "loo-clean (order of the file)"


def test_rows_of_movielens_by_name(rows, tmp_path, monkeypatch, capsys):
    """Two seeds, resumed, by hand from the files of the runs; a row that fails does not lose the others."""
    monkeypatch.setattr(own_table, "ROWS", OTHERS)
    out = tmp_path / "t"
    words = ["--table", rows, "--out", out, "--user", "who", "--only", "tiny"]
    code, _, said = run(monkeypatch, capsys, *words, "no")
    assert code == 2
    assert "failed: cohort.size 500 is larger" in said
    row = read_rows(out)["tiny"]
    runs = [out / "tiny" / f"seed_{seed}" for seed in (0, 1)]
    found = [json.loads((each / "summary.json").read_text()) for each in runs]
    assert row["test/sampled/hr@10"] == pytest.approx(np.mean([each["test/sampled/hr@10"] for each in found]))
    assert row["bytes_up"] == np.mean([each["bytes_up_total"] for each in found]) / 40  # of one round, its best
    each = np.mean([np.load(folder / "users.npz")[NDCG] for folder in runs], 0)
    assert row[f"{NDCG}_se"] == pytest.approx(np.std(each, ddof=1) / 40**0.5)
    assert (row["seeds"], row["users"], row["place"]) == (2, 40, "best")
    assert row["command"].startswith("jaxfed sweep configs/ml100k_popularity.toml --seeds 0 1 --data.path=")
    assert read_config(runs[0])["data"]["protocol"] == "loo-clean"
    assert run(monkeypatch, capsys, *words, "--seeds", "7")[:2] == (0, "nothing to run\n")


def test_figures_of_users_are_read_again_where_the_run_is_another(rows, tmp_path, monkeypatch, capsys):
    words = ["--table", rows, "--user", "who", "--out", tmp_path, "--only", "popularity"]
    assert run(monkeypatch, capsys, *words)[0] == 0
    folder, load = tmp_path / "popularity" / "seed_0", make_cached_loader()
    kept = own_table.read_users(folder, load)
    with open(folder / "users.npz", "wb") as file:
        np.savez(file, **kept | {"params_sha256": np.array("of another"), NDCG: kept[NDCG] * 0})
    assert own_table.read_users(folder, load)[NDCG].tolist() == kept[NDCG].tolist()


def test_other_settings_and_other_data(rows, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.csv"
    path.write_text(rows.read_text())
    words = ["--table", path, "--out", tmp_path / "t", "--user", "who", "--only"]
    monkeypatch.setattr(own_table, "ROWS", {"tiny": OTHERS["tiny"]})
    assert run(monkeypatch, capsys, *words, "tiny", "--seeds", "0")[0] == 0
    monkeypatch.setattr(own_table, "ROWS", {"tiny": TableRow("popularity", "--evaluation.seed 1", (0, 1))})
    code, printed, said = run(monkeypatch, capsys, *words, "tiny", "--seeds", "0")
    assert (code, printed) == (2, "")
    assert "was run with another configuration" in said
    monkeypatch.setattr(own_table, "ROWS", {"tiny": OTHERS["tiny"]})
    path.write_text("\n".join(rows.read_text().splitlines()[:-1]) + "\n")
    code, printed, said = run(monkeypatch, capsys, *words, "tiny", "--seeds", "0")
    assert (code, printed) == (2, "")
    assert "was run on other data than the file has now: pass another --out" in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--table no.csv", "no table 'no.csv': give ml100k, or a file that is there"),
        ("--table ROWS --user who --only tin", 'no row "tin"; did you mean "tiny"'),
        ("--table ROWS --user who --only leak", 'row "leak" has a leaky protocol: only --table ml100k has it'),
        ("--table ROWS --usr who", "unknown option --data.usr"),
        ("--table ROWS", "--data.user"),
        ("--table ROWS --user who --label rating --rating timestamp", "its methods learn from clicks, not from labels"),
        ("--table ROWS --user who --clients silo --silos 4", "take each user for a client"),
    ],
)
def test_what_cannot_be_is_one_line(rows, tmp_path, monkeypatch, capsys, words, text):
    given = [str(rows) if word == "ROWS" else word for word in words.split()]
    monkeypatch.setattr(own_table, "ROWS", OTHERS)
    code, printed, said = run(monkeypatch, capsys, *given, "--out", tmp_path / "t")
    assert (code, printed) == (2, "")
    assert text in said
    assert said.strip().splitlines()[-1].startswith("jaxfed: ")
    assert not (tmp_path / "t").exists()


def test_transitions_are_refused_where_nothing_has_an_order(unordered, tmp_path, monkeypatch, capsys):
    words = ["--table", unordered, "--user", "who", "--out", tmp_path / "t", "--only", own_table.TRANSITIONS]
    code, printed, said = run(monkeypatch, capsys, *words)
    assert (code, printed, said.count("\n")) == (2, "", 1)
    assert "do not say in which order a user's rows came: leave the row out" in said


def test_the_first_run_fails_and_the_others_are_made(rows, tmp_path, monkeypatch, capsys):
    """A row whose run cannot be says so; the table holds the others."""
    tables = own_table.make_rule_tables

    def with_a_bad_row(file, facts):
        made, beyond = tables(file, facts), {"every": 1, "at": (999,), "select": "val/full/ndcg@999"}
        return made | {"popularity": made["popularity"] | {"evaluation": beyond}}

    monkeypatch.setattr(own_table, "make_rule_tables", with_a_bad_row)
    words = ["--table", str(rows), "--user", "who", "--out", str(tmp_path / "out")]
    code, printed, log = run(monkeypatch, capsys, *words, "--only", "popularity", "EASE")
    assert code == 2
    assert "failed: " in log
    assert "EASE" in printed
    assert "min()" not in log + printed
