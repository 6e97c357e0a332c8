"""Links that bound what one client can do to the sum."""

import math

import jax
import jax.numpy as jnp

from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.tables import l2_norm, map_tables
from jaxfed.core.tree import scale_tree, sum_last
from jaxfed.core.types import Mean, Tree


def check_bound(name: str, bound: float) -> None:
    """Raises ValueError for a bound that is none."""
    if not 0 < bound < math.inf:
        raise ValueError(f"{name} is {bound}: it must be a positive number")


def shrink_to_bound(update: Tree, bound: jax.typing.ArrayLike) -> tuple[Tree, jax.Array]:
    """(the update scaled down to an L2 norm of `bound`, its norm before). A norm that is not finite stays so."""
    length = l2_norm(update)
    return scale_tree(jnp.minimum(1, bound / jnp.where(length > 0, length, 1)), update), length


@named("channel")
def clip(bound: float = 1.0) -> Channel:
    """Scales an update whose L2 norm is above `bound` down to it (McMahan et al. 2018, "flat clipping").

    The norm is that of the whole message at this place, of all tables and leaves together. Rows that a client does not
    hold count as zeros.

    Args:
        bound: The largest L2 norm of a message.

    Returns:
        The link.

    Raises:
        ValueError: the bound is not a positive number.

    Example:
        >>> import jaxfed as jf
        >>> jf.channels.clip(0.5).claims.l2_gain(3.0)  # the norm after it, where 3 comes in
        0.5
    """
    check_bound("clip.bound", bound)

    def metrics(update, sent, client):
        return {"clip/clients": Mean(1.0 * (l2_norm(update) > bound), 1.0)}

    return link(
        lambda update, sent, client: (shrink_to_bound(update, bound)[0], client.link_state),
        l2_gain=lambda before: min(before, bound),
        metrics=metrics,
        name="clip",
    )


@named("channel")
def clip_per_row(bound: float = 0.1) -> Channel:
    """Scales each row of a table, and each other leaf as a whole, with an L2 norm above `bound` down to it.

    Args:
        bound: The largest L2 norm of a row.

    Returns:
        The link.

    Raises:
        ValueError: the bound is not a positive number.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> update, client = jf.Table(jnp.array([[3.0, 4.0], [0.3, 0.4]])), SimpleNamespace(link_state=())
        >>> jnp.linalg.norm(jf.channels.clip_per_row(1.0).encode(update, (), client)[0].rows, axis=1).tolist()
        [1.0, 0.5]
    """
    check_bound("clip_per_row.bound", bound)

    def rows(x):
        length = jnp.sqrt(sum_last(jnp.square(x), x.ndim - 1))
        return x * jnp.minimum(1, bound / jnp.where(length > 0, length, 1))

    def encode(update, sent, client):
        return map_tables(rows, lambda x: shrink_to_bound(x, bound)[0], update), client.link_state

    return link(encode, l2_gain=lambda before: before, name="clip_per_row")


@named("channel")
def zero_out(bound: float = 10.0) -> Channel:
    """Replaces an update whose L2 norm is above `bound` by zeros, so that outliers are ignored.

    Args:
        bound: The largest L2 norm of an update that counts.

    Returns:
        The link.

    Raises:
        ValueError: the bound is not a positive number.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> update, client = {"bias": jnp.array([30.0, 40.0])}, SimpleNamespace(link_state=())
        >>> jf.channels.zero_out(10.0).encode(update, (), client)[0]["bias"].tolist()
        [0.0, 0.0]
    """
    check_bound("zero_out.bound", bound)

    def encode(update, sent, client):
        kept = l2_norm(update) <= bound
        return jax.tree.map(lambda x: jnp.where(kept, x, jnp.zeros_like(x)), update), client.link_state

    def metrics(update, sent, client):
        return {"zero_out/clients": Mean(1.0 * (l2_norm(update) > bound), 1.0)}

    return link(encode, l2_gain=lambda before: min(before, bound), metrics=metrics, name="zero_out")


def check_adaptive_clip(bound: float, quantile: float, rate: float, share: float) -> None:
    """Raises ValueError for arguments of `adaptive_clip` that cannot be."""
    check_bound("adaptive_clip.bound", bound)
    if not 0 < quantile < 1 or rate <= 0 or share <= 0:
        raise ValueError("adaptive_clip: the quantile lies between 0 and 1, rate and share are positive")


@named("channel")
def adaptive_clip(
    bound: float = 1.0, quantile: float = 0.5, rate: float = 0.2, share: float = 0.1, count: int = 0
) -> Channel:
    """Clips at a bound that follows a quantile of the norms (Andrew et al. 2021).

    A client sends its update divided by the bound, and whether its norm was within it, as +1/2 or -1/2 times `share`.
    The norm of both together is at most sqrt(1 + share^2 / 4), so that noise to the right of this link covers both.

    Args:
        bound: The bound in the first round.
        quantile: Share of the clients whose norm is to be within the bound.
        rate: The bound is multiplied by exp(-rate x (fraction within - quantile)) each round.
        share: Magnitude of the extra number (+share/2 or -share/2) that says whether the norm was within the bound.
        count: Expected cohort size; required under differential privacy. 0: number of clients that reported.

    Returns:
        The link.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jaxfed as jf
        >>> round(jf.channels.adaptive_clip(share=0.1).claims.l2_gain(3.0), 4)
        1.0012
    """
    check_adaptive_clip(bound, quantile, rate, share)

    def encode(update, now, client):
        kept, length = shrink_to_bound(update, now)
        return (
            scale_tree(1 / now, kept),
            share * (jnp.where(length <= now, 0.5, -0.5) + 0 * length),
        ), client.link_state

    def decode(total, now, round):
        update, within = total
        fraction = jnp.clip(within / share / (count or jnp.maximum(round.present.sum(), 1)) + 0.5, 0, 1)
        return scale_tree(now, update), now * jnp.exp(-rate * (fraction - quantile)), {"clip/bound": now}

    return link(
        encode,
        decode,
        lambda example: (jnp.float32(bound), ()),
        broadcast=lambda now: now,
        l2_gain=lambda before: math.hypot(1, share / 2),
        metrics=lambda update, now, client: {"clip/clients": Mean(1.0 * (l2_norm(update) > now), 1.0)},
        aggregator=SUM,
        is_average=False,
        reads_cohort_size=not count,
        name="adaptive_clip",
    )
