"""Item vectors of texts: fixed vectors and an encoder at the server, against the gradient of the composed model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.core.parametrization import apply_parametrization, check_parametrization
from jaxfed.core.tables import Table, is_table, take_rows
from jaxfed.core.tree import count_bytes
from jaxfed.models.bert import BertEncoder, encode_tokens
from jaxfed.models.bert_weights import convert_bert
from jaxfed.models.lora import LoraSettings, merge_lora
from jaxfed.models.mf import mf
from jaxfed.models.neural import neumf
from jaxfed.models.sasrec import sasrec
from jaxfed.models.text import ProjectedTable, text_encoder, text_vectors
from jaxfed.models.trained_encoder import BATCH, encode_texts, measure_standardization
from tests.composed import pack_small_run, round_and_gradient
from tests.small_text import SIZES, random_tensors

KEY = jax.random.key(3)
ENCODER = convert_bert({"model_type": "bert", "hidden_act": "gelu", **SIZES}, random_tensors())
WIDTH, WORDS = SIZES["hidden_size"], SIZES["vocab_size"]


def texts(number, pieces=7, seed=1):
    """int32 [number, pieces]: random pieces, of random lengths."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, WORDS, (number, pieces))
    return np.where(np.arange(pieces) < rng.integers(2, pieces + 1, (number, 1)), ids, WORDS).astype(np.int32)


def make_vectors(model, items, **more):
    return text_vectors(model, encode_texts(ENCODER, texts(items)), **more)


def make_encoder(model, items, **more):
    return text_encoder(model, ENCODER, texts(items), **more)


LORA = LoraSettings(3, alpha=6.0)
MAKE = {
    "vectors": make_vectors,
    "vectors and ids": lambda model, items: make_vectors(model, items, ids=True),
    "encoder": lambda model, items: make_encoder(model, items, encoder_rate=0.5),
    "upper layer": lambda model, items: make_encoder(model, items, trained_layers=1, encoder_rate=0.5),
    "lora": lambda model, items: make_encoder(model, items, lora=LORA),
    "lora above and ids": lambda model, items: make_encoder(model, items, trained_layers=1, lora=LORA, ids=True),
}


def move(theta, size=0.2):
    """Theta with noise, so that nothing of it is zero."""
    leaves, structure = jax.tree.flatten(theta)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return jax.tree.unflatten(
        structure, [x + size * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    )


# --- the law: a round takes the gradient of the whole model, encoder and all ----------------------------------------


@pytest.fixture(scope="module")
def packed():
    return pack_small_run()


@pytest.mark.parametrize("name", MAKE)
def test_a_round_takes_the_gradient_of_the_whole_model(name, packed):
    """To 1e-5 of the largest number of each array: sums over 30 clients in float32, in another order."""
    made = MAKE[name](packed[0].model, packed[0].data.num_items)
    got, want = round_and_gradient(*packed, made, move(made.init(KEY)))
    sizes = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))
        sizes[jax.tree_util.keystr(path)] = np.abs(b).max()
    for part in ("kernel", "['encoder']"):
        found = [size for path, size in sizes.items() if part in path]
        assert (max(found) > 0.01) if found else name.startswith("vectors")


def test_of_the_rows_of_a_round_each_is_encoded_once(packed):
    """The program of a round has one loop over as many texts as its clients hold, rounded up to whole batches."""
    it, cohort = packed
    made = make_encoder(it.model, it.data.num_items)
    held = {int(row) for block in cohort.blocks for row in np.append(cohort.rows, WORDS * 99)[block.rows].ravel()}
    assert len(np.unique(cohort.rows)) == len(cohort.rows) >= len(held) - 1  # past the end there are none
    shapes = jax.make_jaxpr(made.forward)(made.init(KEY), cohort.rows, made.frozen).pretty_print()
    size = min(BATCH, len(cohort.rows))
    assert f"[{-(-len(cohort.rows) // size)},{size},7]" in shapes


# --- what the vectors are ----------------------------------------


def test_vectors_are_projections_of_centred_texts():
    """In NumPy."""
    model, vectors = mf(30, 1, dim=5), encode_texts(ENCODER, texts(30))
    made = text_vectors(model, vectors, ids=True)
    theta = move(made.init(KEY))
    held = theta["tables"]["item"]
    centred = np.float64(vectors) - np.float64(vectors).mean(0)
    centred /= np.sqrt((centred**2).sum(1).mean())
    want = centred @ np.float64(held.kernel) + held.bias + held.ids.rows
    np.testing.assert_allclose(made.forward(theta, None, made.frozen)["tables"]["item"].rows, want, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder", "upper layer", "lora", "lora above and ids"])
def test_vectors_are_those_of_the_encoder_as_it_stands(name):
    """Of a moved encoder, put together by hand."""
    model = mf(100, 1, dim=5)
    made = MAKE[name](model, 100)
    theta = move(made.init(KEY))
    before = encode_texts(ENCODER, texts(100))
    if "lora" in name:
        params = merge_lora(ENCODER.params, theta["encoder"], LORA.scale)
    else:
        change = {part: theta["encoder"].get(part) for part in ENCODER.params}
        params = {
            part: x if change[part] is None else jax.tree.map(lambda x, y: x + 0.5 * y, x, change[part])
            for part, x in ENCODER.params.items()
        }
    vectors = np.float64(encode_tokens(BertEncoder(ENCODER.sizes), {"params": params}, jnp.asarray(texts(100))))
    spread = np.sqrt(((before - before.mean(0)) ** 2).sum(1).mean())
    held = theta["model"]["tables"]["item"]
    want = (vectors - before.mean(0)) / spread @ np.float64(held.kernel) + np.asarray(held.bias)
    want = want + (np.asarray(held.ids.rows) if held.ids is not None else 0)
    got = made.forward(theta, None, made.frozen)["tables"]["item"].rows
    np.testing.assert_allclose(got, want, atol=3e-5)
    rows = jnp.array([5, 99, 7, 100, 0])  # one past the end
    some = made.forward(theta, rows, made.frozen)["tables"]["item"].rows
    np.testing.assert_allclose(np.delete(some, 3, 0), want[[5, 99, 7, 0]], atol=3e-5)


MODELS = [
    mf(50, 2, dim=6),
    mf(50, 1, dim=6, table_dtype="bfloat16"),
    neumf(50, 1, 6),
    sasrec(50, dim=6, length=5, blocks=1),
]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("model", MODELS)
def test_they_fit_any_model_with_tables(name, model):
    made = MAKE[name](model, 50)
    check_parametrization(made, model)
    ours = jax.tree.leaves(apply_parametrization(made, made.init(KEY)))
    for a, b in zip(ours, jax.tree.leaves(model.init(KEY)), strict=True):  # as large as the model's own: of 300 numbers
        assert np.std(np.float32(a)) == pytest.approx(np.std(np.float32(b)), rel=0.6, abs=1e-6)


def test_an_encoder_begins_with_the_pretrained_one():
    """Adapters and the change of the parameters start at zero, so that all begin with the same vectors."""
    model = mf(50, 1, dim=6)
    made = [MAKE[name](model, 50) for name in ("encoder", "upper layer", "lora", "lora above and ids")]
    kernel = made[0].init(KEY)["model"]
    first, *rest = (each.forward(each.init(KEY) | {"model": kernel}, None, each.frozen) for each in made)
    for each in rest:
        np.testing.assert_allclose(each["tables"]["item"].rows, first["tables"]["item"].rows, atol=1e-5)


def test_texts_that_are_all_alike_give_finite_vectors():
    alike = np.repeat(texts(1), 20, 0)
    made = text_encoder(mf(20, 1, dim=3), ENCODER, alike)
    assert np.isfinite(apply_parametrization(made, made.init(KEY))["tables"]["item"].rows).all()


def test_bfloat16_computes_near_it():
    model = mf(20, 1, dim=3)
    made = [text_encoder(model, ENCODER, texts(20), compute_dtype=dtype) for dtype in ("float32", "bfloat16")]
    a, b = (np.asarray(apply_parametrization(each, made[0].init(KEY))["tables"]["item"].rows) for each in made)
    assert a.dtype == b.dtype == np.float32
    assert 1e-6 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


# --- what is held, and what is compiled ----------------------------------------


def test_theta_holds_what_is_trained_and_no_base():
    model = mf(50, 1, dim=6)
    projection = (WIDTH + 1) * 6 + 50  # and the model's bias
    lora = 2 * 2 * 2 * 3 * WIDTH  # layers, products, factors of rank 3
    layer = sum(x.size for x in jax.tree.leaves(ENCODER.params["layer_1"]))
    whole = sum(x.size for x in jax.tree.leaves(ENCODER.params))
    for name, more in {"vectors": 0, "encoder": whole, "upper layer": layer, "lora": lora}.items():
        theta = jax.eval_shape(MAKE[name](model, 50).init, KEY)
        assert sum(x.size for x in jax.tree.leaves(theta)) == projection + more


@pytest.mark.parametrize("name", ["vectors", "encoder", "upper layer", "lora"])
def test_what_is_frozen_is_no_constant_of_a_program(name):
    made = MAKE[name](mf(50, 1, dim=6), 50)
    theta, rows = made.init(KEY), jnp.arange(8)

    def pull(theta, rows, frozen):
        found, back = jax.vjp(lambda theta: made.forward(theta, rows, frozen), theta)
        return back(found)

    def constants(text):
        """Arrays of different numbers that a program holds, as XLA's text writes them."""
        return re.findall(r'constant dense<"[^>]*> : tensor<(\S+)>', text)

    assert not constants(jax.jit(pull).lower(theta, rows, made.frozen).as_text())
    closed = jax.jit(lambda theta: pull(theta, rows, made.frozen)).lower(theta).as_text()
    assert len(constants(closed)) >= 1  # as it would be otherwise


def test_the_memory_of_a_gradient_is_that_of_one_batch():
    """Of eight times as many texts it grows by the vectors alone, not by the activations."""
    sizes = []
    for number in (2 * BATCH, 16 * BATCH):
        made = make_encoder(mf(number, 1, dim=4), number, lora=LORA)
        theta = made.init(KEY)

        def loss(theta, frozen, made=made):
            return sum(jnp.sum(x) for x in jax.tree.leaves(made.forward(theta, None, frozen)))

        compiled = jax.jit(jax.grad(loss)).lower(theta, made.frozen).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    vectors, activations = 14 * BATCH * WIDTH * 4, 14 * BATCH * 7 * SIZES["intermediate_size"] * 4
    assert sizes[1] - sizes[0] < 8 * vectors < activations + 4 * vectors


# --- what cannot be ----------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_vectors(mf(9, 1, dim=4), 8), "parametrization.text_vectors: there are 8 texts for 9 items"),
        (lambda: make_encoder(mf(9, 1, dim=4), 8), "parametrization.text_encoder: there are 8 texts for 9 items"),
        (lambda: make_encoder(mf(9, 1, dim=4), 9, trained_layers=3), "trained_layers is 3: the encoder has 2 layers"),
        (lambda: make_encoder(mf(9, 1, dim=4), 9, trained_layers=-1), "trained_layers is -1"),
        (lambda: make_encoder(mf(9, 1, dim=4), 9, encoder_rate=0.0), "encoder_rate is 0.0: it must be above 0"),
        (lambda: make_encoder(mf(9, 1, dim=4), 9, lora=LoraSettings(99)), "lora_rank is 99: layer_0/query has a width"),
        (
            lambda: make_encoder(mf(9, 1, dim=4), 9, trained_layers=1, lora=LoraSettings(2, pattern="layer_0")),
            'lora_pattern "layer_0" is in the path of no layer: there are layer_1/',
        ),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_marks_of_tables_are_where_rows_are():
    made = make_encoder(mf(30, 1, dim=4), 30, trained_layers=1, ids=True)
    marked = [x for x in jax.tree.leaves((made.init(KEY), made.frozen), is_leaf=is_table) if isinstance(x, Table)]
    assert len(marked) == 4  # ids, bias, hidden states, places
    assert all(len(x.rows) == 30 for x in marked)
    held = take_rows(made.init(KEY), jnp.array([3]))["model"]["tables"]["item"]
    assert isinstance(held, ProjectedTable)
    assert count_bytes(held.ids) == 16


def test_rows_that_pad_a_table_count_in_no_mean():
    vectors = encode_texts(ENCODER, texts(9))
    padded = np.concatenate([vectors, np.full((3, WIDTH), np.nan, np.float32)])
    for one, other in zip(measure_standardization(padded), measure_standardization(vectors), strict=True):
        np.testing.assert_array_equal(one, other)
    held, whole = (text_vectors(mf(len(x), 1, dim=4), x).frozen.rows for x in (padded, vectors))
    np.testing.assert_array_equal(held[:9], whole)
    assert not held[9:].any()
