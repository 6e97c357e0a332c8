"""Rounds and evaluations lower for TPU and CUDA, on a machine that has neither: nothing in them asks for a CPU."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jaxfed.channels.average import mean
from jaxfed.core.channel import chain
from jaxfed.core.link import link
from jaxfed.data.bijections import BijectionKey
from jaxfed.data.device_cohorts import list_block_formats, mark_held_items, number_marked_items
from jaxfed.data.device_data import list_train_data
from jaxfed.data.device_draws import draw_block
from jaxfed.data.device_rounds import make_block_source, plan_device_round
from jaxfed.data.packing import empty_cohort
from jaxfed.training.rounds import initial_arrays, make_run_keys
from tests.laws.test_laws import AXES, COVERED, USUAL, experiment, name_of
from tests.small import KEY, MARKED, factorisation, row_cohort

pytestmark = pytest.mark.long
PLATFORMS = ("tpu", "cuda")
MODELS, WORKS = AXES["model"], COVERED["work"]
LATER = [name for name in AXES["work"] if name not in WORKS]
# every link, every pair of a model and a work of the cover; every other work with its usual neighbours
COVER = [
    {"model": MODELS[i % len(MODELS)], "work": WORKS[i // len(MODELS) % len(WORKS)], "channel": channel}
    | {"clients": AXES["clients"][i % 3 % 2], "loss": "bce", "server": "adam", "optimizer": "sgd"}
    for i, channel in enumerate(AXES["channel"])
]
COVER += [USUAL | {"work": name, "channel": "cluster_mean" if name == "clustered" else "mean"} for name in LATER]
# What StableHLO says in words of its own, for every platform; whatever else is called is a platform's own code, or a
# callback to Python on the host. None is in use today: a new one is added here with its reason.
CUSTOM_CALLS: set[str] = set()


def lowered(program, *args):
    """A jitted function's module for all platforms. Raises ValueError where one would not run it, or asks its host."""
    try:
        module = export.export(program, platforms=PLATFORMS)(*args)
    except NotImplementedError as error:  # an operation that a platform has no rule for
        raise ValueError(f"no rule: {error}") from None
    except TypeError as error:  # what JAX 0.10 makes of effects where rules differ by platform
        raise ValueError(f"an effect, such as a callback to the host: {error}") from None
    text = module.mlir_module()
    if foreign := set(re.findall(r"custom_call @([\w.$]+)", text)) - CUSTOM_CALLS:
        raise ValueError(f"calls of {', '.join(sorted(foreign))}")
    return module, text


def check_round(made):
    """The three programs of a round, with nobody in a block of the longest shape."""
    every, state = (
        empty_cohort(made.data.population, made.batching, made.shapes),
        jax.eval_shape(lambda: initial_arrays(made, 0)),
    )
    cohort = every._replace(blocks=(made.placement.block(every.blocks[-1]),))
    module, text = lowered(jax.jit(made.algorithm.step), state["state"], cohort, make_run_keys(0).rounds)
    assert all(f"@{program}" in text for program in ("run_client_block", "accumulate", "server_update"))
    assert module.nr_devices == made.placement.devices
    return text


def check_ends(made):
    """A run's first state, and an evaluation of a few clients."""
    exam = made.eval_splits["test"]._replace(who=made.eval_splits["test"].who[:3])
    examine = jax.jit(lambda shared, private, key: made.evaluator(shared, private, exam, key))
    start, best = jax.jit(lambda: initial_arrays(made, 0)), jax.eval_shape(lambda: initial_arrays(made, 0))["best"]
    lowered(start)
    lowered(examine, *best, make_run_keys(0).evaluation)


def test_the_cover_covers():
    pairs = {(case["model"], case["work"]) for case in COVER}
    assert pairs == {(model, work) for model in MODELS for work in WORKS} | {(USUAL["model"], name) for name in LATER}


@pytest.mark.parametrize("case", COVER, ids=name_of)
def test_a_round_lowers(case):
    check_round(experiment(case).made)


def test_a_draw_on_the_device_lowers():
    made = experiment(USUAL).made
    formats = list_block_formats(made.data.population, made.batching, made.shapes)
    draw = partial(draw_block, [*formats.values()][-1])
    lowered(
        jax.jit(draw),
        list_train_data(made.data.population, made.batching),
        jnp.arange(4),
        BijectionKey(jnp.uint32(1), jnp.uint32(2)),
    )
    lowered(jax.jit(mark_held_items), jnp.zeros(9, bool), jnp.arange(4))
    lowered(jax.jit(partial(number_marked_items, 5)), jnp.zeros(9, bool))


DRAWN = [{}, {"model": "sasrec"}, {"loss": "bpr"}, {"model": "fm"}]


@pytest.mark.parametrize("change", [*DRAWN, *({**each, "clients": "silo"} for each in DRAWN)], ids=str)
def test_a_program_of_many_rounds_lowers(change):
    """With rows that cohorts list, and blocks of every kind and format."""
    made = experiment(USUAL | change).made
    shapes, population = made.shapes._replace(room=16), made.data.population
    program, _ = made.algorithm.make_loops(make_block_source(population, made.batching, shapes))
    planned = plan_device_round(population, made.batching, shapes, *made.sampler.draw(0, 0), None, 0, 0)
    rounds = jax.tree.map(lambda x: jnp.stack([x, x, x]), planned)
    state = jax.eval_shape(lambda: initial_arrays(made, 0))["state"]
    lowered(
        jax.jit(lambda *args: program(32, *args)),
        state,
        list_train_data(population, made.batching),
        rounds,
        jnp.int32(2),
        make_run_keys(0).rounds,
    )


@pytest.mark.parametrize("case", COVER[: len(MODELS)], ids=name_of)
def test_the_start_and_an_evaluation_lower(case):
    check_ends(experiment(case).made)


@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_with_bfloat16_tables_on_four_devices(model):
    made = experiment(COVER[0] | {"model": model}, devices=4, table_dtype="bfloat16").made
    check_ends(made)
    text = check_round(made)
    assert '{"clients"}' in text  # blocks lie split over the devices
    assert "bf16" in text


def test_with_pmap_on_four_devices():
    check_round(experiment(COVER[0], devices=4, placement="pmap").made)


# --- the check itself: none of these may pass ----------------------------------------


def on_the_host(x):
    return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")


def printed(x):
    jax.debug.print("{}", x.sum())
    return x


def foreign(x):
    return jax.ffi.ffi_call("my_cpu_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")(x)


def eigenvalues(x):
    return x + jnp.linalg.eigvals(jnp.ones((2, 2)) + x.sum()).real.sum()


def factors(x):
    return x + jnp.linalg.qr(jnp.ones((3, 3)) + x.sum())[0].sum()


REFUSED = {
    "a callback": (on_the_host, "backend cpu is different|callback"),
    "a print": (printed, "backend cpu is different|callback"),
    "a kernel of one's own": (foreign, "custom_call @my_cpu_kernel"),
    "a call that is not on the list": (factors, "calls of"),
    "a routine of LAPACK": (eigenvalues, "no rule|calls of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_link_that_asks_for_its_host_is_refused(name):
    function, reason = REFUSED[name]
    encode = lambda update, sent, client: (jax.tree.map(function, update), client.link_state)
    algorithm = factorisation(chain(link(encode), mean()))
    args = jax.eval_shape(algorithm.init, MARKED, KEY), row_cohort(), KEY
    with pytest.raises(ValueError, match=reason):
        lowered(jax.jit(algorithm.step), *args)
