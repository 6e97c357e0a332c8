"""Pairs of rows: their numbers, what clients send for them, and its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.channels.clip import clip
from jaxfed.channels.secure_sum import ring
from jaxfed.core.aggregate import TILE, add_same_rows
from jaxfed.core.channel import chain
from jaxfed.core.link import link
from jaxfed.core.pairs import (
    MOST_ROWS,
    PairSums,
    check_pairs,
    count_paired_rows,
    count_pairs,
    find_pairs,
    list_pairs,
    number_row_pairs,
    pair_table,
    split_pairs,
    to_dense,
)
from jaxfed.core.tables import Table, same_rows
from jaxfed.core.types import Broadcast
from jaxfed.core.wire import make_wire, message_bytes, pack_message, unpack_message


def test_pairs_are_numbered_row_by_row():
    numbers = {(i, j): i * (i + 1) // 2 + j for i in range(5) for j in range(i + 1)}
    assert sorted(numbers.values()) == list(range(count_pairs(5)))
    got = np.asarray(number_row_pairs(jnp.array([3, 0, 4, 5]), 5))  # the last is unused
    want = [numbers[3, 3], numbers[3, 0], numbers[4, 3], 15, numbers[0, 0], numbers[4, 0], 15, numbers[4, 4], 15, 15]
    assert got.tolist() == want


@given(st.integers(0, count_pairs(MOST_ROWS) - 1))
def test_a_pair_is_split_into_its_rows(pair):
    high, low = split_pairs(np.array([pair]))
    assert 0 <= low[0] <= high[0]
    assert high[0] * (high[0] + 1) // 2 + low[0] == pair


def test_the_largest_catalogue_has_numbers_of_31_bits():
    last = np.asarray(number_row_pairs(jnp.array([MOST_ROWS - 1, MOST_ROWS - 2]), MOST_ROWS))
    assert last.tolist() == [count_pairs(MOST_ROWS) - 1, count_pairs(MOST_ROWS) - 2, count_pairs(MOST_ROWS - 1) - 1]
    assert list_pairs([np.array([[MOST_ROWS - 1, MOST_ROWS - 2]])], MOST_ROWS).tolist() == sorted(last.tolist())
    with pytest.raises(ValueError, match="at most 65,535 items, there are 65,536"):
        check_pairs(MOST_ROWS + 1)


@given(st.integers(0, 10_000))
def test_so_many_rows_have_so_many_pairs(rows):
    assert count_paired_rows(np.array([count_pairs(rows)]))[0] == rows


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=6), min_size=1, max_size=5))
def test_the_pairs_of_clients_are_listed_and_found(clients):
    width = max(1, *map(len, clients))
    rows = np.full((len(clients), width), 13, np.int32)
    for client, items in enumerate(clients):
        rows[client, : len(items)] = items
    got = list_pairs([rows], 13)
    want = {count_pairs(max(a, b)) + min(a, b) for items in clients for a in items for b in items}
    assert got.tolist() == sorted(want)
    for client, items in enumerate(clients):
        ids = number_row_pairs(jnp.asarray(rows[client]), 13)
        places = np.asarray(find_pairs(ids, jnp.asarray(got), count_pairs(13)))
        assert ((places < len(got)) == (np.asarray(ids) < count_pairs(13))).all()
        assert sorted(got[places[places < len(got)]]) == sorted({int(i) for i in ids if i < count_pairs(13)})
        assert (places < len(got)).sum() == count_pairs(len(items))


def test_sums_are_a_lower_triangle():
    sums = PairSums(np.array([1, 2, 4]), np.array([[5.0], [6.0], [7.0]], np.float32), 3)
    assert to_dense(sums).tolist() == [[0, 0, 0], [5, 6, 0], [0, 7, 0]]


def messages(columns=1):
    def sends(shared):
        rows = shared.params["tables"]["pairs"].rows.shape[0]
        return Broadcast({"params": {}, "tables": {"pairs": Table(jnp.zeros((rows, columns)))}})

    return sends


def wire(channel, items=100):
    shared = jax.eval_shape(lambda: Broadcast({"tables": {"pairs": pair_table(items)}}))
    return make_wire(chain(channel), shared, sends=messages(), pairs=True)


def test_a_client_of_five_items_sends_fifteen_numbers_and_five_ids():
    plain = wire(link())
    assert plain.sees == "update+rows"
    assert plain.up(count_pairs(np.array([0, 5, 60]))).tolist() == [0, 4 * (15 + 5), 4 * (1830 + 60)]
    assert plain.down(count_pairs(np.array([5]))).tolist() == [0]  # nothing of the model is read


def test_under_a_secure_sum_all_pairs_are_sent_or_a_public_list_of_them():
    hidden = wire(ring(100, bound=1.0))
    assert (hidden.sees, hidden.up(15), hidden.down(15)) == ("sum", 4 * 5050, 0)  # half of X'X, whatever one has
    public = wire(ring(100, bound=1.0, union=True))
    assert public.sees == "sum+union"
    assert (public.up(15, 400), public.down(15, 400)) == (4 * 400, 4 * 400)  # the list comes down


def test_the_bytes_of_pairs_are_those_that_are_priced():
    held, values = np.array([7, 2, 9], np.int32), np.arange(6.0, dtype=np.float32)[:, None]
    message = {"pairs": Table(np.concatenate([values, np.zeros((4, 1), np.float32)]))}  # room for four items
    data = pack_message(message, held, pairs=True)
    assert len(data) == message_bytes(message, 6, pairs=True) == 4 * (3 + 6)
    got, ids = unpack_message(data, message, 3, 10, pairs=True)
    assert ids.tolist() == held.tolist()
    np.testing.assert_array_equal(got["pairs"].rows, values)
    with pytest.raises(ValueError, match="malformed"):
        unpack_message(data[:-4], message, 3, 10, pairs=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
@pytest.mark.parametrize("items", [20, 2000])  # of which a client holds 4: as a product, or as a scatter
def test_a_row_that_is_the_same_for_all_is_added_to_each(dtype, items):
    rows = jnp.array([[3, 0, 7, 1], [0, 3, items, items], [items] * 4])  # past the end: unused, or absent
    values = jnp.array([[[1, 2], [3, 4]], [[10, 20], [30, 40]], [[0, 0], [0, 0]]], dtype)
    table = jnp.ones((items, 2, 2), dtype)
    want = np.ones((items, 2, 2))
    for client in range(3):
        for row in rows[client]:
            if row < items:
                want[row] += np.asarray(values[client])
    np.testing.assert_array_equal(add_same_rows(table, rows.ravel(), values), want)


@pytest.mark.parametrize("items", [TILE - 1, TILE, 2 * TILE + 44])
def test_rows_are_added_to_a_table_of_several_tiles(items):
    random = np.random.default_rng(items)
    rows = np.array([random.choice(items + 9, 40, replace=False) for _ in range(5)])  # some lie past the end
    values = random.integers(0, 9, (5, 3)).astype(np.float32)
    want = np.zeros((items, 3))
    for client in range(5):
        want[rows[client][rows[client] < items]] += values[client]
    got = jax.jit(add_same_rows)(jnp.zeros((items, 3)), jnp.array(rows.ravel()), jnp.array(values))
    np.testing.assert_array_equal(got, want)


def test_a_secure_sum_and_a_clip_send_the_rows_themselves():
    """A client of 3 rows sends a row of 5 numbers once; what looks at the whole message is given all three."""
    shared = jax.eval_shape(lambda: Broadcast({"item": Table(jnp.zeros((100, 2)))}))

    def sends(shared):
        return Broadcast({"item": same_rows(jnp.zeros(5), shared.params["item"].rows.shape[0])})

    def sent(*links):
        return make_wire(chain(*links), shared, sends=sends).up(3)

    assert sent(link()) == 4 * (5 + 3)
    assert sent(clip(1.0)) == 4 * (3 * 5 + 3)
    assert sent(ring(100, bound=1.0)) == 4 * 100 * 5  # of the whole table, as which rows it holds is hidden
