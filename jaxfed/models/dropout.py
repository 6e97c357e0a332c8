"""Dropout of sequences whose random numbers belong to places: padding a sequence further changes none of them."""

import jax
import jax.numpy as jnp


def fold_key(key: jax.Array, places: int) -> jax.Array:
    """keys [places]: one of each place."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(places))


def drop_out(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets a share `rate` of the numbers x [T, ...] to zero and divides the others by 1 - rate; key None: nothing.

    The numbers of place t depend on the key, t and the other axes alone. Of attention weights [T, T, ...], whose second
    axis is padded too, it must come before the axes that are not: then its padding changes nothing either.
    """
    if key is None or not rate:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(fold_key(key, x.shape[0]))
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
