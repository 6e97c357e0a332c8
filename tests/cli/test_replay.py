"""`jaxfed replay`: known answers, and a future that does not reach the past."""

import json
import math

import jax
import numpy as np
import pytest

from jaxfed.config.config_files import read_config
from jaxfed.config.overrides import override_config
from jaxfed.core.tables import unwrap
from jaxfed.data.loading import from_arrays
from jaxfed.evaluation.prequential import make_timeline
from jaxfed.training.live_model import make_score, rank_by_model, score_users, train_live_model
from jaxfed.training.replay import ReplayOptions, order_by_time, replay_data
from tests.cli.test_report import Page
from tests.programs import run_program

DAY, BEGIN = 86_400, 1_600_000_000
CONFIG = """
rounds = 6
[data]
name = "csv"
path = "rows.csv"
[model]
name = "mf"
dim = 4
[work]
batch_size = 16
[work.optimizer]
learning_rate = 2.0
[cohort]
name = "everyone"
"""
# day, user, item
TINY = [
    (0.0, "a", "x"),
    (0.05, "g", "w"),
    (0.1, "b", "x"),
    (0.2, "b", "y"),
    (0.3, "c", "y"),
    (0.4, "c", "x"),
    (1.1, "a", "y"),  # a has x; y (2) stands before w (1): the first
    (1.2, "d", "y"),  # a new user: x (3) stands before y (2): the second
    (1.3, "d", "x"),  # d has y by now: the first
    (1.4, "b", "z"),  # a new item: nobody knows it
    (2.1, "d", "z"),  # z (1) is known now, d has x and y, and w (1) is a tie, which counts against it: the second
    (2.2, "e", "z"),  # x (4), y (4) and w (1): the fourth
    (2.3, "e", "y"),  # e has z; x (4) is a tie: the second
    (4.5, "f", "y"),  # x (4), y (5), w (1), z (3): the first; the third day has no rows, and no window
]
RANKS = [[1, 2, 1, math.inf], [2, 4, 2], [1]]


def write_rows(path, rows, header="user,item,time"):
    path.write_text("\n".join([header, *(f"{u},{i},{BEGIN + round(day * DAY)}" for day, u, i in rows)]) + "\n")


def many_rows(days=12, users=24, items=30, seed=0):
    """Rows of users with a taste; users and items appear one after the other."""
    random, rows = np.random.default_rng(seed), {}
    for n in range(days * 60):
        day = n / 60
        user, item = int(random.integers(0, users * (day + 2) / (days + 2))), int(random.integers(0, items))
        item = min(2 * (item // 2) + user % 2, items - 1) if day * items / days > item / 2 else user % 4
        rows.setdefault((user, item), (day, f"u{user}", f"i{item}"))
    return [*rows.values()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "c.toml").write_text(CONFIG)
    write_rows(tmp_path / "rows.csv", TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replayed(monkeypatch, capsys, *words):
    code, printed, said = run_program(monkeypatch, capsys, "replay", "c.toml", *words, "--json")
    assert code == 0, said
    return json.loads(printed)


def test_popularity_by_hand(folder, monkeypatch, capsys):
    found = replayed(monkeypatch, capsys, "--first", "1d", "--window", "1d", "--at", 1, 2, 10)
    windows = found["windows"]
    assert [(row["day"], row["interactions"]) for row in windows] == [(1, 4), (2, 3), (4, 1)]
    for row, ranks in zip(windows, RANKS, strict=True):
        for k in (1, 2, 10):
            assert row[f"popularity/hr@{k}"] == pytest.approx(np.mean([rank <= k for rank in ranks]))
            gains = [1 / math.log2(1 + rank) if rank <= k else 0 for rank in ranks]
            assert row[f"popularity/ndcg@{k}"] == pytest.approx(np.mean(gains))
    assert [row["new_users"] for row in windows] == pytest.approx([2 / 4, 2 / 3, 1])
    assert [row["new_items"] for row in windows] == pytest.approx([1 / 4, 0, 0])
    assert [row["known"] for row in windows] == [2, 1, 0]  # a and b; d
    assert windows[1]["popularity/known/ndcg@2"] == pytest.approx(1 / math.log2(3))
    assert windows[2]["popularity/known/hr@1"] is None
    assert found["overall"]["popularity/known/hr@1"] == pytest.approx(1 / 3)
    every = [rank for ranks in RANKS for rank in ranks]
    assert found["overall"]["popularity/hr@1"] == pytest.approx(np.mean([rank <= 1 for rank in every]))
    assert {name.partition("/")[0] for name in windows[0] if "/" in name} == {
        "online",
        "once",
        "retrained",
        "popularity",
    }


def test_what_is_printed(folder, monkeypatch, capsys):
    code, printed, said = run_program(monkeypatch, capsys, "replay", "c.toml", "--first", "1d", "--window", "2d")
    assert code == 0, said
    for words in ("from day", "online hr@10", "popularity ndcg@10", "all, of users known before", "71.4%"):
        assert words in printed
    assert "window 1 of 2" in said


def replay_of(rows, options, words=()):
    """The replay of some rows."""
    days, users, items = zip(*rows, strict=True)
    data = from_arrays(users, items, times=[BEGIN + round(day * DAY) for day in days])
    return replay_data(override_config(read_config("c.toml"), [*words]), data, options)


def test_a_page_over_time(folder, monkeypatch, capsys):
    """Curves of each method with their numbers, and the windows; what somebody else wrote is not overwritten."""
    words = ["replay", "c.toml", "--first", "1d", "--window", "1d", "-o", "new/r.html"]
    assert run_program(monkeypatch, capsys, *words)[0] == 0
    page = Page((folder / "new" / "r.html").read_text())
    said = [data for data, _ in page.text]
    for word in ("online", "once", "retrained", "popularity", "all, of users known before", "Replay of c.toml"):
        assert word in said
    assert len(page.every("figure")) == 4
    assert run_program(monkeypatch, capsys, *words)[0] == 0  # its own
    (folder / "new" / "r.html").write_text("mine")
    code, printed, said = run_program(monkeypatch, capsys, *words)
    assert (code, printed) == (2, "")
    assert "--force" in said


OPTIONS = ReplayOptions(3 * DAY, 3 * DAY, 2, 1)


EASE = ("ease",)
CLOSED = """
rounds = 1
[model]
name = "ease"
[work]
name = "statistics"
[work.optimizer]
name = "sgd"
[[channel]]
name = "ring"
bound = 1.0
fraction_bits = 0
[server]
name = "solve"
[cohort]
name = "everyone"
"""


@pytest.mark.parametrize("words", [(), ("--model.name", "sasrec", "--work.batch-size", "8"), EASE], ids=len)
def test_the_future_does_not_reach_the_past(folder, words):
    """Rows after day 9 exchanged for others, with other users and items, fewer or more: the figures of windows before
    stay to the bit."""
    if words is EASE:
        (folder / "c.toml").write_text(CLOSED)
        words = ()
    rows = many_rows()
    past = [row for row in rows if row[0] < 9]
    random = np.random.default_rng(5)
    other = [(9 + n / 40, f"{'aunew'[n % 5]}{n % 9}", f"{'i0new'[n % 5]}{random.integers(40)}") for n in range(200)]
    first = replay_of(rows, OPTIONS, words)["windows"]
    second = replay_of(past + other, OPTIONS, words)["windows"]
    third = replay_of(past, OPTIONS, words)["windows"]
    assert first[:2] == second[:2] == third
    assert len(first) > 2
    assert first[2] != second[2]


def test_a_seed_decides(folder):
    rows = many_rows(days=7)
    first = replay_of(rows, OPTIONS)
    assert replay_of(rows, OPTIONS) == first
    assert replay_of(rows, OPTIONS, ["--seed", "1"]) != first


def test_the_order_of_the_file_says_nothing(folder):
    """But for rows of one time."""
    rows = many_rows(days=7)
    mixed = [rows[n] for n in np.random.default_rng(0).permutation(len(rows))]
    one, other = replay_of(rows, OPTIONS), replay_of(mixed, OPTIONS)
    for name, value in one["overall"].items():
        assert other["overall"][name] == pytest.approx(value, abs=1e-6)


def score_everyone(live, data):
    """float [users, items]: -inf for items that a model does not know."""
    everyone = np.arange(len(data.users))
    found = np.full((len(everyone), len(data.items)), -np.inf, np.float32)
    found[:, live.items] = score_users(live, make_score(live), everyone, np.zeros((len(everyone), 0), np.int32))
    return found


def test_a_model_goes_on_where_it_was(folder):
    """Rows and private parts of what it knew, without a round: those of before; new ones begin as all did, and are
    scored only once they are there."""
    rows = many_rows(days=8)
    days, users, items = zip(*rows, strict=True)
    timed = order_by_time(from_arrays(users, items, times=[BEGIN + round(day * DAY) for day in days]))
    config, data, half = override_config(read_config("c.toml"), []), timed.data, len(rows) // 2
    before = train_live_model(config, data, half, 4)
    after = train_live_model(config, data, len(rows), 0, before)
    everyone = np.arange(len(data.users))
    old, new = score_everyone(before, data), score_everyone(after, data)
    known = np.ix_(before.users, before.items)
    assert len(before.items) < len(after.items) == len(data.items)
    assert len(before.users) < len(after.users) == len(data.users)
    np.testing.assert_array_equal(old[known], new[known])
    unknown = np.setdiff1d(np.arange(len(data.items)), before.items)
    assert (old[:, unknown] == -np.inf).all()
    assert np.isfinite(new).all()
    strangers = np.setdiff1d(everyone, before.users)
    assert (old[strangers][:, before.items] == old[strangers[0], before.items]).all()  # as a new client each
    trained = train_live_model(config, data, len(rows), 2, before)
    assert (score_everyone(trained, data)[known] != old[known]).mean() > 0.9
    assert trained.rounds == 6


def test_learning_goes_on(folder):
    """Tastes change on day 6: who goes on learning follows, who learnt once does not."""
    random, rows = np.random.default_rng(0), {}
    for n in range(20 * 90):
        day, user = n / 90, int(random.integers(40))
        group = (user + (day >= 6)) % 2
        item = int(random.integers(15)) * 2 + group + 30 * (day >= 6)
        rows.setdefault((user, item), (day, f"u{user}", f"i{item}"))
    options = ReplayOptions(6 * DAY, 1 * DAY, 10, 2)
    words = ["--rounds", "30", "--work.optimizer.learning-rate", "1.0"]
    found = replay_of([*rows.values()], options, words)
    last = found["windows"][3:]
    mean = {name: np.mean([row[f"{name}/hr@10"] for row in last]) for name in ("online", "once", "retrained")}
    assert mean["online"] > mean["once"] + 0.2
    assert mean["retrained"] > mean["once"] + 0.2


def test_a_history_is_known_up_to_the_interaction(folder, monkeypatch):
    """A closed form that learnt on some rows ranks each later row by what its user did before it, in however many
    pieces the rows are ranked: as X B says, by NumPy."""
    (folder / "c.toml").write_text(CLOSED)
    rows = many_rows(days=8)
    days, users, items = zip(*rows, strict=True)
    data = order_by_time(from_arrays(users, items, times=[BEGIN + round(day * DAY) for day in days])).data
    half, line = len(rows) // 2, make_timeline(data.interactions.user, data.interactions.item)
    live = train_live_model(override_config(read_config("c.toml"), []), data, half, 1)
    weights = {path: np.asarray(leaf) for path, leaf in leaves_of(live.shared).items()}
    (matrix,) = [each[: len(live.items)] for each in weights.values() if each.ndim == 2]
    expected = []
    for row in range(half, len(rows)):
        seen = np.zeros(len(data.items))
        seen[[line.item[other] for other in range(row) if line.user[other] == line.user[row]]] = 1
        score = np.full(len(data.items), -np.inf)
        score[live.items] = (seen[live.items] @ matrix[:, : len(live.items)]).astype(np.float32)
        score[seen > 0] = -np.inf
        others = np.delete(score, line.item[row])
        target = score[line.item[row]]
        bounds = [1 + int((others >= target + gap).sum()) for gap in (1e-6, -1e-6)]  # ties, but for rounding
        expected.append([math.inf] * 2 if target == -np.inf else bounds)
    found = rank_by_model(live, data, line, half, len(rows))
    best, worst = np.array(expected).T
    assert len({*worst}) > 5
    assert ((best <= found) & (found <= worst)).all()
    assert (best == worst).mean() > 0.6
    monkeypatch.setattr("jaxfed.training.live_model.AT_ONCE", 300)
    again = rank_by_model(live, data, line, half, len(rows))
    assert ((best <= again) & (again <= worst)).all()


def leaves_of(tree):
    """{place: array} of what a model shares."""
    return {str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(unwrap(tree))}


@pytest.mark.parametrize(
    ("rows", "words", "text"),
    [
        ("user,item\na,x\nb,y\n", "", "the data have no times"),
        ("user,item,time\na,x,0\nb,y,1\nc,x,2\n", "", "the times are an order"),
        (None, "--first 9d", "all rows are in the first part, the data span 4.5 days: shorten --first"),
        (None, "--first 1x", "--first 1x: a whole number from 1 with h, d or w"),
        (None, "--window 0d", "--window 0d: a whole number from 1"),
        (None, "--first 1d --update-rounds -1", "must be at least 0"),
        (None, "--first 1d --at 0", "--at at least 1"),
        (None, "--first 1d --data.user-core 2", "data.user_core would look ahead"),
        (None, "--first 1d --data.cold 0.2", "data.cold would look ahead"),
        (None, "--first 1d --data.clients silo", "each user is a client"),
        (None, "--first 1d --model.dimm 3", "unknown option"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(folder, monkeypatch, capsys, rows, words, text):
    if rows:
        (folder / "rows.csv").write_text(rows)
    code, printed, said = run_program(monkeypatch, capsys, "replay", "c.toml", *words.split())
    assert (code, printed) == (2, "")
    assert text in said.splitlines()[-1]


def test_noise_and_a_look_at_other_models_are_refused(folder):
    noisy = ["--channel.0.name", "mean", "--channel.0.count", "4", "--channel.1.name", "clip", "--channel.2.name"]
    with pytest.raises(ValueError, match="what noise spends over many windows is not accounted for"):
        replay_of(many_rows(days=7), OPTIONS, [*noisy, "gaussian"])


def test_too_many_windows(folder):
    with pytest.raises(ValueError, match="there can be 2,000: take a longer --window"):
        replay_of([(0.0, "a", "x"), (9000.0, "b", "y")], ReplayOptions(DAY, DAY, 1, 1))
