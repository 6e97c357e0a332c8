"""The way of the model from the server to a client: codes, which the client opens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfed.core.link import Channel, broadcast_state, decode_total, encode_message, list_links
from jaxfed.core.streams import DOWN
from jaxfed.core.tables import take_rows
from jaxfed.core.tree import to_compute_dtype
from jaxfed.core.types import Broadcast, ClientView, RoundView, Tree


def check_download(channel: Channel, shared: Tree) -> None:
    """Raises ValueError for links that nobody could undo at a client, from one message and public randomness alone."""
    for each in list_links(channel):
        for_sums = each.claims.reveals != "message" or each.claims.needs_all_rows
        kept = () if for_sums else jax.eval_shape(each.init, shared)
        # a link with a gain undoes one message as it does a sum: a rotation
        undone = each.decode_message or (each.decode and each.claims.l2_gain)
        if for_sums or not each.encode or not undone or jax.tree.leaves(kept):
            raise ValueError(
                f"download: {each.claims.name} cannot be read at a client, or keeps something between rounds: use "
                "codes without error feedback (quantize, drive, rotate before quantize)"
            )


def make_download(channel: Channel, whole: bool) -> Callable[[Broadcast, ClientView], Broadcast]:
    """receive(shared, client) -> what the client reads of its rows of the model. Its update is the change from there.

    A message is a function of the model and of (seed, round, client, link); public: of (seed, round). whole: clients do
    not show their rows, so that there is one message for all, of every row.
    """

    def receive(shared, client):
        public, secret = jax.random.split(jax.random.fold_in(client.public, DOWN))
        ids, held = (jnp.int32(0), jnp.arange(client.size)) if whole else (client.id, client.rows)
        sent = to_compute_dtype(shared if whole else take_rows(shared, held))
        state, link_state = channel.init(sent)
        link_view = client._replace(
            link_state=link_state, key=jax.random.fold_in(secret, ids), public=public, id=ids, rows=held
        )
        message, _ = encode_message(channel, sent, broadcast_state(channel, state), link_view)
        if channel.decode_message:
            message = channel.decode_message(
                message, broadcast_state(channel, state), link_view._replace(link_state=None, key=None)
            )
        read, _, _ = decode_total(channel, message, state, RoundView(public, ids[None], jnp.ones(1, bool)))
        return take_rows(read, client.rows) if whole else read

    return receive
