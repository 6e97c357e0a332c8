"""A text encoder that the server trains: what of it is frozen, what is trained, and its vectors in batches."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.tables import Table, take_rows
from jaxfed.core.types import Key, Tree
from jaxfed.models.adapters import COLLECTION as BOTTLENECKS
from jaxfed.models.adapters import (
    BiasSettings,
    BottleneckSettings,
    add_biases,
    init_bottlenecks,
    make_bottleneck,
    select_biases,
)
from jaxfed.models.bert import BertEncoder, BertSizes, encode_tokens, is_piece, pool_pieces
from jaxfed.models.bert_weights import TextEncoder
from jaxfed.models.lora import COLLECTION, LoraSettings, init_lora, make_lora_product
from jaxfed.models.quantized_encoder import restore_floats

BATCH = 64  # texts that are encoded at a time
SHALLOW = 2  # most layers whose activations of one batch are kept: computing them again is a quarter of a round
NARROWEST = 1e-6  # spread of vectors that is divided by

ComputeDtype = Literal["float32", "bfloat16"]


class Standardization(NamedTuple):
    """How vectors become centred ones, whose mean square length is 1."""

    centre: np.ndarray  # [W]
    spread: np.ndarray  # []


def measure_standardization(vectors: np.ndarray) -> Standardization:
    """The mean of vectors [N, W], and the root of the mean of their squared distances to it. Rows that are not finite
    are no items, but pad a table."""
    vectors = vectors[np.isfinite(vectors).all(1)]
    centre = np.asarray(np.mean(vectors, 0, np.float32))
    spread = np.sqrt(np.square(vectors - centre).sum(1).mean())
    return Standardization(centre, np.array(max(spread, NARROWEST), np.float32))


def encode_in_batches(
    encode: Callable[..., jax.Array], tables: tuple[jax.Array, ...], is_shallow: bool = False
) -> jax.Array:
    """[U, W] of arrays [U, ...], a batch after the other: of all but one batch only the results are in memory, also
    where a gradient is taken. is_shallow: one batch's activations are few enough to be kept for its gradient."""
    rows = len(tables[0])
    size = min(BATCH, max(rows, 1))
    count = -(-rows // size)
    if is_shallow and count == 1:
        return encode(*tables)

    def cut(x):
        padded = jnp.pad(x, ((0, count * size - rows), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(count, size, *x.shape[1:])

    found = jax.lax.map(jax.checkpoint(lambda each: encode(*each), prevent_cse=False), tuple(cut(x) for x in tables))
    return found.reshape(count * size, *found.shape[2:])[:rows]


def encode_texts(encoder: TextEncoder, tokens: np.ndarray, layers: int | None = None) -> np.ndarray:
    """What a pretrained encoder (BERT, Devlin et al. 2019) gives for texts.

    Args:
        encoder: The encoder.
        tokens: int [N, P]: the pieces of each text, see `jaxfed.data.tokenize_texts`.
        layers: The number of layers after which hidden states are given. None: the vectors, after all.

    Returns:
        float32 [N, W], each of length 1; with `layers`, hidden states [N, P, W].

    Example:
        >>> from jaxfed.models.bert import BertSizes
        >>> sizes = BertSizes(vocabulary=10, positions=8, width=4, layers=1, heads=2, hidden=8)
        >>> tokens = np.zeros((3, 8), np.int32)
        >>> params = BertEncoder(sizes).init(jax.random.key(0), tokens, tokens < 10)["params"]
        >>> encode_texts(TextEncoder(sizes, params), tokens).shape
        (3, 4)
    """
    sizes, module = encoder.sizes, BertEncoder(encoder.sizes, last=layers)
    params = encoder.params
    if layers is not None:
        params = {name: each for name, each in params.items() if layer_number(name) < layers}

    def encode(params, tokens):
        params = restore_floats(params)
        if layers is None:
            return encode_tokens(module, {"params": params}, tokens)
        return module.apply({"params": params}, tokens, is_piece(tokens, sizes))

    compiled, size = jax.jit(encode), min(BATCH, max(len(tokens), 1))
    padded = np.pad(tokens, ((0, -len(tokens) % size), (0, 0)))
    found = [np.asarray(compiled(params, padded[low : low + size])) for low in range(0, len(padded), size)]
    return np.concatenate(found)[: len(tokens)]


def layer_number(name: str) -> int:
    """The number of a layer by its name in the parameters of an encoder; -1 for its embeddings."""
    return int(name.removeprefix("layer_")) if name.startswith("layer_") else -1


def find_first_layer(sizes: BertSizes, trained_layers: int) -> int:
    """The lowest layer that is trained; 0: the embeddings are, too. Raises ValueError where there are fewer layers."""
    if not 0 <= trained_layers <= sizes.layers:
        raise ValueError(
            f"trained_layers is {trained_layers}: the encoder has {sizes.layers} layers, set it from 0 "
            "(all, and the embeddings) to that"
        )
    return sizes.layers - trained_layers if trained_layers else 0


def take_upper_params(encoder: TextEncoder, first: int) -> dict[str, Any]:
    """The parameters of the layers from `first` on; from 0 on, those of the embeddings, too."""
    return {name: each for name, each in encoder.params.items() if not first or layer_number(name) >= first}


def freeze_inputs(
    encoder: TextEncoder, tokens: np.ndarray, first: int, vectors: np.ndarray | None = None
) -> dict[str, Any]:
    """What the layers from `first` on read and nobody trains.

    Args:
        encoder: the whole encoder.
        tokens: int [N, P].
        first: the lowest layer that is trained.
        vectors: float [N, W]: what the encoder gives for the texts. None: it is computed.

    Returns:
        base: the pretrained parameters; standard: how its vectors are centred; inputs: the tokens, or the hidden states
        below `first`; then also live: which places hold a piece.
    """
    standard = measure_standardization(encode_texts(encoder, tokens) if vectors is None else vectors)
    inputs = encode_texts(encoder, tokens, first) if first else np.asarray(tokens, np.int32)
    known = {"base": take_upper_params(encoder, first), "standard": standard, "inputs": Table(inputs)}
    return known | ({"live": Table(np.asarray(tokens) < encoder.sizes.vocabulary)} if first else {})


class EncoderParts(NamedTuple):
    """An encoder as it is trained."""

    module: BertEncoder  # of the layers that are trained
    init: Callable[[Key], Tree]  # what is trained, from a key
    variables: Callable[[Tree, Tree], Tree]  # of the module, from the pretrained parameters and what is trained


def divide_encoder(
    encoder: TextEncoder,
    first: int,
    adapter: LoraSettings | BottleneckSettings | BiasSettings | None,
    rate: float,
    dtype: ComputeDtype,
    pieces: int,
) -> EncoderParts:
    """The layers from `first` on, of which adapters, or a change of all their parameters, are trained."""
    make = partial(BertEncoder, encoder.sizes, first, dtype=jnp.dtype(dtype))
    if adapter is None or isinstance(adapter, BiasSettings):
        params = jax.eval_shape(restore_floats, take_upper_params(encoder, first))
        shapes = params if adapter is None else select_biases(params, adapter)

        def variables(base, change):
            if adapter is not None:
                return {"params": add_biases(base, change)}
            return {"params": jax.tree.map(lambda x, moved: x + rate * moved, base, change)}

        return EncoderParts(make(), lambda key: jax.tree.map(lambda x: jnp.zeros(x.shape), shapes), variables)
    inner = (encoder.sizes.width,) if first else ()
    inputs = jax.ShapeDtypeStruct((1, pieces, *inner), jnp.float32 if first else jnp.int32)
    live = jax.ShapeDtypeStruct((1, pieces), jnp.bool)
    if isinstance(adapter, LoraSettings):
        module, collection = make(dot_general_cls=make_lora_product(adapter)), COLLECTION
        init = partial(init_lora, module, adapter)
    else:
        module, collection = make(bottleneck=make_bottleneck(adapter)), BOTTLENECKS
        init = partial(init_bottlenecks, module, adapter)
    jax.eval_shape(lambda key: init(key, inputs, live), jax.random.key(0))  # refuses what cannot be
    return EncoderParts(
        module,
        lambda key: init(key, inputs, live),
        lambda base, adapters: {"params": base, collection: adapters},
    )


def take_whole_layers(encoder: TextEncoder, first: int, dtype: ComputeDtype) -> EncoderParts:
    """The layers from `first` on, whose parameters themselves are trained: they begin as they were pretrained."""
    pretrained = take_upper_params(encoder, first)
    module = BertEncoder(encoder.sizes, first, dtype=jnp.dtype(dtype))
    return EncoderParts(
        module, lambda key: jax.tree.map(jnp.asarray, pretrained), lambda base, trained: {"params": trained}
    )


def encode_items(parts: EncoderParts, trained: Tree, rows: jax.Array | None, frozen: Tree) -> jax.Array:
    """float32 [U, W]: the centred vectors of items `rows`; None: of all.

    Args:
        parts: the encoder.
        trained: what of it is trained.
        rows: int [U]; past the end: any vector.
        frozen: see `freeze_inputs`; without `base` where all of it is trained.
    """
    held = jax.tree.map(jnp.asarray, frozen)
    held = held if rows is None else take_rows(held, rows)
    variables, sizes = parts.variables(restore_floats(held.get("base", {})), trained), parts.module.sizes

    def encode(inputs, live=None):
        live = is_piece(inputs, sizes) if live is None else live
        return pool_pieces(jnp.asarray(parts.module.apply(variables, inputs, live)), live, sizes.pooling)

    tables = tuple(held[name].rows for name in ("inputs", "live") if name in held)
    found = encode_in_batches(encode, tables, sizes.layers - parts.module.first <= SHALLOW)
    return (found - held["standard"].centre) / held["standard"].spread
