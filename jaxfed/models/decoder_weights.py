"""The parameters of a decoder of the Llama family from tensors under the names that Hugging Face gives them."""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.types import Tree
from jaxfed.models.decoder import Decoder, DecoderSizes, init_decoder
from jaxfed.models.tensor_names import check_tensors, lay_out_kernel, path_shapes, read_numbers, unflatten_paths

SIZES = {  # fields of `DecoderSizes` by the keys of config.json
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "epsilon": "rms_norm_eps",
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
UNUSED = re.compile(r"rotary_emb\.inv_freq$")  # numbers that are no parameters


class TextDecoder(NamedTuple):
    """A pretrained decoder of the Llama family (Touvron et al. 2023).

    Args:
        sizes: Its sizes.
        params: Its parameters, the collection `params` of a `Decoder`.
        start: The number of the piece that begins a text.

    Example:
        >>> import jax
        >>> sizes = DecoderSizes(10, 8, width=4, layers=1, heads=2, key_value_heads=1, head_width=2, hidden=8)
        >>> made = TextDecoder(sizes, init_decoder(Decoder(sizes), jax.random.key(0))["params"], start=1)
        >>> made.params["layers"]["q_proj"]["kernel"].shape
        (1, 4, 4)
    """

    sizes: DecoderSizes
    params: Tree
    start: int


def read_decoder_sizes(config: Mapping[str, Any]) -> DecoderSizes:
    """The sizes that a config.json says.

    Raises:
        ValueError: it is not of a decoder of the Llama family, or a size is missing or not valid.
    """
    known = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, wanted in known.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(f"config.json: {key} is {config[key]!r}, and only {wanted!r} can be read: take a Llama")
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | (config.get("rope_parameters") or {})
    scaling = config.get("rope_scaling") or rope
    if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
        raise ValueError(
            f'config.json: rotary positions of the type "{kind}" cannot be read: take a decoder with "default" ones'
        )
    numbers = read_numbers(config, SIZES, "Llama")
    beside = {
        "key_value_heads": config.get("num_key_value_heads") or numbers["heads"],
        "head_width": config.get("head_dim") or numbers["width"] // numbers["heads"],
        "rope_theta": rope["rope_theta"],
    }
    numbers |= read_numbers(beside, {name: name for name in beside}, "Llama")
    whole = {name: x if name in ("epsilon", "rope_theta") else int(x) for name, x in numbers.items()}
    sizes = DecoderSizes(**whole, tied=bool(config.get("tie_word_embeddings", False)))
    if sizes.heads % sizes.key_value_heads:
        raise ValueError(
            f"config.json: {sizes.key_value_heads} heads of keys do not divide {sizes.heads} heads of queries: "
            "take the file that belongs to the weights"
        )
    if sizes.head_width % 2:
        raise ValueError(
            f"config.json: heads have {sizes.head_width} numbers, and rotary positions need an even number: take "
            "another decoder"
        )
    return sizes


def map_decoder_parameters(sizes: DecoderSizes) -> dict[str, tuple[str, int | None]]:
    """{name of a tensor: (its path in the tree, its layer)} of all parameters of a decoder; None: of no layer."""
    paths: dict[str, tuple[str, int | None]] = {
        "model.embed_tokens.weight": ("embed_tokens", None),
        "model.norm.weight": ("norm/scale", None),
    }
    if not sizes.tied:
        paths["lm_head.weight"] = ("lm_head/kernel", None)
    parts = {f"self_attn.{name}": f"{name}/kernel" for name in ATTENTION}
    parts |= {f"mlp.{name}": f"{name}/kernel" for name in ("gate_proj", "up_proj", "down_proj")}
    parts |= {name: f"{name}/scale" for name in ("input_layernorm", "post_attention_layernorm")}
    for number in range(sizes.layers):
        for name, path in parts.items():
            paths[f"model.layers.{number}.{name}.weight"] = (f"layers/{path}", number)
    return paths


def tensor_shapes(sizes: DecoderSizes) -> dict[str, tuple[int, ...]]:
    """{name of a tensor: its shape in a file} of all parameters of a decoder."""
    of_path = path_shapes(jax.eval_shape(lambda key: init_decoder(Decoder(sizes), key)["params"], jax.random.key(0)))
    shapes = {}
    for name, (path, number) in map_decoder_parameters(sizes).items():
        shape = of_path[path] if number is None else of_path[path][1:]
        shapes[name] = shape[::-1] if path.endswith("kernel") else shape
    return shapes


def convert_llama(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    param_dtype: Literal["float32", "bfloat16"] = "float32",
) -> TextDecoder:
    """A decoder of the Llama family (Touvron et al. 2023, "LLaMA") from the files of a folder in Hugging Face's layout.

    Args:
        config: What config.json says.
        tensors: What model.safetensors holds, by name. `lm_head.weight` is not used where the output layer is tied.
        param_dtype: Type in which the parameters are stored.

    Returns:
        The decoder.

    Raises:
        ValueError: tensors are missing, are not of such a decoder, or have another shape than config.json says.

    Example:
        >>> import jaxfed as jf
        >>> jf.models.convert_llama({"model_type": "gpt2"}, {})
        Traceback (most recent call last):
        ValueError: config.json: model_type is 'gpt2', and only 'llama' can be read: take a Llama
    """
    sizes = read_decoder_sizes(config)
    start = config.get("bos_token_id")
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < sizes.vocabulary:
        raise ValueError(
            f"config.json: bos_token_id is {start!r}: it must be a number of the {sizes.vocabulary:,} pieces"
        )
    paths = map_decoder_parameters(sizes)
    held = {name: x for name, x in tensors.items() if not UNUSED.search(name)}
    if sizes.tied:
        held.pop("lm_head.weight", None)
    check_tensors(held, tensor_shapes(sizes), "decoder of the Llama family")
    found: dict[str, list[np.ndarray]] = {}
    for name, (path, _) in paths.items():  # layers come in their order
        found.setdefault(path, []).append(lay_out_kernel(path, np.asarray(held[name], jnp.dtype(param_dtype))))
    made = {path: np.stack(each) if path.startswith("layers/") else each[0] for path, each in found.items()}
    return TextDecoder(sizes, unflatten_paths(made), start)
