"""The encoder against NumPy on random weights, and against the published vectors of the weights that can be fetched."""

import importlib.util
from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.data.sources.pretrained import read_pretrained, tokenize_texts
from jaxfed.models.bert import BertEncoder, BertSizes, encode_tokens, is_piece, pool_pieces
from jaxfed.models.bert_weights import convert_bert, map_parameters, read_sizes
from tests.small_text import SIZES, random_tensors

CONFIG = {"model_type": "bert", "hidden_act": "gelu", **SIZES}
UNUSED = SIZES["vocab_size"]
TOKENS = np.array(
    [[2, 5, 7, 3, 4, 9], [2, 6, 3, UNUSED, UNUSED, UNUSED], [2, 8, 10, 13, 3, UNUSED], [2, 3, *[UNUSED] * 4]], np.int32
)


# --- in NumPy, in float64, text by text and without padding ----------------------------------------


def normalize(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * scale + bias


def encode_by_hand(tensors, pieces, heads=3):
    """The vector of one text."""
    held = {name: np.float64(x) for name, x in tensors.items()}

    def dense(name, x):
        return x @ held[f"{name}.weight"].T + held[f"{name}.bias"]

    def norm(name, x):
        return normalize(x, held[f"{name}.weight"], held[f"{name}.bias"])

    x = held["embeddings.word_embeddings.weight"][pieces]
    x = x + held["embeddings.position_embeddings.weight"][: len(pieces)]
    x = norm("embeddings.LayerNorm", x + held["embeddings.token_type_embeddings.weight"][0])
    for number in range(SIZES["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        query, key, value = (
            np.split(dense(f"{layer}.attention.self.{part}", x), heads, -1) for part in ("query", "key", "value")
        )
        found = []
        for q, k, v in zip(query, key, value, strict=True):
            weight = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            found.append(weight / weight.sum(-1, keepdims=True) @ v)
        x = norm(f"{layer}.attention.output.LayerNorm", x + dense(f"{layer}.attention.output.dense", np.hstack(found)))
        hidden = dense(f"{layer}.intermediate.dense", x)
        hidden = hidden * (1 + np.vectorize(erf)(hidden / np.sqrt(2))) / 2
        x = norm(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", hidden))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.fixture(scope="module")
def random_encoder():
    return convert_bert(CONFIG, random_tensors())


def vectors_of(encoder, tokens, **more):
    return encode_tokens(BertEncoder(encoder.sizes, **more), {"params": encoder.params}, tokens)


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("remat", [False, True])
def test_vectors_against_numpy(prefix, remat):
    """float32 against float64 over two layers, with padding against without."""
    tensors = random_tensors()
    encoder = convert_bert(CONFIG, {prefix + name: x for name, x in tensors.items()})
    got = vectors_of(encoder, TOKENS, remat=remat)
    want = [encode_by_hand(tensors, row[row < UNUSED]) for row in TOKENS]
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert np.std(want, 0).max() > 0.1


def test_the_first_piece_for_the_text():
    """Encoders that pool by it have other vectors: those of the hidden state of [CLS], of length 1."""
    tensors = random_tensors()
    encoder = convert_bert(CONFIG | {"pooling": "cls"}, tensors)
    live = is_piece(TOKENS, encoder.sizes)
    first = BertEncoder(encoder.sizes).apply({"params": encoder.params}, TOKENS, live)[:, 0]
    got = vectors_of(encoder, TOKENS)
    np.testing.assert_allclose(got, first / np.linalg.norm(first, axis=-1, keepdims=True), atol=1e-6)
    assert np.abs(got - vectors_of(convert_bert(CONFIG, tensors), TOKENS)).max() > 0.1


def test_the_upper_layers_go_on_from_the_lower_ones(random_encoder):
    sizes, params = random_encoder.sizes, random_encoder.params
    live = is_piece(TOKENS, sizes)
    lower, upper = BertEncoder(sizes, last=1), BertEncoder(sizes, first=1)
    parts = [{name: params[name] for name in names} for names in (("embeddings", "layer_0"), ("layer_1",))]
    hidden = lower.apply({"params": parts[0]}, TOKENS, live)
    got = pool_pieces(upper.apply({"params": parts[1]}, hidden, live), live)
    np.testing.assert_array_equal(got, vectors_of(random_encoder, TOKENS))
    drawn = upper.init(jax.random.key(0), hidden, live)["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, parts[1])


def test_bfloat16_comes_near(random_encoder):
    """Eight bits over two layers of normalised numbers; the parameters stay in float32."""
    got, want = vectors_of(random_encoder, TOKENS, dtype=jnp.bfloat16), vectors_of(random_encoder, TOKENS)
    assert got.dtype == jnp.float32
    assert 1e-5 < np.abs(got - want).max() < 0.05


def test_a_row_without_pieces_is_zero_and_so_is_its_gradient(random_encoder):
    nothing = np.full((1, 6), UNUSED, np.int32)

    def total(params):
        return jnp.sum(encode_tokens(BertEncoder(random_encoder.sizes), {"params": params}, nothing))

    value, slope = jax.value_and_grad(total)(random_encoder.params)
    assert value == 0
    assert all((x == 0).all() for x in jax.tree.leaves(slope))


# --- what cannot be read ----------------------------------------

WRONG = {
    "missing": (
        lambda t: t.pop("encoder.layer.1.output.dense.bias"),
        "1 tensors are missing (encoder.layer.1.output.d",
    ),
    "many missing": (lambda t: [t.pop(n) for n in list(t) if "layer.1" in n], "16 tensors are missing"),
    "extra": (lambda t: t.update({"encoder.layer.2.output.dense.bias": t["pooler.dense.bias"]}), "of no BERT encoder"),
    "shape": (
        lambda t: t.update({"encoder.layer.0.intermediate.dense.weight": np.zeros((12, 20), np.float32)}),
        "encoder.layer.0.intermediate.dense.weight is [12, 20], and config.json says [20, 12]",
    ),
    "positions": (
        lambda t: t.update({"embeddings.position_embeddings.weight": np.zeros((8, 12), np.float32)}),
        "embeddings.position_embeddings.weight is [8, 12], and config.json says [32, 12]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_named(name):
    tensors = random_tensors()
    spoil, said = WRONG[name]
    spoil(tensors)
    with pytest.raises(ValueError, match="model.safetensors") as error:
        convert_bert(CONFIG, tensors)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, 'model_type is "gpt2"'),
        ({"hidden_act": "relu"}, 'hidden_act is "relu"'),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_attention_heads": 5}, "5 heads do not divide a hidden_size of 12"),
        ({"hidden_size": "12"}, "hidden_size is '12'"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
    ],
)
def test_configs_of_other_models_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        read_sizes(CONFIG | change)


def test_a_size_that_is_missing_is_named():
    with pytest.raises(ValueError, match="num_hidden_layers is missing"):
        read_sizes({name: x for name, x in CONFIG.items() if name != "num_hidden_layers"})


def test_every_parameter_has_a_tensor():
    sizes = BertSizes(30, 16, 8, 3, 2, 8)
    shapes = jax.eval_shape(BertEncoder(sizes).init, jax.random.key(0), jnp.zeros((1, 4), int), jnp.ones((1, 4), bool))
    paths = {"/".join(k.key for k in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])}
    assert paths == set(map_parameters(sizes).values())


# --- the weights that can be fetched ----------------------------------------


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2; what needs it is left out where it cannot be had."""
    if missing := [name for name in ("safetensors", "tokenizers") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    try:
        return read_pretrained()
    except ValueError as error:
        pytest.skip(str(error))


TEXTS = [
    "That is a happy person",
    "That is a happy dog",
    "That is a very happy person",
    "Today is a sunny day",
]


def test_published_cosines(minilm):
    """To the six digits that are published of the first vector, and 1e-5 of the cosines."""
    encoder = convert_bert(minilm.config, minilm.tensors)
    assert sum(x.size for x in jax.tree.leaves(encoder.params)) == 22_713_216 - 384 * 384 - 384  # without the pooler
    vectors = np.asarray(vectors_of(encoder, tokenize_texts(minilm, TEXTS).ids))
    np.testing.assert_allclose(vectors[0] @ vectors[1:].T, [0.6945773363, 0.9429150820, 0.2568760813], atol=1e-5)
    np.testing.assert_allclose(vectors[0, :5], [-0.0338769, 0.0919416, 0.0487013, -0.0348836, -0.0648292], atol=2e-6)
