"""Domains in files of their own: users with one id are one, items with one id are not."""

import pathlib
import tomllib

import numpy as np
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.config_files import config_to_toml, read_config, with_absolute_paths
from jaxfed.config.schema import make_config
from jaxfed.data import cache
from jaxfed.data.clients import partition
from jaxfed.data.loading import read
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round

BOOKS = [(u, i, 10 * i + u) for u in range(1, 7) for i in range(1, 6) if (u + i) % 4]
FILMS = [(u, i, 7 * i + u) for u in range(4, 11) for i in range(3, 9) if (u * i) % 5]


def write(folder, name, rows, header=("user_id", "item_id", "timestamp")):
    file = folder / name
    file.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return str(file)


@pytest.fixture
def files(tmp_path):
    return write(tmp_path, "books.csv", BOOKS), write(tmp_path, "films.csv", FILMS)


def rows_of(data):
    """(user, item, time, domain) of each row, by ids."""
    user, item, _, time = data.interactions
    return list(zip(data.users[user], data.items[item], time.tolist(), data.columns["domain"], strict=True))


def test_rows_are_those_of_the_files(files):
    data = read(files[0], domains=(files[1],))
    want = [(str(u), f"books/{i}", t, "books") for u, i, t in BOOKS]
    assert rows_of(data) == want + [(str(u), f"films/{i}", t, "films") for u, i, t in FILMS]
    assert data.users.tolist() == [str(u) for u in range(1, 10)]  # 4 and 6 are in both
    assert {"books/3", "films/3"} <= {*data.items}  # an id of both files
    assert len({*data.items}) == len(data.items)
    assert data.notes[-1] == "2 domains; 2 of 9 users are in more than one of them"


def test_three_files_of_which_one_is_gzipped_and_named_columns_in_any_order(files, tmp_path):
    import gzip

    swapped = [(t, i, u) for u, i, t in FILMS]
    packed = tmp_path / "games.csv.gz"
    packed.write_bytes(
        gzip.compress(pathlib.Path(write(tmp_path, "g.csv", swapped, ("timestamp", "item_id", "user_id"))).read_bytes())
    )
    data = read(files[0], domains=(files[1], str(packed)))
    assert {*data.columns["domain"]} == {"books", "films", "games"}
    one, other = ([row[:3] for row in rows_of(data) if row[3] == name] for name in ("films", "games"))
    assert [(u, i.replace("films/", "games/"), t) for u, i, t in one] == other


def test_without_times_files_come_one_after_the_other(tmp_path):
    paths = [
        write(tmp_path, f"{n}.csv", [r[:2] for r in rows], ("user", "item")) for n, rows in (("a", BOOKS), ("b", FILMS))
    ]
    data = read(paths[0], domains=(paths[1],))
    assert data.interactions.time.tolist() == list(range(len(BOOKS) + len(FILMS)))
    assert not data.has_times


def test_a_client_is_a_user_in_one_file(files):
    clients = partition(read(files[0], domains=(files[1],), keep="domain"), by="domain", merge="domains")
    population, items = clients.population, clients.source.items
    for client, (name, user) in enumerate(zip(population.names, population.user_names, strict=True)):
        domain = name[len(user) + 1 :]
        assert {items[i].split("/")[0] for i in population.train.of(client)} == {domain}
        assert domain in ("books", "films")
    own = {str(user): number for user, number in zip(population.user_names, population.owner, strict=True)}
    assert len(own) == 9
    assert len({*population.owner.tolist()}) == 9  # who is in both files has two clients and one private part
    assert sorted(np.bincount(population.owner).tolist()) == [1] * 7 + [2] * 2


def table(paths, **more):
    data = {"name": "csv", "path": paths[0], "domains": [paths[1]], "clients": "domain", "merge": "domains"}
    return {
        "data": data | more,
        "model": {"dim": 2},
        "work": {"batch_size": 8, "negatives": 1, "optimizer": {"name": "sgd"}},
        "cohort": {"name": "everyone"},
        "evaluation": {"negatives": 2, "at": [1, 2]},
    }


def test_a_configuration_trains_on_them(files):
    config = make_config(table(files))
    it = build_from_config(config, load_data(config.data))
    state = initial_arrays(it, 0)["state"]
    state, info = it.algorithm.step(state, prepare_round(it, 0, 0).cohort, make_run_keys(0).rounds)
    assert np.isfinite(float(info["train/loss"]))
    assert make_config(tomllib.loads(config_to_toml(config))) == config


def test_files_are_found_beside_the_configuration_and_by_their_whole_path(files, tmp_path, monkeypatch):
    place = tmp_path / "own.toml"
    place.write_text('[data]\nname = "csv"\npath = "books.csv"\ndomains = ["films.csv"]\n')
    found = read_config(place)["data"]
    assert (found["path"], found["domains"]) == (files[0], [files[1]])
    monkeypatch.chdir(tmp_path)
    whole = with_absolute_paths(make_config({"data": {"name": "csv", "path": "books.csv", "domains": ["films.csv"]}}))
    assert (whole.data.path, whole.data.domains) == (files[0], (files[1],))
    place.write_text('[data]\nname = "csv"\npath = "books.csv"\ndomains = [3]\n')
    with pytest.raises(ValueError, match="data.domains"):
        make_config(read_config(place))


def test_prepared_data_are_those_of_both_files_as_they_are(files):
    section = {"name": "csv", "path": files[0], "domains": [files[1]]}
    first = cache.cache_place(section)
    assert cache.cache_place(section) == first
    assert cache.cache_place(section | {"domains": []}) != first
    pathlib.Path(files[1]).write_text(pathlib.Path(files[1]).read_text() + "4,99,1\n")
    assert cache.cache_place(section) != first


WRONG = {
    "no user in common": ([(u + 100, i, t) for u, i, t in FILMS], {}, "no user of books is in another file"),
    "a missing column": ([], {"header": ("who", "item_id", "timestamp")}, "films.csv: .*user"),
    "times in one file": (
        [(u, i) for u, i, _ in FILMS],
        {"header": ("user_id", "item_id")},
        "books has times and films has none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_go_together_are_one_line(name, files, tmp_path):
    rows, how, words = WRONG[name]
    other = write(tmp_path, "films.csv", rows or FILMS, **how)
    with pytest.raises(ValueError, match=words) as error:
        read(files[0], domains=(other,))
    assert "\n" not in str(error.value)


def test_options_that_do_not_go_together_are_one_line(files, tmp_path):
    (tmp_path / "more").mkdir()
    twin = write(tmp_path / "more", "books.csv", FILMS)
    for more, words in (
        ({"domains": (twin,)}, "have the same name, books"),
        ({"domains": files[1]}, "give a list of files"),
        ({"domains": (str(tmp_path / "none.csv"),)}, "none.csv"),
        ({"domains": (files[1],), "titles": files[1]}, "data.titles: with data.domains"),
        ({"domains": (files[1],), "test": files[1]}, "data.test: with data.domains"),
        ({"domains": (files[1],), "keep": "timestamp"}, "choose one of user, silo, device, domain"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            read(files[0], **more)
        assert "\n" not in str(error.value)
