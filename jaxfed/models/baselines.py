"""Models that learn nothing of taste: what any recommender must beat, and what shows a leak."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.models.model import Loss, from_module, take_vectors


class ItemCount(nn.Module):
    """One number an item, and nothing else."""

    collection: str
    num_items: int

    @nn.compact
    def __call__(self, user: jax.Array, item: jax.Array | None = None) -> jax.Array:
        """Logits, see `from_module`."""
        count = self.variable(self.collection, "count", jnp.zeros, self.num_items).value
        return take_vectors(count, item)


@named("model")
def popularity(num_items: int, num_users: int = 1) -> Model:
    """Scores an item by its clicks.

    Use the work `gradient` and the link `weighted_mean`: a client's mean gradient times its examples is its clicks.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user.

    Returns:
        The model.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> clicks = {"params": {}, "tables": {"count": jf.Table(jnp.array([5.0, 1.0, 0.0]))}}
        >>> jf.models.popularity(num_items=3).score(clicks, {}, 0).tolist()
        [5.0, 1.0, 0.0]
    """
    return from_module(ItemCount("tables", num_items), Loss(lambda logit, label: -logit * label))


@named("model")
def counter(num_items: int, num_users: int = 1) -> Model:
    """The zero-learning leak detector: minus the number of times this client drew the item as a negative.

    Use the work `gradient`, which weighs all draws of a client alike.
    At chance (HR@10 about .1 of 100) when training negatives are drawn from all but the train items; near 1 when the
    sampler knows the held-out items and never draws them.
    """
    return from_module(ItemCount("private_tables", num_items), Loss(lambda logit, label: logit * (1 - label)))
