"""A compressed download: a client reads what its codes say, pays for their bytes, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.channels.average import mean
from jaxfed.channels.compress import drive, quantize, sign
from jaxfed.channels.linear_maps import rotate
from jaxfed.channels.noise import densify
from jaxfed.channels.sparse import random_k, top_k
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.config_files import config_to_toml
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.core.channel import chain
from jaxfed.core.channel_checks import shape_client
from jaxfed.core.client_work import ClientWork
from jaxfed.core.download import check_download, make_download
from jaxfed.core.federate import federate
from jaxfed.core.method import Method
from jaxfed.core.state import server_model
from jaxfed.core.tables import Table
from jaxfed.core.tree import tree_digest
from jaxfed.core.types import Broadcast, ClientOutput
from jaxfed.core.wire import coded_shapes, make_wire, pack_message
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import prepare_round
from tests import small
from tests.small import DIM, ITEMS, MARKED, PLAIN, TABLE, USERS, WHO, close, row_cohort, run, same

N, K, D = 50, 12, 8
KEY = jax.random.key(5)
MODEL = Broadcast(
    {
        "item": Table(jax.random.normal(KEY, (N, D))),
        "bias": Table(jax.random.normal(jax.random.fold_in(KEY, 1), (N,))),
        "w": jax.random.normal(jax.random.fold_in(KEY, 2), (3, 4)),
    }
)
HELD = jnp.array([7, 3, 44, 0, 49, N, N, N, N, N, N, N])
CODES = {
    "quantize 8": quantize,
    "quantize 4": lambda: quantize(4),
    "rotate, quantize": lambda: chain(rotate(), quantize(4)),
    "drive": drive,
    "random_k": lambda: random_k(0.5),
}


def who(id=3, key=KEY):
    return shape_client((), K, N)._replace(rows=HELD, id=jnp.int32(id), public=key)


def numbers(tree, rows=5):
    """The leaves that a client holds, beside each other."""
    return [np.asarray(x)[:rows] if x.shape[0] in (K, N) else np.asarray(x) for x in jax.tree.leaves(tree)]


def held_rows():
    take = lambda x: x[HELD[:5]]
    return [np.asarray(take(x)) if x.shape[0] == N else np.asarray(x) for x in jax.tree.leaves(MODEL)]


@pytest.mark.parametrize("name", [name for name in CODES if name != "drive"])  # right for many columns only
@pytest.mark.parametrize("whole", [False, True])
def test_what_a_client_reads_is_the_model_on_average(name, whole):
    """Within six standard errors of the mean of many rounds; one reading alone is not the model."""
    receive = make_download(chain(CODES[name]()), whole)
    once = jax.jit(lambda key: receive(MODEL, who(key=key)))
    many = jax.jit(jax.vmap(once))(jax.random.split(KEY, 3000))
    for leaf, want in zip(jax.tree.leaves(many), held_rows(), strict=True):
        got = np.asarray(leaf)[:, :5] if leaf.shape[1] == K else np.asarray(leaf)
        assert got.std(0).max() > 0
        error = np.abs(got.mean(0) - want)
        assert (error <= 6 * got.std(0) / np.sqrt(3000) + 1e-4).all()


def test_eight_bits_are_next_to_the_model_and_the_same_client_reads_the_same():
    """Within a 127th of the largest number of the row, or of the leaf; zero where no row is held."""
    receive = make_download(chain(quantize(8)), False)
    read = receive(MODEL, who())
    for got, want in zip(numbers(read), held_rows(), strict=True):
        largest = np.abs(want).max() if want.ndim == 1 or want.shape == (3, 4) else np.abs(want).max(-1, keepdims=True)
        assert (np.abs(got - want) <= largest / 127 * 1.001).all()
    assert not np.asarray(read.params["item"].rows)[5:].any()
    same(read, receive(MODEL, who()))
    assert tree_digest(read) != tree_digest(receive(MODEL, who(id=4)))
    assert tree_digest(read) != tree_digest(receive(MODEL, who(key=jax.random.key(6))))


def test_whole_tables_are_one_message_for_all():
    """Whoever asks, and whatever rows it holds: two clients read the same of a row that both hold."""
    receive = make_download(chain(quantize(4)), True)
    one, two = receive(MODEL, who()), receive(MODEL, who(id=4)._replace(rows=HELD[::-1]))
    same(one.params["item"].rows, two.params["item"].rows[::-1])
    same(one.params["w"], two.params["w"])


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_price_is_the_length_of_what_the_packer_writes(name, rows):
    links = chain(CODES[name]())
    mine = jax.tree.map(lambda x: x[HELD] if x.shape[0] == N else x, MODEL)
    state, link_state = links.init(mine)
    client = who()._replace(rows=jnp.where(jnp.arange(K) < rows, HELD, N), link_state=link_state)
    message, _ = links.encode(mine, links.broadcast(state), client)
    price = make_wire(mean(), MODEL, links)
    assert price.down(np.int64(rows)) == len(pack_message(message, np.asarray(HELD[:rows])))
    hidden = make_wire(chain(mean(), densify()), MODEL, links)
    every = links.encode(MODEL, links.broadcast(state), client._replace(rows=jnp.arange(N)))[0]
    assert hidden.down(np.int64(rows)) == len(pack_message(every, np.arange(N))) - 4 * N  # no ids: they are all
    assert hidden.sees == "update"
    assert jax.tree.structure(coded_shapes(links, MODEL, N)) == jax.tree.structure(jax.eval_shape(lambda: every))


def test_without_one_the_price_is_that_of_the_arrays():
    price = make_wire(mean(), MODEL)
    np.testing.assert_array_equal(price.down(np.array([1, 5])), np.array([1, 5]) * (4 * D + 4 + 4) + 48)
    assert make_wire(chain(mean(), densify()), MODEL).down(np.int64(5)) == N * (4 * D + 4) + 48


GIVEN = {"agnostic": {"num_train": [1, 2, 3]}, "feddyn": {"num_clients": 4}}  # by the program


def accepted(name):
    if name in ("gaussian", "local_gaussian", "correlated", "skellam", "discrete_gaussian", "ring", "pads", "krum"):
        return False  # they want others before them
    try:
        check_download(chain(REGISTRY["channel"][name](**GIVEN.get(name, {}))), MODEL)
    except ValueError:
        return False
    return True


def test_links_that_a_client_can_read():
    """Codes with feedback keep it; weights, norms, noise and ranks are nothing to read a model from."""
    assert {name for name in REGISTRY["channel"] if accepted(name)} == {"quantize", "drive", "rotate", "random_k"}
    check_download(chain(sign(False), top_k(0.5, False)), MODEL)
    for kept in (quantize(8, True), sign(), top_k()):
        with pytest.raises(ValueError, match=r"download: \w+ cannot be read at a client"):
            check_download(chain(kept), MODEL)


def test_an_update_is_the_change_from_what_was_received():
    """A work that goes nowhere sends zeros, however coarse its download; the model then stays where it was."""
    here = lambda params, key: (Broadcast(params), ())
    idle = ClientWork(
        here, lambda shared, client_state, steps, key: ClientOutput(jax.tree.map(jnp.zeros_like, shared), (), 1.0, {})
    )
    algorithm = federate(Method(idle), mean(), USERS, download=make_download(chain(quantize(2)), False))
    same(server_model(run(algorithm, row_cohort())[0]), PLAIN)


def test_a_client_starts_from_what_it_received():
    """A work that sends its model as the update: by hand, the mean of what each client reads of its rows."""
    here = lambda params, key: (Broadcast(params), ())
    echo = ClientWork(here, lambda shared, client_state, steps, key: ClientOutput(shared, (), jnp.float32(1), {}))
    receive, cohort = make_download(chain(quantize(2)), False), row_cohort()
    state, _ = run(federate(Method(echo), mean(), USERS, download=receive), cohort, rounds=1)
    total = np.zeros((ITEMS, DIM), np.float32)
    for block in cohort.blocks:
        for slot, rows in zip(block.slots, block.rows, strict=True):
            asks = shape_client((), len(rows), ITEMS)._replace(
                id=jnp.int32(WHO[slot]), rows=jnp.asarray(rows), public=jax.random.fold_in(small.KEY, 0)
            )
            here = np.asarray(receive(Broadcast(MARKED), asks).params["item"].rows)
            total[rows[rows < ITEMS]] += here[rows < ITEMS]
    close(server_model(state)["item"], PLAIN["item"] - total / len(WHO))


BITS = [{"name": "quantize", "bits": 8}]


def trained(out, resume=False, **changes):
    table = {**TABLE, **changes}
    table["run"] = {**table.get("run", {}), "out": str(out)}
    return train_run(make_config(table), resume=resume)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "a", download=BITS)


def test_nothing_is_the_default(tmp_path, compressed):
    """An empty list is no list; and a list is heard."""
    plain = trained(tmp_path / "a")
    assert plain["params_sha256"] == trained(tmp_path / "b", download=[])["params_sha256"]
    assert plain["params_sha256"] != compressed["params_sha256"]
    assert plain["bytes_up_total"] == compressed["bytes_up_total"]
    assert plain["bytes_down_total"] > compressed["bytes_down_total"]
    assert "download = []" in config_to_toml(make_config({}))


def test_where_clients_and_tables_lie_changes_nothing(tmp_path, compressed):
    host = trained(tmp_path / "h", download=BITS, run={"client_store": "host"})
    assert host["params_sha256"] == compressed["params_sha256"]
    split = trained(tmp_path / "s", download=BITS, run={"shard_tables": True, "devices": 2})
    assert split["bytes_down_total"] == compressed["bytes_down_total"]
    assert split["val/full/ndcg@10"] == pytest.approx(compressed["val/full/ndcg@10"], abs=1e-6)


def test_a_run_that_is_resumed_ends_the_same(tmp_path, compressed):
    import shutil

    asked = {"download": BITS, "run": {"checkpoint_every": 2}}
    trained(tmp_path / "r", **asked)
    (tmp_path / "r" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "4")
    assert trained(tmp_path / "r", True, **asked)["params_sha256"] == compressed["params_sha256"]


def test_a_low_rank_has_a_checkpoint(tmp_path):
    """Its state remembers shapes; an empty array could not be saved."""
    channel = [{"name": "weighted_mean"}, {"name": "low_rank", "rank": 2, "gain": 0.0}]
    summary = trained(tmp_path / "l", channel=channel)
    (tmp_path / "l" / "summary.json").unlink()
    assert trained(tmp_path / "l", True, channel=channel)["params_sha256"] == summary["params_sha256"]


@pytest.mark.parametrize("links", [["densify"], ["clip", "ring"]], ids=["densify", "ring"])
def test_who_does_not_show_its_rows_pays_for_whole_tables(links):
    """By hand: 48 or 50 rows of 4 numbers of a byte and a scale, and of a bias of a byte; a scale for all biases."""
    channel = [{"name": "mean"}, *({"name": name} for name in links)]
    config = make_config({**TABLE, "channel": channel, "download": BITS})
    experiment = build_from_config(config, load_data(config.data))
    items = experiment.data.population.num_items
    ready = prepare_round(experiment, 0, 0)
    assert ready.bytes_down == ready.asked * (items * (4 + 4 + 1) + 4)
    from jaxfed.training.rounds import initial_arrays, make_run_keys

    start = initial_arrays(experiment, 0)["state"]
    before = np.array(start.shared.params["tables"]["item"].rows)
    state, _ = experiment.algorithm.step(start, ready.cohort, make_run_keys(0).rounds)
    assert np.isfinite(state.shared.params["tables"]["item"].rows).all()
    assert (np.asarray(state.shared.params["tables"]["item"].rows) != before).any()


def test_the_command_line_names_links_of_the_download():
    from jaxfed.config.overrides import override_config

    config = override_config({"download": [{"name": "quantize"}]}, ["--download.0.bits", "4"])
    assert config.download[0].bits == 4
    config = override_config({"download": [{"name": "quantize"}]}, ["--download.0.name", "drive"])
    assert config.download[0].name == "drive"
    assert dataclasses.is_dataclass(config.channel[0])
    with pytest.raises(ValueError, match=r"download.1: the configuration has 0 links"):
        override_config({}, ["--download.1.name", "quantize"])
    refused = make_config({**TABLE, "download": [{"name": "top_k"}]})
    data = load_data(refused.data)
    with pytest.raises(ValueError, match=r"^download: top_k cannot be read at a client[^\n]*$"):
        build_from_config(refused, data)
