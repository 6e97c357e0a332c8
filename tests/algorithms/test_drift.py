"""Methods against drift and for fairness: neighbours at their neutral setting, and the papers' equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.agnostic import agnostic_mean
from jaxfed.algorithms.feddyn import feddyn as feddyn_method
from jaxfed.algorithms.fednova import normalize_steps
from jaxfed.algorithms.local_training import local_steps
from jaxfed.algorithms.mime import mime as mime_method
from jaxfed.algorithms.qfedavg import fair_mean
from jaxfed.algorithms.scaffold import scaffold as scaffold_method
from jaxfed.channels.average import mean, per_row_mean, weighted_mean
from jaxfed.channels.difference import difference
from jaxfed.channels.robust import median
from jaxfed.channels.staleness import staleness
from jaxfed.core.channel import chain
from jaxfed.core.channel_checks import shape_client
from jaxfed.core.client_work import Batches
from jaxfed.core.federate import federate
from jaxfed.core.method import Method
from jaxfed.core.state import server_model
from jaxfed.core.tables import Table
from jaxfed.core.types import Block, Broadcast, Cohort, Mean, Summed
from tests.named import agnostic_fedavg, feddyn, fednova, fedprox, fedsgd, mime, qfedavg, scaffold
from tests.named import fedavg as plain_fedavg
from tests.small import (
    DATA,
    DENSE,
    IDS,
    KEY,
    MARKED,
    USERS,
    WHO,
    N,
    S,
    X,
    Y,
    bce,
    close,
    dense_cohort,
    loss_model,  # fmt: skip
    mse,
    row_cohort,
    run,
    user,
)

RATE = 0.05
SGD = optax.sgd(RATE)


def slope(p, x, y):
    """The gradient of the mean squared error of a linear model, in NumPy."""
    gap = 2 * (x @ p[:-1] + p[-1] - y) / y.size
    return np.append(x.T @ gap, gap.sum())


def flat(params):
    return np.append(np.asarray(params["w"], np.float64), float(params["b"]))


XS, YS = np.asarray(X, np.float64), np.asarray(Y, np.float64)
ROWS = {  # on tables with private vectors, every method beside FedAvg at the setting where it says the same
    "fedprox, mu 0": (fedprox(bce, SGD, USERS, 0.0, mean(), user), mean()),
    "q-FedAvg, q 0": (qfedavg(bce, SGD, USERS, 0.0, RATE, user), mean()),
    "agnostic, one group": (agnostic_fedavg(bce, SGD, USERS, [1, 2], 1, 0.5, user), weighted_mean()),
    "mimelite, sgd": (mime(bce, SGD, USERS, False, mean(), user), mean()),
    "feddyn's clients, strength 0": (
        federate(
            feddyn_method(loss_model(bce, user), SGD, strength=0.0, num_clients=1)._replace(links=()), mean(), USERS
        ),
        mean(),
    ),
    "scaffold, nobody's variate moves c": (
        federate(scaffold_method(loss_model(bce, user), SGD, num_clients=1 << 30), mean(), USERS),
        mean(),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_at_its_neutral_setting_each_is_its_neighbour(name):
    made, channel = ROWS[name]
    rounds = 1 if "scaffold" in name else 3  # from the second round on c_i acts
    got, _ = run(made, row_cohort(), MARKED, rounds)
    want, _ = run(
        federate(Method(local_steps(loss_model(bce, user), SGD)), channel, USERS), row_cohort(), MARKED, rounds
    )
    close(server_model(got), server_model(want), atol=1e-5)


def test_the_pull_of_fedprox_by_hand():
    """Two steps of one client: the second gradient has mu (y - x) beside it."""
    ids, mu = [3], 0.7
    got, _ = run(fedprox(mse, SGD, N, mu), dense_cohort(ids, xy=(X[:, :2], Y[:, :2])), DENSE, 1)
    start = y = flat(DENSE)
    for s in range(2):
        y = y - RATE * (slope(y, XS[3, s], YS[3, s]) + mu * (y - start))
    np.testing.assert_allclose(flat(server_model(got)), y, rtol=1e-5)


@pytest.mark.parametrize("by_row", [True, False])
def test_a_strong_pull_holds_clients_where_they_started(by_row):
    def distance(mu):
        work = local_steps(loss_model(bce, user), optax.sgd(0.01), by_row=by_row, proximal=mu)
        state, _ = run(federate(Method(work), mean(), USERS), row_cohort(), rounds=1)
        return float(optax.tree.norm(jax.tree.map(jnp.subtract, server_model(state), server_model(run_start()))))

    assert distance(50.0) < 0.9 * distance(0.0)


def run_start():
    return federate(Method(local_steps(loss_model(bce, user), SGD)), mean(), USERS).init(MARKED, KEY)


def test_scaffold_is_that_of_the_paper():
    """Algorithm 1 with option II, two rounds of different cohorts, in NumPy."""
    cohorts = [IDS, np.array([3, 5, 7, 9, 0, 11])]
    share = len(IDS) / N
    algorithm, x, c, own = scaffold(mse, SGD, N), flat(DENSE), np.zeros(6), np.zeros((N, 6))
    state = algorithm.init(DENSE, KEY)
    for ids in cohorts:
        state, _ = algorithm.step(state, dense_cohort(ids), KEY)
        moves, changes = [], []
        for i in ids:
            y = x
            for s in range(S):
                y = y - RATE * (slope(y, XS[i, s], YS[i, s]) - own[i] + c)
            now = own[i] - c + (x - y) / (S * RATE)
            moves.append(y - x)
            changes.append(now - own[i])
            own[i] = now
        x, c = x + np.mean(moves, 0), c + share * np.mean(changes, 0)
    np.testing.assert_allclose(flat(server_model(state)), x, rtol=2e-5)
    np.testing.assert_allclose(flat(state.shared.extra.mean), c, rtol=2e-5, atol=1e-6)
    kept = state.client_states[0].variate
    np.testing.assert_allclose(np.c_[kept["w"], kept["b"]], own, rtol=2e-5, atol=1e-6)


def test_scaffold_goes_to_the_optimum_where_fedavg_stops_short():
    """Steps on all data of clients that differ: drift moves the fixed point of FedAvg, not that of SCAFFOLD."""
    again = [jnp.repeat(z.reshape(N, 1, -1, *z.shape[3:]), S, 1) for z in (X, Y)]
    x = np.concatenate([XS.reshape(-1, XS.shape[-1]), np.ones((YS.size, 1))], 1)
    best = np.linalg.lstsq(x, YS.ravel(), rcond=None)[0]

    def gap(algorithm):
        state, _ = run(algorithm, dense_cohort(range(N), xy=again), DENSE, 300)
        return np.abs(flat(server_model(state)) - best).max()

    assert gap(scaffold(mse, SGD, N)) < 1e-4 < 0.1 * gap(plain_fedavg(mse, SGD, N))


def test_feddyn_is_that_of_the_paper():
    """Algorithm 1 of Acar et al. with local SGD, two cohorts, in NumPy."""
    cohorts, alpha = [IDS, np.array([3, 5, 7, 9, 0, 11])], 0.3
    algorithm = feddyn(mse, SGD, N, alpha)
    state, theta, h, own = algorithm.init(DENSE, KEY), flat(DENSE), np.zeros(6), np.zeros((N, 6))
    for ids in cohorts:
        state, _ = algorithm.step(state, dense_cohort(ids), KEY)
        ends = []
        for i in ids:
            y = theta
            for s in range(S):
                y = y - RATE * (slope(y, XS[i, s], YS[i, s]) - own[i] + alpha * (y - theta))
            own[i] = own[i] - alpha * (y - theta)
            ends.append(y)
        h = h - alpha / N * np.sum(np.array(ends) - theta, 0)
        theta = np.mean(ends, 0) - h / alpha
    np.testing.assert_allclose(flat(server_model(state)), theta, rtol=2e-5)


# --- who takes part: drop-outs, Poisson cohorts, and rows that others hold in every round ----------------------------

EIGHT = 8


def steepness_one(params, private, batch):
    """A loss whose gradient is 1 everywhere."""
    return Mean(jnp.sum(params["t"] * batch[1]), jnp.sum(batch[1]))


def clients_of_one_step(ids, present, rows):
    """A cohort whose clients, of EIGHT, take a step on the rows [clients, k] of a table of as many."""
    ids, rows = np.asarray(ids, np.int32), np.asarray(rows, np.int32)
    m, k = rows.shape
    places, examples = np.tile(np.arange(k, dtype=np.int32), (m, 1, 1)), np.full(m, float(k), np.float32)
    steps = Batches(places, np.ones((m, 1), bool), (places, np.ones((m, 1, k), np.float32)), examples)
    block = Block(np.arange(m, dtype=np.int32), rows, examples, steps)
    return Cohort(ids, np.asarray(present, bool), (block,))


def variate_of(cohorts, channel):
    """SCAFFOLD's c of row 0 after some cohorts, and its model's way since."""
    method = scaffold_method(loss_model(steepness_one), optax.sgd(0.1), num_clients=EIGHT, by_row=True)
    algorithm = federate(method, channel, EIGHT)
    state = algorithm.init({"t": Table(jnp.zeros(EIGHT))}, KEY)
    for cohort in cohorts:
        state, _ = algorithm.step(state, cohort, KEY)
    return state


@pytest.mark.parametrize("channel", [mean(), per_row_mean(), chain(difference(), mean()), median()])
def test_the_variate_of_all_is_the_mean_of_the_clients_whoever_drops_out(channel):
    """All eight are asked, every other one reports, in turn: after four rounds each c_i is 1, and so is c."""
    cohorts = [clients_of_one_step(range(8), np.arange(8) % 2 == t % 2, [[0]] * 8) for t in range(4)]
    state = variate_of(cohorts, channel)
    np.testing.assert_allclose(state.client_states[0].variate["t"].rows[:, 0], 1.0, rtol=1e-6)
    assert float(state.shared.extra.mean["t"].rows[0]) == pytest.approx(1.0, rel=1e-6)
    assert float(state.shared.extra.holders.rows[0]) == 8


@pytest.mark.parametrize("channel", [mean(), per_row_mean(), weighted_mean()])
def test_the_variate_of_a_row_is_the_mean_over_those_who_ever_held_it(channel):
    """Two of eight clients hold row 0 in each round, others each time, and all others hold a row that nobody shares.
    The mean over the holders of a round, gathered, would come to four."""
    rows = [[[0 if i // 2 == t else max(i, 1)] for i in range(8)] for t in range(4)]
    cohorts = [clients_of_one_step(range(8), np.ones(8), each) for each in rows]
    for rounds in (1, 4):
        state = variate_of(cohorts[:rounds], channel)
        assert float(state.shared.extra.mean["t"].rows[0]) == pytest.approx(1.0, rel=1e-6)
        assert float(state.shared.extra.holders.rows[0]) == 2 * rounds


@pytest.mark.parametrize("link", [staleness(), normalize_steps()])
def test_links_that_scale_an_update_leave_what_is_to_be_summed(link):
    """Of an old update, or one of several steps: SCAFFOLD's change of c and its counts of holders would shrink."""
    update = Broadcast({"w": jnp.full(3, 6.0)}, Summed(jnp.full(2, 1.0)))
    client = shape_client((), 0, 0)._replace(age=jnp.int32(3), steps=jnp.float32(2))
    message, _ = chain(link).encode(update, ((),), client._replace(link_state=((),)))
    sent = message if isinstance(message, Broadcast) else message[0]
    np.testing.assert_array_equal(sent.extra.values, 1.0)
    np.testing.assert_allclose(sent.params["w"], 3.0)  # (1 + 3) ^ -1/2, and one of two steps


def test_what_clients_without_tables_change_is_counted_over_all_of_them():
    """The paper's c: those who never took part have a c_i of 0, whoever drops out of however large a cohort."""
    algorithm, present = scaffold(mse, SGD, N), np.arange(N) < 3
    state, _ = algorithm.step(algorithm.init(DENSE, KEY), dense_cohort(range(N), present), KEY)
    kept = state.client_states[0].variate["w"]
    assert (np.asarray(kept[3:]) == 0).all()
    np.testing.assert_allclose(state.shared.extra.mean["w"], np.mean(np.asarray(kept), 0), rtol=1e-5)


def test_feddyn_gathers_of_those_who_reported():
    """Half of the clients drop out: what is gathered is a mean over all, half of that over those who reported."""
    algorithm, present = feddyn(mse, SGD, N, 0.3), np.arange(N) % 2 == 0
    state, _ = algorithm.step(algorithm.init(DENSE, KEY), dense_cohort(range(N), present), KEY)
    moved, gathered = flat(DENSE) - flat(server_model(state)), flat(state.channel[0].params)
    np.testing.assert_allclose(gathered, moved / 3, rtol=1e-5)  # the model moves by the mean, and half of it again


def test_fednova_by_hand():
    """Two clients of one and two live steps, weights 1/4 and 3/4: tau_eff sum(p_i d_i / tau_i)."""
    x, y = X[:2, :2], Y[:2, :2]
    cohort = dense_cohort([0, 1], xy=(x, y))
    live = np.array([[True, False], [True, True]])
    examples = np.array([1.0, 3.0], np.float32)
    steps = Batches(cohort.blocks[0].data.rows, live, (x, y), examples)
    cohort = cohort._replace(blocks=(cohort.blocks[0]._replace(data=steps),))
    got, _ = run(fednova(mse, SGD, 2), cohort, DENSE, 1)
    moves, start = [], flat(DENSE)
    for i, tau in ((0, 1), (1, 2)):
        z = start
        for s in range(tau):
            z = z - RATE * slope(z, XS[i, s], YS[i, s])
        moves.append((z - start) / tau)
    want = start + (0.25 * 1 + 0.75 * 2) * (0.25 * moves[0] + 0.75 * moves[1])
    np.testing.assert_allclose(flat(server_model(got)), want, rtol=1e-5)


def test_fednova_is_a_weighted_mean_where_all_take_as_many_steps():
    a, b = (run(made, dense_cohort(), DENSE)[0] for made in (fednova(mse, SGD, N), plain_fedavg(mse, SGD, N)))
    close(server_model(a), server_model(b))


def test_q_fedavg_is_that_of_the_paper():
    """Algorithm 2: Delta_k = L (w - w_k); sum(F^q Delta) / sum(q F^(q-1) |Delta|^2 + L F^q)."""
    q, ids = 2.0, [3, 1]
    got, _ = run(qfedavg(mse, SGD, N, q, RATE), dense_cohort(ids), DENSE, 1)
    top, bottom, start = 0.0, 0.0, flat(DENSE)
    for i in ids:
        w = start
        for s in range(S):
            w = w - RATE * slope(w, XS[i, s], YS[i, s])
        delta = (start - w) / RATE
        loss = np.mean((XS[i] @ start[:-1] + start[-1] - YS[i]) ** 2)
        top, bottom = top + loss**q * delta, bottom + q * loss ** (q - 1) * delta @ delta + loss**q / RATE
    np.testing.assert_allclose(flat(server_model(got)), start - top / bottom, rtol=1e-5)


def test_agnostic_weights_grow_where_the_loss_is_high():
    """By hand: lambda_g after a round is exp(rate * the group's mean loss), normalised."""
    num_train, rate = np.asarray([len(DATA[c][0]) for c in range(USERS)]), 0.4
    made = agnostic_fedavg(bce, SGD, USERS, num_train, 2, rate, user)
    start = made.init(MARKED, KEY)
    users, shared = np.asarray(start.client_states[0]["user"]), jax.tree.map(np.asarray, server_model(start))
    state, _ = made.step(start, row_cohort(), KEY)
    bound, losses, counts = np.quantile(num_train, 0.5), np.zeros(2), np.zeros(2)
    for c in WHO:
        items, labels = DATA[c]
        logit = shared["scale"] * (shared["item"][items] @ users[c]) + shared["bias"][items]
        group = int(len(items) >= bound)
        losses[group] += (np.logaddexp(0, logit) - labels * logit).sum()
        counts[group] += len(items)
    want = np.exp(rate * losses / counts)
    weights, past = state.channel[0]
    np.testing.assert_allclose(weights, want / want.sum(), rtol=1e-5)
    np.testing.assert_allclose(past, 0.25 + 0.5 * counts / counts.sum(), rtol=1e-5)


def test_mime_mimics_the_central_optimiser():
    """One step a client on all its data: Mime and MimeLite with momentum are server momentum, as all clients report."""
    everyone = dense_cohort(range(N), xy=(X.reshape(N, 1, -1, X.shape[-1]), Y.reshape(N, 1, -1)))
    heavy = optax.sgd(RATE, momentum=0.9)
    for correct in (True, False):
        state = run(mime(mse, heavy, N, correct), everyone, DENSE, 3)[0]
        want = run(fedsgd(mse, heavy, N), everyone, DENSE, 3)[0]
        if not correct:
            close(server_model(state), server_model(want), atol=1e-5)
        else:  # its c is the gradient of the round before, so that its step lags by one
            last, p, m = None, flat(DENSE), np.zeros(6)
            for _ in range(3):
                now = np.mean([slope(p, XS[i].reshape(-1, 5), YS[i].ravel()) for i in range(N)], 0)
                p, m = p - RATE * ((now if last is None else last) + 0.9 * m), now + 0.9 * m
                last = now
            np.testing.assert_allclose(flat(server_model(state)), p, rtol=1e-4)


def test_the_first_step_of_mime_follows_the_mean_gradient_alone():
    """g(y) - g(x) + c is c at y = x, whatever the batch; c is what client 3 said in the first round."""
    made, cut = mime(mse, SGD, N), (X[:, :1], Y[:, :1])
    state, _ = made.step(made.init(DENSE, KEY), dense_cohort([3], xy=cut), KEY)
    first = flat(DENSE) - RATE * slope(flat(DENSE), XS[3, 0], YS[3, 0])
    np.testing.assert_allclose(flat(server_model(state)), first, rtol=1e-5)
    state, _ = made.step(state, dense_cohort([5], xy=cut), KEY)
    np.testing.assert_allclose(flat(server_model(state)), 2 * first - flat(DENSE), rtol=1e-5)


def test_what_cannot_be_is_refused():
    for make in (
        lambda: local_steps(loss_model(mse), SGD, proximal=-1.0),
        lambda: feddyn_method(loss_model(mse), SGD, strength=-1.0, num_clients=2),
        lambda: fair_mean(-1.0),
        lambda: fair_mean(1.0, 0.0),
        lambda: agnostic_mean([1, 2], 0),
        lambda: agnostic_mean([1, 2], 2, -1.0),
    ):
        with pytest.raises(ValueError, match=r"must|lies"):
            make()
    with pytest.raises(ValueError, match="both make a mean"):
        federate(Method(local_steps(loss_model(mse), SGD), server=SGD), chain(fair_mean(), mean()), N)


def test_a_second_round_of_agnostic_weighs_by_what_the_first_left():
    """By hand: a client weighs lambda_g n / N_g, of which a round forgets a fifth of N_g and keeps all of lambda_g."""
    rate, forget, group = 0.1, 0.2, np.arange(N) // (N // 2)  # by train interactions, which is the client's number
    cohort = dense_cohort()
    cohort = cohort._replace(blocks=(cohort.blocks[0]._replace(num_train=IDS.astype(np.float32)),))
    algorithm = federate(Method(local_steps(loss_model(mse), SGD)), agnostic_mean(np.arange(N), 2, rate, forget), N)
    state, _ = run(algorithm, cohort, DENSE, 2)
    start, lam, share, mine = flat(DENSE), np.full(2, 0.5), np.full(2, 0.5), group[IDS]
    for _ in range(2):
        moves, losses = [], []
        for i in IDS:
            p = start
            for s in range(S):
                p = p - RATE * slope(p, XS[i, s], YS[i, s])
            moves.append(p - start)
            losses.append(np.mean((XS[i] @ start[:-1] + start[-1] - YS[i]) ** 2))
        weight = (lam / share)[mine]
        start = start + weight @ np.array(moves) / weight.sum()
        lam = lam * np.exp(rate * np.bincount(mine, losses) / np.bincount(mine))
        lam, share = lam / lam.sum(), (1 - forget) * share + forget * np.bincount(mine) / len(IDS)
    np.testing.assert_allclose(flat(server_model(state)), start, rtol=1e-5)
    np.testing.assert_allclose(state.channel[0], (lam, share), rtol=1e-5)


# --- by row: what acts in every step acts in those that hold a row, and comes to as much ----------------------------

TEN = 10
RARE = (  # client 0 meets row 0 in one of ten steps and asks it to be 1, client 1 meets it in its only one and asks -1
    Batches(
        jnp.arange(TEN)[:, None], jnp.ones(TEN, bool), (jnp.zeros((TEN, 1)).at[0].set(1.0), jnp.ones((TEN, 1))), 1.0
    ),
    Batches(jnp.zeros((TEN, 1), int), jnp.arange(TEN) < 1, (-jnp.ones((TEN, 1)), jnp.ones((TEN, 1))), 1.0),
)
LEAST = (1 / TEN - 1) / (1 / TEN + 1)  # where the mean of the clients' losses, each a mean over its steps, is least


def towards(params, private, batch):
    """Half the squared distance of rows to what is asked of them."""
    y, w = batch
    return Mean(0.5 * jnp.sum((params["t"][:, 0] - y) ** 2 * w), jnp.sum(w))


def test_a_proximal_pull_by_row_acts_in_the_steps_that_hold_the_row():
    """A row in the first and the last of ten steps, rate .05, mu .5. By hand: it goes to .05; then its slope is -.95
    and the pull .025. Dense steps pull it in between, too: .05 * .975^8, and on from there."""
    there = np.zeros((TEN, 1), np.float32)
    there[[0, -1]] = 1.0
    steps = Batches(jnp.where(there > 0, 0, jnp.arange(TEN)[:, None]), jnp.ones(TEN, bool), (there, there), 2.0)
    between = 0.05 * 0.975**8
    want = {True: 0.05 + 0.05 * (0.95 - 0.025), False: between + 0.05 * (1 - between - 0.5 * between)}
    for by_row, value in want.items():
        work = local_steps(loss_model(towards), optax.sgd(0.05), by_row=by_row, proximal=0.5)
        shared, client_state = work.init({"t": Table(jnp.zeros((TEN, 1)))}, KEY)
        moved = work.update(shared, client_state, steps, KEY).update.params["t"].rows[0, 0]
        assert -float(moved) == pytest.approx(value, rel=1e-5)
    assert want[True] == pytest.approx(0.09625)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_rare_rows_go_to_the_optimum(name, by_row):
    """FedAvg ends at 0, half way between the clients, however rare the row is at one of them."""
    sgd = optax.sgd(0.05)
    method = (
        scaffold_method(loss_model(towards), sgd, num_clients=2, by_row=by_row)
        if name == "scaffold"
        else feddyn_method(loss_model(towards), sgd, strength=0.1, by_row=by_row, num_clients=2)
    )
    params, work = {"t": Table(jnp.zeros((TEN, 1)))}, method.work
    shared, client_state = work.init(params, KEY)

    def round(carry, _):
        shared, memories, gathered = carry
        reports = [work.update(shared, mine, steps, KEY) for mine, steps in zip(memories, RARE, strict=True)]
        update = jax.tree.map(lambda a, b: (a + b) / 2, *(each.update._replace(extra=()) for each in reports))
        change = jax.tree.map(jnp.add, *(each.update.extra for each in reports))
        gathered = jax.tree.map(jnp.add, gathered, update.params) if name == "feddyn" else gathered
        now = jax.tree.map(lambda x, d, h: x - d - h, shared.params, update.params, gathered)
        extra = method.move_extra(shared.extra, change) if name == "scaffold" else ()
        return (Broadcast(now, extra), [each.client_state for each in reports], gathered), None

    nothing = jax.tree.map(jnp.zeros_like, params)
    (shared, _, _), _ = jax.lax.scan(round, (shared, [client_state, client_state], nothing), length=2000)
    assert float(shared.params["t"].rows[0, 0]) == pytest.approx(LEAST, abs=0.01)  # local steps of 0.05 end beside it


@pytest.mark.parametrize("known", [0.0, 1.0])
def test_mime_moves_a_rare_row_as_often_as_it_is_due(known):
    """Each of ten rows in one of ten steps: g(y) - g(x) is 0 there, and the mean gradient c acts ten times in it. Where
    none is known, the gradient itself acts once."""
    c, work = (
        {"t": Table(jnp.arange(TEN, dtype=jnp.float32)[:, None])},
        mime_method(loss_model(towards), optax.sgd(0.01)).work,
    )
    shared, _ = work.init({"t": Table(jnp.zeros((TEN, 1)))}, KEY)
    frozen = shared.extra._replace(gradient=c, known={"t": Table(jnp.full(TEN, known))})
    if not known:
        frozen = frozen._replace(gradient=jax.tree.map(jnp.zeros_like, c))
    report = work.update(shared._replace(extra=frozen), (), RARE[0], KEY)
    asked = jnp.zeros(TEN).at[0].set(1.0)
    want = 0.01 * (TEN * jnp.arange(TEN) if known else -asked)
    close(report.update.params["t"].rows[:, 0], want)
