"""The server may hold something else than it broadcasts: rounds against the gradient of the composed model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.fedsgd import fedsgd
from jaxfed.algorithms.hierarchical import hierarchical
from jaxfed.algorithms.ifca import ifca
from jaxfed.algorithms.local_training import local_steps
from jaxfed.algorithms.scaffold import scaffold
from jaxfed.channels.average import mean, per_row_mean
from jaxfed.channels.clip import clip
from jaxfed.channels.compress import quantize
from jaxfed.channels.secure_sum import ring
from jaxfed.core.channel import at_server, chain
from jaxfed.core.download import make_download
from jaxfed.core.federate import federate
from jaxfed.core.link import link
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization, check_parametrization
from jaxfed.core.placement import make_placement
from jaxfed.core.state import server_model
from jaxfed.core.tables import Table, is_table, take_rows, unwrap
from jaxfed.core.wire import make_wire
from jaxfed.models.parametrizations import hashed_tables, low_rank_tables
from tests.small import (
    DENSE,
    DIM,
    ITEMS,
    KEY,
    MARKED,
    USERS,
    bce,
    close,
    dense_cohort,
    loss_model,
    mse,
    on_rows,
    row_cohort,
    run,
    same,
    user,
)

MODEL = Model(lambda key: MARKED, user, bce, lambda shared, private, user: jnp.zeros(ITEMS))
IDENTITY = Parametrization(lambda key: MARKED, lambda theta, rows: theta if rows is None else take_rows(theta, rows))
MADE = {"low_rank": low_rank_tables(MODEL, 2), "hashed": hashed_tables(MODEL, 23, 2, seed=5)}
ABSENT = [True, False, True, True, True, False, True, True]


def training(channel, parametrization=None, work=None, server=None, **more):
    """FedAvg of the small matrix factorisation under a parametrization."""
    method = Method(work or local_steps(MODEL, optax.sgd(0.1)), server=server or optax.sgd(1.0))
    return federate(method._replace(parametrization=parametrization), channel, USERS, **more)


CHANNELS = {
    "mean": mean,
    "per_row_mean": per_row_mean,
    "clip": lambda: chain(per_row_mean(), clip(0.05)),
    "codes": lambda: chain(per_row_mean(), quantize(4)),
    "ring": lambda: chain(mean(), clip(1.0), ring(8)),
    "trace": lambda: chain(at_server(optax.trace(0.9)), mean()),
}


@pytest.mark.parametrize("lay", [lambda cohort: cohort, on_rows], ids=["all", "rows"])
@pytest.mark.parametrize("name", CHANNELS)
def test_the_identity_written_out_gives_the_same_numbers(name, lay):
    """With a momentum at the server, and clients who do not report: rows that only these hold rest. The same bits, but
    where the compiler fuses a product and a sum in one of the two programs: one unit in the last place."""
    server = optax.sgd(0.5, momentum=0.9)
    cohort = lay(row_cohort(present=ABSENT))
    rounds = 1 if name == "codes" else 3  # a unit in the last place may change which way a number is rounded
    got, told = run(training(CHANNELS[name](), IDENTITY, server=server), cohort, rounds=rounds)
    want, info = run(training(CHANNELS[name](), server=server), cohort, rounds=rounds)
    close((got, told), (want, info), atol=1e-8, rtol=1e-6)


def test_the_identity_where_something_rides_along():
    """Control variates are of the parameters' shape, and of the rows that a round touches."""
    method = scaffold(MODEL, optax.sgd(0.1), num_clients=USERS)
    for cohort in (row_cohort(), on_rows(row_cohort())):
        got, _ = run(federate(method._replace(parametrization=IDENTITY), mean(), USERS), cohort)
        close(got, run(federate(method, mean(), USERS), cohort)[0], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_rounds_on_rows_are_rounds_on_all(name):
    """Theta has dense parts that every row of a cohort moves, and tables of which the others rest."""
    made = MADE[name]
    theta = made.init(KEY)
    algorithm = training(per_row_mean(), made)
    got, want = (run(algorithm, cohort, theta)[0] for cohort in (on_rows(row_cohort()), row_cohort()))
    close(got, want, atol=1e-6)
    assert np.abs(server_model(want, made)["item"] - unwrap(made.forward(theta, None))["item"]).max() > 1e-2


def test_noise_in_rows_that_nobody_sent_does_not_reach_what_all_rows_share():
    """On the rows of a cohort, as without a parametrization, those of absent clients rest."""
    made = MADE["low_rank"]
    theta = made.init(KEY)
    nobody = on_rows(row_cohort(present=[False] * 8))
    one_more = link(
        decode=lambda total, state, round: (jax.tree.map(lambda x: x + 1, total), state, {}), is_average=False
    )
    state, _ = run(training(one_more, made), nobody, theta, rounds=1)
    same(state.shared.params["item"], theta["item"])
    assert float(state.shared.params["scale"]) == 0.0


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_on_several_devices(kind):
    made = MADE["low_rank"]
    theta = made.init(KEY)
    for cohort in (row_cohort(), on_rows(row_cohort())):
        got, want = (
            run(training(per_row_mean(), made, placement=place), cohort, theta)[0]
            for place in (make_placement(kind, 4), None)
        )
        close(got, want, atol=1e-6)


def test_tables_of_theta_are_sharded_like_others():
    made = MADE["low_rank"]
    theta = made.init(KEY)
    placement = make_placement("jit", 4, shard_tables=True)
    state, _ = run(training(per_row_mean(), made, placement=placement), on_rows(row_cohort()), theta)
    factors = state.shared.params["item"]
    assert {x.data.shape[0] for x in factors.rows.rows.addressable_shards} == {ITEMS // 4}
    assert {x.data.shape for x in factors.basis.addressable_shards} == {(2, DIM)}
    want, _ = run(training(per_row_mean(), made), on_rows(row_cohort()), theta)
    close(server_model(state, made), server_model(want, made), atol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_tables_in_bfloat16(name):
    """Theta is stored as the tables are, rounded at random; pulled back and moved in float32."""
    half = MODEL._replace(
        init=lambda key: jax.tree.map(
            lambda x: Table(x.rows.astype(jnp.bfloat16)) if is_table(x) else x, MARKED, is_leaf=is_table
        )
    )
    make = {"low_rank": lambda m: low_rank_tables(m, 2), "hashed": lambda m: hashed_tables(m, 23, 2, seed=5)}[name]
    made = make(half)
    check_parametrization(made, half)
    theta = made.init(KEY)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), theta)
    state, _ = run(training(per_row_mean(), made), on_rows(row_cohort()), theta)
    want, _ = run(training(per_row_mean(), make(MODEL)), on_rows(row_cohort()), exact)
    assert server_model(state, made)["item"].dtype == jnp.bfloat16
    # 8 bits of mantissa, rounded in each of three rounds, on each of the factors
    close(
        server_model(state, made)["item"].astype(jnp.float32),
        server_model(want, make(MODEL))["item"],
        atol=0.05,
        rtol=0.05,
    )


def test_codes_of_the_download_are_of_what_is_broadcast():
    """Identity codes: the model's rows themselves; of all rows where clients do not show theirs."""
    made = MADE["hashed"]
    theta = made.init(KEY)
    want, _ = run(training(per_row_mean(), made), on_rows(row_cohort()), theta)
    fine = quantize(16)
    for whole in (False, True):
        download = make_download(fine, whole)
        got, _ = run(training(per_row_mean(), made, download=download), on_rows(row_cohort()), theta)
        close(server_model(got, made), server_model(want, made), atol=1e-3)  # 16 bits of each number, three rounds


@pytest.mark.parametrize("name", MADE)
def test_a_client_sends_and_receives_the_bytes_of_the_parameters(name):
    """What is broadcast has the shapes of the model's own parameters, whatever the server holds."""
    channel, sizes = chain(per_row_mean(), quantize(4)), np.array([1, 7, 40])
    method = Method(local_steps(MODEL, optax.sgd(0.1)), parametrization=MADE[name])
    shapes = jax.eval_shape(lambda: MADE[name].forward(MADE[name].init(KEY), None))
    wires = [make_wire(channel, method.work.init(params, KEY)[0]) for params in (MARKED, shapes)]
    for ours, plain in ((wires[1].up, wires[0].up), (wires[1].down, wires[0].down)):
        np.testing.assert_array_equal(ours(sizes), plain(sizes))


# --- refused in one line ----------------------------------------


def changed(forward):
    return IDENTITY._replace(forward=forward)


WRONG = {
    "unmarked": (changed(lambda theta, rows: unwrap(IDENTITY.forward(theta, rows))), "of 2 rows"),
    "all rows": (changed(lambda theta, rows: theta), r"of 2 rows: \['bias'\].rows is float32\[60\]"),
    "other tables": (
        Parametrization(
            lambda key: {"t": Table(jnp.zeros(7)), "all": MARKED},
            lambda theta, rows: IDENTITY.forward(theta["all"], rows),
        ),
        "tables of different lengths",
    ),
    "short tables": (
        Parametrization(
            lambda key: Table(jnp.zeros(7)),
            lambda theta, rows: IDENTITY.forward(MARKED, rows),
        ),
        "its tables have 7 rows, those of the model 60",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_are_not_those_asked_for_are_refused(name):
    made, said = WRONG[name]
    with pytest.raises(ValueError, match=said) as error:
        training(mean(), made).init(made.init(KEY), KEY)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=said):
        check_parametrization(made, MODEL)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"item": Table(jnp.zeros((ITEMS, DIM + 1)))}, r"\['item'\].* is float32\[60, 5\] where float32\[60, 4\]"),
        ({"item": Table(jnp.zeros((ITEMS, DIM), jnp.bfloat16))}, r"bfloat16\[60, 4\] where float32\[60, 4\]"),
        ({"scale": jnp.ones(2)}, r"\['scale'\] is float32\[2\] where float32\[\]"),
        ({"more": jnp.ones(2)}, r"\['more'\] is float32\[2\] where nothing"),
    ],
)
def test_what_is_not_the_model_is_refused(other, said):
    made = changed(lambda theta, rows: IDENTITY.forward(theta | other, rows))
    with pytest.raises(ValueError, match=said) as error:
        check_parametrization(made, MODEL)
    assert "\n" not in str(error.value)


def test_what_keeps_several_models_is_refused():
    method = ifca(MODEL, optax.sgd(0.1), clusters=2)._replace(parametrization=IDENTITY)
    with pytest.raises(ValueError, match="several models at the server"):
        federate(method, link(), USERS).init(MARKED, KEY)
    with pytest.raises(ValueError, match="of a parametrization the server keeps none"):
        training(mean(), IDENTITY, history_length=2)
    one = Method(local_steps(MODEL, optax.sgd(0.1)), parametrization=IDENTITY)
    with pytest.raises(ValueError, match="server.edges"):
        hierarchical(one, mean(), USERS, edge=np.arange(USERS) % 2)


def test_a_model_without_tables_may_be_parametrized_by_hand():
    """theta = w / 2: a step of the gradient of theta is twice that of w, so four times as long."""
    half = Parametrization(lambda key: DENSE, lambda theta, rows: jax.tree.map(lambda x: 2 * x, theta))
    start = jax.tree.map(lambda x: x / 2, DENSE)

    def stepped(parametrization, rate, params):
        method = fedsgd(loss_model(mse), optax.sgd(0.1))._replace(
            server=optax.sgd(rate), parametrization=parametrization
        )
        return server_model(run(federate(method, mean(), 12), dense_cohort(), params)[0], parametrization)

    close(stepped(half, 0.05, start), stepped(None, 0.2, DENSE))
