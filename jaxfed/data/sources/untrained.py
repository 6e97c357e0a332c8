"""Text models without weights: their shape and their tokenizer, for measurements of memory and time."""

from pathlib import Path

from jaxfed.data.sources.pretrained import Pretrained, check_extra, fetch_minilm, read_json, read_tokenizer

# config.json of BERT-base (Devlin et al. 2019); the tokenizer of all-MiniLM-L6-v2 is for the same vocabulary
BERT_BASE = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def read_untrained(folder: str = "") -> Pretrained:
    """A text model of which only the shape and the tokenizer are read.

    Args:
        folder: A folder with config.json and tokenizer.json. Left out: the shape of BERT-base, and the tokenizer of
            all-MiniLM-L6-v2, which is fetched once (84 MB).

    Returns:
        The model, with no tensors.

    Raises:
        ValueError: a package or a file is missing or cannot be read, or the tokenizer is of another model.

    Example:
        >>> read_untrained("/no/such/folder")
        Traceback (most recent call last):
        ValueError: /no/such/folder: config.json is missing: name a folder with config.json and tokenizer.json
    """
    place = Path(folder).expanduser() if folder else None
    for name in ("config.json", "tokenizer.json"):
        if place and not (place / name).is_file():
            raise ValueError(f"{place}: {name} is missing: name a folder with config.json and tokenizer.json")
    check_extra()
    config = read_json(place / "config.json") if place else dict(BERT_BASE)
    return Pretrained(config, {}, read_tokenizer(place or fetch_minilm(), config), "random")
