"""Links for clients who were sent models of different rounds; see `arrivals.buffered`."""

import jax
import jax.numpy as jnp

from jaxfed.channels.average import map_averaged
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.tree import scale_tree
from jaxfed.core.types import Broadcast, ClientView


def staleness_discount(age: jax.Array, exponent: float) -> jax.Array:
    """float []: (1 + age)^-exponent, the polynomial discount of FedAsync (Xie et al. 2019) and FedBuff."""
    return (1.0 + age) ** -exponent


def check_exponent(name: str, exponent: float) -> None:
    """Raises ValueError for a discount that grows with age."""
    if exponent < 0:
        raise ValueError(f"{name}.exponent is {exponent}: it must not be negative")


@named("channel")
def staleness(exponent: float = 0.5) -> Channel:
    """Multiplies an update by (1 + age)^-exponent (FedBuff: Nguyen et al. 2022). Put it before (left of) a mean.

    A client learns the age of its update when it reports, and sends the product. So it works with secure sums, codes
    and clipping. It never makes a norm larger.

    Args:
        exponent: An update that is `age` rounds old has weight (1 + age)^-exponent. 0: age is ignored.

    Returns:
        The link.

    Raises:
        ValueError: the exponent is negative.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> client = SimpleNamespace(link_state=(), age=3)
        >>> float(jf.channels.staleness(exponent=0.5).encode(jnp.array(1.0), (), client)[0])
        0.5
    """
    check_exponent("staleness", exponent)

    def encode(update, sent, client):
        discount = staleness_discount(client.age, exponent)
        return map_averaged(lambda update: scale_tree(discount, update), update), client.link_state

    return link(encode, l2_gain=lambda bound: bound, name="staleness")


@named("channel")
def mixing(rate: float = 0.6, exponent: float = 0.5) -> Channel:
    """FedAsync (Xie et al. 2019): the server's model x becomes (1 - a) x + a y, y being a client's model and a = rate
    (1 + age)^-exponent. This holds for the rows that the client holds.

    It is for a cohort of one (`buffered`, size 1) and server sgd(1.). With several clients, a mean beside it mixes x
    with the mean of their models. An update moves the model by what a client has changed; this also undoes what others
    have changed since. The server computes it client by client, so no secure sum can follow.

    Args:
        rate: How far the server's model moves to a client's, above 0, up to 1.
        exponent: A model that is `age` rounds old has weight (1 + age)^-exponent. 0: age is ignored.

    Returns:
        The link.

    Raises:
        ValueError: the rate is not above 0 and up to 1, the exponent is negative, or, in a chain, another link comes
            first.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> client, update = SimpleNamespace(age=3, drift=jnp.array(0.0)), jf.Broadcast(jnp.array(1.0))  # x - y
        >>> float(jf.channels.mixing(rate=0.5, exponent=0.5).decode_message(update, (), client).params)
        0.25
    """
    check_exponent("mixing", exponent)
    if not 0 < rate <= 1:
        raise ValueError(f"mixing.rate is {rate}: it lies above 0, up to 1")

    def init(example):
        if not isinstance(example, Broadcast):
            raise ValueError("mixing: it opens whole models, and a link before it sends something else: put it first")
        return (), ()

    def decode_message(message, sent, client: ClientView):
        step = jax.tree.map(jnp.add, message.params, client.drift)  # x - y, whatever y began from
        return message._replace(params=scale_tree(rate * staleness_discount(client.age, exponent), step))

    return link(init=init, decode_message=decode_message, name="mixing")
