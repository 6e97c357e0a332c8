"""The round: equal to one written by hand, sparse in rows, deaf to the absent, exact to resume."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import mean, per_row_mean, weighted_mean
from jaxfed.channels.difference import difference
from jaxfed.channels.secure_sum import ring
from jaxfed.core import tree
from jaxfed.core.aggregate import SUM, gather_then
from jaxfed.core.channel import chain
from jaxfed.core.federate import federate
from jaxfed.core.link import link
from jaxfed.core.method import Method
from jaxfed.core.placement import make_placement
from jaxfed.core.state import server_model
from jaxfed.core.tables import Table, is_table, unwrap
from jaxfed.core.types import Broadcast
from jaxfed.core.wire import make_wire
from tests.small import (
    DATA,
    DENSE,
    DIM,
    ITEMS,
    KEY,
    MARKED,
    PLAIN,
    USERS,
    WHO,
    M,
    N,
    S,
    X,
    Y,
    bce,
    by_hand,
    close,
    dense_cohort,
    factorisation,
    loss_model,  # fmt: skip
    mse,
    on_rows,
    row_block,
    row_cohort,
    run,
    same,
    user,
)


def linear(channel, lr=0.05, **more):
    return federate(Method(local_steps(loss_model(mse), optax.sgd(lr))), channel, N, **more)


def test_fedavg_by_hand():
    def one(i):
        p = DENSE
        for s in range(S):
            g = jax.grad(lambda p: jnp.mean((X[i, s] @ p["w"] + p["b"] - Y[i, s]) ** 2))(p)
            p = jax.tree.map(lambda p, g: p - 0.05 * g, p, g)
        return p

    want = jax.tree.map(lambda *x: sum(x) / len(x), *(one(i) for i in dense_cohort().ids))
    close(server_model(run(linear(mean()), dense_cohort(), DENSE, 1)[0]), want)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["rows", "whole"])
def test_row_sparse_is_dense_fedavg_of_a_factorisation(weighted, whole):
    state, _ = run(factorisation(weighted_mean() if weighted else mean()), row_cohort(whole))
    params, users = by_hand(weighted)
    close(server_model(state), params)
    for client, own in users.items():
        close({"user": state.client_states[0]["user"][client]}, own)


@pytest.mark.parametrize("channel", [mean, weighted_mean, per_row_mean, lambda: chain(difference(), per_row_mean())])
@pytest.mark.parametrize("server", [optax.sgd(0.5), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))])
def test_a_round_on_the_cohorts_rows_is_the_round_on_all(channel, server):
    """For a server without a state: a row that nobody holds has no update."""
    cohort = row_cohort(present=[1, 0, 1, 1, 1, 1, 0, 1])
    want, told = run(factorisation(channel(), server=server), cohort)
    got, info = run(factorisation(channel(), server=server), on_rows(cohort))
    close(server_model(got), server_model(want))
    close(got.client_states, want.client_states)
    close(info, told)


def test_a_server_with_a_state_is_lazy_on_the_rows_of_the_cohort():
    """Adam by hand, every row with moments of its own, which rest while nobody holds the row."""
    cohort = row_cohort()
    held = np.unique(np.concatenate([block.rows.ravel() for block in cohort.blocks]))[:-1]
    others = np.setdiff1d(np.arange(ITEMS), held)
    assert len(others)
    adam = optax.adam(0.1, eps=0.01)  # not a mere sign of the difference of two models below
    algorithm, plainly = factorisation(mean(), server=adam), factorisation(mean())
    state, _ = run(algorithm, on_rows(cohort), rounds=2)
    same(server_model(state)["item"][others], PLAIN["item"][others])

    item, moments, now = PLAIN["item"][held], adam.init(PLAIN["item"][held]), algorithm.init(MARKED, KEY)
    for _ in range(2):
        twin = jax.tree.map(jnp.copy, now)._replace(opt=plainly.init(MARKED, KEY).opt)
        moved, _ = plainly.step(twin, cohort, KEY)
        mean_update = server_model(now)["item"][held] - server_model(moved)["item"][held]
        step, moments = adam.update(mean_update, moments, item)
        item = item + step
        now, _ = algorithm.step(now, on_rows(cohort), KEY)
        close(server_model(now)["item"][held], item)


def test_memory_of_tables_is_found_by_the_catalogue():
    """Private tables [clients, catalogue] are read and written at the catalogue's rows, whatever list a round has."""
    work = local_steps(loss_model(bce, lambda key: {**user(key), "seen": Table(jnp.zeros(ITEMS))}), optax.sgd(0.1))

    def counting(shared, mine, steps, key):
        report = work.update(shared, mine, steps, key)
        seen = {**report.client_state, "seen": Table(mine["seen"].rows + 1)}
        return report._replace(client_state=seen)

    cohort = row_cohort()
    algorithm = federate(Method(work._replace(update=counting)), mean(), USERS)
    state, _ = run(algorithm, on_rows(cohort), rounds=3)
    want = np.zeros((USERS, ITEMS))
    for client in WHO:
        want[client, DATA[client][0]] = 3
    same(state.client_states[0]["seen"].rows, want)


def test_per_row_mean_by_hand():
    averaging, alone = factorisation(mean()), []
    for slot in range(len(WHO)):
        state, _ = run(averaging, row_cohort(present=np.arange(len(WHO)) == slot), rounds=1)
        alone.append(np.asarray(server_model(state)["item"] - PLAIN["item"]))
    for by, weigh in (("examples", len), ("uniform", lambda items: 1)):
        got = server_model(run(factorisation(per_row_mean(by)), row_cohort(), rounds=1)[0])["item"]
        weights, total = np.zeros(ITEMS), np.zeros((ITEMS, DIM))
        for client, update in zip(WHO, alone, strict=True):
            weights[DATA[client][0]] += weigh(DATA[client][0])
            total += weigh(DATA[client][0]) * update
        close(got, PLAIN["item"] + total / np.maximum(weights, 1e-9)[:, None], atol=5e-6)


def test_no_array_of_clients_by_catalogue():
    big, shapes = 9973, set()
    params = {"item": Table(jnp.zeros((big, DIM))), "bias": Table(jnp.zeros(big)), "scale": jnp.ones(())}

    def look(update, sent, client):
        shapes.add(update.params["item"].rows.shape)
        return update, client.link_state

    cohort = row_cohort()
    wide = tuple(b._replace(rows=np.where(b.rows == ITEMS, big, b.rows)) for b in cohort.blocks)
    text = []
    original = jax.jit

    def spying(f, **kw):
        jitted = original(f, **kw)

        def call(*args):
            text.append(jitted.lower(*args).as_text())
            text.append(jitted.lower(*args).compile().as_text())
            return jitted(*args)

        return call

    jax.jit = spying
    try:
        algorithm = factorisation(chain(link(look), per_row_mean()))
        algorithm.step(algorithm.init(params, KEY), cohort._replace(blocks=wide), KEY)
    finally:
        jax.jit = original
    assert shapes == {(32, DIM), (big, DIM)}  # a client's slice, and the shape evaluation of `chain`
    assert any(str(big) in program for program in text)
    for program in text:
        for width in (4, len(WHO), USERS):
            assert not any(f in program for f in (f"{width}x{big}x{DIM}", f"[{width},{big},{DIM}"))


def test_private_leaf_never_in_a_message():
    """Values, not names: a private vector made of sevens must not occur in what is sent."""
    sevens, messages = 7.0, []

    def spy(update, sent, client):
        jax.debug.callback(lambda *leaves: messages.extend(leaves), *jax.tree.leaves(update))
        return update, client.link_state

    def still(params, private, batch):  # a loss that leaves the private part as it is
        return mse({"w": params["item"][0], "b": 0.0}, (), (params["item"], jnp.zeros(len(params["item"]))))

    work = local_steps(loss_model(still, lambda key: {"user": jnp.full(DIM, sevens)}), optax.sgd(0.1))
    algorithm = federate(Method(work), chain(link(spy), mean()), USERS)
    run(algorithm, row_cohort(), rounds=1)
    jax.effects_barrier()
    assert messages
    assert not any((np.asarray(leaf) == sevens).any() for leaf in messages)


def test_messages_have_the_structure_of_the_shared_part_alone():
    seen = []

    def spy(update, sent, client):
        seen.append(jax.tree.structure(unwrap(update.params)))
        return update, client.link_state

    run(factorisation(chain(link(spy), mean())), row_cohort(), rounds=1)
    assert set(seen) == {jax.tree.structure(PLAIN)}


@pytest.mark.parametrize("channel", [mean, weighted_mean, per_row_mean])
@pytest.mark.parametrize("server", [optax.sgd(1.0), optax.sgd(1.0, momentum=0.9)], ids=["sgd", "momentum"])
@pytest.mark.parametrize("lay", [lambda cohort: cohort, on_rows], ids=["all", "rows"])
def test_the_absent_count_for_nothing_and_keep_their_memory(channel, server, lay):
    present = [1, 0, 1, 1, 0, 1, 0, 1]
    gone = [slot for slot, here in enumerate(present) if not here]
    some, info = run(factorisation(channel(), server=server), lay(row_cohort(present=present)))
    slots = [slot if slot not in gone else len(WHO) for slot in range(8)]
    cohort = row_cohort(present=present)._replace(blocks=(row_block(slots[:4]), row_block(slots[4:])))
    never, _ = run(factorisation(channel(), server=server), lay(cohort))
    same(server_model(some), server_model(never))
    same(some.client_states, never.client_states)
    fresh = factorisation(channel()).init(MARKED, KEY).client_states[0]["user"]
    away = np.array([WHO[slot] for slot in gone])
    same(some.client_states[0]["user"][away], fresh[away])
    assert int(info["clients/reported"]) == sum(present)


@pytest.mark.parametrize("server", [optax.sgd(1.0, momentum=0.9), optax.adam(0.1)], ids=["momentum", "adam"])
def test_rows_that_only_the_absent_hold_rest_with_their_moments(server):
    """On listed rows: as if the absent had not been asked, whatever momentum the server has from the round before."""
    present = np.arange(8) > 2
    here, gone = (np.concatenate([DATA[c][0] for c in np.array(WHO)[who]]) for who in (present, ~present))
    alone = np.setdiff1d(gone, here)
    assert len(alone)
    algorithm = factorisation(mean(), server=server)
    first, _ = run(algorithm, on_rows(row_cohort()), rounds=1)
    before = jax.tree.map(jnp.copy, (first.shared.params, first.opt))
    after, _ = algorithm.step(first, on_rows(row_cohort(present=present)), KEY)
    for was, now in zip(tables(before), tables((after.shared.params, after.opt)), strict=True):
        same(now[alone], was[alone])
    assert (before[0]["item"].rows[alone] != PLAIN["item"][alone]).all()  # there is a momentum
    assert (after.shared.params["item"].rows[here] != before[0]["item"].rows[here]).any()


def tables(tree):
    """The arrays of a tree's tables."""
    return [x.rows for x in jax.tree.leaves(tree, is_leaf=is_table) if is_table(x)]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_client_whose_update_is_not_finite_withdraws_and_is_counted(poison):
    def bad(block, slot):
        y, w = block.data.batch
        return block._replace(
            data=block.data._replace(batch=(np.where(block.slots[:, None, None] == slot, poison, y), w))
        )

    cohort = row_cohort()
    poisoned = cohort._replace(blocks=tuple(bad(b, 2) for b in cohort.blocks))
    state, info = run(factorisation(mean()), poisoned, rounds=1)
    without, _ = run(factorisation(mean()), row_cohort(present=np.arange(8) != 2), rounds=1)
    same(server_model(state), server_model(without))
    same(state.client_states, without.client_states)
    assert int(info["clients/refused"]) == 1
    assert int(info["clients/reported"]) == 7
    assert np.isfinite(float(info["train/loss"]))


def test_integers_do_not_hide_an_update_that_is_not_finite():
    """In a ring what is no number becomes one; nothing else of the client is amiss."""
    work = local_steps(loss_model(bce, user), optax.sgd(0.1))
    most = max(len(DATA[c][0]) for c in WHO)  # of one client

    def run_badly(shared, mine, steps, key):
        report = work.update(shared, mine, steps, key)
        return report._replace(
            update=jax.tree.map(lambda x: jnp.where(steps.examples == most, jnp.nan, x), report.update)
        )

    channel, there = chain(mean(), ring(8, 20, bound=9.0)), [len(DATA[c][0]) < most for c in WHO]
    assert sum(there) == 7
    algorithm = federate(Method(work._replace(update=run_badly)), channel, USERS)
    state, info = run(algorithm, on_rows(row_cohort()), rounds=1)
    without, _ = run(factorisation(channel), on_rows(row_cohort(present=there)), rounds=1)
    same(server_model(state), server_model(without))
    assert int(info["clients/refused"]) == 1


def test_a_message_that_overflows_withdraws_too():
    """Finite as an update, infinite once it is weighed: it would be, in the sum."""
    huge = link(lambda u, sent, c: (jax.tree.map(lambda x: jnp.where(c.id == 4, 2e38, x), u), c.link_state))
    state, info = run(factorisation(chain(huge, weighted_mean())), row_cohort(), rounds=1)
    without, _ = run(factorisation(weighted_mean()), row_cohort(present=np.array(WHO) != 4), rounds=1)
    same(server_model(state), server_model(without))
    assert int(info["clients/refused"]) == 1
    assert int(info["rows/sent"].sum()) == sum(len(DATA[c][0]) for c in WHO if c != 4)


def test_nobody_reports():
    algorithm = factorisation(mean())
    before = server_model(algorithm.init(MARKED, KEY))
    state, info = run(algorithm, row_cohort(present=np.zeros(8)), rounds=1)
    same(server_model(state), before)
    assert int(info["clients/reported"]) == 0


def test_the_order_of_slots_and_blocks_is_nothing():
    want = server_model(run(factorisation(per_row_mean()), row_cohort())[0])
    close(server_model(run(factorisation(per_row_mean()), row_cohort(blocks=((7, 3, 0, 5), (2, 1, 6, 4))))[0]), want)
    close(server_model(run(factorisation(per_row_mean()), row_cohort(blocks=tuple((i,) for i in range(8))))[0]), want)


def test_integer_sums_do_not_depend_on_blocks_at_all():
    to_int = link(
        lambda u, sent, c: (jax.tree.map(lambda x: jnp.round(x * 2**12).astype(jnp.int32), u), c.link_state),
        lambda t, s, r: (jax.tree.map(lambda x: x * jnp.float32(2**-12), t), s, {}),
        is_average=False,
    )
    ways = ((0, 1, 2, 3), (4, 5, 6, 7)), ((7, 3, 0, 5), (2, 1, 6, 4))
    same(
        *(server_model(run(factorisation(chain(mean(), to_int)), row_cohort(blocks=way), rounds=1)[0]) for way in ways)
    )


@pytest.mark.optimised
def test_padding_the_parts_changes_nothing():
    want = run(factorisation(per_row_mean()), row_cohort())[0]
    same(run(factorisation(per_row_mean(), padded_shape=(9, 500)), row_cohort())[0], want)


def test_a_step_consumes_its_state_but_never_the_callers_parameters():
    algorithm = factorisation(mean())
    params = jax.tree.map(jnp.copy, MARKED)
    state = algorithm.init(params, KEY)
    old = state.shared.params["item"].rows, state.client_states[0]["user"]
    at = [x.unsafe_buffer_pointer() for x in old]
    state, _ = algorithm.step(state, row_cohort(), KEY)
    assert all(x.is_deleted() for x in old)
    assert [x.unsafe_buffer_pointer() for x in (state.shared.params["item"].rows, state.client_states[0]["user"])] == at
    same(params, MARKED)


def test_resume_is_exact():
    algorithm = factorisation(per_row_mean(), server=optax.adam(0.01))
    want = run(algorithm, row_cohort(), rounds=4)[0]
    half = jax.tree.map(np.asarray, run(algorithm, row_cohort(), rounds=2)[0])
    for _ in range(2):
        half, _ = algorithm.step(jax.tree.map(jnp.asarray, half), row_cohort(), KEY)
    same(half, want)


def test_client_memory_beyond_the_budget_is_refused_in_words():
    with pytest.raises(ValueError, match="client states take"):
        factorisation(mean(), client_memory_budget=10.0).init(MARKED, KEY)


def test_randomness_is_a_function_of_seed_round_client_and_link():
    keys = []

    def spy(update, sent, client):
        jax.debug.callback(
            lambda i, k: keys.append((int(i), tuple(np.asarray(k)))), client.id, jax.random.key_data(client.key)
        )
        return update, client.link_state

    def seen(cohort, rounds=2):
        keys.clear()
        run(factorisation(chain(link(spy), link(spy), mean())), cohort, rounds=rounds)
        jax.effects_barrier()
        return set(keys)

    cohort = row_cohort()
    first = seen(cohort)
    assert len(first) == 2 * 2 * len(WHO)  # two rounds, two links: all keys differ
    assert first == seen(row_cohort(blocks=tuple((i,) for i in reversed(range(8)))))
    slot = np.roll(np.arange(len(WHO)), 3)  # the same clients at other slots
    blocks = tuple(block._replace(slots=slot[block.slots].astype(np.int32)) for block in cohort.blocks)
    assert first == seen(cohort._replace(ids=cohort.ids[np.argsort(slot)], blocks=blocks))


def test_private_parts_start_as_a_function_of_the_client():
    store = factorisation(mean()).init(MARKED, KEY).client_states[0]["user"]
    for client in (0, 5):
        close(store[client], user(jax.random.fold_in(KEY, client))["user"])


@pytest.mark.parametrize("kind", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("channel", [mean, per_row_mean])
def test_every_placement_is_one_device(kind, devices, channel):
    def wide(cohort):  # a block's width is a multiple of the devices: one block of all eight
        return cohort._replace(blocks=(row_block(range(8)),))

    want = server_model(run(factorisation(channel()), wide(row_cohort()), rounds=1)[0])
    on = make_placement(kind, devices)
    cohort = wide(row_cohort())
    cohort = cohort._replace(blocks=tuple(map(on.block, cohort.blocks)))
    got = server_model(run(factorisation(channel(), placement=on), cohort, rounds=1)[0])
    close(got, want, atol=1e-6 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)), rtol=0)


@pytest.mark.optimised
@pytest.mark.parametrize("shard_tables", [False, True])
@pytest.mark.parametrize("devices", [2, 4])
def test_integer_sums_are_the_same_on_any_devices(devices, shard_tables):
    """What clients send as integers adds up to the same bits, and so does the model the server makes of them."""
    fixed = link(
        lambda u, sent, c: (jax.tree.map(lambda x: jnp.round(x * 2**16).astype(jnp.int32), u), c.link_state),
        lambda t, s, r: (jax.tree.map(lambda x: x / jnp.float32(2**16), t), s, {}),
        aggregator=SUM,
        is_average=False,
    )
    cohort = on_rows(row_cohort(blocks=(range(8),)))
    want = server_model(run(factorisation(fixed), cohort, rounds=1)[0])
    on = make_placement("jit", devices, shard_tables)
    laid = cohort._replace(blocks=tuple(map(on.block, cohort.blocks)))
    state, _ = run(factorisation(fixed, placement=on), laid, rounds=1)
    same(server_model(state), want)
    table = state.shared.params["item"].rows
    assert {x.data.shape[0] for x in table.addressable_shards} == {ITEMS // devices if shard_tables else ITEMS}


def test_tables_that_do_not_divide_among_the_devices():
    with pytest.raises(ValueError, match=r"60 rows do not divide among 8 devices: make tables of `padded_table_rows`"):
        factorisation(mean(), placement=make_placement("jit", 8, True)).init(MARKED, KEY)
    with pytest.raises(ValueError, match=r"copies its model to every device"):
        make_placement("pmap", 2, True)


@pytest.mark.optimised
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_cohort_in_chunks_is_the_cohort(chunk):
    cohort = row_cohort(blocks=((0, 1, 2, 3), (4, 5, 8, 8), (6, 7, 8, 8)), present=[1, 1, 0, 1, 1, 1, 1, 0])
    want, told = run(factorisation(per_row_mean()), cohort)
    got, info = run(factorisation(per_row_mean(), chunk=chunk), cohort)
    same((server_model(got), got.client_states, info), (server_model(want), want.client_states, told))


@pytest.mark.optimised
@pytest.mark.parametrize("laid", [lambda cohort: cohort, on_rows])
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_client_store_on_the_host_is_the_same_store(chunk, laid):
    """Private parts, and what a link keeps of the tables on each client, are read and written where they lie."""

    def feedback(update, sent, client):
        kept = jax.tree.map(jnp.add, update, client.link_state)
        return jax.tree.map(jnp.round, kept), jax.tree.map(lambda x: x - jnp.round(x), kept)

    channel = chain(link(feedback, init=lambda example: ((), tree.zeros_like(example))), mean())
    present = [1, 1, 0, 1, 1, 1, 1, 0]
    cohort = laid(row_cohort(blocks=((0, 1, 2, 3), (4, 5, 8, 8), (6, 7, 8, 8)), present=present))
    want, told = run(factorisation(channel, chunk=chunk), cohort)
    got, info = run(factorisation(channel, chunk=chunk, store_on_host=True), cohort)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(got.client_states))
    kept = got.client_states[1][0].params["item"].rows
    assert [bool(kept[who].any()) for who in WHO] == [bool(there) for there in present]
    same((server_model(got), got.client_states, info), (server_model(want), want.client_states, told))


def test_chunks_are_for_sums():
    with pytest.raises(ValueError, match=r"run.chunk: only sums"):
        factorisation(link(aggregator=gather_then(lambda messages, rows: None)), chunk=1)


def test_more_devices_than_there_are():
    with pytest.raises(ValueError, match=r"9 devices asked for, 8 are there"):
        make_placement("jit", 9)


def test_momentum_on_the_client_is_exact_on_the_whole_slice():
    opt = optax.sgd(0.1, momentum=0.9)
    rows, whole = (server_model(run(factorisation(mean(), opt, by_row=False), row_cohort(w))[0]) for w in (False, True))
    close(rows, whole, atol=5e-6)


def test_momentum_by_row_is_lazy():
    """Every row is in one step only here, so its momentum never acts; that of the user vector and the scale does."""
    opt = optax.sgd(0.1, momentum=0.9)
    lazy = server_model(run(factorisation(mean(), opt), row_cohort(), rounds=1)[0])
    total = jnp.zeros((ITEMS, DIM))
    for client in WHO:
        own, scale = user(jax.random.fold_in(KEY, client))["user"], PLAIN["scale"]
        speed = jnp.zeros(DIM), jnp.zeros(())
        for s in range(0, len(DATA[client][0]), 4):
            i, y = (column[s : s + 4] for column in DATA[client])

            def loss(item, own, scale, y=y):
                logit = scale * (item @ own)
                return jnp.mean(jnp.logaddexp(0, logit) - y * logit)

            row, *rest = jax.grad(loss, (0, 1, 2))(PLAIN["item"][i], own, scale)
            total = total.at[i].add(-0.1 * row)
            speed = tuple(g + 0.9 * v for g, v in zip(rest, speed, strict=True))
            own, scale = own - 0.1 * speed[0], scale - 0.1 * speed[1]
    close(lazy["item"], PLAIN["item"] + total / len(WHO))
    dense = server_model(run(factorisation(mean(), opt, by_row=False), row_cohort(), rounds=1)[0])
    assert float(jnp.abs(lazy["item"] - dense["item"]).max()) > 1e-4


def test_rounds_of_one_shape_scan():
    """`step` is a function like any other: several rounds are one program, where their blocks have one shape."""
    whos = [[1] * 8, [1, 1, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 1, 1]]
    cohorts = [on_rows(row_cohort(present=present)) for present in whos]
    algorithm = factorisation(per_row_mean(), server=optax.adam(0.1))
    want = algorithm.init(MARKED, KEY)
    for cohort in cohorts:
        want, info = algorithm.step(want, cohort, KEY)
    stacked = jax.tree.map(lambda *x: np.stack(x), *cohorts)
    got, seen = jax.lax.scan(
        lambda state, cohort: algorithm.step(state, cohort, KEY), algorithm.init(MARKED, KEY), stacked
    )
    close(
        (server_model(got), got.client_states, got.opt), (server_model(want), want.client_states, want.opt), atol=1e-6
    )
    close(jax.tree.map(lambda x: x[-1], seen), info, atol=1e-6)


def test_shapes_of_cohorts_do_not_recompile(compiled):
    algorithm = factorisation(per_row_mean(), padded_shape=(4, 128))
    state = algorithm.init(MARKED, KEY)
    cohort = row_cohort()
    state, _ = algorithm.step(state, cohort, KEY)
    compiled.clear()
    for slots in (((0, 1, 2, 3),), ((0, 8, 8, 8), (1, 2, 3, 4), (5, 6, 7, 8))):
        state, _ = algorithm.step(state, row_cohort(blocks=slots), KEY)
    assert not compiled


@pytest.mark.parametrize("count", [0, M])
def test_a_fixed_count_is_the_mean_when_all_report(count):
    close(
        server_model(run(linear(mean(count)), dense_cohort(), DENSE)[0]),
        server_model(run(linear(mean()), dense_cohort(), DENSE)[0]),
    )


# --- tables in bfloat16 ----------------------------------------

HALF = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {name: MARKED[name] for name in ("item", "bias")})
HALF |= {"scale": MARKED["scale"]}


def test_tables_in_bfloat16_are_stored_so_and_computed_with_in_float32():
    algorithm = factorisation(per_row_mean(), server=optax.adam(0.1))
    state, _ = run(algorithm, row_cohort(), HALF)
    dtypes = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert dtypes((state.shared.params["item"], state.shared.params["bias"])) == {"bfloat16"}
    assert dtypes((state.opt, state.client_states, state.shared.params["scale"])) == {"float32"}
    text = str(jax.make_jaxpr(algorithm.step)(algorithm.init(HALF, KEY), row_cohort(), KEY))
    assert "bf16" in text
    sums = [line for line in text.splitlines() if re.search(r"= (scatter-add|dot_general|reduce_sum)\[", line)]
    assert sums
    assert not [line for line in sums if "bf16" in line]


def test_tables_in_bfloat16_end_where_float32_does():
    """To a few parts in 256 of what a number is: three rounds, each rounding once."""
    exact, half = (run(factorisation(per_row_mean()), row_cohort(), params)[0] for params in (MARKED, HALF))
    close(server_model(exact)["item"], server_model(half)["item"].astype(jnp.float32), atol=0.02, rtol=0.03)
    assert not np.array_equal(server_model(exact)["item"], server_model(half)["item"].astype(jnp.float32))


def test_steps_too_small_for_bfloat16_are_not_lost():
    """A thousand steps of 1/1000 of a unit in the last place: rounded to the nearest they would all vanish."""
    start = jnp.full((400,), 1.0, jnp.bfloat16)
    step = lambda i, x: tree.stochastic_cast(x.astype(jnp.float32) + 2.0**-7 / 1000, x, jax.random.fold_in(KEY, i))
    end = jax.lax.fori_loop(0, 1000, step, start)
    assert float(end.astype(jnp.float32).mean()) == pytest.approx(1 + 2.0**-7, abs=4 * 2.0**-7 / 20)


def test_what_is_stored_is_one_of_the_two_neighbours():
    x = jax.random.normal(KEY, (1000,)) * 10.0 ** jax.random.randint(KEY, (1000,), -30, 30)
    x = jnp.concatenate([x, jnp.array([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan])])
    y = tree.stochastic_cast(x, x.astype(jnp.bfloat16), KEY).astype(jnp.float32)
    np.testing.assert_array_equal(y[-7:], x[-7:])  # what bfloat16 can say stays
    assert (jnp.abs(y - x)[:-3] <= 2.0**-7 * jnp.abs(x[:-3])).all()


def test_only_the_download_of_bfloat16_tables_is_half():
    one, half = (make_wire(mean(), Broadcast(params)) for params in (MARKED, HALF))
    assert (one.up(10), one.sees) == (half.up(10), half.sees)
    assert one.down(10) - half.down(10) == 10 * (DIM + 1) * 2
