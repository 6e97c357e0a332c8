"""The boundary between a client and the server is one of functions: each could run where its name says."""

import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.channels.average import mean
from jaxfed.channels.clip import clip
from jaxfed.core import client as client_side
from jaxfed.core.aggregate import sum_messages
from jaxfed.core.channel import at_server, chain
from jaxfed.core.client import ClientDownload, ClientInput, PublicRound, client_round, client_view, open_message
from jaxfed.core.federate import federate
from jaxfed.core.link import broadcast_state
from jaxfed.core.method import Method
from jaxfed.core.server import server_round
from jaxfed.core.state import server_model
from jaxfed.core.streams import CLIENTS
from jaxfed.core.tables import Table, gather_client, take_rows
from jaxfed.core.types import Messages, RoundView
from jaxfed.core.wire import unpack_message
from tests.core.client_process import CHANNELS, client_work
from tests.small import ITEMS, KEY, MARKED, USERS, WHO, close, factorisation, row_block, row_cohort, run, same

ROOT = Path(__file__).parents[2]


def test_a_client_is_given_nothing_of_others_of_the_model_or_of_the_past(monkeypatch):
    """In the simulator itself: no argument of `client_round` has an axis of all clients, of all items, or of versions
    of the model; who was asked is all that it knows of others. The server has a momentum, which stays there."""
    seen = []

    def spy(work, channel, received, own, public, key):
        seen.append((received, own._replace(data=()), public))
        return client_round(work, channel, received, own, public, key)

    monkeypatch.setattr(client_side, "client_round", spy)
    blocks = [row_block([slot], steps=9) for slot in range(8)]
    cohort = row_cohort()._replace(blocks=tuple(blocks), ages=np.zeros(8, np.int32))
    channel = chain(mean(), clip(1.0), at_server(optax.trace(0.9)))
    algorithm = factorisation(channel, server=optax.sgd(1.0, momentum=0.9), history_length=3)
    run(algorithm, cohort, rounds=1)
    (received, own, public), *_ = seen
    width = blocks[0].rows.shape[1]
    assert width not in (ITEMS, USERS, 3)
    arrays = jax.tree.leaves((received, own, public.key))
    axes = {size for x in arrays if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for size in x.shape}
    assert width in axes
    assert not axes & {ITEMS, USERS, len(WHO)}
    assert public.cohort.shape == (len(WHO),)
    assert not jax.tree.leaves(received.links)  # the trace of at_server is not broadcast
    assert jax.tree.structure(own.state.work) == jax.tree.structure({"user": 0})


def rounds_apart(name, folder, state, channel, key):
    """The messages of a round as the server has them, each client in a process that knows its own part alone."""
    broadcast, links = state.shared, broadcast_state(channel, state.channel)
    block, opened, rows, counts = row_block(range(8)), [], [], []
    public = PublicRound(key, np.array(WHO, np.int32), ITEMS)
    started = []
    for slot, who in enumerate(WHO):
        held = block.rows[slot]
        received = ClientDownload(take_rows(broadcast, held), take_rows(links, held))
        kept = gather_client(state.client_states, jnp.int32(who), held)
        data = jax.tree.map(lambda x, slot=slot: x[slot], block.data)
        own = ClientInput(np.int32(who), kept, held, block.num_train[slot], data)
        own_key = jax.random.fold_in(jax.random.fold_in(key, CLIENTS), who)
        asked = jax.tree.map(np.asarray, (received, own, public._replace(key=jax.random.key_data(key))))
        source, target = folder / f"{slot}.in", folder / f"{slot}.out"
        source.write_bytes(pickle.dumps((*asked, np.asarray(jax.random.key_data(own_key)))))
        words = [sys.executable, "-m", "tests.core.client_process", name, str(source), str(target)]
        started.append((subprocess.Popen(words, cwd=ROOT), target, received, own))
    for process, target, received, own in started:
        assert process.wait(300) == 0
        data, facts = pickle.loads(target.read_bytes())
        assert facts["is_finite"]
        like = jax.eval_shape(lambda r=received, o=own: client_round(client_work(), channel, r, o, public, KEY).message)
        count = int((own.rows < ITEMS).sum())
        message, ids = unpack_message(data, like, count, ITEMS)
        np.testing.assert_array_equal(ids, own.rows[:count])
        view = client_view(own, public)._replace(link_state=None, rows=jnp.asarray(ids), weight=facts["weight"])
        links = jax.tree.map(lambda x: x, received.links)
        message, is_finite = open_message(channel, jax.tree.map(jnp.asarray, message), links, view)
        assert is_finite
        opened.append(message)
        rows.append(ids)
        counts.append(count)
    together = lambda *x: jnp.concatenate([each.rows if isinstance(each, Table) else each[None] for each in x])
    stacked = jax.tree.map(
        lambda *x: Table(together(*x)) if isinstance(x[0], Table) else together(*x),
        *opened,
        is_leaf=lambda node: isinstance(node, Table),
    )
    held = jnp.concatenate(rows)
    who = jnp.arange(8)
    return Messages(stacked, (), jnp.ones(8, bool), jnp.array(counts), who, who, held, held, held, {})


@pytest.mark.parametrize("name", CHANNELS)
def test_a_round_with_each_client_in_a_process_of_its_own(name, tmp_path):
    """Messages go through the packer: bits where they are integers, and 1e-6 where floats are summed in another
    order."""
    channel = CHANNELS[name]()
    method = Method(client_work())
    algorithm = federate(method, channel, USERS)
    state = algorithm.init(MARKED, KEY)
    key = jax.random.fold_in(KEY, 0)
    messages = rounds_apart(name, tmp_path, state, channel, key)
    view = RoundView(key, jnp.array(WHO, jnp.int32), jnp.ones(8, bool))
    aggregate = sum_messages(messages, ITEMS)
    moves, _ = server_round(method, channel, state.shared, state.opt, state.channel, aggregate, view)
    got = optax.apply_updates(state.shared.params, moves.delta)
    want, _ = algorithm.step(state, row_cohort(), KEY)
    if name == "integers":
        same(got, want.shared.params)
    else:
        close(got, want.shared.params, atol=1e-6)
    assert np.abs(np.asarray(server_model(want)["item"]) - np.asarray(MARKED["item"].rows)).max() > 1e-3
