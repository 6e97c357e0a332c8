"""Models that the server makes for each client from a code."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.models.model import (
    LossName,
    check_positive,
    find_loss,
    from_module,
    normal_variable,
    score_one_by_one,
    take_vectors,
)


class GeneratedItems(nn.Module):
    """Item vectors and a small score network, both made from a mixture of shared memories that a private code picks."""

    num_items: int
    num_users: int
    dim: int
    code: int
    rank: int
    hidden: int
    init_scale: float

    @nn.compact
    def __call__(self, user: jax.Array, item: jax.Array | None = None) -> jax.Array:
        """Logits, see `from_module`."""

        def shared(name, *shape):
            return normal_variable(self, "params", name, shape, shape[0] ** -0.5)

        codes = normal_variable(self, "private", "code", (self.num_users, self.code), 1.0)
        low = normal_variable(self, "tables", "item", (self.num_items, self.rank, self.code), self.init_scale)
        keys, memories = shared("keys", self.code, self.code), shared("memories", self.code, self.code)
        rise = shared("rise", self.code, self.rank, self.dim)
        first, last = shared("first", self.code, self.dim + 1, self.hidden), shared("last", self.code, self.hidden)

        def one(user, item):
            mixed = self.code * nn.softmax(codes[user] @ keys) @ memories
            made = take_vectors(low, item) @ mixed @ jnp.tensordot(mixed, rise, 1)
            weights, threshold = jnp.split(jnp.tensordot(mixed, first, 1), [self.dim])
            return nn.relu(made @ weights + threshold[0]) @ (mixed @ last)

        if jnp.ndim(user):  # an example each
            return jax.vmap(lambda user, item: one(user, item[None])[0])(user, item)
        return one(user, item)


@named("model")
def metamf(
    num_items: int,
    num_users: int = 1,
    dim: int = 32,
    code: int = 16,
    rank: int = 4,
    hidden: int = 16,
    init_scale: float = 0.1,
    loss: LossName = "bce",
) -> Model:
    """MetaMF (Lin et al. 2020): a shared network makes each user's item vectors and score function from a private code.

    The vectors are made from `rank` numbers for each item and number of a code. Unlike in the paper, a client keeps its
    code, downloads the network and makes them itself, so that the server does not know its user.

    Args:
        num_items: Number of items.
        num_users: Number of users of a client.
        dim: Numbers in the vector made for an item.
        code: Numbers in a user's private code.
        rank: Numbers of an item that the server keeps for each number of a code.
        hidden: Width of the score function.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.

    Returns:
        The model.

    Raises:
        ValueError: a size is below 1, or there is no such loss.

    Example:
        >>> import jax, jaxfed as jf
        >>> model = jf.models.metamf(num_items=100, code=16)
        >>> jax.eval_shape(model.private, jax.random.key(0))["private"]["code"].shape
        (1, 16)
    """
    check_positive("model.dim", dim)
    check_positive("model.code, model.rank or model.hidden", code, rank, hidden)
    model = from_module(GeneratedItems(num_items, num_users, dim, code, rank, hidden, init_scale), find_loss(loss))
    return model._replace(score=score_one_by_one(model.score))
