"""Data sets that say which rows train, validate and test: files, a column, tables in memory."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxfed.data.clients import partition
from jaxfed.data.loading import from_arrays, from_pandas, read
from jaxfed.data.population import ALONE
from jaxfed.data.sources.files import from_arrow
from jaxfed.data.splits import PART, TEST, TRAIN, VALID
from jaxfed.evaluation.split import make_eval_split

HEADER = ("user", "item", "time")
TRAINING = [("a", 1, 1), ("a", 2, 2), ("a", 10, 3), ("b", 1, 1), ("b", 3, 2), ("c", 2, 7), ("c", 3, 8)]
VALIDATION = [("a", 3, 4), ("b", 2, 3)]
TESTING = [("a", 4, 5), ("b", 10, 4), ("b", 4, 5)]
PARTS = {"path": TRAINING, "valid": VALIDATION, "test": TESTING}


def write(folder, parts, header=HEADER, ending="csv", delimiter=","):
    """{path, valid, test: a file} of rows."""
    paths = {}
    for key, rows in parts.items():
        paths[key] = str(folder / f"{key}.{ending}")
        lines = [delimiter.join(map(str, row)) for row in ([header] if header else []) + rows]
        pathlib.Path(paths[key]).write_text("\n".join(lines) + "\n")
    return paths


def columns(rows, header=HEADER):
    return {name: np.array(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}


def with_words(train="train", valid="valid", test="test"):
    """All rows, each with the word of its part, in a mixed order."""
    rows = [(*row, word) for rows, word in zip(PARTS.values(), (train, valid, test), strict=True) for row in rows]
    return [rows[i] for i in (7, 0, 11, 3, 9, 1, 4, 2, 10, 5, 8, 6)]


def held_out(clients):
    """{user: (train, validation, test items)}, by ids; train in its order, the others sorted."""
    population, items = clients.population, clients.source.items
    lists = population.train, population.valid, population.test
    found = {str(name): [items[part.of(u)].tolist() for part in lists] for u, name in enumerate(population.user_names)}
    return {name: (train, sorted(valid), sorted(test)) for name, (train, valid, test) in found.items()}


WANTED = {"a": (["1", "2", "10"], ["3"], ["4"]), "b": (["1", "3"], ["2"], ["10", "4"]), "c": (["2", "3"], [], [])}


def made(kind, folder):
    """The same parts by every way there is."""
    if kind == "files":
        return read(**write(folder, PARTS))
    if kind == "parquet":
        paths = {key: str(folder / f"{key}.parquet") for key in PARTS}
        for key, rows in PARTS.items():
            pyarrow.parquet.write_table(pa.table(columns(rows)), paths[key])
        return read(**paths)
    if kind == "no header":
        return read(**write(folder, PARTS, None, "tsv", "\t"), columns=HEADER)
    if kind == "column":
        rows = {"path": with_words("Train", "VAL", "test")}
        return read(**write(folder, rows, (*HEADER, "which")), part="which")
    if kind == "tables":
        return from_arrow(*[columns(TRAINING)], valid=columns(VALIDATION), test=columns(TESTING))
    words = columns(with_words("training", "dev", "Test"), (*HEADER, "split"))
    if kind == "pandas":
        pandas = pytest.importorskip("pandas")
        return from_pandas(pandas.DataFrame(words), part="split")
    return from_arrays(words["user"], words["item"], times=words["time"], parts=words["split"])


@pytest.mark.parametrize("kind", ["files", "parquet", "no header", "column", "tables", "pandas", "arrays"])
def test_every_way_gives_the_same_parts(kind, tmp_path):
    clients = partition(made(kind, tmp_path))
    assert held_out(clients) == WANTED
    assert clients.protocol == "given"
    assert not clients.leaky
    assert clients.source.items.tolist() == ["1", "2", "3", "4", "10"]  # which are numbers over all parts
    (note,) = [note for note in clients.notes if "no train row" in note]
    assert note.startswith('1 of 5 items have no train row (the first: "4"): their 2 validation and test rows stay')


def test_users_without_held_out_rows_train_and_weigh_nothing():
    population = partition(made("arrays", None)).population
    for part, lists in (("val", population.valid), ("test", population.test)):
        split = make_eval_split(population, part, share=ALONE)
        assert (split.targets.counts == lists.counts).all()
        assert split.targets.counts[2] == 0
        assert split.masked.counts[2] == 2
    assert population.train.counts[2] == 2


@pytest.mark.parametrize(
    ("protocol", "wanted"),
    [
        ("leave-one-out", {"a": ["10"], "b": ["3"], "c": ["3"]}),
        ("ratio", {"a": ["2", "10"], "b": ["3"], "c": ["3"]}),
        ("compat-pfedrec", {"a": ["10"], "b": ["3"], "c": ["3"]}),
    ],
)
def test_validation_that_is_not_given_is_taken_from_the_train_rows(protocol, wanted, tmp_path):
    parts = {"path": [*TRAINING, ("d", 1, 5)], "test": [*TESTING, ("d", 2, 6)]}
    data = read(**write(tmp_path, parts))
    clients = partition(data, split=protocol, ratio=(0.7, 0.1))
    found = held_out(clients)
    valid = {"a": ["10"], "b": ["3"], "c": ["3"], "d": []}
    if protocol == "ratio":  # 0.7 of 3 rows are 2, of 2 rows 1
        valid["a"] = ["10", "2"]
    assert {user: each[1] for user, each in found.items()} == valid
    assert {user: each[2] for user, each in found.items()} == {"a": ["4"], "b": ["10", "4"], "c": [], "d": ["2"]}
    assert found["d"][0] == ["1"]
    name = {"leave-one-out": "loo-clean", "ratio": "ratio-clean"}.get(protocol, protocol)
    assert clients.protocol == f"given, validation {name}"
    (note,) = [note for note in clients.notes if "no validation rows" in note]
    share = "share" if protocol == "ratio" else "one"
    assert note == (
        f"no validation rows are given: the latest {share} of each user's train rows validates (data.protocol = "
        f'"{name}"); 1 users with a single train row have none'
    )
    assert clients.leaky == (protocol == "compat-pfedrec")


@pytest.mark.parametrize("split", ["random-leave-one-out", "random-ratio"])
def test_validation_by_chance_leaves_the_test_as_it_is(split, tmp_path):
    data = read(**write(tmp_path, {key: PARTS[key] for key in ("path", "test")}))
    seen = set()
    for deal in range(12):
        clients = partition(data, split=split, deal=deal)
        found = held_out(clients)
        assert [found[user][2] for user in "abc"] == [["4"], ["10", "4"], []]
        assert [len(found[user][1]) for user in "abc"] == [1, 1, 1]
        assert sorted(found["a"][0] + found["a"][1], key=int) == ["1", "2", "10"]
        seen.add(found["a"][1][0])
    assert seen == {"1", "2", "10"}
    with pytest.raises(
        ValueError, match=r'data.protocol = "global-random": the test rows are given, and no validation'
    ):
        partition(data, split="global-random")


def test_ties_and_file_order_are_told_of_validation_alone(tmp_path):
    rows = {"path": [("a", 1, 5), ("a", 2, 5), ("b", 1, 1), ("b", 3, 2)], "test": [("a", 3, 5), ("b", 2, 2)]}
    clients = partition(read(**write(tmp_path, rows)))
    assert any(note.startswith("1 of 2 held-out items have the same time") for note in clients.notes)
    given = partition(read(**write(tmp_path, rows | {"valid": [("a", 4, 5), ("b", 4, 2)]})))
    assert not any("same time" in note for note in given.notes)
    untimed = {key: [row[:2] for row in each] for key, each in rows.items()}
    clients = partition(read(**write(tmp_path, untimed, HEADER[:2])))
    assert clients.protocol == "given, validation loo-clean (rows sorted by item id)"


BAD = {
    "overlapping parts": (
        {"test": [*TESTING, ("a", 1, 9), ("b", 2, 9)]},
        {},
        '2 (user, item) pairs are in two parts (the first: user "a", item "1", in train and test): parts must not',
    ),
    "unknown users": (
        {"valid": [], "test": [("a", 4, 9), ("x", 1, 1), ("y", 1, 1)]},
        {},
        '2 of 3 users with validation or test rows have no train row (the first: "x"): check that all parts write ids',
    ),
    "unknown items": (
        {"valid": [("a", "m1", 1)], "test": [("a", "m2", 9), ("b", "m3", 1)]},
        {},
        '3 of 7 items have no train row (the first: "m1"), among them all of the validation and test rows: check that',
    ),
    "validation alone": ({"test": []}, {}, "data.valid: validation rows are given, and no test rows"),
    "parts twice": (
        {},
        {"part": "time"},
        "data.part: parts are told by the column 'time' or by data.test, not by both",
    ),
    "a k-core": ({}, {"user_core": 2}, "data.user_core, data.item_core: the parts of the data are given"),
}


@pytest.mark.parametrize("name", BAD)
def test_parts_that_cannot_be_are_refused_in_a_line(name, tmp_path):
    changes, options, words = BAD[name]
    parts = {key: rows for key, rows in (PARTS | changes).items() if rows}
    if name == "overlapping parts":
        parts["valid"] = [("b", 9, 9)]
        parts["path"] = [*TRAINING, ("b", 2, 1)]
    core = {key: options.pop(key) for key in ("user_core",) if key in (options := dict(options))}
    with pytest.raises(ValueError, match=".") as error:
        partition(read(**write(tmp_path, parts), **options), **core)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("missing", "word"), [("train", "train"), ("test", "test")])
def test_a_column_without_a_part_is_refused(missing, word):
    words = {"train": "train", "test": "test"} | {missing: "valid"}
    rows = columns([(*row, words[part]) for part, rows in (("train", TRAINING), ("test", TESTING)) for row in rows],
                   (*HEADER, "part"))  # fmt: skip
    with pytest.raises(
        ValueError, match=f"no row of the data is of the part {word}: a split needs train and test rows"
    ):
        partition(from_arrow(rows, part="part"))


def test_a_word_that_is_no_part_is_named_with_its_row(tmp_path):
    paths = write(tmp_path, {"path": with_words(valid="holdout")}, (*HEADER, "split"))
    with pytest.raises(ValueError, match=r"'split' has 'holdout', which is no part, in row 1: write train, valid"):
        read(**paths, part="split")
    with pytest.raises(ValueError, match="no column 'which' for part among user, item, time, split"):
        read(**paths, part="which")


def test_few_unknown_users_are_left_out_and_named(tmp_path):
    parts = PARTS | {"test": [*TESTING, ("new", 1, 1), ("new", 2, 1)]}
    clients = partition(read(**write(tmp_path, parts)))
    assert held_out(clients) == WANTED
    assert (
        '1 of 3 users with validation or test rows have no train row (the first: "new"): left out, with 2 rows'
        in clients.notes
    )


def test_a_repeat_within_a_part_counts_once(tmp_path):
    parts = PARTS | {"path": [*TRAINING, ("a", 1, 9)]}
    clients = partition(read(**write(tmp_path, parts)))
    assert held_out(clients) == WANTED
    assert any(note.startswith("1 repeated (user, item) rows left out") for note in clients.notes)


def test_held_out_files_may_lack_times_but_not_ratings(tmp_path):
    header, rated = (*HEADER, "rating"), {key: [(*row, 5) for row in rows] for key, rows in PARTS.items()}
    paths = write(tmp_path, rated, header)
    (tmp_path / "b").mkdir()
    untimed = write(tmp_path / "b", {"test": [(u, i, r) for u, i, _, r in rated["test"]]}, ("user", "item", "rating"))
    for time in ("", "time"):
        assert held_out(partition(read(**paths | untimed, time=time))) == WANTED
    bare = write(tmp_path / "b", {"test": [row[:2] for row in TESTING]}, HEADER[:2])
    with pytest.raises(ValueError, match=r"test.csv: no column of ratings is found, .*path.csv has one: name it, or"):
        read(**paths | bare)
    assert held_out(partition(read(**paths | bare, rating="none"))) == WANTED


def test_titles_and_features_are_those_of_all_parts(tmp_path):
    titles = {"item": np.array([1, 2, 3, 4, 10]), "title": np.array(list("vwxyz")), "kind": np.array(list("ppqqr"))}
    users = {"user": np.array(list("abc")), "job": np.array(["x", "y", "x"])}
    more = {"titles": titles, "item_features": titles, "user_features": users}
    data = from_arrow(columns(TRAINING), valid=columns(VALIDATION), test=columns(TESTING), **more)
    clients = partition(data)
    assert clients.source.titles.tolist() == list("vwxyz")
    assert len(clients.population.item_features.rows(np.arange(5))) == 5
    assert clients.vocabulary[0] > 0


def test_clients_of_a_column_are_of_all_parts():
    def placed(rows, place):
        return columns([(*row, place) for row in rows], (*HEADER, "place"))

    parts = {"valid": placed(VALIDATION, "home"), "test": placed(TESTING, "home")}
    rows = placed(TRAINING, "home")
    rows["place"][:2] = "work"
    data = from_arrow(rows, keep="place", **parts)
    devices = partition(data, by="place", merge="devices").population
    assert devices.names.tolist() == ["a/home", "a/work", "b/home", "c/home"]
    assert devices.asked.test.counts.tolist() == [1, 2, 0]
    apart = partition(data, by="place").population
    assert apart.names.tolist() == ["home", "work"]
    assert apart.user_names.tolist() == ["a", "b", "c", "a"]
    with pytest.raises(ValueError, match="clients by 'place': the data have no such column; choose one of user, silo,"):
        partition(made("arrays", None), by="place")


def test_the_digest_is_of_the_parts_too():
    rows, other = with_words(), [(*row[:3], "train" if row[3] == "valid" else row[3]) for row in with_words()]
    names = (*HEADER, "part")
    plain, given, changed = (
        partition(from_arrow(columns(each, names), part=part)) for each, part in
        ((rows, ""), (rows, "part"), (other, "part"))
    )  # fmt: skip
    assert len({plain.digest, given.digest, changed.digest}) == 3
    assert from_arrow(columns(rows, names), part="part").columns[PART].tolist() == [
        {"train": TRAIN, "valid": VALID, "test": TEST}[row[3]] for row in rows
    ]
