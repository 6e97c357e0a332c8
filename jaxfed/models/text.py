"""Parametrizations by text: item vectors are made of what is said of the items."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization
from jaxfed.core.tables import Table, is_table, num_rows, take_rows
from jaxfed.core.types import Key, Tree
from jaxfed.models.bert_weights import TextEncoder
from jaxfed.models.lora import LoraSettings
from jaxfed.models.parametrizations import check_tables, entry_size, map_matrices
from jaxfed.models.trained_encoder import (
    ComputeDtype,
    EncoderParts,
    divide_encoder,
    encode_items,
    find_first_layer,
    freeze_inputs,
    measure_standardization,
)


class ProjectedTable(NamedTuple):
    """A table [N, ...] as a projection of text vectors [N, W]."""

    kernel: jax.Array  # [W, ...]
    bias: jax.Array  # [...]: in the dtype of the table
    ids: Table | None  # [N, ...]: what each item has beside its text; None: nothing


def init_projections(model: Model, key: Key, width: int, ids: bool) -> Tree:
    """The model's shared parameters, with a `ProjectedTable` for each table of item vectors, such that vectors have
    entries as large as the model's own. ids: whether items have a vector beside, which starts at zero."""
    model_key, own_key = jax.random.split(key)

    def draw(table, key):
        kernel = entry_size(table) * jax.random.normal(key, (width, *table.shape[1:]))
        own = Table(jnp.zeros_like(table)) if ids else None
        return ProjectedTable(kernel, jnp.zeros(table.shape[1:], table.dtype), own)

    return map_matrices(draw, model.init(model_key), own_key)


def project_vectors(held: Tree, vectors: jax.Array, rows: jax.Array | None) -> Tree:
    """The model's shared parameters of what `init_projections` makes: rows `rows` of tables, whose text vectors are
    `vectors` [U, W]; None: all rows."""

    def cut(table):
        return table if rows is None else take_rows(table, rows)

    def project(node):
        if not isinstance(node, ProjectedTable):
            return cut(node) if is_table(node) else node
        made = jnp.tensordot(vectors, node.kernel, 1) + node.bias.astype(jnp.float32)
        if node.ids is not None:
            made += cut(node.ids).rows.astype(jnp.float32)
        return Table(made.astype(node.bias.dtype))

    return jax.tree.map(project, held, is_leaf=lambda node: isinstance(node, ProjectedTable) or is_table(node))


def check_texts(name: str, model: Model, texts: int) -> None:
    """Raises ValueError where a model has no table of item vectors, or not as many rows as there are texts."""
    check_tables(name, model)
    rows = num_rows(jax.eval_shape(model.init, jax.random.key(0)))
    if rows != texts:
        raise ValueError(f"parametrization.{name}: there are {texts:,} texts for {rows:,} items: give one for each")


def text_vectors(model: Model, vectors: np.ndarray, ids: bool = False) -> Parametrization:
    """Each table of item vectors is a trained projection of fixed text vectors, as in ZESRec (Ding et al. 2021).

    The server trains the projection [W, d] and a vector [d] that all items have. Clients download the rows that they
    hold, and send an update of them, as without it. The text vectors are centred, and scaled to a mean square length of
    1. Tables of one dimension (a bias) stay as they are.

    Args:
        model: The model whose tables they are.
        vectors: float [N, W]: the vector of each item's text.
        ids: Whether each item has a trained vector beside, which starts at zero.

    Returns:
        The parametrization, for `jaxfed.Experiment`.

    Raises:
        ValueError: the model has no such table, or another number of items.

    Example:
        >>> from jaxfed.models.mf import mf
        >>> held = text_vectors(mf(100, 1, dim=8), np.eye(100, 24)).init(jax.random.key(0))
        >>> held["tables"]["item"].kernel.shape
        (24, 8)
    """
    check_texts("text_vectors", model, len(vectors))
    vectors = np.asarray(vectors, np.float32)
    standard = measure_standardization(vectors)
    frozen = Table(np.nan_to_num((vectors - standard.centre) / standard.spread, posinf=0, neginf=0))

    def init(key):
        return init_projections(model, key, vectors.shape[1], ids)

    def forward(theta, rows, frozen):
        every = jnp.asarray(frozen.rows)
        return project_vectors(theta, every if rows is None else take_rows(Table(every), rows).rows, rows)

    return Parametrization(init, forward, frozen)


def text_encoder(
    model: Model,
    encoder: TextEncoder,
    tokens: np.ndarray,
    trained_layers: int = 0,
    lora: LoraSettings | None = None,
    encoder_rate: float = 0.01,
    ids: bool = False,
    compute_dtype: ComputeDtype = "float32",
    vectors: np.ndarray | None = None,
) -> Parametrization:
    """Each table of item vectors is what a text encoder at the server gives (Yi et al. 2021, "Efficient-FedRec").

    The server trains the encoder and a projection. A round encodes only the items that its clients hold, without
    repeats; clients download these vectors and send an update of them, as of a table of ids. The sum of the updates is
    pulled back through the encoder. Where clients send gradients, that is the gradient of the loss; for an update of
    several local steps it is an approximation.

    Args:
        model: The model whose tables they are.
        encoder: The pretrained encoder.
        tokens: int [N, P]: the pieces of each item's text, see `jaxfed.data.tokenize_texts`.
        trained_layers: Number of upper layers to train. What the layers below give is computed once and kept, P x W
            numbers for an item. 0: all layers and the embeddings are trained.
        lora: Only adapters in these layers are trained. None: all of their parameters.
        encoder_rate: Without adapters: the server holds the change of the encoder's parameters, divided by this, so
            that an adaptive optimiser moves the encoder by this share of its own rate.
        ids: Whether each item has a trained vector beside, which starts at zero.
        compute_dtype: In what the encoder computes; its parameters are in float32.
        vectors: float [N, W]: what the encoder gives for the texts, where that is known.

    Returns:
        The parametrization, for `jaxfed.Experiment`.

    Raises:
        ValueError: the model has no such table or another number of items, the encoder has not as many layers, or there
            cannot be such adapters.

    Example:
        >>> from jaxfed.models.bert import BertEncoder, BertSizes
        >>> from jaxfed.models.mf import mf
        >>> sizes = BertSizes(vocabulary=10, positions=8, width=4, layers=2, heads=2, hidden=8)
        >>> tokens = np.zeros((30, 8), np.int32)
        >>> params = BertEncoder(sizes).init(jax.random.key(0), tokens, tokens < 10)["params"]
        >>> made = text_encoder(mf(30, 1, dim=8), TextEncoder(sizes, params), tokens, trained_layers=1)
        >>> list(made.init(jax.random.key(0))["encoder"])
        ['layer_1']
    """
    check_texts("text_encoder", model, len(tokens))
    if not encoder_rate > 0:
        raise ValueError(f"parametrization.encoder_rate is {encoder_rate}: it must be above 0")
    first = find_first_layer(encoder.sizes, trained_layers)
    parts = divide_encoder(encoder, first, lora, encoder_rate, compute_dtype, tokens.shape[1])
    frozen = freeze_inputs(encoder, tokens, first, vectors)
    return Parametrization(partial(init_encoder, model, parts, ids), partial(project_items, parts), frozen)


def init_encoder(model: Model, parts: EncoderParts, ids: bool, key: Key) -> Tree:
    """Theta of an encoder: its own part, and the projections."""
    own, encoder_key = jax.random.split(key)
    return {
        "model": init_projections(model, own, parts.module.sizes.width, ids),
        "encoder": parts.init(encoder_key),
    }


def project_items(parts: EncoderParts, theta: Tree, rows: jax.Array | None, frozen: Tree) -> Tree:
    """The model's shared parameters of theta: rows `rows` of tables; None: all."""
    return project_vectors(theta["model"], encode_items(parts, theta["encoder"], rows, frozen), rows)
