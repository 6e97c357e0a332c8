"""Blocks of transformers over one sequence [T, d]. Unused positions lie at the end and are masked out of attention."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.models.dropout import drop_out
from jaxfed.models.model import check_positive

BlockName = Literal["pre_norm", "authors_code", "ligr"]
MASKED_LOGIT = -1e30  # finite: a softmax over masked positions alone is no NaN


def split_key(key: jax.Array | None, number: int) -> Any:
    """`number` keys of one; None for each of None."""
    return (None,) * number if key is None else jax.random.split(key, number)


class Attention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1) with several heads.

    Args:
        heads: Number of heads.
        rate: Dropout of the weights.
        causal: Whether a place sees only itself and those before it.
        dtype: What products are computed in; the softmax is in float32.
        width: Numbers of a head. 0: as many as make `heads` of them as wide as the input.
    """

    heads: int
    rate: float
    causal: bool = True
    dtype: Any = jnp.float32
    width: int = 0

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array, live: jax.Array, key: jax.Array | None) -> jax.Array:
        """queries [T, d]; keys [T, d]: of keys and values; live bool [T]. Returns [T, d]."""
        places, dim = queries.shape
        shape = self.heads, self.width or dim // self.heads
        # a bias of keys would shift all logits of a place alike, which a softmax does not see
        query, key_vectors, values = (
            nn.DenseGeneral(shape, dtype=self.dtype, use_bias=name != "key", name=name)(x)
            for name, x in (("query", queries), ("key", keys), ("value", keys))
        )
        logits = jnp.einsum("thd,shd->tsh", query, key_vectors).astype(jnp.float32) / shape[1] ** 0.5
        seen = live[None, :] & (jnp.tril(jnp.ones((places, places), bool)) if self.causal else True)
        weights = jax.nn.softmax(jnp.where(seen[..., None], logits, MASKED_LOGIT), 1)
        mixed = jnp.einsum("tsh,shd->thd", drop_out(weights, self.rate, key).astype(self.dtype), values)
        return nn.DenseGeneral(dim, axis=(-2, -1), dtype=self.dtype, name="output")(mixed)


class FeedForward(nn.Module):
    """Two layers, each place alone: ReLU or GELU; or SwiGLU (Shazeer 2020)."""

    hidden: int
    rate: float
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [T, d]. Returns [T, d]."""
        if self.activation == "swiglu":
            gate = nn.silu(nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name="gate")(x))
            inner = gate * nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name="inner")(x)
        else:
            inner = getattr(nn, self.activation)(nn.Dense(self.hidden, dtype=self.dtype, name="inner")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="output")(drop_out(inner, self.rate, key))


class TransformerBlock(nn.Module):
    """A block of attention and feed-forward layers.

    pre_norm: x += drop(attention(LN x)); x += drop(ff(LN x)). authors_code: the block of SASRec's public code, queries
    normalised, keys and values not, the residual from the normalised queries. ligr: each residual has a gate
    sigmoid(W x), the feed-forward layer is SwiGLU (eSASRec, 2025).
    """

    kind: BlockName
    heads: int
    hidden: int
    rate: float
    causal: bool = True
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    dtype: Any = jnp.float32
    head_width: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, live: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [T, d], live bool [T]. Returns [T, d]."""
        keys = split_key(key, 4)
        attend = Attention(self.heads, self.rate, self.causal, self.dtype, self.head_width, name="attention")
        activation = "swiglu" if self.kind == "ligr" else self.activation
        feed = FeedForward(self.hidden, self.rate, activation, self.dtype, name="feed_forward")
        first = nn.LayerNorm(dtype=self.dtype, name="norm_1")(x)
        second = nn.LayerNorm(dtype=self.dtype, name="norm_2")
        if self.kind == "authors_code":
            x = first + drop_out(attend(first, x, live, keys[0]), self.rate, keys[1])
            inner = second(x)
            return inner + drop_out(feed(inner, keys[2]), self.rate, keys[3])

        def gate(name, x):
            return nn.sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(x)) if self.kind == "ligr" else 1

        x = x + gate("gate_1", x) * drop_out(attend(first, first, live, keys[0]), self.rate, keys[1])
        return x + gate("gate_2", x) * drop_out(feed(second(x), keys[2]), self.rate, keys[3])


def places_from_end(live: jax.Array) -> jax.Array:
    """int [T]: how many places in use come after each: positions that no padding changes. 0 where unused."""
    return jnp.maximum(live.sum() - 1 - jnp.arange(live.shape[0]), 0)


def check_dropout_rate(dropout: float) -> None:
    """Raises ValueError for a share that cannot be dropped."""
    if not 0 <= dropout < 1:
        raise ValueError(f"model.dropout is {dropout:g}: it must be from 0 to below 1")


def check_heads(dim: int, heads: int, dropout: float, head_width: int = 0, **sizes: int) -> None:
    """Raises ValueError for sizes that no transformer has."""
    for name, size in (("dim", dim), ("heads", heads), *sizes.items()):
        check_positive(f"model.{name}", size)
    if head_width < 0:
        raise ValueError(f"model.head_width is {head_width}: it must be at least 0")
    if dim % heads and not head_width:
        raise ValueError(f"model.heads is {heads}, model.dim {dim}: set a dim that the heads divide, or head_width")
    check_dropout_rate(dropout)
