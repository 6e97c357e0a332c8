"""Clients that keep a model of their own beside the shared one: its state, and how it is scored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.core.method import Method
from jaxfed.core.tables import Table, map_tables, num_rows
from jaxfed.core.tree import subtract, zeros_like
from jaxfed.core.types import Tree


class OwnModel(NamedTuple):
    """A client's state with its own copy of the shared part. Rows that it does not have are the server's."""

    private: Tree  # beside the server's model
    copy: Tree  # like the shared part
    beside: Tree  # the private part of the copy
    written: Tree  # table of float [N]: the client's round in which it wrote a row of its copy; 0: never
    rounds: jax.Array  # float []: rounds it took part in


def new_own_model(params: Tree, private: Tree, beside: Tree) -> OwnModel:
    """The state of a client that has no copy yet."""
    rows = num_rows(params)
    return OwnModel(private, zeros_like(params), beside, Table(jnp.zeros(rows)) if rows else (), jnp.float32(0))


def own_copy(own: OwnModel, params: Tree, latest: bool = False) -> Tree:
    """The copy, where the client has one; latest: of its last round alone."""

    def row(copied, server):
        rows = own.written.rows
        there = (rows == own.rounds) & (rows > 0) if latest else rows > 0
        return jnp.where(there.reshape(there.shape + (1,) * (copied.ndim - 1)), copied, server)

    return map_tables(row, lambda copied, server: jnp.where(own.rounds > 0, copied, server), own.copy, params)


def stamp_rows(own: OwnModel, **new: Tree) -> OwnModel:
    """The state after a round in which the client wrote all the rows that it holds."""
    now = own.rounds + 1
    return own._replace(written=jax.tree.map(lambda x: jnp.full_like(x, now), own.written), rounds=now, **new)


def server_view(params: Tree, own: OwnModel) -> tuple[Tree, Tree]:
    """(shared, private) of the server's model at a client."""
    return params, own.private


def own_view(params: Tree, own: OwnModel) -> tuple[Tree, Tree]:
    """(shared, private) of a client's own model."""
    return own_copy(own, params), own.beside


def check_own_copy(method: Method) -> None:
    """Raises ValueError for a method of which a client keeps other things than the model's private part."""
    if not method.sends_difference:
        raise ValueError(
            "work.keep_copy: this work ends nowhere on the client, or keeps things of its own: set it to false, or "
            "take local_steps, alternate or reconstruct"
        )


def keep_own_copy(method: Method) -> Method:
    """The same method, whose clients keep what they have trained until their next round.

    It is evaluated as `personal`: rows of a client's last round are its own, the others the server's. PFedRec (Zhang et
    al. 2023) is evaluated so.

    Args:
        method: A method of which a client keeps the private part of the model alone, such as `fedavg`.

    Returns:
        The method, with one more view.

    Raises:
        ValueError: clients of this method keep other things, or end nowhere.

    Example:
        >>> import jaxfed as jf, optax
        >>> method = jf.algorithms.fedavg(jf.models.pfedrec(num_items=100), optax.sgd(0.1))
        >>> sorted(jf.algorithms.keep_own_copy(method).work.views)  # the models that are evaluated; "" is the server's
        ['', 'personal']
    """
    check_own_copy(method)
    work = method.work

    def init(params, key):
        shared, private = work.init(params, key)
        return shared, new_own_model(params, private, ())

    def update(shared, own, steps, key):
        report = work.update(shared, own.private, steps, key)
        end = subtract(shared.params, report.update.params)
        return report._replace(client_state=stamp_rows(own, private=report.client_state, copy=end))

    def personal(params, own):
        return own_copy(own, params, latest=True), own.private

    views = {"": server_view, "personal": personal}
    return method._replace(work=work._replace(init=init, update=update, views=views), sends_difference=False)
