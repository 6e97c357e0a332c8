"""Models of sequences that read times: which times come to them, and that only those that are known change anything."""

import json
import math
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.cli import main
from jaxfed.core.model import SequenceFormat
from jaxfed.core.tables import unwrap
from jaxfed.core.types import History
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.packing import pack_cohort
from jaxfed.data.population import scale_times
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.evaluation.split import make_eval_batches, make_eval_split
from jaxfed.models.hstu import classify_times
from jaxfed.models.sequence import take_latest_times
from tests.small import close

LENGTH = 9
DATA = synthetic_data(60, 50, mean_length=12)
DATA = DATA._replace(  # times are apart by different gaps, and no row has that of another
    interactions=DATA.interactions._replace(
        time=10**9 + np.random.default_rng(0).permutation(len(DATA.interactions.time)).astype(np.int64) ** 2
    )
)
REGION = np.searchsorted([1, 3, 8, 25], DATA.interactions.user, "right")
SECONDS = scale_times(DATA.interactions.time)
assert len(np.unique(DATA.interactions.time - SECONDS)) == 1  # the common time
TIME_OF = {
    (DATA.users[user], item): time - (DATA.interactions.time - SECONDS)[0]
    for user, item, _, time in zip(*DATA.interactions, strict=True)
}


def time_of(population, user, items):
    """When a user of a population met some items, by the rows of the source."""
    return [TIME_OF[population.user_names[user], item] for item in items]


# --- what comes to a model ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("clients", ["user", "region", "device"])
def test_each_item_of_a_step_comes_with_its_time(clients, size):
    """Clients of very different lengths, of one user, of several, and devices of one user."""
    population = prepare_population(DATA._replace(columns={"region": REGION}), clients=clients)[1]
    assert population.num_train.max() > 3 * population.num_train.min()
    batching = Batching(size, negatives=7, sequence=SequenceFormat(LENGTH + 1, times="known"))
    ids = np.arange(population.num_clients)
    shapes = make_block_shapes(population, batching, len(ids), 1, 16, False)
    cohort = pack_cohort(population, batching, shapes, ids, np.ones(len(ids), bool), 3, 0)
    names = {str(name): number for number, name in enumerate(population.user_names)}
    assert len(names) == len(population.user_names) or clients == "device"
    found = 0
    for block in cohort.blocks:
        batch = block.data.batch
        assert batch["time"].shape == batch["sequence"].shape
        for lane, slot in enumerate(block.slots):
            first, end = population.client_offsets[[slot, slot + 1]] if slot < len(ids) else (0, 0)
            histories = {tuple(population.train.of(user)[-LENGTH - 1 :].tolist()): user for user in range(first, end)}
            for step in np.flatnonzero(block.data.live[lane]):
                held = np.append(block.rows[lane], population.num_items)[
                    np.minimum(block.data.rows[lane, step], len(block.rows[lane]))
                ]
                for sequence, time in zip(
                    np.atleast_2d(batch["sequence"][lane, step]), np.atleast_2d(batch["time"][lane, step]), strict=True
                ):
                    used = sequence < len(held)
                    if used.any():
                        items = tuple(held[sequence[used]].tolist())
                        assert time[used].tolist() == time_of(population, histories[items], items)
                        assert not time[~used].any()
                        found += 1
    assert found == len(population.user_names)


@pytest.mark.parametrize("protocol", ["loo-clean", "ratio-clean", "loo-random"])
@pytest.mark.parametrize("past", ["train", "all"])
@pytest.mark.parametrize("part", ["val", "test"])
def test_a_request_comes_with_the_time_of_the_first_held_out_item(part, past, protocol):
    population = prepare_population(DATA, protocol=protocol, ratio=(0.2, 0.2))[1]
    for times in ("known", "request"):
        split = make_eval_split(population, part, history=past, times=times)
        batches = [batch for group in make_eval_batches(split) for batch in group]
        asked = 0
        for client, targets, history, when in (
            (batch.client[i], batch.targets[i, 0], batch.history[i, 0], batch.times[i, 0])
            for batch in batches
            for i in range(len(batch.client))
        ):
            if client == population.num_clients:
                continue
            items = history[history < population.num_items]
            want = time_of(population, client, items)
            assert len(when) == len(history) + 1
            if times == "request":
                want += time_of(population, client, targets[:1])
            assert when[: len(want)].tolist() == want
            assert not when[len(want) :].any(), "nothing else is told"
            asked += 1
        assert asked == 60
    assert make_eval_split(population, part, history=past).times is None


def test_times_follow_users_who_are_cold():
    population = prepare_population(DATA, cold=0.3)[1]
    for group in (population, population.cold):
        for user in range(group.num_clients):
            for part, times in zip((group.train, group.valid, group.test), group.times, strict=True):
                got = times[part.start[user] : part.start[user + 1]]
                assert got.tolist() == time_of(group, user, part.of(user))


def test_times_are_seconds_however_they_are_written():
    gaps = np.array([0, 86_400 * 120, 7, 3600, 86_400 * 30, 5])
    for start, unit in ((1_600_000_000, 1), (1_600_000_000_000, 1000), (16 * 10**14, 10**6), (16 * 10**17, 10**9)):
        seconds = scale_times(start + gaps * unit)
        assert (seconds - seconds[0]).tolist() == gaps.tolist()
    odd = scale_times(np.array([1_600_000_000, 1_600_000_050, 9_999_999_999_000]))
    assert np.diff(odd).tolist() == [50, (1 << 30) - 1], "one odd row changes no other"
    assert classify_times(jnp.array([(1 << 30) - 1]), jnp.array([1 - (1 << 30)])).tolist() == [[71]], "no wrap"


def test_ranks_are_no_times():
    assert scale_times(np.array([2, 0, 1, 1, 3])) is None
    assert scale_times(np.array([2, 0, 1, 1, 5])) is not None
    assert scale_times(np.zeros(0, np.int64)) is None


# --- what a model does with them --------------------------------------------------------------------


def test_classes_of_times_apart():
    gaps = [-5, 0, 1, 2, 60, 3600, 86_400, 10**7, 2**31 - 1]
    got = classify_times(jnp.array(gaps), jnp.zeros(1, jnp.int32))[:, 0]
    assert got.tolist() == [math.floor(math.log(max(1, gap)) / 0.301) for gap in gaps]
    assert classify_times(jnp.array([50, 70]), jnp.array([0, 49])).tolist() == [[12, 0], [14, 10]]


def make_model(time_bias, **more):
    return jf.models.hstu(30, dim=8, length=LENGTH, time_bias=time_bias, **{"dropout": 0.0} | more)


def shared_of(model):
    """Its shared parameters, of a size at which nothing is linear."""
    shared, keys = unwrap(model.init(jax.random.key(0))), iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda x: x + 0.5 * jax.random.normal(next(keys), x.shape), shared)


ITEMS, TIMES = np.array([3, 7, 1, 12, 5]), np.array([0, 4, 300, 301, 90_000, 100_000])


def normalize(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("time_bias", ["known", "request"])
def test_two_blocks_with_times_are_those_of_the_paper(time_bias):
    """By loops in NumPy, place by place."""
    model = make_model(time_bias, temperature=0.0)
    shared = jax.tree.map(lambda x: np.asarray(x, np.float64), shared_of(model))
    x, encoder = 8**0.5 * shared["tables"]["item"][ITEMS], shared["params"]["encoder"]
    for number in range(2):
        block = encoder[f"block_{number}"]
        inner = silu(np.einsum("td,dkhe->tkhe", normalize(x), block["inner"]["kernel"]))[:, :, 0]
        gate, value, query, keys = inner.swapaxes(0, 1)
        mixed = np.zeros_like(x)
        for i in range(5):
            for j in range(i + 1):
                gap = max(1, TIMES[i + (time_bias == "request")] - TIMES[j])
                bias = block["distance"][i - j] + block["time"][math.floor(math.log(gap) / 0.301)]
                mixed[i] += silu(query[i] @ keys[j] + bias) / LENGTH * value[j]
        out = block["output"]
        x = x + (gate * normalize(mixed)) @ out["kernel"] + out["bias"]
    want = (normalize(x) * encoder["norm"]["scale"] + encoder["norm"]["bias"])[-1] @ shared["tables"]["item"].T
    rows = jnp.array([*ITEMS, 1 << 30, 1 << 30])
    vector = model.fold_in(shared_of(model), History(rows, rows, 30, jnp.array([*TIMES, 0, 0])))
    close(model.score(shared_of(model), vector, 0), want, atol=1e-4)


def scores_at(model, items, times):
    rows = jnp.array(items)
    shared = shared_of(model)
    return model.score(shared, model.fold_in(shared, History(rows, rows, 30, jnp.array(times))), 0)


def test_only_what_is_marked_reads_the_time_of_a_request():
    known, request = make_model("known"), make_model("request")
    one, other = ([*TIMES[:-1], time] for time in (100_000, 95_000_000))
    assert (scores_at(known, ITEMS, one) == scores_at(known, ITEMS, other)).all()
    assert (scores_at(known, ITEMS, one) != scores_at(known, ITEMS, [5, *TIMES[1:]])).any()
    assert (scores_at(request, ITEMS, one) != scores_at(request, ITEMS, other)).any()


@pytest.mark.parametrize("time_bias", ["known", "request"])
def test_padding_and_cutting_change_nothing(time_bias):
    model = make_model(time_bias)
    long_items, long_times = np.arange(20), np.arange(21) ** 3
    want = scores_at(model, long_items, long_times)
    close(scores_at(model, long_items[-LENGTH:], long_times[-LENGTH - 1 :]), want)
    padded = [*long_items, 1 << 30, 1 << 30]
    close(scores_at(model, padded, [*long_times, 77, 88]), want)
    rows = jnp.array([4, 1 << 30, 1 << 30])
    assert take_latest_times(History(rows, rows, 30, jnp.array([6, 8, 0, 0])), 2)[:2].tolist() == [6, 8]


@pytest.mark.parametrize("time_bias", ["known", "request"])
def test_the_loss_of_a_place_is_that_of_the_scores_there(time_bias):
    model = make_model(time_bias, loss="softmax")
    shared = shared_of(model)
    batch = {"negative": jnp.ones(30), "dropout": jnp.zeros(2, jnp.uint32), "catalogue": jnp.float32(30)}
    for places in (5, 8):
        sequence, time = np.full(places, 30), np.zeros(places, int)
        sequence[:5], time[:5] = ITEMS, TIMES[:5]
        got = model.loss(shared, (), batch | {"sequence": jnp.array(sequence), "time": jnp.array(time)})
        each = [scores_at(model, ITEMS[:n], TIMES[: n + 1]) for n in range(1, 5)]
        want = sum(jax.nn.logsumexp(z) - z[ITEMS[n + 1]] for n, z in enumerate(each))
        close(got.total, want, rtol=1e-4)
        assert got.weight == 4


class PauseEncoder(nn.Module):
    """A user vector by whether there is a pause before the item to be predicted, or before the latest one read."""

    request: bool

    @nn.compact
    def __call__(self, vectors, live, key=None, masked=None, times=None):
        known = jnp.diff(times[:-1], prepend=times[:1])
        return nn.Embed(2, vectors.shape[-1])(jnp.where(self.request, jnp.diff(times), known) // 90_000)


def test_the_time_of_a_request_gives_away_what_nothing_else_does():
    """After a pause an item of the second half is met, else one of the first, and pauses come by chance."""
    users, generator = 60, np.random.default_rng(0)
    paused = generator.random((users, 10)) < 0.5
    item = np.argsort(generator.random((users, 10, 15)), -1)[:, 0, :10] + 15 * paused
    time = np.cumsum(np.where(paused, 90_000, 1), 1)
    data = jf.data.from_arrays(np.repeat(np.arange(users), 10), item.ravel(), times=time.ravel())
    clients, figures = jf.data.partition(data, by="user", split="leave-one-out"), {}
    for times in ("known", "request"):
        model = jf.models.from_encoder(PauseEncoder(times == "request"), 30, 8, LENGTH, "softmax", times=times)
        method, channel = jf.algorithms.fedsgd(model, optax.sgd(0.1), optax.adam(0.05)), jf.channels.weighted_mean()
        run = jf.Experiment(clients, model, method, channel=channel, cohort=jf.sampling.everyone())
        for _ in run.train(rounds=100, evaluate_every=100):
            pass
        found = run.evaluate("val")
        figures[times] = found["val/full/hr@10"]
        assert found.get("leaky", False) == (times == "request")
    assert figures["known"] < 0.6, "ten of some twenty items that are left"
    assert figures["request"] > 0.85, "ten of some ten in the half where it is"


# --- as a user runs it ------------------------------------------------------------------------------


def write_rows(path, times=True):
    user, item, _, time = DATA.interactions
    columns = [DATA.users[user], DATA.items[item], *([time.astype(str)] if times else [])]
    lines = [",".join(row) for row in zip(*columns, strict=True)]
    path.write_text("\n".join([",".join(["user", "item", "time"][: len(columns)]), *lines]) + "\n")
    return path


@pytest.fixture
def program(monkeypatch):
    """Runs the program in this process."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["jaxfed", *map(str, args)])
        monkeypatch.setattr(main, "set_up_process", lambda: None)
        main.main()

    return call


def train(program, path, out, time_bias, *more):
    sizes = "--rounds", 2, "--evaluation.every", 1, "--cohort.size", 8, "--model.dim", 8
    program("train", "ml100k_hstu", "--data.path", path, "--out", out, *sizes, "--model.time-bias", time_bias, *more)


@pytest.mark.parametrize("time_bias", ["none", "known", "request"])
def test_a_run_with_request_times_is_marked(time_bias, program, tmp_path, capsys):
    path, out = write_rows(tmp_path / "rows.csv"), tmp_path / "run"
    train(program, path, out, time_bias)
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    marked = time_bias == "request"
    assert all(("leaky" in row) == marked for row in [summary, *rows])
    protocol = "loo-clean, the time of the held-out item is read (LEAKY)" if marked else "loo-clean"
    assert summary["protocol"] == protocol
    assert ("LEAKY" in "".join(capsys.readouterr())) == marked
    for command in (["recommend", out, "--user", DATA.users[3]], ["evaluate", out]):
        program(*command)
        assert ("LEAKY" in "".join(capsys.readouterr())) == marked


@pytest.mark.parametrize("written", ["none", "fractions", "test rows have none"])
def test_rows_without_times_are_refused_in_one_line(written, program, tmp_path, capsys):
    path, more = write_rows(tmp_path / "rows.csv", times=written != "none"), ()
    if written == "fractions":
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], *(f"{line}.5" for line in lines[1:])]) + "\n")
    if written == "test rows have none":
        lines = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]
        (tmp_path / "test.csv").write_text("\n".join([lines[0], *lines[1::9]]) + "\n")
        kept = path.read_text().splitlines()
        path.write_text("\n".join([kept[0], *(line for at, line in enumerate(kept[1:]) if at % 9)]) + "\n")
        more = "--data.test", tmp_path / "test.csv"
    with pytest.raises(SystemExit) as stop:
        train(program, path, tmp_path / "run", "known", *more)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.endswith('write times of all rows as whole numbers or dates, or set model.time_bias = "none"')
    train(program, path, tmp_path / "run", "none", *more)  # which needs none


def test_a_model_that_reads_times_neither_teaches_nor_learns_without_them(program, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.csv")
    for name, time_bias in (("plain", "none"), ("timed", "known")):
        train(program, path, tmp_path / name, time_bias)
    start = "--start.distil-steps", 2, "--start.run"
    for student, teacher, words in (("none", "timed", "that reads no times"), ("known", "plain", "have no times")):
        with pytest.raises(SystemExit):
            train(program, path, tmp_path / "run", student, *start, tmp_path / teacher)
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
    train(program, path, tmp_path / "run", "none", *start, tmp_path / "plain")


def test_times_that_are_missing_are_no_silence():
    rows = jnp.array(ITEMS)
    for time_bias, times in (("known", None), ("none", jnp.array(TIMES))):
        model = make_model(time_bias)
        with pytest.raises(ValueError, match="reads"):
            model.fold_in(shared_of(model), History(rows, rows, 30, times))


def test_times_of_masked_items_and_words_that_there_are_not():
    with pytest.raises(ValueError, match="times are those of next items"):
        jf.models.from_encoder(PauseEncoder(True), 30, 8, 5, targets="masked", times="known")
    with pytest.raises(ValueError, match="no times 'clock'"):
        jf.models.hstu(30, time_bias="clock")
