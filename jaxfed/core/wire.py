"""What crosses the wire: the forms a message may take, their size, and the packer that writes the very bytes.

A leaf of a message is an array as it is, or one of two forms: `Coded`, integers of a few bits, or `Kept`, some of the
entries. Tables are priced by the rows that a client really holds, whatever its block pads them to.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.channel_checks import message_shapes
from jaxfed.core.link import Channel, broadcast_state
from jaxfed.core.pairs import count_paired_rows, count_pairs
from jaxfed.core.tables import is_table, num_rows, repeat_rows, take_rows
from jaxfed.core.tree import count_bytes, to_compute_dtype
from jaxfed.core.types import Coded, Kept, Tree

ID = 4  # bytes of a row's id


class Wire(NamedTuple):
    """What crosses the wire for one client and one round, by the rows it holds."""

    # int [...] rows (, rows of its whole cohort, int [...] ids of clients) -> bytes it sends, row ids included
    up: Callable[..., np.ndarray]
    down: Callable[..., np.ndarray]  # bytes it receives, its request for rows included
    sees: str  # what the server learns of it: update+rows | update | sum+union | sum
    frozen: int = 0  # bytes that it receives once, before its first round: the frozen part of the model
    by_round: Callable[[int], "Wire"] | None = None  # the wire of a round, where sizes change; None: this one for all

    def in_round(self, number: int) -> "Wire":
        """The wire of a round."""
        return self.by_round(number) if self.by_round else self


def is_form(node: Any) -> bool:
    """Whether a node of a message is a `Coded` or a `Kept`."""
    return isinstance(node, Coded | Kept)


def iterate_forms(tree: Tree) -> list[tuple[Any, bool]]:
    """(leaf or form, is it in a table?) in order."""
    out = []
    for node in jax.tree.leaves(tree, is_leaf=lambda x: is_table(x) or is_form(x)):
        if is_table(node):
            out += [(leaf, True) for leaf in jax.tree.leaves(node.rows, is_leaf=is_form)]
        else:
            out.append((node, False))
    return out


def form_values(leaf: Any) -> Any:
    """The array of a leaf or form."""
    return leaf.values if is_form(leaf) else leaf


def form_bits(leaf: Any, entries: Any) -> Any:
    """Bits of so many entries of a leaf; int or an array of them."""
    if isinstance(leaf, Coded):
        return entries * leaf.bits
    if isinstance(leaf, Kept):
        return kept_entries(leaf.share, entries) * (32 + (0 if leaf.known else position_bits(entries)))
    return entries * leaf.dtype.itemsize * 8


def kept_entries(share: float, entries: Any) -> Any:
    """How many entries are kept of so many: a share of them in ten thousandths, rounded up."""
    return -(-np.asarray(entries, np.int64) * round(share * 10_000) // 10_000)


def position_bits(entries: Any) -> Any:
    """Bits that tell one of so many entries from the others."""
    return np.ceil(np.log2(np.maximum(entries, 1))).astype(np.int64)


def message_bytes(tree: Tree, rows: Any, pairs: bool = False) -> Any:
    """Bytes of a message (arrays or shapes) of a client that holds so many rows: each leaf begins a byte, and the ids
    of its rows come with them. rows: int or an array of them. pairs: rows are those of pairs of rows, of which the ids
    are sent."""
    rows, out, ids = np.asarray(rows, np.int64), 0, 0
    for leaf, in_table in iterate_forms(tree):
        shape = form_values(leaf).shape
        entries = rows * math.prod(shape[1:]) if in_table else np.int64(math.prod(shape))
        out, ids = out + -(-form_bits(leaf, entries) // 8), ids or in_table
    return out + ID * (count_paired_rows(rows) if pairs else rows) * ids


def pack_message(tree: Tree, held: np.ndarray, pairs: bool = False) -> bytes:
    """The bytes of one client's message; held int [r]: the ids of its rows, the first r of its tables. pairs: the
    tables have a row for each pair of these."""
    out = [np.asarray(held, np.int32).tobytes()] if num_rows(open_shapes(tree)) else []
    rows = count_pairs(len(held)) if pairs else len(held)
    for leaf, in_table in iterate_forms(tree):
        x = np.asarray(form_values(leaf))
        x = (x[:rows] if in_table else x).ravel()
        if isinstance(leaf, Coded):
            out.append(pack_bits(x, leaf.bits))
        elif isinstance(leaf, Kept):
            count = int(kept_entries(leaf.share, x.size))
            chosen = np.asarray(leaf.chosen)
            chosen = (chosen[:rows] if in_table else chosen).ravel()
            places = kept_places(chosen, count)
            number = x[places].astype(np.float32).view(np.uint32).astype(np.int64)
            out.append(pack_pairs(number, places, 0 if leaf.known else int(position_bits(x.size))))
        else:
            out.append(x.tobytes())
    return b"".join(out)


def pack_bits(x: np.ndarray, width: int) -> bytes:
    """Integers of `width` bits each, one after the other."""
    return np.packbits(x.astype(np.int64)[:, None] >> np.arange(width) & 1, axis=None).tobytes()


def pack_pairs(number: np.ndarray, places: np.ndarray, width: int) -> bytes:
    """32-bit numbers, each followed by its place of `width` bits."""
    columns = [number[:, None] >> np.arange(32) & 1, places[:, None] >> np.arange(width) & 1]
    return np.packbits(np.concatenate(columns, 1).astype(np.uint8), axis=None).tobytes()


def open_shapes(tree: Tree) -> Tree:
    """The same tree of plain arrays: forms opened."""
    return jax.tree.map(form_values, tree, is_leaf=is_form)


def unpack_message(data: bytes, like: Tree, rows: int, items: int, pairs: bool = False) -> tuple[Tree, np.ndarray]:
    """Undoes `pack`.

    Args:
        data: the message, from anybody.
        like: a message of the same forms and shapes. Of forms whose places both ends draw it holds the places.
        rows: how many rows of its tables the client holds.
        items: rows of the whole catalogue.
        pairs: the tables have a row for each pair of these.

    Returns:
        (the message, int32 [rows]: the ids of its rows, in the client's order).

    Raises:
        ValueError: `pack` would not write this: it is cut or too long, ids or places are none, repeated or out of
            order, numbers are not finite, or bits are set that say nothing.
    """
    like_leaves, at = iterate_forms(like), 0
    table_rows = count_pairs(rows) if pairs else rows
    expected = int(message_bytes(like, table_rows, pairs)) if rows >= 0 else 0
    refuse_malformed(len(data) != expected, f"{len(data)} bytes where {expected} were expected")
    ids = np.zeros(0, np.int32)
    if any(in_table for _, in_table in like_leaves):
        ids, at = np.frombuffer(data, np.int32, rows), ID * rows
        refuse_malformed(((ids < 0) | (ids >= items)).any(), "row ids outside the catalogue")
        refuse_malformed(len(np.unique(ids)) < rows, "a row that comes twice")
    out = []
    for leaf, in_table in like_leaves:
        shape = form_values(leaf).shape
        shape = (table_rows, *shape[1:]) if in_table else shape
        entries = math.prod(shape)
        count = int(-(-form_bits(leaf, np.int64(entries)) // 8))
        out.append(read_leaf(leaf, data[at : at + count], shape, entries))
        at += count
    structure = jax.tree.structure(like, is_leaf=is_form)
    return jax.tree.unflatten(structure, out), ids


def refuse_malformed(wrong: Any, what: str) -> None:
    """Raises ValueError where a message is wrong."""
    if wrong:
        raise ValueError(f"a message is malformed ({what}): refuse it")


def read_leaf(leaf: Any, data: bytes, shape: tuple[int, ...], entries: int) -> Any:
    """One leaf from its bytes. Raises ValueError for any that `pack` would not write."""
    if not isinstance(leaf, Coded | Kept):
        x = np.frombuffer(data, leaf.dtype)
        refuse_malformed(
            x.dtype == bool and (np.frombuffer(data, np.uint8) > 1).any(), "a boolean that is neither 0 nor 1"
        )
        refuse_malformed(not np.isfinite(x).all(), "a number that is not finite")
        return x.reshape(shape)
    stream = np.unpackbits(np.frombuffer(data, np.uint8)).astype(np.int64)
    if isinstance(leaf, Coded):
        used = entries * leaf.bits
        refuse_malformed(stream[used:].any(), "bits after the last number")
        x = stream[:used].reshape(-1, leaf.bits) << np.arange(leaf.bits)
        return Coded(x.sum(1).astype(leaf.values.dtype).reshape(shape), leaf.bits)
    count, width = int(kept_entries(leaf.share, entries)), 0 if leaf.known else int(position_bits(entries))
    refuse_malformed(stream[count * (32 + width) :].any(), "bits after the last number")
    each = stream[: count * (32 + width)].reshape(count, 32 + width)
    number = (each[:, :32] << np.arange(32)).sum(1).astype(np.uint32).view(np.float32)
    refuse_malformed(not np.isfinite(number).all(), "a number that is not finite")
    if leaf.known:  # the server draws the places itself
        at = kept_places(np.asarray(leaf.chosen).ravel()[:entries], count)
    else:
        at = (each[:, 32:] << np.arange(width)).sum(1)
        refuse_malformed((np.diff(at) <= 0).any() or (at >= entries).any(), "places past the entries or out of order")
    x, chosen = np.zeros(entries, np.float32), np.zeros(entries, bool)
    x[at], chosen[at] = number, True
    return Kept(x.reshape(shape), chosen.reshape(shape), leaf.share, leaf.known)


def kept_places(chosen: np.ndarray, count: int) -> np.ndarray:
    """The first `count` places that are chosen, ascending; where they are too few, others fill up, and hold zeros."""
    return np.sort(np.argsort(~chosen, kind="stable")[:count])


def entropy_bytes(tree: Tree, rows: int) -> float:
    """Bytes if the integers of a message were coded by their frequencies in it (order 0), the rest as it is."""
    out = ID * rows * any(in_table for _, in_table in iterate_forms(tree)) * 1.0
    for leaf, in_table in iterate_forms(tree):
        x = np.asarray(form_values(leaf))
        x = (x[:rows] if in_table else x).ravel()
        if isinstance(leaf, Coded) and x.size:
            share = np.unique(x, return_counts=True)[1] / x.size
            out += x.size * -(share * np.log2(share)).sum() / 8
        else:
            out += int(-(-form_bits(leaf, np.int64(x.size)) // 8))
    return float(out)


def coded_shapes(channel: Channel | None, tree: Tree, size: int) -> Tree:
    """Shapes of what a channel that keeps nothing makes of a tree; None: the tree."""
    if channel is None:
        return tree
    example = jax.eval_shape(to_compute_dtype, tree)
    state, link_state = jax.eval_shape(channel.init, example)
    return message_shapes(channel, example, state, link_state, size)


def make_wire(
    channel: Channel,
    shared: Tree,
    download: Channel | None = None,
    sends: Callable[[Tree], Tree] = lambda x: x,
    alone: Callable[[Tree], Tree] = lambda x: (),
    frozen: Tree = (),
    pairs: bool = False,
) -> Wire:
    """Derived from the chain, from the links of the download, if any, and from shapes. sends: see
    `ClientWork.update_shapes`; alone: see `Method.own_download`. frozen: see `Model.frozen`. pairs: rows are those of
    pairs of rows, and nothing of the model is downloaded.

    A client that asks for its rows has shown them, whatever hides its upload: one that sends no rows, or hides all but
    the sum, downloads whole tables, or the rows of its cohort where those are public.
    """
    everything = num_rows(shared)
    state, _ = jax.eval_shape(channel.init, jax.eval_shape(lambda x: sends(to_compute_dtype(x)), shared))
    row_shapes = jax.eval_shape(
        partial(take_rows, ids=jnp.zeros(1, jnp.int32)), (shared, broadcast_state(channel, state))
    )
    # float32, whatever the model is stored in
    update = jax.eval_shape(lambda x: sends(to_compute_dtype(x)), row_shapes[0])
    link_state = jax.eval_shape(channel.init, update)[1]
    sent = message_shapes(channel, update, state, link_state, everything)
    received = (
        coded_shapes(download, row_shapes[0], everything),
        row_shapes[1],
        jax.eval_shape(lambda x: alone(to_compute_dtype(x)), row_shapes[0]),
    )
    shows_rows = num_rows(open_shapes(sent)) > 0 and channel.claims.reveals == "message"
    sees = "update+rows" if shows_rows else "update"
    if channel.claims.reveals != "message":
        public_rows = channel.claims.reveals == "sum and rows" and num_rows(open_shapes(sent))
        sees = "sum+union" if public_rows else "sum"

    whole = jax.eval_shape(repeat_rows, sent)  # what hides its rows cannot say that they are alike

    def together(tree, rows, union):
        """Bytes of the rows that all send alike, whose ids need not be told: the cohort's, or all there are."""
        every = np.full(np.shape(rows), union if sees == "sum+union" else everything, np.int64)
        return message_bytes(tree, every) - (ID * every if num_rows(open_shapes(tree)) else 0)

    def up(rows, union=0, clients=None):
        return message_bytes(sent, rows, pairs) if channel.claims.reveals == "message" else together(whole, rows, union)

    def down(rows, union=0, clients=None):
        listed = ID * union if sees == "sum+union" else 0  # which rows the cohort holds, each must be told
        if pairs:  # no rows are asked for
            return together(received, rows, union) + listed
        return message_bytes(received, rows) if shows_rows else together(received, rows, union) + listed

    return Wire(up, down, sees, count_bytes(frozen))


def join_wires(wires: Sequence[Wire], groups: np.ndarray) -> Wire:
    """The wire of clients in groups, each of which has one of its own. groups: int [clients]."""
    groups = np.append(groups, 0)  # of nobody

    def price(name):
        def by_group(rows, union=0, clients=None):
            every = np.stack([getattr(each, name)(rows, union) for each in wires])
            return np.take_along_axis(every, groups[np.asarray(clients)][None], 0)[0]

        return by_group

    return wires[0]._replace(up=price("up"), down=price("down"))
