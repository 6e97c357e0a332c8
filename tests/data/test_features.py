"""Features of users and items: as they are encoded, read, renumbered, and laid beside the rows they belong to."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxfed.config import build
from jaxfed.config.schema import make_config
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.features import Features, encode_features
from jaxfed.data.interactions import Dataset, Interactions, data_digest
from jaxfed.data.packing import empty_cohort, pack_cohort
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.beside import read_features
from jaxfed.data.sources.files import read_interactions
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.data.sources.tables import read_source


def names_of(known, index):
    """What the features of one are called."""
    return [known.names[i] for i in known.numbers[index] if i < len(known.names)]


def test_words_are_sets_numbers_are_buckets_and_what_is_missing_is_a_value():
    got = encode_features(
        {
            "kind": np.array(["b a", "", "a|c, b", "a a"]),
            "age": np.array([7.0, np.nan, 30.0, 7.0]),
        }
    )
    assert got.names.tolist() == ["kind=", "kind=a", "kind=b", "kind=c", "age=7", "age=30", "age="]
    assert [names_of(got, i) for i in range(4)] == [
        ["kind=a", "kind=b", "age=7"],
        ["kind=", "age="],
        ["kind=a", "kind=b", "kind=c", "age=30"],
        ["kind=a", "age=7"],
    ]
    assert (got.numbers[1] == [0, 6, 7, 7]).all()  # past the end of the names where unused
    assert (got.rows(np.array([[4, 1]])) == [[[7, 7, 7, 7], [0, 6, 7, 7]]]).all()
    assert encode_features({}) is None


def test_a_quote_is_no_part_of_a_word(tmp_path):
    """Where fields are not quoted, one that begins with a quote is the same word."""
    moods = [(i, '"' * (i in (3, 30)) + ("sad", "glad")[i % 2]) for i in range(40)]
    (tmp_path / "f.tsv").write_text("item_id\tmood\n" + "".join(f"{i}\t{mood}\n" for i, mood in moods))
    found = read_features(read_source(tmp_path / "f.tsv"), np.arange(40).astype(str), "item")
    assert found.names.tolist() == ["mood=glad", "mood=sad"]


def test_buckets_of_numbers_are_alike_in_size_and_never_cut_equal_numbers():
    column = np.random.default_rng(0).integers(0, 1000, 5000).astype(float)
    got = encode_features({"x": column})
    size = np.bincount(got.numbers[:, 0])
    assert len(size) == 10
    assert size.min() > 400
    assert all(len(set(got.numbers[column == each, 0].tolist())) == 1 for each in np.unique(column))
    low = [column[got.numbers[:, 0] == bucket].min() for bucket in range(10)]
    assert got.names.tolist() == [f"x={each:g}" for each in low]
    skewed = encode_features({"x": np.r_[np.zeros(900), np.arange(1.0, 101)]})  # nine tenths are one number
    assert names_of(skewed, 0) == ["x=0"]
    assert len(skewed.names) == 2


def tricky(clients="user"):
    """Rows in no order, whose users and items are known by features that say their names; some are left out as the data
    are prepared, and some users are at two clients."""
    random = np.random.default_rng(3)
    user, item = random.integers(0, 30, 400), random.integers(0, 25, 400)
    user[random.permutation(400)[:2]] = 30, 31  # too short to stay
    users, number = np.unique(user, return_inverse=True)
    items, at = np.unique(item, return_inverse=True)
    said, told = (np.array([f"{letter}{each}" for each in names]) for letter, names in (("u", users), ("i", items)))
    shuffled = random.permutation(len(said))  # numbers of features are not those of users
    data = Dataset(
        Interactions(number.astype(np.int32), at.astype(np.int32), np.ones(400, np.float32), random.permutation(400)),
        users.astype(str),
        items.astype(str),
        columns={"shop": (random.random(400) < 0.5).astype(str)},
        user_features=Features(shuffled.argsort()[:, None].astype(np.int32), said[shuffled]),
        item_features=encode_features(
            {"": np.array([f"{each} {'rare' if i % 7 == 0 else ''}" for i, each in enumerate(told)])}
        ),
    )
    return prepare_population(data, clients, silos=6, item_core=12, user_core=3)


@pytest.mark.parametrize("clients", ["user", "silo", "shop"])
def test_features_stay_with_their_users_and_items(clients):
    data, population = tricky(clients)
    assert len(data.users) == len(population.user_names)
    assert len(data.items) < 25  # some were left out
    assert any(each in ("30", "31") for each in data.users) is False
    for u, name in enumerate(population.user_names):
        assert names_of(population.user_features, u) == [f"u{name}"]
    for i, name in enumerate(data.items):
        assert f"=i{name}" in names_of(population.item_features, i)
    if clients == "shop":
        assert len(set(population.user_names)) < len(population.user_names)  # who is at both is two users


@pytest.mark.parametrize("clients", ["user", "silo"])
@pytest.mark.parametrize("pairwise", [False, True])
def test_batches_carry_the_features_of_their_rows_and_users(clients, pairwise):
    _, population = tricky(clients)
    batching = Batching(8, 2, 2, pairwise, features=("user", "item"))
    ids = np.arange(population.num_clients)[::-1]
    shapes = make_block_shapes(population, batching, len(ids), steps_per_block=16)
    cohort = pack_cohort(population, batching, shapes, ids, np.ones(len(ids), bool), 0, 0)
    every, of_item, of_user = 0, population.item_features, population.user_features
    for block in cohort.blocks:
        rows, batch = np.append(cohort.rows, population.num_items)[block.rows], block.data.batch
        for lane, slot in enumerate(block.slots):
            held = np.append(rows[lane], population.num_items)
            for step in np.flatnonzero(block.data.live[lane]):
                at = np.minimum(block.data.rows[lane, step], rows.shape[1])
                assert (batch["item_features"][lane, step] == of_item.rows(held[at])).all()
                first, known = population.client_offsets[ids[slot]], batch["user_features"][lane, step]
                if clients == "user":
                    assert known.tolist() == of_user.numbers[first].tolist()
                else:
                    used = batch["weight"][lane, step] > 0
                    assert (known[used] == of_user.numbers[first + batch["user"][lane, step]][used]).all()
                every += 1
            for step in np.flatnonzero(~block.data.live[lane]):
                assert (batch["user_features"][lane, step] == len(of_user.names)).all()
    assert every > 50
    shape = lambda c: [jax_shape(b.data.batch) for b in c.blocks]
    assert set(shape(cohort)) <= set(shape(empty_cohort(population, batching, shapes)))


def jax_shape(batch):
    return tuple((name, x.dtype, x.shape[2:]) for name, x in sorted(batch.items()))


def test_batches_of_models_without_features_carry_none():
    _, population = tricky()
    shapes = make_block_shapes(population, Batching(), 5)
    cohort = pack_cohort(population, Batching(), shapes, np.arange(5), np.ones(5, bool), 0, 0)
    assert set(cohort.blocks[0].data.batch) == {"label", "weight"}


def test_synthetic_data_have_features_that_mean_something():
    """A user's strongest factor is that of more of their items than chance would have it."""
    data = synthetic_data(300, 200, mean_length=20, taste=6.0)
    user, item = data.interactions.user, data.interactions.item
    same = data.user_features.numbers[user, 0] == data.item_features.numbers[item, 0]
    assert same.mean() > 0.2  # chance: about 1 / 8
    phase = data.item_features.numbers[item, 1] - 8
    time = [data.interactions.time[phase == each].mean() for each in range(4)]  # histories run through phases
    assert time == sorted(time)


ROWS = "user_id,item_id,rating,timestamp\n" + "".join(
    f"u{u},{10 + (u * 3 + i * i) % 9},{1 + (u + i) % 5},{i}\n" for u in range(12) for i in range(6)
)
PEOPLE = "user_id,age,work\nu3,30,law\nu0,20,\nu99,4,law\nu1,,art law\n"
GOODS = "item_id,title,genre\n13,The One,Drama|War\n10,Zero,Drama\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.csv").write_text(ROWS)
    (tmp_path / "people.csv").write_text(PEOPLE)
    (tmp_path / "goods.csv").write_text(GOODS)
    return tmp_path


def read(files, **more):
    return read_interactions(str(files / "a.csv"), "csv", **{k: str(files / v) for k, v in more.items()})


def test_files_of_features(files):
    data = read(files, user_features="people.csv", item_features="goods.csv")
    who = {name: names_of(data.user_features, i) for i, name in enumerate(data.users)}
    assert who["u3"] == ["age=30", "work=law"]
    assert who["u0"] == ["age=20", "work="]
    assert who["u1"] == ["age=", "work=art", "work=law"]
    assert who["u7"] == ["age=", "work="]  # of whom the file says nothing
    assert not any("4" in name for name in data.user_features.names)  # u99 did nothing here
    what = {name: names_of(data.item_features, i) for i, name in enumerate(data.items)}
    assert what["13"] == ["genre=Drama", "genre=War"]  # its title names it
    assert what["10"] == ["genre=Drama"]
    assert what["14"] == ["genre="]
    assert read(files).user_features is None
    assert data_digest(data, features=True) != data_digest(read(files), features=True)
    assert data_digest(data) == data_digest(read(files))


def test_files_of_features_in_every_form(files):
    want = read(files, user_features="people.csv")
    (files / "people.tsv").write_text(PEOPLE.replace(",", "\t"))
    typed = {"user_id": "token", "age": "float", "work": "token_seq"}
    header = "\t".join(f"{name}:{kind}" for name, kind in typed.items())
    (files / "a.user").write_text(header + PEOPLE.replace(",", "\t")[PEOPLE.index("\n") :])
    table = pyarrow.csv.read_csv(files / "people.csv")
    pyarrow.parquet.write_table(table, files / "people.parquet")
    for name in ("people.tsv", "a.user", "people.parquet"):
        got = read(files, user_features=name)
        assert got.user_features.names.tolist() == want.user_features.names.tolist(), name
        assert (got.user_features.numbers == want.user_features.numbers).all()
    (files / "a.inter").write_text(ROWS.replace(",", "\t"))
    (files / "a.item").write_text("item_id:token\tgenre:token_seq\n10\tDrama War\n")
    beside = read_interactions(str(files / "a.inter"), "inter")
    assert beside.user_features.names.tolist() == want.user_features.names.tolist()
    assert beside.item_features.names.tolist() == ["genre=", "genre=Drama", "genre=War"]
    assert beside.titles is None


BAD = {
    "no id column": ("user_features", "who,age\nu1,3\n", "no column of user ids among who, age: rename the column of"),
    "an id twice": (
        "user_features",
        "user_id,age\nu1,3\nu2,4\nu1,5\n",
        "'user_id' has 'u1', an id that came before, in row 3",
    ),
    "no id": ("item_features", "item_id,age\n10,3\n,4\n", "'item_id' has no value"),
    "strangers": ("user_features", "user_id,age\nx,3\n", "no id in column 'user_id' matches a user of the"),
    "an empty file": ("item_features", "item_id,age\n", "the table has no rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_unfit_files_of_features_are_refused_in_words(files, name):
    role, text, words = BAD[name]
    (files / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read(files, **{role: "bad.csv"})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        read(files, **{role: "none.csv"})


def test_a_column_of_lists_is_neither_words_nor_numbers(files):
    pyarrow.parquet.write_table(pa.table({"user_id": ["u1"], "x": [[[1], [2]]]}), files / "x.parquet")
    with pytest.raises(ValueError, match="'x' holds list.*neither words nor numbers"):
        read_features(read_source(files / "x.parquet"), np.array(["u1"]), "user")


def test_features_are_kept_with_large_data_and_made_anew_when_a_file_changes(files, monkeypatch):
    monkeypatch.setenv("JAXFED_DATA", str(files / "cache"))
    monkeypatch.setattr(build, "LARGE", 10)
    path = files / "a.inter"
    path.write_text(ROWS.replace(",", "\t"))
    people = files / "a.user"
    people.write_text(PEOPLE.replace(",", "\t"))
    section = make_config({"data": {"name": "inter", "path": str(path)}}).data
    want = build.load_data(section)
    got = build.load_data(section)
    assert isinstance(got.population.user_features.numbers, np.ndarray)
    for known in (got.population.user_features, got.source.user_features):
        assert (known.numbers == want.source.user_features.numbers).all()
    people.write_text(PEOPLE.replace(",", "\t").replace("law", "poetry"))  # found beside, not named
    again = build.load_data(section)
    assert "work=poetry" in again.population.user_features.names
    assert again.digest != got.digest
