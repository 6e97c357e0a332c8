"""Files of somebody's own that are odd: what `jaxfed data` says, and that what `jaxfed init` writes can be trained."""

import numpy as np
import pytest

from tests.cli.test_newcomer import run

HEAD = "user,item,time"


def rows(users=30, items=40, length=8):
    """Rows of users with distinct items, one a day."""
    random = np.random.default_rng(0)
    return [
        (f"u{user}", f"i{item}", 1_600_000_000 + 86_400 * day + user)
        for user in range(users)
        for day, item in enumerate(random.choice(items, length, replace=False))
    ]


def text(table, head=HEAD):
    return "\n".join([head, *(",".join(map(str, row)) for row in table)]) + "\n"


def negatives(table, many, items=40):
    """A line for each user, whose last item is the test item, in the form of NCF."""
    had = {user: [item for who, item, _ in table if who == user] for user, _, _ in table}
    free = {user: [f"i{i}" for i in range(items) if f"i{i}" not in mine][:many] for user, mine in had.items()}
    return "".join(f"({user},{had[user][-1]})\t" + "\t".join(mine) + "\n" for user, mine in free.items())


RATED = [(*row, 1 + number * 7 % 5) for number, row in enumerate(rows())]
FILES = {
    "plain.csv": text(rows()),
    "rated.csv": text(RATED, f"{HEAD},rating"),
    "labelled.csv": text([(*row[:3], row[3] // 4) for row in RATED], f"{HEAD},label"),
    "equal.csv": text([(*row[:2], 7) for row in rows()]),
    "one_item.csv": text([(f"u{user}", "i1", user) for user in range(9)]),
    "nobody.csv": text([]),
    "nothing.csv": "",
    "few.negative": negatives(rows(), 10),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("one_item.csv", "no user has 3 interactions, the least that can be split into train, validation, test"),
        ("nobody.csv", "nobody.csv: the table has no rows"),
        ("nothing.csv", "nothing.csv: the file is empty, it has no rows"),
        ("labelled.csv --label click", "choose a threshold above 0 and at most 1"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(words, says, folder, monkeypatch, capsys):
    for command in ("data", "init"):
        code, printed, said = run(monkeypatch, capsys, command, *words.split())
        assert (code, printed) == (2, "")
        assert says in said.splitlines()[-1]
    assert {path.name for path in folder.iterdir()} == {*FILES}


def test_a_name_with_a_blank_can_be_typed_again(folder, monkeypatch, capsys):
    (folder / "my shop.csv").write_text(FILES["plain.csv"])
    assert "which jaxfed init 'my shop.csv' writes" in run(monkeypatch, capsys, "data", "my shop.csv")[1]
    printed = run(monkeypatch, capsys, "init", "my shop.csv")[1]
    assert printed == "my shop.toml is written; now: jaxfed train 'my shop.toml'\n"
    assert "jaxfed train 'my shop.toml'" in (folder / "my shop.toml").read_text()


def test_rows_that_may_be_no_clicks_are_told(folder, monkeypatch, capsys):
    note = "note: 144 of 240 rows have a rating of 0 or less, and count as interactions"
    assert note in run(monkeypatch, capsys, "data", "labelled.csv")[1]
    for words in (["labelled.csv", "--label", "click", "--threshold", "1"], ["rated.csv"], ["plain.csv"]):
        assert "0 or less" not in run(monkeypatch, capsys, "data", *words)[1]


def test_times_that_are_equal_are_the_order_of_the_file(folder, monkeypatch, capsys):
    said = run(monkeypatch, capsys, "data", "equal.csv")[1]
    assert "protocol loo-clean (order of the file)" in said
    assert 'data.protocol = "loo-random"' in said


def test_what_is_asked_is_not_suggested_otherwise(folder, monkeypatch, capsys):
    assert "data.protocol = " in run(monkeypatch, capsys, "data", "plain.csv")[1]
    said = run(monkeypatch, capsys, "data", "plain.csv", "--protocol", "loo-random")[1]
    assert "model.name = " in said
    assert "data.protocol = " not in said


def test_a_summary_says_what_a_test_knows(folder, monkeypatch, capsys):
    for model in ("ease", "mf"):
        run(monkeypatch, capsys, "init", "plain.csv", "--model", model, "--out", f"{model}.toml")
    known = "history  train and validation items"
    assert known in run(monkeypatch, capsys, "train", "ease.toml")[1]
    assert known in run(monkeypatch, capsys, "evaluate", "runs/ease")[1]
    assert known not in run(monkeypatch, capsys, "train", "mf.toml", "--rounds", "1", "--evaluation.history", "all")[1]


@pytest.mark.parametrize(
    ("words", "figure"),
    [
        ("rated.csv --label rating", "val/rating/rmse"),
        ("rated.csv --label click", "val/click/log_loss"),
        ("plain.csv --negatives few.negative", "val/full/ndcg@10"),
        ("plain.csv --clients silo --silos 3", "val/full/ndcg@10"),
    ],
)
def test_what_init_writes_can_be_trained(words, figure, folder, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "init", *words.split(), "--out", "my.toml")[0] == 0
    code, _, said = run(monkeypatch, capsys, "train", "my.toml", "--rounds", "1")
    assert code == 0, said
    assert figure in said
