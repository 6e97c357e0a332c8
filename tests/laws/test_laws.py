"""What every algorithm that a configuration can name must do, over the whole registry.

`make test` runs a pairwise cover of the axes, `make test-all` also the full product but for the clients' optimiser.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.registry import CLOSED, REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.core.state import server_model
from jaxfed.core.tables import map_tables
from jaxfed.data.packing import pack_cohort
from jaxfed.training.rounds import make_run_keys
from tests.laws.cover import pairs, pairwise, product
from tests.small import BY_TEXT, KEY, SEQUENCES, close, same

MEANS = ("mean", "weighted_mean", "per_row_mean")
ALONE = (*MEANS, "fair", "agnostic")  # a mean by themselves
PRIVATE = {"name": "mean", "count": 20}
NEEDS = {  # what must stand before a link
    "gaussian": [PRIVATE, "clip"],
    "local_gaussian": [PRIVATE, "clip", "densify"],
    "ring": ["mean", "clip"],
    "pads": ["mean", "clip", "densify", "ring"],
    "skellam": [PRIVATE, "clip"],
    "discrete_gaussian": [PRIVATE, "clip"],
    "correlated": [PRIVATE, "clip"],
}
CHANNELS = {name: [name] if name in ALONE else [*NEEDS.get(name, ["mean"]), name] for name in REGISTRY["channel"]}
CHANNELS |= {name: [name, "mean"] for name in ("fednova", "feddyn")}
CHANNELS |= {
    "per_row_mean, clip": ["per_row_mean", "clip"],
    "per_row_mean, rotate, quantize": ["per_row_mean", "rotate", "quantize"],
    "per_row_mean, top_k": ["per_row_mean", "top_k"],
    "weighted_mean, clip, ring": ["weighted_mean", "clip", "ring"],
    "adaptive_clip, gaussian": [PRIVATE, {"name": "adaptive_clip", "count": 20}, "gaussian"],
}
CHANNELS.pop("cluster_mean")  # for the work `clustered` alone
CHANNELS |= {"plain": [], "clip, ring": ["clip", "ring"]}
CHANNELS |= {f"difference, {name}": ["difference", name] for name in MEANS[1:]}
AXES = {
    "model": [name for name in REGISTRY["model"] if name not in (*CLOSED, *BY_TEXT)],
    "loss": ["bce", "bpr", "squared"],
    "work": [name for name in REGISTRY["work"] if name != "statistics"],
    "channel": list(CHANNELS),
    "server": ["sgd", "adam", "yogi", "adagrad"],
    "optimizer": ["sgd", "adam"],  # of the clients
    "clients": ["user", "silo"],
    "laws": ["some", "all"],  # `vmaps` has programs of its own: half of the cover does without
}
CONTROLS = ("popularity", "counter")
USUAL = {axis: values[0] for axis, values in AXES.items()} | {"model": "mf"}
SUMS = {  # closed forms, on channels that are sums
    f"{name}, {channel}": {"model": name, "work": "statistics", "channel": channel, "server": "solve"}
    for name in CLOSED
    for channel in ("plain", "clip, ring")
    if channel == "plain" or name in ("ease", "ials")
}


def allowed(case):
    """Controls have a loss of their own; a server that compares clients takes a mean."""
    compares = case["work"] == "graph_guided" and case["channel"] not in MEANS
    if case["model"] in SEQUENCES and case["loss"] == "squared":
        return False
    return not compares and (case["model"] not in CONTROLS or case["loss"] == "bce")


# `make test` covers each of these values, `make test-all` all pairs; the later links meet the laws beside their usual
# neighbours
FIRST = [
    name
    for name in CHANNELS
    if name != "plain" and set(name.split(", ")) <= {*MEANS, "difference", "at_client", "at_server"}
]
COVERED = AXES | {"channel": FIRST, "work": ["local_steps", "gradient"]}
COVERED["model"] = [name for name in AXES["model"] if name not in SEQUENCES[1:]]  # one stands for what they share
COVER = pairwise(COVERED, allowed)
EACH_VALUE = pairwise(COVERED, allowed, of=1)


def pytest_generate_tests(metafunc):
    """The full product is made only where it may run: to collect it takes every worker half a minute."""
    if "full" in {mark.name for mark in metafunc.definition.iter_markers()}:
        axes = AXES | {"optimizer": ["sgd"], "laws": ["all"]}
        asked = "not full" not in metafunc.config.option.markexpr
        rest = [case for case in product(axes) if asked and allowed(case) and case not in COVER]
        metafunc.parametrize("case", COVER + rest, ids=name_of)


def name_of(case):
    return "-".join(case.values())


@functools.cache
def data(clients):
    """30 users of a synthetic catalogue, each a client or in one of 6 silos."""
    table = {"name": "synthetic", "users": 30, "items": 40, "mean_length": 5.0, "clients": clients, "silos": 6}
    return load_data(make_config({"data": table}).data), table


LOWERED = []  # grows by one for each program that is lowered


@jax.monitoring.register_event_duration_secs_listener
def _(event, duration, **_):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        LOWERED.append(event)


def experiment(case, **more):
    """A case as a user would configure it. The laws of a case share its programs: they hold whatever ran before."""
    return made_once(tuple(case.items()), tuple(more.items()))


@functools.lru_cache(maxsize=4)
def made_once(case, more):
    return make(dict(case), **dict(more))


def make(case, steps_per_block=8, devices=1, placement="jit", **model):
    """An experiment with more for its model; by default clients have one step or two, so that programs are few."""
    content, table = data(case["clients"])
    own = {} if case["model"] in CONTROLS else {"dim": 4, "loss": case["loss"]}
    if case["model"] in CLOSED:
        own = {"dim": 4} if case["model"] == "ials" else {}
    own |= {"length": 6} if case["model"] in SEQUENCES else {}
    clients = content.population.num_clients
    apart = case["model"] == "metamf" and case["loss"] == "squared"  # a product of five factors: it soon diverges
    rate = 1e-3 if apart else 0.05
    config = make_config(
        {
            "data": table,
            "model": {"name": case["model"], **own, **model},
            **({"algorithm": {"name": case["algorithm"]}} if "algorithm" in case else {}),
            "work": {
                **({} if "algorithm" in case else {"name": case["work"]}),
                "batch_size": case.get("batch", {"user": 16, "silo": 32}[case["clients"]]),
                "negatives": 2,
                "optimizer": {"name": case["optimizer"], "learning_rate": rate, "user": {"weight_decay": 0.01}},
            },
            "channel": [
                each if isinstance(each, dict) else {"name": each}
                for each in CHANNELS.get(case["channel"], [case["channel"]])
            ],
            "server": {"name": case["server"], "learning_rate": 0.5},
            "cohort": {"name": "cyclic" if "correlated" in case["channel"] else "uniform", "size": clients - 1},
            "run": {"area": steps_per_block, "devices": devices, "placement": placement},
        }
    )
    made = build_from_config(config, content)

    def cohort(t, present=None, ids=None):
        who, there = made.sampler.draw(0, t)
        who = who if ids is None else ids
        return pack_cohort(
            content.population, made.batching, made.shapes, who, there if present is None else present, 0, t
        )

    keys = make_run_keys(0)

    @functools.cache
    def first():
        return made.algorithm.init(made.model.init(keys.model), keys.memory)

    def step(state, cohort):
        before = len(LOWERED)
        after = made.algorithm.step(state, cohort, keys.rounds)
        it.programs += len(LOWERED) - before
        return after

    start = lambda: through_the_host(first())  # a step consumes its state
    it = SimpleNamespace(start=start, step=step, cohort=cohort, made=made, slots=made.sampler.slots, programs=0)
    return it


def through_the_host(state):
    """The same arrays, come from the host as those of a checkpoint do."""
    return jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), state)


def keeps_structure(case):
    """A step gives back the state it took: the same tree, shapes and dtypes; and finite numbers that moved."""
    it = experiment(case)
    state = it.start()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    before = jax.tree.map(np.asarray, (server_model(state), state.client_states[0]))
    state, info = it.step(state, it.cohort(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert int(state.round) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))
    after = jax.tree.map(np.asarray, (server_model(state), state.client_states[0]))
    moved = [(a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert any(moved)
    closed = it.made.method.closed
    if not (closed and closed.pair_columns):  # clients who send pairs of items read no model to have a loss of
        assert np.isfinite(float(info["train/loss"]))


def compiles_once(case):
    """One program a shape of block and three more (to start, add and finish), whatever cohorts come; one
    more where the server compares what clients sent. A closed form, whose messages are long, pads none to one shape: it
    has a program to add each shape of block, one to solve, and one to go a part of the way."""
    it = experiment(case)
    state = it.start()
    for t in range(3):
        state, _ = it.step(state, it.cohort(t))
    shapes, method = len(it.made.shapes.kinds), it.made.method
    of_solution = shapes + 1 + (case["model"] == "ials") if method.closed else 0
    assert 4 <= it.programs <= shapes + 3 + bool(method.compare_clients) + of_solution


def ignores_the_absent(case):
    """Clients who do not report count for nothing and keep their memory: as if they had not been asked.

    Not the links' own state: what the server knows of the number of those it asked is its business.
    """
    it = experiment(case)
    ids, _ = it.made.sampler.draw(0, 0)
    there = np.arange(it.slots) % 3 != 1
    nobody = it.made.data.population.num_clients
    some, _ = it.step(it.start(), it.cohort(0, present=there))
    never, _ = it.step(it.start(), it.cohort(0, there, np.where(there, ids, nobody)))
    close((server_model(some), some.client_states), (server_model(never), never.client_states), atol=1e-5)
    untouched = ids[~there]
    start, server_tells = (
        it.start(),
        bool(it.made.method.compare_clients),
    )  # of what it makes for all, also for those absent
    kept = [(s.client_states[0].own if server_tells else s.client_states[0], s.client_states[1]) for s in (some, start)]
    same(*(jax.tree.map(lambda x: np.asarray(x)[untouched], each) for each in kept))


def vmaps(case):
    """Clients side by side are clients one at a time."""
    one, many = experiment(case, steps_per_block=1), experiment(case)
    a, b = ((server_model(s), s.client_states) for s in (it.step(it.start(), it.cohort(0))[0] for it in (one, many)))
    # yogi and adam divide by the root of a mean of squares near zero, which magnifies the order of sums
    close(a, b, atol=2e-4 if case["server"] != "sgd" or case["optimizer"] == "adam" else 1e-5, rtol=1e-4)


def ignores_the_order_of_slots(case):
    """A cohort is a set."""
    it = experiment(case)
    ids, there = it.made.sampler.draw(0, 0)
    a = it.step(it.start(), it.cohort(0))[0]
    b = it.step(it.start(), it.cohort(0, there[::-1], ids[::-1]))[0]
    loose = case["server"] != "sgd" or case["optimizer"] == "adam"
    close(
        (server_model(a), a.client_states), (server_model(b), b.client_states), atol=2e-4 if loose else 1e-5, rtol=1e-4
    )


def resumes(case):
    """From the host and back between rounds is nothing, bit for bit."""
    it = experiment(case)
    straight, halting = it.start(), it.start()
    for t in range(3):
        straight, _ = it.step(straight, it.cohort(t))
        halting = through_the_host(halting)
        halting, _ = it.step(halting, it.cohort(t))
    same(straight, halting)


def messages(it, state, cohort):
    """{client: its rows in their order, and what it sends of every leaf} of a round, as the server gets it."""
    nobody = it.made.data.population.num_clients
    programs = it.made.algorithm.step.args[1]
    sent = {}
    for block in cohort.blocks:
        part = programs.run_client_block(state, cohort.ids, cohort.present, cohort.rows, cohort.ages, KEY, block, None)
        part = jax.tree.map(np.asarray, part)
        for place, client in enumerate(part.ids):
            if client < nobody:
                rows = np.flatnonzero(part.owner == client)
                rows = rows[np.argsort(part.held[rows])]
                own = map_tables(lambda x, rows=rows: x[rows], lambda x, place=place: x[place], part.messages)
                sent[int(client)] = part.held[rows], own
    return sent


def sends_the_same_from_any_block(case):
    """A client's message depends on nothing but the client: it has the same bits beside longer clients, whose blocks
    have more room for rows and steps, and alone. Pads are those of a cohort; at_client sums as Optax does; the compiler
    writes out a loop of one step, and fuses it otherwise, where `reconstruct` has one."""
    it = experiment(case)
    ids, _ = it.made.sampler.draw(0, 0)
    num_train, nobody = it.made.data.population.num_train, it.made.data.population.num_clients
    state = it.start()
    together = messages(it, state, it.cohort(0))
    for client in (ids[np.argmin(num_train[ids])], ids[np.argmax(num_train[ids])]):
        only = np.where(np.arange(it.slots) == 1, client, nobody)
        alone = messages(it, state, it.cohort(0, only < nobody, only))
        rounded = "at_client" in case["channel"] or case["work"] == "reconstruct"
        equal = close if rounded else same
        if "pads" not in case["channel"]:
            equal(together[int(client)], alone[int(client)])


SHARED = [keeps_structure, compiles_once, ignores_the_absent, ignores_the_order_of_slots, resumes]
LAWS = [*SHARED, vmaps]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name_of(case), marks=[] if case in EACH_VALUE else pytest.mark.full)
        for case in [*EACH_VALUE, *(each for each in COVER if each not in EACH_VALUE)]
    ],
)
def test_law(case):
    for law in LAWS if case["laws"] == "all" else SHARED:
        law(case)


@pytest.mark.parametrize("channel", [name for name in CHANNELS if name not in (*FIRST, "plain", "clip, ring")])
def test_laws_of_later_links(channel):
    for law in (*SHARED, sends_the_same_from_any_block):  # of which `vmaps` follows
        law(USUAL | {"channel": channel})


@pytest.mark.parametrize("channel", [*FIRST, "plain", "clip, ring"])
def test_a_message_is_its_clients_alone(channel):
    sends_the_same_from_any_block(USUAL | {"channel": channel})


@pytest.mark.parametrize("work", [name for name in AXES["work"] if name != "local_steps"])
def test_a_message_is_its_clients_alone_whatever_the_work(work):
    channel = "cluster_mean" if work == "clustered" else "weighted_mean"
    sends_the_same_from_any_block(USUAL | {"work": work, "channel": channel})


@pytest.mark.parametrize("law", LAWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("work", [name for name in AXES["work"] if name not in COVERED["work"]])
def test_laws_of_later_works(work, law):
    law(USUAL | {"work": work, "channel": "cluster_mean" if work == "clustered" else "weighted_mean"})


@pytest.mark.parametrize("name", ["heterofl", "fedrolex", "ptf_fedrec"])
def test_laws_of_methods_by_name(name):
    """Methods that no work spells out: whose message says which part of the model it is of, or has no parameters."""
    for law in (*LAWS, sends_the_same_from_any_block):
        law(USUAL | {"algorithm": name, "channel": "plain"})


@pytest.mark.full  # see `pytest_generate_tests`
@pytest.mark.parametrize("law", LAWS, ids=lambda f: f.__name__)
def test_every_law(case, law):
    law(case)


@pytest.mark.parametrize("law", LAWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SUMS)
def test_laws_of_closed_forms(name, law):
    law(USUAL | SUMS[name])


def test_the_cover_covers():
    every = set().union(*map(pairs, filter(allowed, product(COVERED))))
    assert set().union(*map(pairs, COVER)) == every  # so each law meets every value too: `laws` is an axis
    values = [{(axis, value) for axis, value in case.items()} for case in EACH_VALUE]
    assert set().union(*values) == {(axis, value) for axis, found in COVERED.items() for value in found}
