"""Adapters on clients: every client has a text encoder, and trains and sends adapters or whole layers of it."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.model import Model
from jaxfed.core.tables import Table, unwrap
from jaxfed.core.types import History, Key, Mean, Tree
from jaxfed.models.adapters import BiasSettings, BottleneckSettings
from jaxfed.models.bert_weights import TextEncoder
from jaxfed.models.lora import LoraSettings, add_products
from jaxfed.models.model import (
    Loss,
    LossName,
    check_positive,
    find_loss,
    fit_private,
    score_batch,
    score_rows,
    take_vectors,
)
from jaxfed.models.quantized_encoder import is_quantized, restore_floats
from jaxfed.models.trained_encoder import (
    ComputeDtype,
    EncoderParts,
    divide_encoder,
    encode_items,
    find_first_layer,
    freeze_inputs,
    take_whole_layers,
)

INIT_SCALE = 0.1  # standard deviation of the normal numbers that projection and user vectors start with
Rule = Literal["fedit", "ffa", "fedsa"]
Adapter = LoraSettings | BottleneckSettings | BiasSettings | Literal["full"]


def split_factors(factors: Tree) -> tuple[Tree, Tree]:
    """(the factors A, the factors B) of a collection `lora`, each a tree of the layers."""
    if "a" in factors and "b" in factors:
        return factors["a"], factors["b"]
    halves = {name: split_factors(each) for name, each in factors.items()}
    return {name: each[0] for name, each in halves.items()}, {name: each[1] for name, each in halves.items()}


def join_factors(left: Tree, right: Tree) -> Tree:
    """A collection `lora` of its factors A and B; see `split_factors`."""
    if not isinstance(left, dict):
        return {"a": left, "b": right}
    return {name: join_factors(left[name], right[name]) for name in left}


class AdaptedModel(NamedTuple):
    """What the functions of a model with adapters share."""

    parts: EncoderParts
    adapter: Adapter
    rule: Rule
    num_items: int
    num_users: int
    dim: int


def find_adapter(shared: Tree, private: Tree) -> Tree:
    """The trained part of the encoder, from where the rule of aggregation keeps it."""
    if "adapter" in shared["params"]:
        return shared["params"]["adapter"]
    left = shared["lora_a"] if "lora_a" in shared else shared["params"]["lora_a"]
    right = private["private"]["lora_b"] if "lora_b" in private["private"] else shared["params"]["lora_b"]
    return join_factors(left, right)


def encode_rows(made: AdaptedModel, shared: Tree, private: Tree) -> jax.Array:
    """float32 [rows, W]: the centred vectors of the rows that are given. Some rules move the base by a residual."""
    text = shared["text"]
    tables = {name: Table(text[name]) for name in ("inputs", "live") if name in text}
    if "lora_residual" in shared["params"] and isinstance(made.adapter, LoraSettings):
        tables["base"] = add_products(
            restore_floats(text["base"]), shared["params"]["lora_residual"], made.adapter.scale
        )
    return encode_items(made.parts, find_adapter(shared, private), None, text | tables)


def init_shared(made: AdaptedModel, key: Key) -> Tree:
    """The shared parameters: a projection, a vector that all items have, their biases, and factors by the rule."""
    own, factors_key = jax.random.split(key)
    adapter = made.parts.init(factors_key)
    kernel = INIT_SCALE * jax.random.normal(own, (made.parts.module.sizes.width, made.dim))
    params = {"kernel": kernel, "shift": jnp.zeros(made.dim)}
    if isinstance(made.adapter, LoraSettings):
        left, right = split_factors(adapter)
        params |= {} if made.rule == "ffa" else {"lora_a": left}
        params |= {} if made.rule == "fedsa" else {"lora_b": right}
    else:
        params["adapter"] = adapter
    return {"params": params, "tables": {"bias": Table(jnp.zeros(made.num_items))}}


def init_private(made: AdaptedModel, key: Key) -> Tree:
    """What a client keeps: the vectors of its users, and factors by the rule."""
    own: dict[str, Any] = {"user": INIT_SCALE * jax.random.normal(key, (made.num_users, made.dim))}
    return {"private": own | ({"lora_b": split_factors(made.parts.init(key))[1]} if made.rule == "fedsa" else {})}


def make_item_vectors(made: AdaptedModel, shared: Tree, private: Tree) -> jax.Array:
    """float32 [rows, D]: the vectors of the rows that are given, to be multiplied by that of a user."""
    shared, private = unwrap(shared), unwrap(private)
    return encode_rows(made, shared, private) @ shared["params"]["kernel"] + shared["params"]["shift"]


def make_text_logits(
    made: AdaptedModel, shared: Tree, private: Tree, user: Any, item: Any, rows: jax.Array | None = None
) -> jax.Array:
    """The logits of a user's items, positions in the rows that are given; None: of all of these. rows: the vectors of
    these, where they are known."""
    rows = make_item_vectors(made, shared, private) if rows is None else rows
    shared, private = unwrap(shared), unwrap(private)
    bias, user_vector = take_vectors(shared["tables"]["bias"], item), private["private"]["user"][user]
    return bias + score_rows(take_vectors(rows, item), user_vector)


def fit_user(made: AdaptedModel, loss: Loss, shared: Tree, history: History) -> Tree:
    """The vector of a user with this history; items are encoded once."""
    private = partial(init_private, made)
    rows = make_item_vectors(made, shared, private(jax.random.key(0)))

    def score(shared, private, user):
        return make_text_logits(made, shared, private, user, None, rows)

    return fit_private(loss, private, score, shared, history)


def compare_examples(made: AdaptedModel, loss: Loss, shared: Tree, private: Tree, batch: dict[str, Any]) -> Mean:
    """The loss of a batch of examples."""
    at = score_batch(partial(make_text_logits, made, shared, private), batch, ())
    each = loss.value(at[0] - at[1]) if loss.pairwise else loss.value(at[0], batch["label"])
    return Mean(jnp.sum(each * batch["weight"]), jnp.sum(batch["weight"]))


def make_adapted_encoder(
    encoder: TextEncoder,
    tokens: np.ndarray,
    adapter: Adapter,
    rule: Rule,
    trained_layers: int,
    compute_dtype: ComputeDtype,
    vectors: np.ndarray | None,
) -> tuple[EncoderParts, dict[str, Any]]:
    """(the encoder with adapters, what of it and of the texts is frozen); see `text_lora`."""
    first = find_first_layer(encoder.sizes, trained_layers)
    frozen: dict[str, Any] = {"text": freeze_inputs(encoder, tokens, first, vectors)}
    if adapter == "full":
        del frozen["text"]["base"]
        return take_whole_layers(encoder, first, compute_dtype), frozen
    parts = divide_encoder(encoder, first, adapter, 1.0, compute_dtype, tokens.shape[1])
    if rule == "ffa":
        frozen["lora_a"] = jax.device_get(split_factors(parts.init(jax.random.key(0)))[0])
    return parts, frozen


def check_adapted_model(
    num_items: int, texts: int, dim: int, rule: str, adapter: Adapter, encoder: TextEncoder
) -> None:
    """Raises ValueError for sizes, a rule or an encoder that cannot be."""
    check_positive("model.dim", dim)
    if texts != num_items:
        raise ValueError(f"text_lora: there are {texts:,} texts for {num_items:,} items: give one for each")
    if rule not in ("fedit", "ffa", "fedsa"):
        raise ValueError(f"model.rule: no rule {rule!r}: choose one of fedit, ffa, fedsa")
    if rule != "fedit" and not isinstance(adapter, LoraSettings):
        raise ValueError(f"model.rule {rule} is for the factors of low-rank adapters: leave it out for other adapters")
    if adapter == "full" and any(map(is_quantized, jax.tree.leaves(encoder.params, is_leaf=is_quantized))):
        raise ValueError("model.adapter full trains the layers in float32: leave base_dtype out")


def text_lora(
    num_items: int,
    encoder: TextEncoder,
    tokens: np.ndarray,
    num_users: int = 1,
    dim: int = 32,
    lora: LoraSettings | None = None,
    rule: Rule = "fedit",
    trained_layers: int = 0,
    loss: LossName = "bce",
    compute_dtype: ComputeDtype = "float32",
    vectors: np.ndarray | None = None,
    adapter: BottleneckSettings | BiasSettings | Literal["full"] | None = None,
) -> Model:
    """Matrix factorisation whose item vectors a text encoder gives, with adapters that clients train.

    logit = <W f(text of i) + c, u> + b_i. Clients have the encoder and the texts of their items, frozen, and download
    them once. They train the adapters, W, c, the biases b of their items, and their own vector u. Rules of aggregation:
    fedit (Zhang et al. 2024), FFA-LoRA (Sun et al. 2024), FedSA-LoRA (Guo et al. 2025).

    Args:
        num_items: Number of items.
        encoder: The pretrained encoder.
        tokens: int [num_items, P]: the pieces of each item's text, see `jaxfed.data.tokenize_texts`.
        num_users: Number of users of a client.
        dim: Numbers in the vector of a user.
        lora: The adapters. None: of rank 8, for queries and values.
        rule: What becomes of the factors A and B. fedit: both are averaged, which is not the mean of their products.
            ffa: A is the same for all and frozen; the mean of B is that of the products. fedsa: A is averaged, B stays.
        trained_layers: Number of upper layers that may have adapters; the layers below compute once. 0: all.
        loss: bce: cross-entropy. bpr: the click of a pair ranks before the negative. squared: squared error.
        compute_dtype: In what the encoder computes; its parameters are in float32.
        vectors: float [num_items, W]: what the encoder gives for the texts, where that is known.
        adapter: What is trained instead of low-rank adapters, averaged as in fedit. full: all parameters of the layers.

    Returns:
        The model.

    Raises:
        ValueError: the number of layers or of texts, the adapters, the rule or the type of parameters are not valid.

    Example:
        >>> from jaxfed.models.bert import BertEncoder, BertSizes
        >>> tokens, sizes = np.zeros((9, 8), np.int32), BertSizes(10, 8, width=4, layers=1, heads=2, hidden=8)
        >>> made = TextEncoder(sizes, BertEncoder(sizes).init(jax.random.key(0), tokens, tokens < 10)["params"])
        >>> sorted(text_lora(9, made, tokens, lora=LoraSettings(2), rule="ffa").init(jax.random.key(0))["params"])
        ['kernel', 'lora_b', 'shift']
    """
    chosen, compare = adapter or lora or LoraSettings(8), find_loss(loss)
    check_adapted_model(num_items, len(tokens), dim, rule, chosen, encoder)
    parts, frozen = make_adapted_encoder(encoder, tokens, chosen, rule, trained_layers, compute_dtype, vectors)
    made = AdaptedModel(parts, chosen, rule, num_items, num_users, dim)

    def score(shared, private, user):
        return make_text_logits(made, shared, private, user, None)

    private, can_fold = partial(init_private, made), not compare.pairwise and rule != "fedsa"
    folds = partial(fit_user, made, compare) if can_fold else None
    value = partial(compare_examples, made, compare)
    return Model(partial(init_shared, made), private, value, score, compare.pairwise, folds, frozen=frozen)
