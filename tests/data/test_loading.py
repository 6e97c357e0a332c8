"""What large data are loaded by, beside a slow reference: the same arrays, from files of any kind in any order."""

import hashlib
import logging
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from jaxfed.data.clients import make_clients
from jaxfed.data.interactions import data_digest
from jaxfed.data.loading import from_arrays, read
from jaxfed.data.ragged import make_ragged
from jaxfed.data.sorting import (
    find_repeats,
    list_starts,
    number_present,
    sort_by_time,
    sort_histories,
    sort_pairs_of_rows,
)
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.data.stages import log_stage
from jaxfed.training import log

ROOT = Path(__file__).parents[2]
PROTOCOLS = ("loo-clean", "ratio-clean", "compat-pfedrec")
RATIO = 0.1, 0.2


def in_order(ids):
    """Distinct ids, as numbers where all are written as whole numbers are."""
    whole = all(each.lstrip("-").isdigit() and str(int(each)) == each for each in ids)
    return sorted(set(ids), key=int if whole else str)


def prepare_slowly(users, items, times, protocol, ties_in_order=True):
    """{what a population is made of: lists}, of rows in their order, ids as words; a loop over rows and users."""
    first = {}
    for row in sorted(range(len(users)), key=lambda row: (times[row], row)):
        first.setdefault((users[row], items[row]), row)
    rows, count = sorted(first.values()), defaultdict(int)
    for row in rows:
        count[users[row]] += 1
    rows = [row for row in rows if count[users[row]] >= 3]
    user_names, item_names = in_order([users[row] for row in rows]), in_order([items[row] for row in rows])
    place = {name: number for number, name in enumerate(item_names)}
    histories = defaultdict(list)
    for row in rows:
        histories[users[row]].append((times[row], row if ties_in_order else -row, place[items[row]]))
    found = {"users": user_names, "items": item_names, "train": [], "valid": [], "test": [], "excluded": []}
    for name in user_names:
        history = [item for *_, item in sorted(histories[name])]
        n = len(history)
        test = min(max(int(RATIO[1] * n), 1), n - 2) if protocol == "ratio-clean" else 1
        valid = min(max(int(RATIO[0] * n), 1), n - test - 1) if protocol == "ratio-clean" else 1
        train = history[: n - test - valid]
        for part, some in (
            ("train", train),
            ("valid", history[n - test - valid : n - test]),
            ("test", history[-test:]),
        ):
            found[part].append(some)
        found["excluded"].append(sorted(history if protocol == "compat-pfedrec" else train))
    return found


def check_population(data, users, items, times, protocol):
    """That a data set is prepared as the reference has it, to the types of the arrays."""
    want = prepare_slowly(users, items, times, protocol, data.ties_in_order)
    clients = make_clients(data, protocol=protocol, ratio=RATIO)
    population, num_items = clients.population, len(want["items"])
    assert population.num_items == num_items
    assert population.user_names.tolist() == population.names.tolist() == want["users"]
    assert clients.source.items.tolist() == want["items"]
    for part in ("train", "valid", "test", "excluded"):
        lists = getattr(population, part)
        assert [lists.of(user).tolist() for user in range(len(want["users"]))] == want[part], part
        assert (lists.values.dtype, lists.start.dtype) == (np.int32, np.int64), part
    gaps = [
        u * (num_items + 1) + item - rank for u, some in enumerate(want["excluded"]) for rank, item in enumerate(some)
    ]
    assert population.negative_index.gaps.tolist() == gaps
    assert population.negative_index.gaps.dtype == np.int64
    outside = [item for some in want["excluded"] for item in range(num_items) if item not in some]
    assert population.negative_index.negatives.tolist() == outside
    assert population.num_train.tolist() == [len(each) for each in want["train"]]
    rows = clients.source.interactions
    kinds = [column.dtype for column in (*rows, clients.source.columns[" client"])]
    assert kinds == [np.int32, np.int32, np.float32, np.int64, np.int64]


TIMES = {
    "distinct": lambda random, n: random.permutation(n) + 1_000_000_000,
    "ties": lambda random, n: random.integers(0, 12, n),
    "sorted with ties": lambda random, n: np.sort(random.integers(0, 40, n)),
    "constant": lambda random, n: np.full(n, 7),
    "before 1970": lambda random, n: random.integers(-50, 50, n),
    "of 63 bits": lambda random, n: random.integers(-(2**62), 2**62, n),
}
IDS = {
    "numbers": str,
    "negative numbers": lambda i: str(i if i % 3 else -i - 2),
    "words": lambda i: f"ï {i % 7} {i}",
    "leading zeros": lambda i: f"{i:03d}",
    "one word among numbers": lambda i: "x1" if i == 4 else str(i),
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("times", TIMES)
def test_files_are_prepared_as_a_slow_reference_does(tmp_path, ids, times):
    """Repeated pairs, users of one and two rows, users and items in any order; csv, quoted or not, and parquet."""
    random = np.random.default_rng(len(ids) + len(times))
    n, name = 900, IDS[ids]
    users = [name(i) for i in np.minimum(random.geometric(0.04, n), 70).tolist()]
    items = [name(i) for i in random.integers(0, 45, n).tolist()]
    clock = TIMES[times](random, n)
    table = pa.table({"user": users, "item": items, "rating": random.integers(1, 11, n) / 2, "time": clock})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    pa.csv.write_csv(table, tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes((tmp_path / "a.csv").read_bytes().replace(b'"', b""))
    if "numbers" in ids and "word" not in ids:
        typed = table.set_column(0, "user", pa.array(map(int, users))).set_column(
            1, "item", pa.array(map(float, items))
        )
        pa.parquet.write_table(typed, tmp_path / "typed.parquet")
    digests = set()
    for path in sorted(tmp_path.iterdir()):
        data = read(str(path))
        digests.add(data_digest(data))
        for protocol in PROTOCOLS:
            check_population(data, users, items, clock.tolist(), protocol)
    assert len(digests) == 1


def words_of(data):
    rows = data.interactions
    return data.users[rows.user].tolist(), data.items[rows.item].tolist(), rows.time.tolist()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_movielens_and_synthetic_data_are_prepared_as_a_slow_reference_does(ml100k, protocol):
    """MovieLens' users are numbered from 1, and of equal times its earliest row counts as the latest."""
    synthetic = synthetic_data(300, 200, mean_length=20, seed=2)
    for data in (synthetic, ml100k.source._replace(columns={})):
        check_population(data, *words_of(data), protocol)


def slow_digest(users, items, ratings, times, ties):
    lines = "\n".join(users) + ";" + "\n".join(items) + ";"
    numbers = np.array(ratings, "<f4").tobytes() + b";" + np.array(times, "<i8").tobytes() + b";"
    return hashlib.sha256(lines.encode() + numbers + (b"ties in order;" if ties else b"")).hexdigest()


@pytest.mark.parametrize("rows_at_once", [1, 7, 30, 1000])
def test_the_digest_is_that_of_ids_as_text(monkeypatch, rows_at_once):
    """Folders of runs hold it: what they were run on is known by it for ever."""
    monkeypatch.setattr("jaxfed.data.interactions.AT_ONCE", rows_at_once)
    users, items = ["a", "bé", "a"] * 10, [f"{i}" for i in range(30)]
    ratings = [0.5] * 15 + [4.0] * 15
    for times, ties in (
        (list(range(30)), False),
        ([5] * 30, True),
        ([*range(29), 28], False),
        ([*range(29), 26], True),
    ):
        got = data_digest(from_arrays(users, items, ratings, times))
        assert got == slow_digest(users, items, ratings, times, ties), times


def test_equal_times_are_found_among_few_and_among_all_users():
    """The digest looks at the users of low numbers first."""
    users = [str(u) for u in range(200) for _ in range(3)]
    for tied in (0, 150, None):
        times = [100 * i for i in range(600)]
        if tied is not None:
            times[3 * tied + 2] = times[3 * tied]
        got = data_digest(from_arrays(users, users, None, times))
        assert got == slow_digest(users, users, [1] * 600, times, tied is not None)


def test_rows_are_sorted_as_lexsort_does():
    random = np.random.default_rng(0)
    for n, low, high in ((0, 0, 1), (1, 5, 6), (500, 0, 9), (500, -(2**62), 2**62), (500, 0, 2**40), (400, -3, -2)):
        user, item = random.integers(0, 20, (2, n)).astype(np.int32)
        time, row = random.integers(low, high, n), np.arange(n)
        np.testing.assert_array_equal(sort_by_time(time), np.lexsort((row, time)))
        np.testing.assert_array_equal(sort_histories(user, time, 20), np.lexsort((row, time, user)))
        np.testing.assert_array_equal(sort_histories(user, time, 20, False), np.lexsort((-row, time, user)))
        np.testing.assert_array_equal(sort_histories(user, np.sort(time), 20), np.lexsort((row, user)))
        np.testing.assert_array_equal(sort_pairs_of_rows(user, item, 20, 20), np.lexsort((row, item, user)))


def test_lists_know_their_repeats_and_distinct_values():
    lists = [[], [3, 1, 3], [], [3], [3, 3], []]
    values = np.array([value for each in lists for value in each], np.int32)
    number = np.repeat(np.arange(6), [len(each) for each in lists])
    ragged = make_ragged(values, number, 6)
    assert find_repeats(ragged.values, ragged.start).tolist() == [False, False, False, False, False, True]
    distinct = ragged.distinct(4)
    assert [distinct.of(i).tolist() for i in range(6)] == [sorted(set(each)) for each in lists]
    assert find_repeats(np.zeros(0, np.int32), list_starts(np.zeros(3, int))).tolist() == []
    assert [each.tolist() for each in number_present(np.array([4, 1, 4], np.int32), 6)] == [[1, 4], [1, 0, 1]]
    assert [each.tolist() for each in number_present(np.array([1, 0], np.int32), 2)] == [[0, 1], [1, 0]]


def record_stages(monkeypatch):
    """[(text, whether it begins)] of the stages that are announced from now on."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append((record.getMessage(), record.stage_begins))
    monkeypatch.setattr(log.STAGES, "handlers", [handler])
    return told


def test_stages_are_said_as_they_begin_and_end(tmp_path, monkeypatch):
    told = record_stages(monkeypatch)
    path = tmp_path / "mine.csv"
    path.write_text("user,item\n" + "".join(f"{u},{i}\n" for u in range(4) for i in range(5)))
    make_clients(read(str(path)))
    begun = [text for text, begins in told if begins]
    assert begun == [
        "reading mine.csv",
        "numbering the ids of column user",
        "numbering the ids of column item",
        "dividing the rows into clients",
        "splitting the clients' histories",
        "laying the histories out client by client",
        "hashing 20 rows",
    ]
    assert told == [each for text in begun for each in ((text, True), (f"{text}: done", False))]


def test_a_stage_that_fails_ends_too(monkeypatch):
    told = record_stages(monkeypatch)
    with pytest.raises(ValueError, match="no"), log_stage("trying"):
        raise ValueError("no")
    assert told == [("trying", True), ("trying: done", False)]


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """A terminal, as a file."""
    from rich.console import Console

    with open(tmp_path / "screen", "w+") as file:
        console = Console(file=file, force_terminal=True, width=80)
        monkeypatch.setattr(log, "terminal", lambda: console)
        monkeypatch.setattr(log, "is_watched", lambda: True)
        monkeypatch.setattr(log.STAGES, "handlers", [log.StageLine()])
        yield lambda: (file.seek(0), file.read())[1]


def test_a_terminal_shows_the_stage_and_then_nothing_of_it(watched):
    with log_stage("reading [bold]mine.csv"):
        with log_stage("inside"):
            pass
        assert log.STAGES.handlers[0].line.tasks[0].description == "reading [bold]mine.csv"
    assert log.STAGES.handlers[0].line is None
    screen = watched()
    assert "reading [bold]mine.csv" in screen  # not taken for markup
    assert "inside" in screen
    assert screen.rstrip().endswith("\x1b[2K")


def test_a_second_moving_line_is_not_begun(watched):
    """Rich refuses one: a bar of rounds, say, is there."""
    from rich.progress import Progress

    with Progress(console=log.terminal()), log_stage("reading"):
        pass
    assert log.STAGES.handlers[0].line is None


def test_nothing_moves_where_nobody_watches(capfd):
    with log_stage("reading"):
        assert log.STAGES.handlers[0].line is None
    assert capfd.readouterr() == ("", "")


def test_the_benchmark_of_loading_runs(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/loading.py"), "--rows", "3000", "--kinds", "csv", "--ids", "words"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "csv, ids are words: 3,000 rows" in said
    assert "numbering the ids of column user" in said
    assert "once more, from the prepared data" in said
