"""Tiny text encoders as folders in Hugging Face's layout, random weights in them."""

import json

import numpy as np

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "red", "blue", "night", "day", "of", "comedy", "war", "##s", ".")
SIZES = {
    "vocab_size": len(WORDS) + 2,
    "max_position_embeddings": 32,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def random_tensors(sizes=SIZES, seed=0):
    """{name: array} of a BERT encoder as it is published, its head among them."""
    rng, width = np.random.default_rng(seed), sizes["hidden_size"]

    def normal(*shape):
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": normal(sizes["vocab_size"], width),
        "embeddings.position_embeddings.weight": normal(sizes["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": normal(sizes["type_vocab_size"], width),
        "pooler.dense.weight": normal(width, width),
        "pooler.dense.bias": normal(width),
        "embeddings.position_ids": np.arange(sizes["max_position_embeddings"])[None],
    }
    inner = sizes["intermediate_size"]
    dense = {"attention.self.query": (width, width), "attention.self.key": (width, width)}
    dense |= {"attention.self.value": (width, width), "attention.output.dense": (width, width)}
    dense |= {"intermediate.dense": (inner, width), "output.dense": (width, inner)}
    norms = ["embeddings.LayerNorm"]
    for number in range(sizes["num_hidden_layers"]):
        layer = f"encoder.layer.{number}."
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
        for name, shape in dense.items():
            tensors |= {f"{layer}{name}.weight": normal(*shape), f"{layer}{name}.bias": normal(shape[0])}
    for name in norms:
        tensors |= {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}
    return tensors


def write_tokenizer(path, pads=True):
    """A tokenizer.json of WORDS. pads: it pads and cuts by itself, as published ones do."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    if pads:
        made.enable_padding(length=128)
        made.enable_truncation(128)
    made.save(str(path))


def write_encoder(folder, sizes=SIZES, tensors=None, **config):
    """Writes the three files; returns the tensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(sizes) if tensors is None else tensors
    known = {"model_type": "bert", "hidden_act": "gelu", **sizes, **config}
    (folder / "config.json").write_text(json.dumps(known))
    save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder / "tokenizer.json")
    return tensors


def make_encoder_and_tokens(num_items):
    """(a tiny encoder, the pieces of so many texts)."""
    from jaxfed.models.bert_weights import convert_bert

    encoder = convert_bert({"model_type": "bert", "hidden_act": "gelu"} | SIZES, random_tensors())
    rng, words, pieces = np.random.default_rng(1), SIZES["vocab_size"], 7
    ids = rng.integers(1, words, (num_items, pieces))
    tokens = np.where(np.arange(pieces) < rng.integers(2, pieces + 1, (num_items, 1)), ids, words).astype(np.int32)
    return encoder, tokens


def make_adapted_model(num_items, num_users=1, rule="fedit", quantized=False, **more):
    """A model whose clients train adapters of rank 2 of a tiny encoder, or what is said in `adapter`."""
    from jaxfed.models.lora import LoraSettings
    from jaxfed.models.quantized_encoder import quantize_encoder
    from jaxfed.models.text_lora import text_lora

    encoder, tokens = make_encoder_and_tokens(num_items)
    encoder = quantize_encoder(encoder) if quantized else encoder
    return text_lora(num_items, encoder, tokens, num_users, 5, LoraSettings(2, alpha=4.0), rule, **more)


def pack_adapted_run(**options):
    """(the packer's run of such a model, a cohort of one block of it, whose rows are those of the catalogue)."""
    from jaxfed.config.registry import REGISTRY
    from tests.composed import pack_small_run

    REGISTRY["model"]["adapted"] = lambda num_items, num_users: make_adapted_model(num_items, num_users, **options)
    try:
        more = {"work": {"batch_size": 8}, "server": {"name": "sgd", "lazy": False}}
        it, cohort = pack_small_run(model={"name": "adapted"}, channel=[{"name": "weighted_mean"}], **more)
    finally:
        del REGISTRY["model"]["adapted"]
    assert cohort.rows is None
    block = max(cohort.blocks, key=lambda block: (block.slots < len(cohort.ids)).sum())
    slots = block.slots[block.slots < len(cohort.ids)]
    present = cohort.present & np.isin(np.arange(len(cohort.ids)), slots)
    return it, cohort._replace(blocks=(block,), present=present)
