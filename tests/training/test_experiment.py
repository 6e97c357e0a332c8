"""`Experiment`: a run in a program gives what the command line gives."""

import inspect
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import jaxfed as jf
from jaxfed.config.config_files import read_config
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.models.model import LOSSES
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import Progress
from tests.small import OF_ADAPTERS, same

SGD = optax.sgd(0.3)
SIZES = {"users": 40, "items": 30, "mean_length": 6.0}


@pytest.fixture(scope="module")
def clients():
    return jf.data.partition(jf.data.load("synthetic", **SIZES))


def make_run(clients, method=None, **more):
    model = jf.models.mf(clients.num_items, dim=4)
    method = method or jf.algorithms.fedavg(model, optax.sgd(0.5), optax.sgd(1.0))
    return jf.Experiment(clients, model, method, **{"cohort": jf.sampling.uniform(8)} | more)


def wrong_size(clients):
    model = jf.models.mf(7)
    return jf.Experiment(clients, model, jf.algorithms.fedavg(model, SGD))


def tableless():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, user, item=None):
            return self.param("w", nn.initializers.zeros, 30)

    return jf.from_module(Flat())


def train(run, rounds, **more):
    return list(run.train(rounds, **{"evaluate_every": 2} | more))


def train_saved(folder, out, rounds):
    """The summary of the command line's run of a saved configuration."""
    table = read_config(folder)
    return train_run(make_config(table | {"rounds": rounds, "run": table["run"] | {"out": str(out)}}))


def test_pause_save_and_resume_end_where_the_command_line_does(clients, tmp_path):
    """One run to round 6; one that is left at 2, saved at 4 and opened again; the saved configuration, from the start
    and resumed: all end with the same parameters."""
    whole = make_run(clients)
    assert [row["round"] for row in train(whole, 6)] == [2, 4, 6]
    paused = make_run(clients)
    for row in paused.train(6, evaluate_every=2):
        assert row["round"] == paused.round == 2
        break
    assert [row["round"] for row in train(paused, 4)] == [4]
    paused.save(tmp_path / "saved")
    opened = jf.load_run(tmp_path / "saved")
    assert opened.rows == json.loads(json.dumps(paused.rows))
    train(opened, 6)
    again = train_saved(tmp_path / "saved", tmp_path / "new", 6)
    config = read_config(tmp_path / "saved")
    resumed = train_run(make_config(config | {"rounds": 6}), resume=True)
    found = {whole.params_sha256, opened.params_sha256, again["params_sha256"], resumed["params_sha256"]}
    assert len(found) == 1
    assert [row["round"] for row in map(json.loads, (tmp_path / "saved" / "metrics.jsonl").open())][:3] == [2, 4, 6]


def algorithm_arguments(name, clients):
    known = {"num_clients": clients.num_clients, "num_train": clients.population.num_train}
    asked = inspect.signature(getattr(jf.algorithms, name)).parameters
    return {each: value for each, value in known.items() if each in asked and asked[each].default is asked[each].empty}


NAMES = [name for name in REGISTRY["algorithm"] if name not in ("custom", "closed_form", *OF_ADAPTERS)]


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_writes_the_configuration_that_makes_it(clients, tmp_path, name):
    of_blocks = name == "layerdrop"
    model = (
        jf.models.sasrec(clients.num_items, dim=4, length=6) if of_blocks else jf.models.mf(clients.num_items, dim=4)
    )
    make = getattr(jf.algorithms, name)
    optimizers = (optax.sgd(0.2), optax.sgd(0.5))[name == "central" :]  # which has no clients
    method = make(model, *optimizers, **algorithm_arguments(name, clients))
    waiting = name in ("fedbuff", "fedasync")
    clock = jf.sampling.lognormal_clock(spread=0.3) if waiting else None
    cohort = jf.sampling.buffered(1 if name == "fedasync" else 4, 12) if waiting else jf.sampling.uniform(8)
    run = jf.Experiment(clients, model, method, cohort=cohort, clock=clock)
    train(run, 2)
    run.save(tmp_path / "saved")
    table = read_config(tmp_path / "saved")
    assert table["algorithm"]["name"] == name
    assert train_saved(tmp_path / "saved", tmp_path / "new", 2)["params_sha256"] == run.params_sha256


@pytest.mark.parametrize("name", ["ease", "item_knn", "transitions", "ials"])
def test_a_closed_form_has_no_optimisers(clients, tmp_path, name):
    model = getattr(jf.models, name)(clients.num_items)
    run = jf.Experiment(clients, model, jf.algorithms.closed_form(model), cohort=jf.sampling.everyone())
    train(run, 1, evaluate_every=1)
    run.save(tmp_path / "saved")
    assert train_saved(tmp_path / "saved", tmp_path / "new", 1)["params_sha256"] == run.params_sha256


def test_all_kinds_of_pieces_are_written_down(clients, tmp_path):
    """Links, codes of the download, groups of rates, an adaptive server, noise and settings."""
    model = jf.models.neumf(clients.num_items)
    rates = jf.algorithms.group_rates(
        optax.adam, 0.05, item=jf.algorithms.Rates(0.1), user=jf.algorithms.Rates(0.2, 0.01), b1=0.8
    )
    method = jf.algorithms.fedprox(model, rates, jf.algorithms.fedadam(0.03, tau=0.01), proximal=0.1)
    channel = jf.chain(
        jf.channels.per_row_mean(floor=2.0), jf.channels.clip(0.5), jf.channels.gaussian(0.1), jf.channels.densify()
    )
    run = jf.Experiment(
        clients,
        model,
        method,
        channel,
        jf.sampling.poisson(8),
        seed=3,
        batching=jf.Batching(batch_size=128, negatives=2, epochs=2),
        download=jf.channels.quantize(6),
        evaluation=jf.Evaluation(clients=20, select="val/sampled/hr@10"),
        privacy=jf.Privacy(delta=1e-4, accountant="rdp"),
        run=jf.Run(checkpoint_every=3),
    )
    train(run, 2)
    assert run.privacy["epsilon"] > 0
    run.save(tmp_path / "saved")
    assert train_saved(tmp_path / "saved", tmp_path / "new", 2)["params_sha256"] == run.params_sha256


@pytest.mark.parametrize("name", ["low_rank_tables", "hashed_tables"])
def test_a_parametrization_is_written_down(clients, tmp_path, name):
    model = jf.models.mf(clients.num_items, dim=4)
    held = getattr(jf.models, name)(model, **({"rank": 2} if name == "low_rank_tables" else {"buckets": 8}))
    method = jf.algorithms.fedavg(model, optax.sgd(0.5))
    run = jf.Experiment(clients, model, method, cohort=jf.sampling.uniform(8), parametrization=held)
    train(run, 2)
    assert run.params["tables"]["item"].shape == (clients.num_items, 4)
    run.save(tmp_path / "saved")
    assert train_saved(tmp_path / "saved", tmp_path / "new", 2)["params_sha256"] == run.params_sha256


def test_edges_are_written_down(clients, tmp_path):
    run = make_run(clients, edges=jf.Edges(3, 2, seed=5))
    train(run, 2)
    run.save(tmp_path / "saved")
    assert train_saved(tmp_path / "saved", tmp_path / "new", 2)["params_sha256"] == run.params_sha256


# --- data -------------------------------------------------------------------------------------


def frame(rows=200):
    random = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "who": random.integers(0, 20, rows),
            "what": [f"i{i}" for i in random.integers(0, 25, rows)],
            "when": np.arange(rows),
            "shop": random.integers(0, 3, rows),
        }
    )


def test_a_frame_is_read_as_its_csv_file(tmp_path):
    """An index out of order, columns of objects and categories change nothing."""
    table, options = frame(), {"user": "who", "item": "what", "time": "when"}
    table.to_csv(tmp_path / "rows.csv", index=False)
    want = jf.data.partition(jf.data.read(str(tmp_path / "rows.csv"), **options)).digest
    objects = table.astype({"who": object, "what": object, "when": object})
    shuffled = table.set_index(np.random.default_rng(1).permutation(len(table)))
    for each in (table, objects, shuffled, table.astype({"what": "category"}), table.astype({"what": "string"})):
        assert jf.data.partition(jf.data.from_pandas(each, **options)).digest == want
    arrays = jf.data.from_arrays(table["who"], table["what"], times=table["when"])
    assert jf.data.partition(arrays).digest == want


BAD = {
    "no column": (lambda t: t.drop(columns="who"), "who"),
    "a missing user": (lambda t: t.assign(who=t["who"].astype(object).where(t.index != 7)), "who"),
    "NaN for a time": (
        lambda t: t.astype({"when": float}).assign(when=lambda x: x["when"].where(x.index != 7)),
        "when",
    ),
    "a word for a time": (lambda t: t.astype({"when": object}).assign(when=["late"] * len(t)), "when"),
    "no rows": (lambda t: t[:0], "no "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_frame_that_cannot_be_read_is_refused_in_a_line(name):
    change, word = BAD[name]
    with pytest.raises(ValueError, match=word) as error:
        jf.data.partition(jf.data.from_pandas(change(frame()), user="who", item="what", time="when"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jf.data.load("ml-1b"), "no data set 'ml-1b'"),
        (lambda: jf.data.from_pandas([1, 2]), "a DataFrame of pandas, not list"),
        (lambda: jf.data.from_arrays([1, 2], [1]), "of one length"),
        (lambda: jf.data.from_arrays([[1]], [[1]]), "flat"),
        (lambda: jf.data.read("nowhere.txt"), 'pass, for example, kind="csv"'),
        (lambda: jf.data.partition(jf.data.load("synthetic", **SIZES), split="random"), "no split 'random'"),
        (lambda: jf.data.partition(jf.data.load("synthetic", **SIZES), by="shop"), "shop"),
    ],
)
def test_data_that_cannot_be_are_refused_in_a_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_model_is_no_parametrization(clients):
    model = jf.models.mf(clients.num_items, dim=4)
    with pytest.raises(ValueError, match="parametrization is a Model: pass a Parametrization;"):
        make_run(clients, parametrization=jf.models.code_rows(model, np.zeros((clients.num_items, 2), int)))


def test_a_frame_is_saved_with_the_run(tmp_path):
    """The command line reads the rows from the run's folder, clients by a column among them."""
    data = jf.data.from_pandas(frame(), user="who", item="what", time="when", keep="shop")
    clients = jf.data.partition(data, by="shop", split="ratio", ratio=(0.2, 0.2))
    model = jf.models.mf(clients.num_items, num_users=clients.users_per_client, dim=4)
    run = jf.Experiment(clients, model, jf.algorithms.fedavg(model, optax.sgd(0.5)), cohort=jf.sampling.everyone())
    train(run, 2)
    run.save(tmp_path / "saved")
    summary = train_saved(tmp_path / "saved", tmp_path / "new", 2)
    assert (summary["params_sha256"], summary["data_sha256"]) == (run.params_sha256, clients.digest)


# --- what comes out -----------------------------------------------------------------------------


def test_parameters_are_plain_arrays_by_the_ids_of_the_data(clients):
    run = make_run(clients)
    start = run.params
    train(run, 4)
    params = run.params
    assert isinstance(params["tables"]["item"], np.ndarray)
    assert params["tables"]["item"].shape == (len(run.latest.item_ids), 4)
    assert not np.array_equal(params["tables"]["item"], start["tables"]["item"])
    user = run.latest.user_ids[5]
    vector = run.latest.user_params(user)["private"]["user"]
    assert vector.shape == (1, 4)
    had = {str(clients.source.items[i]) for i in clients.population.train.of(5)}
    had |= {str(clients.source.items[part.of(5)[0]]) for part in (clients.population.valid, clients.population.test)}
    scores = params["tables"]["item"] @ vector[0] + params["tables"]["bias"]
    best = [
        str(run.latest.item_ids[i])
        for i in np.argsort(-scores, kind="stable")
        if str(run.latest.item_ids[i]) not in had
    ]
    assert [item for item, _, _ in run.latest.recommend(user, 5)] == best[:5]
    with pytest.raises(ValueError, match="no user"):
        run.recommend("nobody")


def test_evaluation_is_of_the_best_model_or_of_the_last(clients):
    run = make_run(clients)
    rows = train(run, 6)
    best = max(row["val/full/ndcg@10"] for row in rows)
    assert run.evaluate("val")["val/full/ndcg@10"] == best
    assert run.latest.evaluate("val")["val/full/ndcg@10"] == rows[-1]["val/full/ndcg@10"]
    assert "test/full/hr@10" in run.evaluate()
    with pytest.raises(ValueError, match="choose val or test"):
        run.evaluate("train")


def test_callbacks_and_loggers_are_told_each_row(clients):
    seen, closed = [], []

    class Keep:
        def log_row(self, row):
            seen.append(row["round"])

        def close(self):
            closed.append(True)

    run = make_run(clients)
    rows = train(run, 4, callbacks=[lambda row: seen.append(-row["round"])], loggers=[Keep()])
    assert seen == [-2, 2, -4, 4]
    assert closed == [True]
    assert rows == run.rows


def test_seeds_share_programs_and_are_runs_of_their_own(clients):
    run = make_run(clients)
    rows = list(jf.train_seeds(run, [0, 1, 2], rounds=2, evaluate_every=1))
    assert [(row["seed"], row["round"]) for row in rows] == [(s, r) for s in (0, 1, 2) for r in (1, 2)]
    assert run.round == 0
    alone = make_run(clients, seed=2)
    train(alone, 2, evaluate_every=1)
    assert rows[-1]["val/full/ndcg@10"] == alone.rows[-1]["val/full/ndcg@10"]
    assert rows[-1]["test/full/hr@10"] == alone.evaluate("test")["test/full/hr@10"]
    assert len({row["val/full/ndcg@10"] for row in rows[1::2]}) == 3


# --- pieces of one's own -------------------------------------------------------------------------


class Net(nn.Module):
    """A user's own module."""

    num_items: int

    @nn.compact
    def __call__(self, user, item=None):
        items = self.variable("tables", "item", lambda: 0.1 * jnp.ones((self.num_items, 3))).value
        vector = self.variable("private", "user", lambda: 0.1 * jnp.ones(3)).value
        scores = nn.Dense(1, use_bias=False)(items * vector)[:, 0]
        return scores if item is None else scores[item]


def own_run(clients, **more):
    model = jf.from_module(Net(clients.num_items), LOSSES["bce"])
    double = jf.link(lambda update, sent, client: (jax.tree.map(lambda x: 2 * x, update), client.link_state))
    method = jf.algorithms.fedavg(model, optax.sgd(0.3))
    return jf.Experiment(clients, model, method, jf.chain(double, jf.channels.per_row_mean()), **more)


def test_pieces_without_names_are_trained_saved_and_restored(clients, tmp_path, capsys):
    run, whole = own_run(clients), own_run(clients)
    train(run, 2)
    with pytest.raises(ValueError, match="the model was not made by a function"):
        run.to_table(tmp_path)
    run.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.toml").exists()
    again = own_run(clients)
    again.restore(tmp_path / "saved")
    assert (again.round, again.rows) == (2, json.loads(json.dumps(run.rows)))
    train(again, 4)
    train(whole, 4)
    assert again.params_sha256 == whole.params_sha256
    with pytest.raises(ValueError, match="pieces without names"):
        jf.load_run(tmp_path / "saved")
    other = jf.data.partition(jf.data.load("synthetic", **SIZES | {"seed": 1}))
    with pytest.raises(ValueError, match="other data"):
        own_run(other).restore(tmp_path / "saved")


def test_what_was_replaced_has_no_name_any_more(clients):
    model = jf.models.mf(clients.num_items, dim=4)
    method = jf.algorithms.fedavg(model, optax.sgd(0.3))._replace(server=optax.adam(0.1))
    run = jf.Experiment(clients, model, method, cohort=jf.sampling.uniform(8))
    with pytest.raises(ValueError, match="the algorithm was not made by a function .* or was changed since"):
        run.to_table()
    decayed = jf.algorithms.fedavg(model, optax.adamw(0.1))
    plain = jf.Experiment(clients, model, decayed, cohort=jf.sampling.uniform(8))
    with pytest.raises(ValueError, match="client optimiser"):
        plain.to_table()


def test_a_folder_with_something_else_is_left_alone(clients, tmp_path):
    (tmp_path / "file").write_text("mine")
    run = make_run(clients)
    train(run, 2)
    with pytest.raises(ValueError, match="not empty"):
        run.save(tmp_path)
    run.save(tmp_path / "new")
    train(run, 4)
    run.save(tmp_path / "new")
    assert jf.load_run(tmp_path / "new").round == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda c, m, f: jf.Experiment(c.source, m, f), "clients is a Dataset, not a Clients"),
        (lambda c, m, f: jf.Experiment(c, f, m), "model is a Method, not a Model"),
        (lambda c, m, f: wrong_size(c), "tables of 7 rows, the clients have 30 items"),
        (lambda c, m, f: jf.Experiment(c, jf.models.mf(c.num_items), f), "made for another model"),
        (
            lambda c, m, f: jf.Experiment(c, m, f, channel=[jf.channels.mean()]),
            r"channel is a list.*jaxfed.chain\(\*links",
        ),
        (lambda c, m, f: jf.Experiment(c, m, f, channel=jf.channels.mean), "channel is a function.*call it"),
        (lambda c, m, f: jf.Experiment(c, m, f, channel=optax.clip(1.0)), "wrap it in jaxfed.at_client"),
        (lambda c, m, f: jf.chain([jf.channels.mean()]), "a list is no link"),
        (lambda c, m, f: jf.Experiment(c, m, f, cohort="uniform"), "cohort is a str that gives no Sampler"),
        (
            lambda c, m, f: jf.Experiment(c, m, f, cohort=jf.sampling.uniform),
            "cohort is a function that gives no Sampler",
        ),
        (lambda c, m, f: jf.Experiment(c, m, f, clock="lognormal"), "clock is a str that gives no Clock"),
        (
            lambda c, m, f: jf.Experiment(c, m, jf.algorithms.fedavg(m, "sgd")),
            "client_optimizer of the method is a str",
        ),
        (
            lambda c, m, f: jf.Experiment(c, m, jf.algorithms.scaffold(m, SGD, num_clients=7)),
            "made for 7 clients, there are",
        ),
        (lambda c, m, f: jf.data.partition(frame()), "a data set, not a DataFrame"),
        (lambda c, m, f: jf.data.partition(c.source, label="ratings"), "no label 'ratings'"),
        (lambda c, m, f: jf.link(lambda u, s, v: u, reveals="nothing"), "reveals is 'nothing': choose one of"),
        (lambda c, m, f: jf.link(decode=lambda t, s, r: t, is_averag=True), "no claim 'is_averag'"),
        (lambda c, m, f: jf.channels.mean(count=-3), "mean.count is -3"),
        (lambda c, m, f: jf.Experiment(c, m, jf.algorithms.closed_form(m)), "closed form"),
        (lambda c, m, f: jf.Experiment(c, m, f, cohort=jf.sampling.uniform(99)), "larger than the population"),
        (lambda c, m, f: jf.Experiment(c, m, f, jf.channels.ring(4)), "ring: nothing bounds"),
        (lambda c, m, f: next(jf.Experiment(c, m, f).train()), "after how many rounds"),
        (lambda c, m, f: jf.Experiment(c, m, f, evaluation=jf.Evaluation(select="val/x")), "no metric"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(clients, make, words):
    model = jf.models.mf(clients.num_items, dim=4)
    with pytest.raises(ValueError, match=words) as error:
        make(clients, model, jf.algorithms.fedavg(model, optax.sgd(0.3)))
    assert "\n" not in str(error.value)


def test_from_config_is_the_run_of_the_command_line(tmp_path):
    table = {"data": {"name": "synthetic", **SIZES}, "cohort": {"size": 8}, "rounds": 2}
    run = jf.from_config(table, "--seed", "4", "--evaluation.every", "1")
    assert [row["round"] for row in run.train()] == [1, 2]
    config = make_config(table | {"seed": 4, "evaluation": {"every": 1}, "run": {"out": str(tmp_path / "run")}})
    assert train_run(config)["params_sha256"] == run.params_sha256
    loaded = jf.load_run(tmp_path / "run")
    same(loaded.params, run.params)
    assert loaded.recommend(loaded.latest.user_ids[0], 3) == run.recommend(run.latest.user_ids[0], 3)


def test_registered_pieces_are_written_down_with_their_module(clients, tmp_path, monkeypatch):
    """The command line imports the module, and makes the same run."""
    (tmp_path / "my_links.py").write_text(
        "import jaxfed as jf, optax\n"
        "def scaled(factor: float = 0.5):\n    return jf.at_client(optax.scale(factor))\n"
        "scaled = jf.register('channel', 'my_scaled', scaled)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_links

    run = make_run(clients, channel=jf.chain(my_links.scaled(0.25), jf.channels.per_row_mean()))
    train(run, 2)
    run.save(tmp_path / "saved")
    assert read_config(tmp_path / "saved")["run"]["imports"] == ["my_links"]
    assert train_saved(tmp_path / "saved", tmp_path / "new", 2)["params_sha256"] == run.params_sha256
    del REGISTRY["channel"]["my_scaled"]


# --- settings, checked as a configuration's are ----------------------------------------


BAD_SETTINGS = [
    ({"run": jf.Run(devices="two")}, {"run": {"devices": "two"}}),
    ({"run": jf.Run(keep=0)}, {"run": {"keep": 0}}),
    ({"run": jf.Run(placement="tpu")}, {"run": {"placement": "tpu"}}),
    ({"run": jf.Run(imports="json")}, {"run": {"imports": "json"}}),
    ({"run": jf.Run(client_memory_gb=float("nan"))}, {"run": {"client_memory_gb": float("nan")}}),
    ({"evaluation": jf.Evaluation(every=0)}, {"evaluation": {"every": 0}}),
    ({"evaluation": jf.Evaluation(clients=-1)}, {"evaluation": {"clients": -1}}),
    ({"evaluation": jf.Evaluation(targets=(3,))}, {"evaluation": {"targets": [3]}}),
    ({"privacy": jf.Privacy(delta="1e-5")}, {"privacy": {"delta": "1e-5"}}),
    ({"seed": "x"}, {"seed": "x"}),
    ({"seed": -1}, {"seed": -1}),
]


@pytest.mark.parametrize(("settings", "table"), BAD_SETTINGS, ids=[str(table) for _, table in BAD_SETTINGS])
def test_settings_of_a_program_and_of_a_file_are_refused_in_the_same_words(clients, settings, table):
    with pytest.raises(ValueError) as from_file:  # noqa: PT011  test_config.py holds the words
        make_config(table)
    with pytest.raises(ValueError) as from_program:  # noqa: PT011
        make_run(clients, **settings)
    assert str(from_program.value) == str(from_file.value)
    assert "\n" not in str(from_program.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batching": jf.Batching(batch_size="64")}, "batching.batch_size: '64' is not a whole number: write 64"),
        ({"batching": jf.Batching(epochs=1.5)}, "batching.epochs: 1.5 is not a whole number"),
        ({"edges": jf.Edges(number=-1)}, "edges.number is -1"),
        ({"lazy": "no"}, "lazy: 'no' is not true or false"),
        ({"run": {"devices": 2}}, r"run is a dict: make it with jaxfed.Run\(...\)"),
        ({"evaluation": jf.Run()}, r"evaluation is a Run: make it with jaxfed.Evaluation\(...\)"),
        (
            {"evaluation": jf.Evaluation(channel=make_config({}).channel)},
            "evaluation.channel is for configurations: pass the links to Experiment as evaluation_channel",
        ),
    ],
)
def test_wrong_settings_of_a_program_say_what_is_wrong(clients, settings, words):
    with pytest.raises(ValueError, match=words) as error:
        make_run(clients, **settings)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_and_whole_numbers_serve_in_settings(clients):
    run = make_run(
        clients,
        seed=np.int64(3),
        batching=jf.Batching(batch_size=np.int32(8)),
        evaluation=jf.Evaluation(every=np.int64(2)),
        run=jf.Run(client_memory_gb=4),
    )
    table = run.to_table()
    assert (table["seed"], table["work"]["batch_size"], table["evaluation"]["every"]) == (3, 8, 2)
    assert type(table["run"]["client_memory_gb"]) is float
    assert json.loads(json.dumps(table)) == table  # which NumPy's numbers would not pass


def test_a_saved_run_evaluates_at_the_clients_where_the_program_did(clients, tmp_path):
    """The channel of the clients' figures is written down together with `where`, without which no run reads it."""
    run = make_run(clients, evaluation_channel=jf.chain(jf.channels.mean(), jf.channels.clip(1e-3)))
    rows = train(run, 2)
    run.save(tmp_path / "run")
    config = make_config(read_config(tmp_path / "run"))
    assert config.evaluation.where == "clients"
    again = jf.from_config(str(tmp_path / "run"))
    assert {key: value for key, value in train(again, 2)[0].items() if "seconds" not in key} == {
        key: value for key, value in rows[0].items() if "seconds" not in key
    }


# --- what a pause, a folder and a file must not lose ------------------------------------------------


def test_a_model_without_tables_is_refused(clients):
    model = tableless()
    with pytest.raises(ValueError, match="the model has no tables"):
        jf.Experiment(clients, model, jf.algorithms.fedavg(model, SGD))


def test_a_file_without_a_kind_is_written_down_with_it(tmp_path):
    frame().to_csv(tmp_path / "rows.csv", index=False)
    data = jf.data.read(str(tmp_path / "rows.csv"), user="who", item="what", time="when")
    run = make_run(jf.data.partition(data))
    train(run, 2)
    run.save(tmp_path / "saved")
    assert train_saved(tmp_path / "saved", tmp_path / "new", 2)["params_sha256"] == run.params_sha256


def test_an_interrupt_while_a_round_is_counted_loses_nothing(clients, monkeypatch):
    """Counting waits for the devices, and that is where Ctrl-C comes."""
    whole, stopped = make_run(clients), make_run(clients)
    train(whole, 6)
    record, calls = Progress.record_round, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return record(self, *args)

    monkeypatch.setattr(Progress, "record_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, 6)
    train(stopped, 6)
    assert stopped.params_sha256 == whole.params_sha256
    assert stopped.rows[-1]["bytes_up_total"] == whole.rows[-1]["bytes_up_total"]


def test_a_folder_of_another_run_is_not_restored(clients, tmp_path):
    run = make_run(clients)
    train(run, 2)
    run.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="seed: 0 -> 5"):
        make_run(clients, seed=5).restore(tmp_path / "saved")
    own = own_run(clients)
    train(own, 2)
    own.save(tmp_path / "own")
    with pytest.raises(ValueError, match="another seed"):
        own_run(clients, seed=7).restore(tmp_path / "own")


def test_a_secret_seed_is_not_resumed(clients, tmp_path):
    run = own_run(clients, privacy=jf.Privacy(seed="secret"))
    train(run, 2)
    run.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="secret seed is not stored"):
        own_run(clients, privacy=jf.Privacy(seed="secret")).restore(tmp_path / "saved")


def test_noise_made_for_some_rounds_is_for_no_more(clients, tmp_path):
    sampler = jf.sampling.cyclic(8)(num_clients=clients.num_clients)
    noise = jf.channels.correlated(rounds=4, num_clients=clients.num_clients, sampler=sampler, kind="tree")
    channel = jf.chain(jf.channels.mean(8), jf.channels.clip(1.0), noise)
    run = make_run(clients, channel=channel, cohort=sampler)
    train(run, 2)
    run.save(tmp_path / "saved")
    assert read_config(tmp_path / "saved")["rounds"] == 4
    opened = jf.load_run(tmp_path / "saved")
    for each in (run, opened):
        train(each, 4)
        with pytest.raises(ValueError, match="made for 4 rounds, not 8"):
            train(each, 8)
    assert opened.params_sha256 == run.params_sha256


def test_a_schedule_keeps_its_rounds(tmp_path):
    table = {
        "data": {"name": "synthetic", **SIZES},
        "cohort": {"size": 8},
        "rounds": 6,
        "server": {"schedule": "cosine"},
    }
    whole, paused = jf.from_config(table), jf.from_config(table)
    train(whole, 6)
    train(paused, 2)
    paused.save(tmp_path / "saved")
    resumed = train_run(make_config(read_config(tmp_path / "saved")), resume=True)
    assert resumed["params_sha256"] == whole.params_sha256


def test_the_latest_model_outlives_the_next_round(clients):
    run = make_run(clients)
    train(run, 2)
    before = run.latest
    params = before.params
    train(run, 4)
    same(before.params, params)


def test_a_parametrization_of_the_method_counts(clients):
    model = jf.models.mf(clients.num_items, dim=4)
    held = jf.models.low_rank_tables(model, rank=2)
    plain = jf.algorithms.fedavg(model, SGD)
    runs = [
        jf.Experiment(clients, model, plain._replace(parametrization=held), cohort=jf.sampling.uniform(8)),
        jf.Experiment(clients, model, plain, cohort=jf.sampling.uniform(8), parametrization=held),
    ]
    a, b = [train(each, 2) and each.params_sha256 for each in runs]
    assert a == b
    with pytest.raises(ValueError, match="has a parametrization already"):
        jf.Experiment(clients, model, plain._replace(parametrization=held), parametrization=held)


def test_a_table_of_overrides_is_left_as_it_was():
    table = {"data": {"name": "synthetic", **SIZES}, "channel": [{"name": "per_row_mean"}]}
    jf.from_config(table, "--channel.1.name", "clip")
    assert table["channel"] == [{"name": "per_row_mean"}]


def test_a_finished_run_that_goes_on_has_no_summary_of_fewer_rounds(tmp_path):
    """The command line would take it for that of the run; where no round was added, it stays."""
    table = {"data": {"name": "synthetic", **SIZES}, "cohort": {"size": 8}, "rounds": 2}
    train_run(make_config(table | {"run": {"out": str(tmp_path / "run")}}))
    run = jf.load_run(tmp_path / "run")
    run.save(tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()
    train(run, 4)
    run.save(tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "summary_2.json").exists()
    resumed = train_run(make_config(read_config(tmp_path / "run")), resume=True)
    assert (resumed["rounds"], resumed["params_sha256"]) == (4, run.params_sha256)


def test_a_save_without_a_configuration_leaves_other_files_alone(clients, tmp_path):
    run = own_run(clients)
    train(run, 2)
    run.save(tmp_path / "saved")
    (tmp_path / "saved" / "notes.parquet").write_bytes(b"mine")
    run.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "notes.parquet").read_bytes() == b"mine"


def test_a_module_of_ones_own_reads_features():
    """The features of the table reach training and recommendations: who likes what is written in them alone."""

    class ByKind(nn.Module):
        num_items: int

        @nn.compact
        def __call__(self, user, item=None, of_user=None, of_item=None):
            match = self.param("match", nn.initializers.zeros, (3, 3))
            bias = self.variable("tables", "bias", jnp.zeros, self.num_items).value
            known = of_user is not None and of_item is not None  # neither is when the variables are made
            scores = bias + match[of_user[0]][of_item[:, 0]] if known else bias
            return scores if item is None else scores[item]

    random = np.random.default_rng(0)
    kind_of_user, kind_of_item = random.integers(0, 2, 40), random.integers(0, 2, 30)
    rows = [(u, i) for u in range(40) for i in random.permutation(np.flatnonzero(kind_of_item == kind_of_user[u]))[:8]]
    who, what = np.array(rows).T
    data = jf.data.from_arrow(
        {"user_id": who, "item_id": what},
        user_features={"user_id": np.arange(40), "kind": np.array(["a", "b"])[kind_of_user]},
        item_features={"item_id": np.arange(30), "kind": np.array(["a", "b"])[kind_of_item]},
    )
    clients = jf.data.partition(data)
    model = jf.from_module(ByKind(clients.num_items), features=("user", "item"))
    method = jf.algorithms.fedavg(model, optax.sgd(1.0))
    run = jf.Experiment(clients, model, method, jf.channels.mean(), jf.sampling.everyone())
    train(run, 20, evaluate_every=20)
    for user in run.latest.user_ids[:6]:
        items = [int(item) for item, _, _ in run.latest.recommend(user, 3)]
        assert (kind_of_item[items] == kind_of_user[int(user)]).all()
