"""Channels: chains, conflicts, what crosses the wire, and the links' known values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import mean, per_row_mean, weighted_mean
from jaxfed.channels.clip import clip
from jaxfed.channels.compress import quantize
from jaxfed.channels.difference import difference
from jaxfed.channels.noise import gaussian
from jaxfed.channels.robust import median
from jaxfed.channels.sparse import top_k
from jaxfed.core.aggregate import SUM, gather_then
from jaxfed.core.channel import at_client, at_server, chain
from jaxfed.core.federate import federate
from jaxfed.core.link import link
from jaxfed.core.method import Method
from jaxfed.core.state import server_model
from jaxfed.core.types import Broadcast
from jaxfed.core.wire import make_wire
from tests.small import (
    DENSE,
    DIM,
    ITEMS,
    KEY,
    MARKED,
    PLAIN,
    USERS,
    WHO,
    D,
    bce,
    close,
    factorisation,
    loss_model,
    row_cohort,
    run,
    same,
    user,
)


def middle(part, size):
    """Another reduction than the sum: the coordinate-wise median of leaves that are no tables."""
    here = lambda x: part.present.reshape((-1,) + (1,) * (x.ndim - 1))
    return jax.tree.map(lambda x: jnp.nanmedian(jnp.where(here(x), x, jnp.nan), 0), part.messages)


def test_chain_encodes_left_to_right_and_decodes_right_to_left():
    def tagged(name, factor):
        return link(
            lambda u, sent, c: (jax.tree.map(lambda x: x * factor + 1, u), c.link_state),
            lambda t, s, r: (jax.tree.map(lambda x: x / factor, t), s, {name: jnp.float32(0)}),
            is_average=False,
        )

    path = chain(tagged("a", 2.0), tagged("b", 3.0))
    state, link_state = path.init({"w": jnp.ones(())})
    from jaxfed.core.channel_checks import shape_client

    message, _ = path.encode({"w": jnp.float32(1)}, path.broadcast(state), shape_client(link_state, 0, 0))
    assert float(message["w"]) == (1 * 2 + 1) * 3 + 1
    from jaxfed.core.types import RoundView

    back, _, info = path.decode(
        {"w": jnp.float32(12)}, state, RoundView(jax.random.key(0), jnp.arange(1), jnp.ones(1, bool))
    )
    assert float(back["w"]) == 12 / 3 / 2
    assert list(info) == ["b", "a"]


def test_two_reductions_are_refused_when_the_chain_is_made():
    ring = link(aggregator=SUM, name="ring")
    robust = link(aggregator=gather_then(middle), name="middle")
    for links in ((mean(), ring, robust), (chain(mean(), ring), robust)):
        with pytest.raises(ValueError, match=r"^links need different reductions \(ring, middle\): keep one of them$"):
            chain(*links)
    assert chain(chain(mean(), ring), ring).aggregator is SUM


def test_a_reduction_of_ones_own_replaces_the_sum():
    from tests.core.test_federate import linear
    from tests.small import IDS, X, Y, dense_cohort

    x = X.at[3].set(1e4)  # one client far off
    cohort = dense_cohort(xy=(x, Y))
    honest = run(linear(link(aggregator=gather_then(middle))), dense_cohort(IDS[1:]), DENSE, 1)[0]
    robust = run(linear(link(aggregator=gather_then(middle))), cohort, DENSE, 1)[0]
    averaged = run(linear(mean()), cohort, DENSE, 1)[0]
    far = lambda state: float(jnp.abs(server_model(state)["w"] - server_model(honest)["w"]).max())
    assert far(robust) < 1 < far(averaged) or not np.isfinite(far(averaged))


NEUTRAL = {
    "chain of one": lambda: chain(mean()),
    "chains nest": lambda: chain(chain(link()), chain(mean(), link())),
    "activity is examples here": lambda: weighted_mean("activity"),
    "at_client identity": lambda: chain(at_client(optax.identity()), mean()),
    "at_server identity": lambda: chain(at_server(optax.identity()), mean()),
    "clip far away": lambda: chain(at_client(optax.clip_by_global_norm(1e9)), mean()),
    "trace of nothing": lambda: chain(at_server(optax.trace(0.0)), mean()),
    "weights to the power 0": lambda: weighted_mean("examples", 0.0),
    "uniform weights": lambda: weighted_mean("uniform"),
    "difference": lambda: chain(difference(), mean()),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_channels_are_the_mean(name):
    want = run(factorisation(weighted_mean() if "activity" in name else mean()), row_cohort())[0]
    close(server_model(run(factorisation(NEUTRAL[name]()), row_cohort())[0]), server_model(want), atol=1e-5)


def test_at_client_clips_the_norm_of_the_dense_update():
    """A slice's norm is the norm of the whole table's update: the rest of it is zero."""
    channel = lambda: chain(at_client(optax.clip_by_global_norm(0.05)), mean())
    close(*(server_model(run(factorisation(channel()), row_cohort(whole))[0]) for whole in (False, True)))
    one = np.arange(8) == 0
    moved = server_model(run(factorisation(channel()), row_cohort(present=one), rounds=1)[0])
    norm = optax.tree.norm(jax.tree.map(jnp.subtract, moved, PLAIN))
    np.testing.assert_allclose(norm, 0.05, rtol=1e-5)


def test_at_server_momentum_is_a_server_with_momentum():
    close(
        server_model(run(factorisation(chain(at_server(optax.trace(0.9)), mean())), row_cohort())[0]),
        server_model(run(factorisation(mean(), server=optax.sgd(1.0, momentum=0.9)), row_cohort())[0]),
    )


def test_weights_that_are_not_there():
    with pytest.raises(ValueError, match="choose one of examples, activity, uniform"):
        weighted_mean("size")


def test_rows_that_nobody_holds_stay_put_under_per_row_mean():
    from tests.small import DATA, WHO

    held = np.unique(np.concatenate([DATA[c][0] for c in WHO]))
    free = np.setdiff1d(np.arange(ITEMS), held)
    got = server_model(run(factorisation(per_row_mean()), row_cohort())[0])["item"]
    same(got[free], PLAIN["item"][free])
    assert np.abs(got[held] - PLAIN["item"][held]).max(1).min() > 0


def price(channel, shared, rows):
    """(bytes up, bytes down, what the server sees) of a client with so many rows."""
    of = make_wire(channel, shared)
    return int(of.up(rows)), int(of.down(rows)), of.sees


def test_wire():
    rows, shared = 10, Broadcast(MARKED)
    mine = 4 * (rows * DIM + rows + 1)
    ids = 4 * rows
    assert price(mean(), shared, rows) == (mine + ids, mine + ids, "update+rows")
    assert price(weighted_mean(), shared, rows) == (mine + 4 + ids, mine + ids, "update+rows")
    assert price(per_row_mean(), shared, rows) == (mine + 4 * rows + 4 + ids, mine + ids, "update+rows")
    # the last aggregate comes down, a one for each row and for the client goes up
    assert price(chain(difference(), mean()), shared, rows) == (
        mine + 4 * rows + 4 + ids,
        2 * mine + ids,
        "update+rows",
    )
    assert price(mean(), Broadcast(DENSE), 0) == (4 * (D + 1), 4 * (D + 1), "update")


def test_what_the_server_sees_follows_from_the_chain():
    hidden = chain(link(lambda u, sent, c: (u, c.link_state), reveals="sum"), mean())
    assert make_wire(hidden, Broadcast(DENSE)).sees == "sum"
    back = lambda total, state, round: (Broadcast(MARKED), state, {})
    flat = link(lambda u, sent, c: (jnp.zeros((c.size, DIM)), c.link_state), back, is_average=False, reveals="sum")
    dense = 4 * (ITEMS * DIM + ITEMS + 1)
    # an upload that hides its rows is worth nothing after a request for them: the whole table comes down
    assert price(flat, Broadcast(MARKED), 10) == (4 * ITEMS * DIM, dense, "sum")
    # and a sum that hides who holds what is one of whole tables, without ids
    assert price(link(reveals="sum"), Broadcast(MARKED), 10) == (dense, dense, "sum")


# --- links of one's own that cannot be: one line that names the link ----------------------------------------


def changed(tree, by):
    return jax.tree.map(by, tree)


WRONG = {
    "one row of every table": (
        link(lambda u, sent, c: (changed(u, lambda x: x[:1] if x.ndim else x), c.link_state), name="short"),
        r"short: encode made a table of \(1,\) out of 60 rows",
    ),
    "no link state": (link(lambda u, sent, c: u, name="forgets"), r"forgets: encode gave back Broadcast, not the pair"),
    "another link state": (
        link(lambda u, sent, c: (u, jnp.zeros(3)), name="keeps"),
        "keeps: encode gave back a link state of another shape than init",
    ),
    "a shape that nothing undoes": (
        link(lambda u, sent, c: (u._replace(params={"scale": u.params["scale"]}), c.link_state), name="drops"),
        "drops: encode changes the shape of a message .* and nothing undoes it",
    ),
    "half of a decode": (
        link(decode=lambda total, state, round: (total.params["scale"], state, {}), is_average=False, name="loses"),
        r"loses: decode gave back \(\) for an update of",
    ),
    "no state": (
        link(decode=lambda total, state, round: (total, {}), is_average=False, name="pair"),
        "pair: decode gave back something",
    ),
    "another state": (
        link(decode=lambda total, state, round: (total, jnp.zeros(2), {}), is_average=False, name="grows"),
        "grows: decode gave back a state of another shape",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_link_that_does_not_keep_to_the_form_is_refused_by_name(name):
    wrong, message = WRONG[name]
    algorithm = federate(Method(local_steps(loss_model(bce, user), optax.sgd(0.1))), chain(wrong, mean()), USERS)
    with pytest.raises(ValueError, match=message) as error:
        algorithm.init(MARKED, KEY)
    assert "\n" not in str(error.value)


AFTER_CODES = {
    "noise on what codes meant": lambda: chain(mean(8), clip(1.0), top_k(0.5, keep_error=False), gaussian()),
    "a server's transform": lambda: chain(mean(), quantize(), at_server(optax.clip_by_global_norm(1.0))),
    "a robust rule": lambda: chain(mean(), quantize(), median()),
    "a server's state": lambda: chain(mean(), top_k(0.5), at_server(optax.trace(0.9))),
}


@pytest.mark.parametrize("name", AFTER_CODES)
def test_a_link_after_codes_is_given_what_they_meant(name):
    """At the server codes are read before the sum: what comes to the right of them sees updates, and so does its
    state."""
    state, _ = run(factorisation(AFTER_CODES[name]()), row_cohort(), rounds=2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(server_model(state)))


def test_a_decode_that_cannot_read_its_sum_is_named_in_one_line():
    wrong = link(
        decode=lambda total, state, round: (jax.tree.map(jnp.add, total, state), state, {}),
        init=lambda example: ({"other": jnp.zeros(3)}, ()),
        is_average=False,
        name="stranger",
    )
    algorithm = federate(Method(local_steps(loss_model(bce, user), optax.sgd(0.1))), chain(wrong, mean()), USERS)
    with pytest.raises(ValueError, match="stranger: decode cannot read a sum of") as error:
        algorithm.init(MARKED, KEY)
    assert "\n" not in str(error.value)


def test_no_link_sees_padding():
    """A link that writes on all of its rows, and one after it that looks at them: those that nobody holds are zero."""
    seen = []

    def ones(update, sent, client):
        return changed(update, lambda x: x + 1), client.link_state

    def look(update, sent, client):
        table = update.params["item"].rows
        jax.debug.callback(lambda x, held: seen.append((x[~held], x[held])), table, client.held)
        return update, client.link_state

    run(factorisation(chain(mean(), link(ones), link(look))), row_cohort(), rounds=1)
    jax.effects_barrier()
    assert len(seen) == len(WHO)
    assert any(len(padding) for padding, _ in seen)
    for padding, held in seen:
        assert (padding == 0).all()
        assert (held != 0).any()
