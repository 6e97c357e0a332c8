"""Bytes are real: what the packer writes is as long as what is charged, and reads back as what was sent."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxfed.channels.average import mean, per_row_mean, weighted_mean
from jaxfed.channels.clip import clip
from jaxfed.channels.compress import drive, keep_weights_apart, quantize, sign
from jaxfed.channels.difference import difference
from jaxfed.channels.linear_maps import low_rank, rotate
from jaxfed.channels.secure_sum import ring
from jaxfed.channels.sparse import random_k, top_k
from jaxfed.core.channel import chain
from jaxfed.core.channel_checks import message_shapes, shape_client
from jaxfed.core.link import broadcast_state, encode_message
from jaxfed.core.tables import Table, take_rows
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Broadcast, Coded, Kept, RoundView, Weights
from jaxfed.core.wire import entropy_bytes, is_form, make_wire, message_bytes, pack_message, unpack_message

N, K, D = 50, 12, 8
WHOLE = Broadcast(
    {"item": Table(jnp.zeros((N, D))), "bias": Table(jnp.zeros(N)), "w": jnp.zeros((3, 4)), "one": jnp.zeros(())}
)
CODES = {
    "quantize": quantize,
    "quantize 4": lambda: quantize(4),
    "quantize 11": lambda: quantize(11),
    "terngrad": lambda: quantize(2),
    "kept error": lambda: quantize(3, True),
    "sign": sign,
    "drive": drive,
    "top_k": top_k,
    "top_k all": lambda: top_k(1.0, False),
    "random_k": random_k,
    "low_rank": lambda: low_rank(2),
    "rotate, quantize": lambda: chain(rotate(), quantize(4)),
    "low_rank, top_k": lambda: chain(low_rank(4), top_k(0.25)),
    "weighted, sign": lambda: chain(weighted_mean(), sign(False)),
    "per row, top_k": lambda: chain(per_row_mean(), top_k()),
    "difference, random_k": lambda: chain(difference(), per_row_mean(), random_k(0.3)),
    "nothing": mean,
}


def client_of(channel, held, seed=0):
    """A client that holds the rows `held` in a slice of K, with a fresh link state for them."""
    rows = np.full(K, N, np.int32)
    rows[: len(held)] = held
    state, link_state = channel.init(WHOLE)
    cut = jax.tree.map(lambda x: Table(x.rows[jnp.minimum(rows, N - 1)]) if isinstance(x, Table) else x, link_state,
                       is_leaf=lambda x: isinstance(x, Table))  # fmt: skip
    who = shape_client(cut, K, N)._replace(
        rows=jnp.array(rows), key=jax.random.key(seed), public=jax.random.key(seed + 1)
    )
    return state, who


def update_of(held, seed=0):
    """A random update, zero where no row is held."""
    key = jax.random.key(seed)
    here = (np.arange(K) < len(held)).astype(np.float32)
    return Broadcast(
        {
            "item": Table(jax.random.normal(key, (K, D)) * here[:, None]),
            "bias": Table(jax.random.normal(jax.random.fold_in(key, 1), (K,)) * here),
            "w": jax.random.normal(jax.random.fold_in(key, 2), (3, 4)),
            "one": jnp.float32(-2.5),
        }
    )


def sent_by(channel, held, seed=0):
    state, who = client_of(channel, held, seed)
    return encode_message(
        channel, update_of(held, seed), take_rows(broadcast_state(channel, state), who.rows), who
    ), who


def opened(channel, sent, who):
    if not channel.decode_message:
        return sent
    state, _ = channel.init(WHOLE)
    return channel.decode_message(sent, broadcast_state(channel, state), who._replace(link_state=None, key=None))


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("rows", [1, 5, K])
def test_the_packer_writes_what_is_charged(name, rows):
    channel = chain(CODES[name]())
    held = np.random.default_rng(rows).permutation(N)[:rows]
    (sent, _), _ = sent_by(channel, held)
    data = pack_message(sent, held)
    assert len(data) == message_bytes(sent, rows) == make_wire(channel, WHOLE).up(np.int64(rows))
    back, ids = unpack_message(data, sent, rows, N)
    np.testing.assert_array_equal(ids, held)
    stop = lambda x: is_form(x)
    for got, want in zip(*(jax.tree.leaves(x, is_leaf=stop) for x in (back, sent)), strict=True):
        a, b = (np.asarray(x.values if is_form(x) else x) for x in (got, want))
        np.testing.assert_array_equal(a, b[: len(a)] if a.ndim and len(a) != len(b) else b)


FORMS = ["quantize 4", "sign", "kept error", "top_k", "random_k", "per row, top_k", "nothing"]


@pytest.fixture(scope="module")
def packed():
    """{code: (a client's message, its bytes)} for five rows."""
    held = np.array([41, 7, 0, 49, 12])
    made = {name: sent_by(chain(CODES[name]()), held)[0][0] for name in FORMS}
    return {name: (jax.tree.map(np.asarray, sent), pack_message(sent, held)) for name, sent in made.items()}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_as_what_packs_to_the_same_bytes(packed, data):
    """Bytes flipped, cut off or added: what is read packs to the same bytes; all else is one ValueError."""
    sent, message = packed[data.draw(st.sampled_from(FORMS))]
    wrong = bytearray(message)
    for place in data.draw(st.lists(st.integers(0, len(message) - 1), max_size=4)):
        wrong[place] ^= data.draw(st.integers(1, 255))
    wrong = wrong[: data.draw(st.sampled_from([len(wrong), len(wrong), len(wrong) - 1, 7, 0]))]
    wrong += data.draw(st.binary(max_size=2)) if data.draw(st.booleans()) else b""
    with contextlib.suppress(ValueError):
        back, ids = unpack_message(bytes(wrong), sent, 5, N)
        check_written(back, ids, wrong)


def check_written(back, ids, message):
    """What was read is what the packer writes."""
    assert pack_message(back, ids) == message
    assert sorted(set(ids.tolist())) == sorted(ids.tolist())
    assert all(0 <= each < N for each in ids.tolist())


TWO = {"t": Table(np.zeros((2, 1), np.float32))}
FEW = {"a": Kept(np.arange(5, dtype=np.float32), np.arange(5) < 1, 0.2, False)}


@pytest.mark.parametrize(
    ("data", "like", "rows", "what"),
    [
        (np.array([3, N], np.int32).tobytes() + bytes(8), TWO, 2, "row ids outside the catalogue"),
        (np.array([-1, 3], np.int32).tobytes() + bytes(8), TWO, 2, "row ids outside the catalogue"),
        (np.array([3, 3], np.int32).tobytes() + bytes(8), TWO, 2, "a row that comes twice"),
        (np.array([3, 4], np.int32).tobytes() + np.float32([0, np.inf]).tobytes(), TWO, 2, "not finite"),
        (bytes(15), TWO, 2, "15 bytes where 16 were expected"),
        (bytes(16), TWO, -1, "16 bytes where 0 were expected"),
        (bytes(4) + b"\xe0", FEW, 0, "places past the entries"),  # place 7 of 5: an IndexError, once
        (bytes(4) + b"\x04", FEW, 0, "bits after the last number"),
        (b"\2", {"b": np.zeros(1, bool)}, 0, "neither 0 nor 1"),
        (b"\xff", {"c": Coded(np.zeros(1, np.uint8), 3)}, 0, "bits after the last number"),
    ],
)
def test_malformed_messages_say_what_is_wrong(data, like, rows, what):
    with pytest.raises(ValueError, match=what):
        unpack_message(data, like, rows, N)


@pytest.mark.parametrize("name", ["quantize 4", "terngrad", "random_k"])
def test_right_on_average(name):
    """Unbiased: the mean of many codes of one update is the update, within five standard errors."""
    channel, held = chain(CODES[name]()), np.arange(K)
    update = update_of(held)
    state, who = client_of(channel, held)

    @jax.jit
    def once(key):
        me = who._replace(key=key, public=jax.random.fold_in(key, 1))
        message, _ = encode_message(channel, update, broadcast_state(channel, state), me)
        message = channel.decode_message(
            message, broadcast_state(channel, state), me._replace(link_state=None, key=None)
        )
        from jaxfed.core.types import RoundView

        return channel.decode(message, state, RoundView(me.public, who.cohort, jnp.ones(2, bool)))[0]

    many = jax.vmap(once)(jax.random.split(jax.random.key(7), 2000))
    for got, want in zip(jax.tree.leaves(many), jax.tree.leaves(update), strict=True):
        error = np.abs(got.mean(0) - want)
        assert (error <= 5 * np.asarray(got.std(0)) / np.sqrt(2000) + 1e-5).all()


def test_quantised_numbers_are_next_to_what_they_were():
    """Within one step: of the largest number of a row of the table, of the largest of any other leaf."""
    held = np.arange(K)
    channel = chain(quantize(8))
    (sent, _), who = sent_by(channel, held)
    got, want = opened(channel, sent, who), update_of(held)
    for name in ("item", "bias", "w", "one"):
        x, y = (np.asarray(jax.tree.leaves(tree.params[name])[0]) for tree in (got, want))
        largest = np.abs(y).max(-1, keepdims=True) if name == "item" else np.abs(y).max()
        assert (np.abs(x - y) <= largest / 127 * 1.001).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, K), st.sampled_from([0.01, 0.1, 0.25, 0.5, 1.0]), st.integers(0, 1000))
def test_top_k_is_the_largest(rows, share, seed):
    """Against NumPy: in each leaf the largest share of the client's own numbers, rounded up."""
    held = np.random.default_rng(seed).permutation(N)[:rows]
    channel = chain(top_k(share, False))
    (sent, _), _ = sent_by(channel, held, seed)
    for node, whole in zip(jax.tree.leaves(sent, is_leaf=is_form), jax.tree.leaves(update_of(held, seed)), strict=True):
        x = np.asarray(whole)
        entries = x.size // K * rows if x.ndim and x.shape[0] == K else x.size
        count = -(-entries * round(share * 10000) // 10000)
        order = np.sort(np.abs(x).ravel())[::-1]
        chosen = np.asarray(node.chosen)
        assert chosen.sum() == count
        assert np.abs(x[chosen]).min() >= order[count - 1]
        np.testing.assert_array_equal(np.asarray(node.values), np.where(chosen, x, 0))


@pytest.mark.parametrize("name", ["sign", "top_k", "kept error"])
def test_error_feedback_forgets_nothing(name):
    """What was read at the server and what the client keeps add up to what there was to send, in two rounds."""
    channel, held = chain(CODES[name]()), np.arange(K)
    (sent, link_state), who = sent_by(channel, held)
    again, link_state = encode_message(
        channel,
        update_of(held, 5),
        broadcast_state(channel, channel.init(WHOLE)[0]),
        who._replace(link_state=link_state),
    )
    read = [opened(channel, each, who) for each in (sent, again)]
    total = jax.tree.map(lambda *x: sum(x), *read, link_state[0])
    there = jax.tree.map(jnp.add, update_of(held), update_of(held, 5))
    for x, y in zip(jax.tree.leaves(total), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)  # twice the roundings of one round


def test_low_rank_with_a_gain_of_zero_is_right_on_average():
    """Two of eight directions, drawn anew 4,000 times; five deviations of a mean."""
    made, tree, draws = low_rank(2, gain=0.0), {"w": jax.random.normal(jax.random.key(0), (3, D))}, 4000
    state, link_state = made.init(tree)

    def once(key):
        sent, _ = made.encode(tree, (), shape_client(link_state, K, N)._replace(public=key))
        return made.decode(sent, state, RoundView(key, jnp.zeros(1, int), jnp.ones(1, bool)))[0]["w"]

    got = np.asarray(jax.vmap(once)(jax.random.split(jax.random.key(1), draws)))
    assert (np.abs(got.mean(0) - tree["w"]) < 5 * got.std(0) / np.sqrt(draws)).all()


@pytest.mark.parametrize("name", ["quantize 4", "terngrad", "kept error", "sign", "drive", "top_k", "random_k"])
@pytest.mark.parametrize("rows", [1, 5])
def test_codes_lose_nothing_of_weights(name, rows):
    """What the server divides by is what the client weighs, on each row it holds, and no less."""
    channel, held = chain(per_row_mean(), CODES[name]()), np.arange(rows)
    sent, who = sent_by(channel, held)
    _, weights, weight = opened(channel, sent[0], who)
    np.testing.assert_allclose(np.asarray(weights.values.rows)[:rows], 1, rtol=1e-6)
    np.testing.assert_allclose(weight, 1, rtol=1e-6)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=K, max_size=K))
@example([2.0**-133] + [0.0] * (K - 1))  # 1e-40: XLA takes it for 0, as the unit of a 127th would be
@example([2.0**-121] + [0.0] * (K - 1))
@settings(max_examples=20, deadline=None)
def test_weights_that_differ_are_never_enlarged(numbers):
    """They are rounded toward zero, to a 127th of the largest: a norm that a clip bounds stays bounded."""
    made = keep_weights_apart(top_k(0.5, False))
    weights = Weights(Table(jnp.array(numbers, jnp.float32)))
    me = shape_client(made.init(weights)[1], K, N)
    sent, _ = made.encode(weights, (), me)
    got = np.asarray(made.decode_message(sent, (), me).values.rows)
    want = np.array(numbers, np.float32)
    assert (np.abs(got) <= np.abs(want) * (1 + 1e-6)).all()
    unit = max(np.abs(want).max() / 127 * 1.001, 127 * np.finfo(np.float32).tiny)
    assert (np.abs(got - want) <= unit).all()


def test_the_size_of_signs_is_that_of_the_rows_held():
    """The mean of what is there: places that only fill a block make no number smaller."""
    channel = chain(sign(False))
    (sent, _), who = sent_by(channel, np.arange(3))
    got, want = (np.asarray(x.params["bias"].rows)[:3] for x in (opened(channel, sent, who), update_of(np.arange(3))))
    np.testing.assert_allclose(got, np.sign(want) * np.abs(want).mean(), rtol=1e-6)


def test_codes_come_last():
    with pytest.raises(ValueError, match=r"weighted_mean cannot work on the codes of quantize: put quantize last"):
        chain(quantize(), weighted_mean())
    assert chain(top_k(), mean()).decode_message  # a link that does nothing on the client may follow


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: quantize(1), "quantize.bits is 1"),
        (lambda: top_k(0.0), "top_k.share is 0.0"),
        (lambda: random_k(1.5), "random_k.share is 1.5"),
        (lambda: low_rank(0), "low_rank.rank is 0"),
    ],
)
def test_numbers_that_cannot_be(make, what):
    with pytest.raises(ValueError, match=what):
        make()


def test_entropy_is_below_the_packed_size_and_nothing_for_a_constant():
    (sent, _), _ = sent_by(chain(quantize(8)), np.arange(K))
    assert 0 < entropy_bytes(sent, K) <= message_bytes(sent, K)
    still = Broadcast({"item": Table(Coded(jnp.zeros((K, D), jnp.uint8), 8))})
    assert entropy_bytes(still, K) == 4 * K  # the ids of the rows


def test_forms_know_their_size():
    few = Kept(jnp.zeros((10, 10)), jnp.zeros((10, 10), bool), 0.1, False)
    assert message_bytes(few, 0) == -(-10 * (32 + 7) // 8)
    assert message_bytes(Kept(few.values, few.chosen, 0.1, True), 0) == 40
    assert message_bytes(Coded(jnp.zeros(9, jnp.uint8), 3), 0) == 4
    assert message_bytes({"t": Table(Coded(jnp.zeros((5, 4), jnp.uint8), 2))}, 3) == 3 + 12
    assert jax.tree.leaves(zeros_like(message_shapes(mean(), WHOLE, (), (), N)))


def test_a_secure_sum_over_the_rows_of_the_cohort():
    """All rows of the cohort, four bytes a number, whose ids are downloaded with the model; or whole tables."""
    few, all_rows = (make_wire(chain(mean(), clip(1.0), ring(8, 10, union=union)), WHOLE) for union in (True, False))
    numbers = sum(x.size // N for x in jax.tree.leaves(WHOLE) if x.shape[:1] == (N,))
    rest = sum(x.size for x in jax.tree.leaves(WHOLE) if x.shape[:1] != (N,))
    held, union = np.array([2, 3]), 5
    np.testing.assert_array_equal(few.up(held, union), [4 * (union * numbers + rest)] * 2)
    np.testing.assert_array_equal(few.down(held, union), [4 * (union * numbers + rest + union)] * 2)
    np.testing.assert_array_equal(all_rows.up(held, union), [4 * (N * numbers + rest)] * 2)
    np.testing.assert_array_equal(all_rows.down(held, union), [4 * (N * numbers + rest)] * 2)
    assert (few.sees, all_rows.sees) == ("sum+union", "sum")
