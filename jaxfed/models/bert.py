"""Encoders of the BERT family (Devlin et al. 2019, "BERT: Pre-training of deep bidirectional transformers")."""

from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.core.types import Tree

SMALLEST = 1e-24  # of a squared norm that is divided by


Pooling = Literal["mean", "cls"]  # a text's vector: the mean over its pieces, or the state of the first one


class BertSizes(NamedTuple):
    """The sizes of an encoder."""

    vocabulary: int  # pieces of words
    positions: int  # the most pieces of a text
    width: int  # of a hidden state
    layers: int
    heads: int
    hidden: int  # units of the feed-forward network of a layer
    token_types: int = 2
    epsilon: float = 1e-12  # of the layer norms
    pooling: Pooling = "mean"


class BertEmbeddings(nn.Module):
    """The sum of a piece's vector, its position's and that of the first token type, normalised."""

    sizes: BertSizes
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[..., P, width] of int [..., P]; of what is past the vocabulary some vector, which nothing reads."""
        normal, width = nn.initializers.normal(0.02), self.sizes.width
        word = self.param("word", normal, (self.sizes.vocabulary, width))
        position = self.param("position", normal, (self.sizes.positions, width))
        kind = self.param("token_type", normal, (self.sizes.token_types, width))
        found = jnp.asarray(word).at[tokens].get(mode="clip") + position[: tokens.shape[-1]] + kind[0]
        return nn.LayerNorm(epsilon=self.sizes.epsilon, dtype=self.dtype, name="norm")(found)


class BertLayer(nn.Module):
    """Attention and a feed-forward network, each added to its input and then normalised."""

    sizes: BertSizes
    dtype: Any
    dot_general_cls: Any
    bottleneck: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, live: jax.Array) -> jax.Array:
        """[..., P, width]; live: bool [..., P], the others are not attended to."""
        sizes = self.sizes
        norm = partial(nn.LayerNorm, epsilon=sizes.epsilon, dtype=self.dtype)
        dense = partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            dot_general_cls=self.dot_general_cls,
        )
        query, key, value = (
            dense(sizes.width, name=name)(x).reshape(*x.shape[:-1], sizes.heads, -1)
            for name in ("query", "key", "value")
        )

        def project(x, name):
            """Back to the width, and through a bottleneck where there is one."""
            found = dense(sizes.width, name=name)(x)
            return self.bottleneck(name)(found) if self.bottleneck else found

        attended = jax.nn.dot_product_attention(query, key, value, mask=live[..., None, None, :])
        x = norm(name="attention_norm")(x + project(attended.reshape(x.shape), "attention_output"))
        hidden = nn.gelu(dense(sizes.hidden, name="hidden")(x), approximate=False)
        return norm(name="output_norm")(x + project(hidden, "output"))


class BertEncoder(nn.Module):
    """An encoder, or the upper layers of one.

    sizes: Of the whole encoder.
    first: The layer with which it begins; then its input is what the layers below give. 0: it begins with tokens.
    last: The layer before which it ends. None: it has all layers above `first`.
    remat: Whether activations within a layer are computed again for a gradient, which saves their memory.
    dtype: In which layers compute; parameters are in float32.
    dot_general_cls: What makes the product of each dense layer, see `flax.linen.Dense`. None: the plain product.
    bottleneck: bottleneck(name) -> a module that the output of the layer of that name goes through, see
        `jaxfed.models.adapters`. None: there is none.
    """

    sizes: BertSizes
    first: int = 0
    last: int | None = None
    remat: bool = False
    dtype: Any = jnp.float32
    dot_general_cls: Any = None
    bottleneck: Any = None

    @nn.compact
    def __call__(self, inputs: jax.Array, live: jax.Array) -> jax.Array:
        """Hidden states [B, P, width] of tokens int [B, P], or of hidden states [B, P, width] below `first`.

        live: bool [B, P]: which places hold a piece of a text.
        """
        layer = nn.remat(BertLayer) if self.remat else BertLayer
        x = (
            inputs.astype(self.dtype)
            if self.first
            else BertEmbeddings(self.sizes, self.dtype, name="embeddings")(inputs)
        )
        for number in range(self.first, self.sizes.layers if self.last is None else self.last):
            x = layer(self.sizes, self.dtype, self.dot_general_cls, self.bottleneck, name=f"layer_{number}")(x, live)
        return x


def is_piece(tokens: jax.Array, sizes: BertSizes) -> jax.Array:
    """bool, like `tokens`: which of them are pieces of a text; the others, past the vocabulary, are padding."""
    return tokens < sizes.vocabulary


def pool_pieces(hidden: jax.Array, live: jax.Array, pooling: Pooling = "mean") -> jax.Array:
    """float32 [B, width] of length 1: the mean of the hidden states [B, P, width] of a text's pieces, or the first."""
    weight = live.astype(jnp.float32)[..., None]
    if pooling == "cls":
        weight = weight * (jnp.arange(hidden.shape[-2]) == 0)[:, None]
    total = jnp.sum(hidden.astype(jnp.float32) * weight, -2) / jnp.maximum(weight.sum(-2), 1)
    return total * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(total), -1, keepdims=True), SMALLEST))


def encode_tokens(encoder: BertEncoder, variables: Tree, tokens: jax.Array) -> jax.Array:
    """The vector of each text.

    Args:
        encoder: Begins with tokens.
        variables: Its collections: `params`, and what adapters add.
        tokens: int [B, P]: the pieces of each text, past the vocabulary where unused.

    Returns:
        float32 [B, width], each of length 1.
    """
    live = is_piece(tokens, encoder.sizes)
    return pool_pieces(jnp.asarray(encoder.apply(variables, tokens, live)), live, encoder.sizes.pooling)
