"""Decoders of the Llama family: rotary positions (Su et al. 2021, "RoFormer"), RMS norms (Zhang and Sennrich 2019),
SwiGLU (Shazeer 2020) and grouped queries (Ainslie et al. 2023). Modules have the names of Hugging Face's tensors."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxfed.core.types import Tree

# How the parameters are split over the mesh axis `model`, by patterns in their paths: the first that matches counts,
# and parameters without one are copied to every device. Attention is split by heads, the feed-forward network by its
# units, the vocabulary by its pieces; a layer then has two sums over devices.
PARTITION_RULES = (
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel$", PartitionSpec(None, None, "model")),
    (r"(o_proj|down_proj)/kernel$", PartitionSpec(None, "model", None)),
    (r"embed_tokens$", PartitionSpec("model", None)),
    (r"lm_head/kernel$", PartitionSpec(None, "model")),
)


class DecoderSizes(NamedTuple):
    """The sizes of a decoder of the Llama family (Touvron et al. 2023).

    Args:
        vocabulary: Number of pieces (tokens).
        positions: The most pieces of a text.
        width: Numbers of a hidden state.
        layers: Number of layers.
        heads: Heads of queries.
        key_value_heads: Heads of keys and values; they divide `heads`.
        head_width: Numbers of a head's query.
        hidden: Units of the feed-forward network of a layer.
        epsilon: What RMS norms add to a mean square.
        rope_theta: The base of the rotary frequencies.
        tied: Whether the output layer has the weights of the embedding.

    Example:
        >>> DecoderSizes(100, 32, width=8, layers=2, heads=4, key_value_heads=2, head_width=2, hidden=16).tied
        False
    """

    vocabulary: int
    positions: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    hidden: int
    epsilon: float = 1e-6
    rope_theta: float = 10000.0
    tied: bool = False


class PastPieces(NamedTuple):
    """The keys and values of pieces that a decoder has read, for the pieces after them."""

    keys: jax.Array  # [layers, B, S, key_value_heads, head_width], rotated
    values: jax.Array  # [layers, B, S, key_value_heads, head_width]
    live: jax.Array  # bool [B, S]


def rotate_pairs(x: jax.Array, places: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: numbers i and i + D/2 of each head are rotated by the angle place * theta^(-2i/D).

    Args:
        x: [B, T, heads, D].
        places: int [B, T].
        theta: The base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = places[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    low, high = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x.dtype)


def join_places(before: jax.Array, now: jax.Array) -> jax.Array:
    """[B, S + T, ...] of [B, S, ...] and [B, T, ...]."""
    return jnp.concatenate([before, now], 1)


class DecoderLayer(nn.Module):
    """Attention and a feed-forward network, each of the normalised input and added to it."""

    sizes: DecoderSizes
    dtype: Any = jnp.float32
    dot_general_cls: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, places: jax.Array, seen: jax.Array, past: Any = None) -> tuple[jax.Array, Any]:
        """([B, T, width], (keys, values) [B, T, key_value_heads, head_width] of these places).

        places: int [B, T]: their positions. seen: bool [B, T, S + T]: what each place attends to. past: (keys, values)
        of S places before these; None: there are none.
        """
        sizes = self.sizes
        norm = partial(nn.RMSNorm, epsilon=sizes.epsilon, dtype=self.dtype)
        options: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "dot_general_cls": self.dot_general_cls}
        dense: Any = partial(nn.Dense, kernel_init=nn.initializers.normal(0.02), **options)

        def heads(name, count):
            return dense(count * sizes.head_width, name=name)(inner).reshape(*x.shape[:-1], count, sizes.head_width)

        inner = norm(name="input_layernorm")(x)
        query = rotate_pairs(heads("q_proj", sizes.heads), places, sizes.rope_theta)
        key = rotate_pairs(heads("k_proj", sizes.key_value_heads), places, sizes.rope_theta)
        value = heads("v_proj", sizes.key_value_heads)
        keys, values = (key, value) if past is None else map(join_places, past, (key, value))
        attended = jax.nn.dot_product_attention(query, keys, values, mask=seen[:, None])
        x = x + dense(sizes.width, name="o_proj")(attended.reshape(*x.shape[:-1], -1))
        inner = norm(name="post_attention_layernorm")(x)
        hidden = nn.silu(dense(sizes.hidden, name="gate_proj")(inner)) * dense(sizes.hidden, name="up_proj")(inner)
        return x + dense(sizes.width, name="down_proj")(hidden), (key, value)


def list_seen(live: jax.Array, past: PastPieces | None) -> jax.Array:
    """bool [B, T, S + T]: what each place attends to: pieces before it, and itself."""
    places = live.shape[1]
    seen = jnp.broadcast_to(live[:, None], (*live.shape, places)) & jnp.tril(jnp.ones((places, places), bool))
    if past is None:
        return seen
    return jnp.concatenate([jnp.broadcast_to(past.live[:, None], (*live.shape, past.live.shape[1])), seen], 2)


def append_pieces(past: PastPieces | None, now: PastPieces) -> PastPieces:
    """The keys and values of all pieces, past and present."""
    if past is None:
        return now
    keys, values = (jnp.concatenate(pair, 2) for pair in ((past.keys, now.keys), (past.values, now.values)))
    return PastPieces(keys, values, jnp.concatenate([past.live, now.live], 1))


class Decoder(nn.Module):
    """A decoder. Its layers are one program that is scanned over their parameters [layers, ...].

    sizes: Its sizes.
    remat: Whether activations within a layer are computed again in the backward pass, which saves their memory.
    dtype: Type in which layers compute; logits are in float32.
    dot_general_cls: What makes the product of each dense layer, see `flax.linen.Dense`. None: the plain product.
    """

    sizes: DecoderSizes
    remat: bool = False
    dtype: Any = jnp.float32
    dot_general_cls: Any = None

    @nn.compact
    def __call__(
        self, tokens: jax.Array, live: jax.Array, past: PastPieces | None = None
    ) -> tuple[jax.Array, PastPieces]:
        """(logits float32 [B, T, vocabulary] of the piece after each, keys and values of these pieces and the past).

        Args:
            tokens: int [B, T]: pieces; any number where unused.
            live: bool [B, T]: which are pieces. The others change nothing, wherever they lie.
            past: of the S pieces that come before.
        """
        sizes = self.sizes
        places = jnp.cumsum(live, 1) - 1 + (0 if past is None else past.live.sum(1, keepdims=True))
        seen = list_seen(live, past)
        normal = nn.initializers.normal(0.02)
        embedding = jnp.asarray(self.param("embed_tokens", normal, (sizes.vocabulary, sizes.width)))
        x = embedding.at[tokens].get(mode="clip").astype(self.dtype)
        layer = nn.remat(DecoderLayer, prevent_cse=False) if self.remat else DecoderLayer
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=sizes.layers,
        )(sizes, self.dtype, self.dot_general_cls, name="layers")
        x, kept = scanned(x, places, seen, None if past is None else (past.keys, past.values))
        x = nn.RMSNorm(epsilon=sizes.epsilon, dtype=self.dtype, name="norm")(x)
        if sizes.tied:
            logits = x @ embedding.T.astype(self.dtype)
        else:
            logits = nn.Dense(
                sizes.vocabulary,
                False,
                self.dtype,
                kernel_init=normal,
                dot_general_cls=self.dot_general_cls,
                name="lm_head",
            )(x)
        return logits.astype(jnp.float32), append_pieces(past, PastPieces(kept[0], kept[1], live))


def init_decoder(module: Decoder, key: jax.Array) -> Tree:
    """The variables of a decoder, drawn at random."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, tokens, tokens == 0)
