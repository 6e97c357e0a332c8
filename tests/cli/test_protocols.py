"""Protocols of others as a user meets them: on the command line, in a configuration, in a program, in a saved run."""

import json
import tomllib

import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config
from jaxfed.training.loop import train_run
from tests.cli.test_newcomer import run

random = np.random.default_rng(5)
TAKEN = [random.permutation(40)[: int(random.integers(6, 12))] for _ in range(30)]
ROWS = [(f"u{user}", f"i{item}", 100 + time) for user, items in enumerate(TAKEN) for time, item in enumerate(items)]
LAST = {(f"u{user}", f"i{items[-1]}") for user, items in enumerate(TAKEN)}
HEADER = "user,item,time"


def lines(rows, header=HEADER):
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def split_rows():
    """(train rows, test rows): each user's last."""
    return [row for row in ROWS if row[:2] not in LAST], [row for row in ROWS if row[:2] in LAST]


def negatives(many=25):
    free = [np.setdiff1d(np.arange(40), items)[:many] for items in TAKEN]
    names = [(f"(u{user},i{items[-1]})", *(f"i{item}" for item in free[user])) for user, items in enumerate(TAKEN)]
    return "\n".join("\t".join(line) for line in names) + "\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that words of the tests name."""
    train, test = split_rows()
    files = {
        "rows.csv": lines(ROWS),
        "train.csv": lines(train),
        "test.csv": lines(test),
        "valid.csv": lines([(user, "i999", 1) for user in ("u1", "u2")]),
        "empty.csv": HEADER + "\n",
        "strangers.csv": lines([("x1", "i1", 5), ("x2", "i2", 5)]),
        "new_items.csv": lines([("u1", "n1", 5), ("u2", "n2", 5)]),
        "both.csv": lines([*test, train[0]]),
        "column.csv": lines([(*row, "test" if row[:2] in LAST else "train") for row in ROWS], f"{HEADER},split"),
        "untimed.csv": lines([row[:2] for row in ROWS], "user,item"),
        "sorted.csv": lines(sorted((row[0], row[1]) for row in ROWS), "user,item"),
        "good.negative": negatives(),
        "few.negative": negatives(3),
        "odd.negative": negatives() + "u0\ti1\n",
        "positives.negative": negatives().replace("\n", f"\ti{TAKEN[0][0]}\n", 1),
        "short.negative": negatives().split("\n", 1)[1],
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "small.toml").write_text(
        'rounds = 2\n[model]\ndim = 4\n[cohort]\nsize = 8\n[evaluation]\nevery = 2\n[work.optimizer]\nname = "sgd"\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(text, out="r"):
    return ["train", "small.toml", "--out", out, *text.split()]


BAD = {
    "--data.path train.csv --data.test both.csv": '1 (user, item) pairs are in two parts (the first: user "u0"',
    "--data.path train.csv --data.test strangers.csv": "2 of 2 users with validation or test rows have no train row",
    "--data.path train.csv --data.test new_items.csv": "among them all of the validation and test rows",
    "--data.path train.csv --data.test empty.csv": "empty.csv: the table has no rows",
    "--data.path train.csv --data.test nope.csv": "nope.csv: no such file",
    "--data.path train.csv --data.valid valid.csv": "validation rows are given, and no test rows",
    "--data.path column.csv --data.part time": "column 'time' has '100', which is no part, in row 1",
    "--data.path column.csv --data.part no": "no column 'no' for part among user, item, time, split",
    "--data.path column.csv --data.part split --data.test test.csv": "told by the column 'split' or by data.test",
    "--data.path train.csv --data.test test.csv --data.item-core 2": "a k-core would change them",
    "--data.path untimed.csv --data.protocol global-time": "the data have no times: choose loo-random",
    "--data.path rows.csv --data.protocol global-time --data.ratio 0.5 0.5": "two shares, of validation and test",
    "--data.path rows.csv --data.protocol loo-randm": "loo-random",
    "--data.path rows.csv --data.negatives positives.negative": "1 negatives are items that the user interacted with",
    "--data.path rows.csv --data.negatives short.negative": '1 of 30 users have no negatives (the first: "u0")',
    "--data.path rows.csv --data.negatives odd.negative": "odd.negative: line 31 is not (user,item) with negatives",
    "--data.path rows.csv --data.negatives few.negative": "20 is beyond the 4 candidates of `sampled` figures",
    "--data.path rows.csv --data.negatives good.negative --evaluation.negative-sampling popularity": (
        "data.negatives gives the negatives: leave one of both out"
    ),
    "--data.path rows.csv --evaluation.at 10 41": "evaluation.at: 41 is beyond the catalogue of 40 items",
    "--data.path rows.csv --evaluation.at 10,35 --evaluation.negatives 30": "35 is beyond the 31 candidates",
    "--data.path rows.csv --evaluation.at 0": "cut-offs are whole numbers from 1",
    "--data.path rows.csv --evaluation.negatives 40": "evaluation.negatives is 40, the catalogue has 40 items",
    "--data.path rows.csv --evaluation.draws 0": "evaluation.draws is 0: it must be at least 1",
    "--data.path rows.csv --evaluation.at 5": 'evaluation.select: no metric "val/full/ndcg@10"; did you mean',
    "--data.path rows.csv --evaluation.negative-sampling popular": "Expected one of ('uniform', 'popularity')",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_ends_in_one_line(words, folder, monkeypatch, capsys):
    code, _, said = run(monkeypatch, capsys, *words_of(words))
    assert code == 2
    (line,) = [line for line in said.split("\n") if line.startswith("jaxfed: ")]
    assert BAD[words] in line


def trained(folder, monkeypatch, capsys, text, out="r"):
    """(the summary of a run, what it said)."""
    code, _, said = run(monkeypatch, capsys, *words_of(text, out))
    assert code == 0, said
    return json.loads((folder / out / "summary.json").read_text()), said


GOOD = {
    "--data.path rows.csv": ("loo-clean", "99 uniform, 5 draws"),
    "--data.path untimed.csv": ("loo-clean (order of the file)", "99 uniform, 5 draws"),
    "--data.path sorted.csv": ("loo-clean (rows sorted by item id)", "99 uniform, 5 draws"),
    "--data.path sorted.csv --data.protocol loo-random --evaluation.negatives 20": (
        "loo-random",
        "20 uniform, 5 draws",
    ),
    "--data.path rows.csv --data.protocol global-random": ("global-random", "99 uniform, 5 draws"),
    "--data.path train.csv --data.test test.csv --data.negatives good.negative": (
        "given, validation loo-clean", "given, 25 a user",
    ),
    "--data.path column.csv --data.part split --data.protocol ratio-random --evaluation.negatives 0": (
        "given, validation ratio-random", None,
    ),
    "--data.path rows.csv --evaluation.negative-sampling popularity --evaluation.negatives 20 --evaluation.draws 1": (
        "loo-clean", "20 by popularity, 1 draw",
    ),
    "--data.path train.csv --data.test test.csv --data.protocol compat-pfedrec": (
        "given, validation compat-pfedrec (LEAKY)", "99 uniform, 5 draws",
    ),
    "--data.path train.csv --data.test test.csv --data.clients silo --data.silos 8 --data.negatives good.negative": (
        "given, validation loo-clean", "given, 25 a user",
    ),
    "--data.path rows.csv --data.protocol ratio-random --data.clients device --data.cold 0.2": (
        "ratio-random", "99 uniform, 5 draws",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", GOOD)
def test_a_summary_says_its_protocol(words, folder, monkeypatch, capsys):
    summary, said = trained(folder, monkeypatch, capsys, words)
    assert (summary["protocol"], summary.get("negatives")) == GOOD[words]
    assert ("leaky" in summary) == ("LEAKY" in GOOD[words][0])
    assert any(name.startswith("test/sampled/") for name in summary) == ("negatives" in summary)
    assert ("CAUTION" in said) == ("sorted by" in GOOD[words][0])
    code, table, _ = run(monkeypatch, capsys, "evaluate", "r", "--json")
    values = json.loads(table)
    assert code == 0
    assert values.items() <= summary.items()
    assert values["protocol"] == summary["protocol"]
    code, text, _ = run(monkeypatch, capsys, "evaluate", "r")
    assert f"protocol  {summary['protocol']}" in text
    code, text, _ = run(monkeypatch, capsys, "recommend", "r", "--user", "u3", "-k", "2")
    assert (code, len(text.strip().split("\n"))) == (0, 2)


def test_the_same_held_out_rows_in_files_as_by_the_rule_give_the_same_run(folder, monkeypatch, capsys):
    """Loading them apart changes neither numbering nor order, and the digest alone tells."""
    plain, _ = trained(folder, monkeypatch, capsys, "--data.path rows.csv", "a")
    given, _ = trained(folder, monkeypatch, capsys, "--data.path train.csv --data.test test.csv", "b")
    assert given["params_sha256"] == plain["params_sha256"]
    assert given["test/full/mrr"] == plain["test/full/mrr"]
    assert given["data_sha256"] != plain["data_sha256"]


def test_cut_offs_are_columns_of_the_table(folder, monkeypatch, capsys):
    words = words_of("--data.path rows.csv --evaluation.at 5,3 --evaluation.select val/full/ndcg@5")
    code, text, said = run(monkeypatch, capsys, *words)
    assert code == 0, said
    assert [word for word in text.split() if "@" in word][:4] == ["hr@3", "ndcg@3", "hr@5", "ndcg@5"]


def test_a_run_with_given_files_is_reproduced_by_its_configuration(folder, monkeypatch, capsys):
    words = "--data.path train.csv --data.test test.csv --data.negatives good.negative"
    first, _ = trained(folder, monkeypatch, capsys, words)
    stored = tomllib.loads((folder / "r" / "config.toml").read_text())["data"]
    assert [stored[key] for key in ("path", "test", "negatives")] == [
        str(folder / name) for name in ("train.csv", "test.csv", "good.negative")
    ]
    monkeypatch.chdir("/")
    code, _, said = run(monkeypatch, capsys, "train", folder / "r" / "config.toml", "--out", folder / "again")
    assert code == 0, said
    again = json.loads((folder / "again" / "summary.json").read_text())
    assert again["params_sha256"] == first["params_sha256"]
    assert again["test/sampled/ndcg@10"] == first["test/sampled/ndcg@10"]
    (folder / "test.csv").write_text(lines(split_rows()[1][::-1]))
    code, _, said = run(monkeypatch, capsys, "evaluate", folder / "r")
    assert (code, "differ from those of the run" in said) == (2, True)


def test_data_and_init_take_parts_and_negatives(folder, monkeypatch, capsys):
    own = ["--test", "test.csv", "--negatives", "good.negative"]
    code, text, _ = run(monkeypatch, capsys, "data", "train.csv", *own)
    assert code == 0
    count = len(ROWS) - 60
    assert f"protocol given, validation loo-clean: {count:,} train rows, 30 validation rows, 30 test rows" in text
    code, _, _ = run(monkeypatch, capsys, "init", "train.csv", *own, "--out", "mine.toml")
    table = tomllib.loads((folder / "mine.toml").read_text())["data"]
    assert (code, table["test"], table["negatives"]) == (0, "test.csv", "good.negative")
    code, text, _ = run(monkeypatch, capsys, "data", "sorted.csv")
    assert "note: CAUTION: there are no times, and the rows of each user are sorted by item id" in text


def columns(rows, header=HEADER):
    return {name: np.array(column) for name, column in zip(header.split(","), zip(*rows, strict=True), strict=True)}


SOURCES = {
    "files": lambda: jf.data.read("train.csv", test="test.csv", negatives="good.negative"),
    "column": lambda: jf.data.read("column.csv", part="split", negatives="good.negative"),
    "tables": lambda: jf.data.from_arrow(
        columns(split_rows()[0]), test=columns(split_rows()[1]), negatives=columns(free_pairs(), "user,item")
    ),
    "arrays": lambda: jf.data.from_arrays(
        *(column for name, column in columns(ROWS).items() if name != "time"),
        times=np.array([row[2] for row in ROWS]),
        parts=["TEST" if row[:2] in LAST else "Train" for row in ROWS],
    ),
    "chance": lambda: jf.data.read("rows.csv"),
}


def free_pairs():
    return [(f"u{user}", f"i{item}") for user, items in enumerate(TAKEN) for item in np.setdiff1d(np.arange(40), items)]


@pytest.mark.parametrize("source", SOURCES)
def test_a_saved_run_of_a_program_reproduces(source, folder, tmp_path):
    split = "random-leave-one-out" if source == "chance" else "leave-one-out"
    clients = jf.data.partition(SOURCES[source](), split=split, deal=3)
    model = jf.models.mf(clients.num_items, dim=4)
    method = jf.algorithms.fedavg(model, optax.sgd(0.5))
    settings = jf.Evaluation(every=2, at=(5, 10), negatives=21, draws=2)
    experiment = jf.Experiment(clients, model, method, cohort=jf.sampling.uniform(8), evaluation=settings)
    assert len(list(experiment.train(2))) == 1
    experiment.save(tmp_path / "saved")
    test = experiment.evaluate("test")
    assert {"test/full/hr@5", "test/sampled/hr@5"} <= test.keys()
    loaded = jf.load_run(tmp_path / "saved")
    assert loaded.evaluate("test") == test
    table = read_config(tmp_path / "saved")
    summary = train_run(make_config(table | {"run": table["run"] | {"out": str(tmp_path / "new")}}))
    assert (summary["params_sha256"], summary["data_sha256"]) == (experiment.params_sha256, clients.digest)
    assert test.items() <= summary.items()
    assert summary["protocol"] == clients.protocol
