"""Tiny decoders of the Llama family as folders in Hugging Face's layout, random weights in them."""

import json

import numpy as np

from tests.small_text import WORDS, write_tokenizer

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": len(WORDS) + 2,
    "max_position_embeddings": 64,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
}


def random_decoder_tensors(config=CONFIG, seed=0):
    """{name: array} of a decoder as it is published."""
    rng, width, inner = np.random.default_rng(seed), config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))

    def normal(*shape):
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], width), "model.norm.weight": 1 + normal(width)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], width)
    shapes = {"self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width)}
    shapes |= {"self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries)}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        tensors |= {f"{layer}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = 1 + normal(width)
    return tensors


def write_decoder(folder, config=CONFIG, tensors=None, files=1):
    """Writes a folder, its tensors in one file or in several with an index; returns the tensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_decoder_tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json")
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names = [f"model-{number + 1:05d}-of-{files:05d}.safetensors" for number in range(files)]
    where = {name: names[number % files] for number, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: x for name, x in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tensors
