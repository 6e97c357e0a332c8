"""Every device adds what its own clients send, and all devices meet once a round, however many blocks it has."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from jaxfed.channels.average import mean, per_row_mean
from jaxfed.channels.robust import median
from jaxfed.channels.secure_sum import ring
from jaxfed.core import tree
from jaxfed.core.channel import chain
from jaxfed.core.link import link
from jaxfed.core.placement import make_placement
from jaxfed.core.state import server_model
from tests.small import KEY, MARKED, close, factorisation, on_rows, row_block, row_cohort, run

DEVICES = 8
BLOCKS = (range(8), [8] * 8, [8] * 8, [8] * 8)  # eight clients, and blocks of empty places
COLLECTIVES = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
DTYPES = 3  # of float, int and bool: an all-reduce has arrays of one


def laid_out(on, blocks, listed):
    cohort = row_cohort()._replace(blocks=tuple(map(row_block, blocks)))
    cohort = on_rows(cohort) if listed else cohort
    return cohort._replace(blocks=tuple(map(on.block, cohort.blocks)))


def collectives(channel, blocks, listed):
    """How often the devices meet in a round, by the kind of operation."""
    on = make_placement("jit", DEVICES)
    algorithm = factorisation(channel, placement=on)
    state = algorithm.init(MARKED, KEY)
    program = jax.jit(algorithm.step).lower(state, laid_out(on, blocks, listed), KEY)
    return Counter(re.findall(COLLECTIVES, program.compile().as_text()))


@pytest.mark.optimised  # operations of one dtype are made one
@pytest.mark.parametrize("listed", [False, True], ids=["all rows", "rows of the cohort"])
@pytest.mark.parametrize(
    "channel", [per_row_mean, lambda: chain(mean(), ring(slots=8, bound=8.0))], ids=["floats", "integers"]
)
def test_devices_meet_once_a_round(channel, listed):
    one, four = (collectives(channel(), blocks, listed) for blocks in (BLOCKS[:1], BLOCKS))
    assert one == four
    assert set(four) == {"all-reduce"}
    assert four["all-reduce"] <= DTYPES


def feedback(update, sent, client):
    kept = jax.tree.map(jnp.add, update, client.link_state)
    return jax.tree.map(jnp.round, kept), jax.tree.map(lambda x: x - jnp.round(x), kept)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_what_clients_keep_is_the_same_on_any_devices(listed, on_host):
    """Leaves and tables that clients keep, of blocks that the devices divide."""
    channel = chain(link(feedback, init=lambda example: ((), tree.zeros_like(example))), mean())
    runs = []
    for devices in (1, DEVICES):
        on = make_placement("jit", devices)
        algorithm = factorisation(channel, placement=on, store_on_host=on_host)
        runs.append(run(algorithm, laid_out(on, BLOCKS[:2], listed)))
    (want, told), (got, info) = runs
    close((server_model(got), got.client_states, info), (server_model(want), want.client_states, told))


def test_a_block_that_does_not_divide_is_refused():
    algorithm = factorisation(mean(), placement=make_placement("jit", DEVICES))
    with pytest.raises(ValueError, match="of 3 places does not divide among 8 devices"):
        algorithm.step(algorithm.init(MARKED, KEY), row_cohort()._replace(blocks=(row_block(range(3)),)), KEY)


def test_a_reduction_of_its_own_reads_the_messages_of_all_devices():
    on = make_placement("jit", DEVICES)
    want, _ = run(factorisation(median()), laid_out(make_placement(), BLOCKS, True))
    got, _ = run(factorisation(median(), placement=on), laid_out(on, BLOCKS, True))
    close(server_model(got), server_model(want))
