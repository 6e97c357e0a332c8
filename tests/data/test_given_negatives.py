"""Negatives of a file: in NCF's form and as a table, what is refused and what is left out."""

import gzip

import numpy as np
import pytest

from jaxfed.data.clients import partition
from jaxfed.data.loading import read
from jaxfed.data.sources.files import from_arrow
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.evaluation.candidates import SampleOptions
from jaxfed.evaluation.split import make_eval_split

ROWS = {
    "user": np.repeat(list("abc"), 4),
    "item": np.array([1, 2, 3, 4, 2, 3, 4, 5, 5, 6, 7, 1]),
    "time": np.arange(12),
}
NEGATIVES = {"a": [7, 5, 6], "b": [6, 1, 7], "c": [3, 2]}
TARGETS = {"a": 4, "b": 5, "c": 1}


def ncf(negatives=NEGATIVES, targets=TARGETS):
    return "".join(
        f"({user},{targets[user]})\t" + "\t".join(map(str, items)) + "\n" for user, items in negatives.items()
    )


def rows_of(negatives=NEGATIVES):
    pairs = [(user, item) for user, items in negatives.items() for item in items]
    return {"user": np.array([user for user, _ in pairs]), "item": np.array([item for _, item in pairs])}


def as_csv(negatives=NEGATIVES):
    return "who,item_id\n" + "".join(
        f"{user},{item}\n" for user, item in zip(*rows_of(negatives).values(), strict=True)
    )


def write_rows(folder):
    lines = ["who,item,time", *(",".join(map(str, row)) for row in zip(*ROWS.values(), strict=True))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "rows.csv")


def found(clients):
    population, items = clients.population, clients.source.items
    lists = population.asked.negatives
    return {str(name): {int(i) for i in items[lists.of(u)]} for u, name in enumerate(population.asked.user_names)}


WANTED = {user: {*items} for user, items in NEGATIVES.items()}
FORMS = {
    "ncf": ("test.negative", ncf().encode()),
    "with a byte order mark": ("a.csv", b"\xef\xbb\xbf" + ncf().encode()),
    "csv": ("negatives.csv", as_csv().encode()),
    "gzipped": ("negatives.csv.gz", gzip.compress(as_csv().encode())),
    "tsv": ("negatives.tsv", as_csv().replace(",", "\t").encode()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form, tmp_path):
    name, content = FORMS[form]
    (tmp_path / name).write_bytes(content)
    clients = partition(read(write_rows(tmp_path), user="who", negatives=str(tmp_path / name)))
    assert found(clients) == WANTED
    assert clients.source.negatives is None
    (note,) = [note for note in clients.notes if name in note]
    assert note == f"{name}: users have 2 to 3 negatives, 1 of 3 fewer than 3"


def with_negatives(negatives=NEGATIVES, **options):
    return partition(from_arrow(ROWS, negatives=rows_of(negatives)), **options)


def test_they_are_the_candidates_of_validation_and_test():
    clients = with_negatives()
    population, items = clients.population, clients.source.items
    for part in ("val", "test"):
        split = make_eval_split(population, part, seed=3)
        assert split.sampled.shape == (3, 1, 3)
        for user, name in enumerate(population.user_names):
            real = split.sampled[user, 0][split.sampled[user, 0] < len(items)]
            assert {*items[real].astype(int)} == WANTED[name]
            assert len(real) == len(WANTED[name])
    some = make_eval_split(population, "test", most=2)
    assert (some.sampled == make_eval_split(population, "test").sampled[some.who]).all()
    none = make_eval_split(population, "test", candidates=SampleOptions(0))
    assert none.sampled.shape[-1] == 0


def test_other_clients_have_the_negatives_of_their_users():
    plain = found(with_negatives())
    assert found(with_negatives(by="silo", silos=2)) == found(with_negatives(by="device")) == plain
    devices = with_negatives(by="device").population
    assert devices.negatives is None
    cold = with_negatives(cold=0.34).population
    both = [(group.user_names.tolist(), group.negatives.counts.tolist()) for group in (cold, cold.cold)]
    assert sorted(pair for each in both for pair in zip(*each, strict=True)) == [("a", 3), ("b", 3), ("c", 2)]


BAD = {
    "a train item": (
        {"a": [7, 1]},
        '1 negatives are items that the user interacted with (the first: user "a", item "1"',
    ),
    "the test item": ({"c": [3, 1], "b": [5]}, 'user "b", item "5", a test item): take them out'),
    "a user without": (
        {"b": []},
        '1 of 3 users have no negatives (the first: "b"): add them, or leave these users out',
    ),
    "unknown items alone": ({"c": [77, 78]}, '1 of 3 users have no negatives (the first: "c")'),
}


@pytest.mark.parametrize("name", BAD)
def test_negatives_that_cannot_be_are_refused_in_a_line(name):
    changes, words = BAD[name]
    with pytest.raises(ValueError, match=".") as error:
        with_negatives(NEGATIVES | changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("whose", ["users", "items"])
def test_ids_of_another_spelling_are_told(whose):
    if whose == "users":
        other = {f"u{user}": items for user, items in NEGATIVES.items()}
    else:
        other = {user: [f"i{item}" for item in items] for user, items in NEGATIVES.items()}
    said = rf"none of its {whose} is one of the data's \(.* here, .* there\): check that it writes ids as the data do"
    with pytest.raises(ValueError, match=said):
        with_negatives(other)


def test_strangers_and_repeats_are_left_out_and_counted():
    clients = with_negatives(NEGATIVES | {"x": [1, 2], "a": [7, 5, 6, 6, 99]})
    assert found(clients) == WANTED
    notes = "\n".join(clients.notes)
    assert 'negatives: 1 of its 4 users are none of the data\'s (the first: "x"): 2 negatives left out' in notes
    assert 'items are none of the data\'s (the first: "99"): 1 negatives left out' in notes
    assert "negatives: 1 negatives come twice and count once" in notes


def test_another_test_item_than_that_of_the_split_is_told(tmp_path):
    (tmp_path / "n.negative").write_text(ncf(targets=TARGETS | {"b": 4, "c": 88}))
    clients = partition(read(write_rows(tmp_path), user="who", negatives=str(tmp_path / "n.negative")))
    assert any(
        note.startswith('n.negative names another test item than the split for 2 of 3 users (the first: "b")')
        for note in clients.notes
    )
    assert not any("another test item" in note for note in with_negatives().notes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ncf() + "(a,4)\t5\n", 'n.negative: user "a" has two lines, the second is line 4'),
        (ncf() + "(d,4)\n", "n.negative: line 4 is not (user,item) with negatives behind tabs: '(d,4)'"),
        (ncf() + "d,4\t5\n", "line 4 is not (user,item)"),
        (ncf() + "(d,4,5)\t5\n", "line 4 is not (user,item)"),
        (ncf() + "(d,4)\t5\t\t6\n", "line 4 is not (user,item)"),
        ("who,what\na,1\n", "cannot tell which column is item (columns: who, what): pass item"),
        ("who,item\n", "the table has no rows"),
        ("", "the file is empty"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_a_line(text, words, tmp_path):
    (tmp_path / "n.negative").write_text(text)
    with pytest.raises(ValueError, match=".") as error:
        read(write_rows(tmp_path), user="who", negatives=str(tmp_path / "n.negative"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_does_not_go_with_given_negatives():
    for options, words in (
        ({"label": "rating"}, 'data.negatives: with data.label = "rating" nothing is ranked'),
        ({"malicious": 0.5, "promoted": ("7",)}, "data.negatives: given negatives do not go with data.promoted"),
    ):
        rows = ROWS | {"rating": np.arange(12) % 5}
        with pytest.raises(ValueError, match=words):
            partition(from_arrow(rows, negatives=rows_of()), **options)
    rows = {"user": np.repeat(list("ab"), 8), "item": np.tile(np.arange(8), 2), "side": np.tile(list("ppppqqqq"), 2)}
    far = {"user": np.array(list("ab")), "item": np.array([8, 9])}
    with pytest.raises(ValueError, match=r"data.negatives: given negatives do not go with data.merge"):
        partition(from_arrow(rows, keep="side", negatives=far), by="side", merge="domains")


def test_the_digest_is_of_the_negatives_too():
    plain = partition(from_arrow(ROWS)).digest
    assert len({plain, with_negatives().digest, with_negatives(NEGATIVES | {"c": [2, 4]}).digest}) == 3
    assert with_negatives().digest == with_negatives().digest


def test_nobody_to_ask_is_refused():
    population = partition(synthetic_data(60, 50, mean_length=8)).population
    empty = population._replace(test=population.test.some(np.array([], int))._replace(start=np.zeros(61, np.int64)))
    with pytest.raises(ValueError, match="none of the 60 clients that are asked has a test item: ask more of them"):
        make_eval_split(empty, "test")
