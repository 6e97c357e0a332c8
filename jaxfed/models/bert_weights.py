"""The parameters of a BERT encoder from tensors under the names that Hugging Face gives them."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.types import Tree
from jaxfed.models.bert import BertEncoder, BertSizes
from jaxfed.models.tensor_names import check_tensors, lay_out_kernel, path_shapes, read_numbers, unflatten_paths

# of an encoder's embeddings and of a layer: the name of a tensor, and its path in the tree of `BertEncoder`
EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "word",
    "embeddings.position_embeddings.weight": "position",
    "embeddings.token_type_embeddings.weight": "token_type",
    "embeddings.LayerNorm.weight": "norm/scale",
    "embeddings.LayerNorm.bias": "norm/bias",
}
NORMS = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "output_norm"}
DENSE = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "hidden",
    "output.dense": "output",
}
SIZES = {  # fields of `BertSizes` by the keys of config.json
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "token_types": "type_vocab_size",
    "epsilon": "layer_norm_eps",
}
UNUSED = re.compile(r"^(pooler|cls)\.|(^|\.)position_ids$")  # heads of the pretraining; numbers that are no parameters


class TextEncoder(NamedTuple):
    """A pretrained encoder of the BERT family (Devlin et al. 2019).

    Args:
        sizes: Its sizes.
        params: Its parameters, the collection `params` of a `BertEncoder`.

    Example:
        >>> import jax
        >>> from jaxfed.models.bert import BertEncoder
        >>> sizes = BertSizes(vocabulary=10, positions=4, width=4, layers=1, heads=2, hidden=8)
        >>> tokens = jnp.zeros((1, 4), int)
        >>> params = BertEncoder(sizes).init(jax.random.key(0), tokens, tokens < 10)["params"]
        >>> TextEncoder(sizes, params).sizes.width
        4
    """

    sizes: BertSizes
    params: Tree


def read_sizes(config: Mapping[str, Any]) -> BertSizes:
    """The sizes that a config.json says.

    Raises:
        ValueError: it is not of a BERT encoder, a size is missing or cannot be.
    """
    for key, wanted in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(key, wanted) != wanted:
            raise ValueError(
                f'config.json: {key} is "{config[key]}", and only "{wanted}" can be read: take a BERT encoder'
            )
    found = read_numbers(config, SIZES, "BERT encoder")
    pooling = config.get("pooling", "mean")
    sizes = BertSizes(**{name: x if name == "epsilon" else int(x) for name, x in found.items()}, pooling=pooling)
    if sizes.width % sizes.heads:
        raise ValueError(f"config.json: {sizes.heads} heads do not divide a hidden_size of {sizes.width}")
    return sizes


def map_parameters(sizes: BertSizes) -> dict[str, str]:
    """{name of a tensor: its path in the tree} of all parameters of an encoder."""
    paths = {name: f"embeddings/{path}" for name, path in EMBEDDINGS.items()}
    for number in range(sizes.layers):
        for names, weight in ((NORMS, "scale"), (DENSE, "kernel")):
            for name, path in names.items():
                paths[f"encoder.layer.{number}.{name}.weight"] = f"layer_{number}/{path}/{weight}"
                paths[f"encoder.layer.{number}.{name}.bias"] = f"layer_{number}/{path}/bias"
    return paths


def encoder_shapes(sizes: BertSizes) -> dict[str, tuple[int, ...]]:
    """{name of a tensor: its shape in a file} of all parameters of an encoder."""
    tokens = jnp.zeros((1, sizes.positions), jnp.int32)
    of_path = path_shapes(jax.eval_shape(BertEncoder(sizes).init, jax.random.key(0), tokens, tokens < 1)["params"])
    return {
        name: of_path[path][::-1] if path.endswith("kernel") else of_path[path]
        for name, path in map_parameters(sizes).items()
    }


def convert_bert(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> TextEncoder:
    """A BERT encoder (Devlin et al. 2019) from the files of a folder in Hugging Face's layout.

    Args:
        config: What config.json says.
        tensors: What model.safetensors holds, by name, with or without `bert.` before it. `pooler.*`, `cls.*` and
            `position_ids` are no part of an encoder and are left out.

    Returns:
        The encoder, its parameters in float32.

    Raises:
        ValueError: tensors are missing, are not of a BERT encoder, or have another shape than config.json says.

    Example:
        >>> import jaxfed as jf
        >>> jf.models.convert_bert({"model_type": "gpt2"}, {})
        Traceback (most recent call last):
        ValueError: config.json: model_type is "gpt2", and only "bert" can be read: take a BERT encoder
    """
    sizes = read_sizes(config)
    held = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    held = {name: tensor for name, tensor in held.items() if not UNUSED.search(name)}
    check_tensors(held, encoder_shapes(sizes), "BERT encoder")
    paths = map_parameters(sizes)
    made = {path: lay_out_kernel(path, np.asarray(held[name], np.float32)) for name, path in paths.items()}
    return TextEncoder(sizes, unflatten_paths(made))


def init_bert(config: Mapping[str, Any]) -> TextEncoder:
    """A BERT encoder with random weights, the same in each process: to measure what one of its shape costs.

    Args:
        config: What config.json says.

    Returns:
        The encoder, its parameters in float32.

    Raises:
        ValueError: it is not of a BERT encoder.

    Example:
        >>> from jaxfed.data.sources.untrained import BERT_BASE
        >>> made = jax.eval_shape(lambda: init_bert(BERT_BASE).params)
        >>> sum(x.size for x in jax.tree.leaves(made))
        108891648
    """
    sizes = read_sizes(config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(BertEncoder(sizes).init)
    return TextEncoder(sizes, init(jax.random.key(0), tokens, tokens < 1)["params"])
