"""A base of 8 or 4 bits: how far off a number can be, how large it is, and that what is trained on it stays float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.algorithms.lora_products import RESIDUAL, multiply_factors
from jaxfed.algorithms.rolora import replace_dense
from jaxfed.core.tree import count_bytes
from jaxfed.data.sources.pretrained import read_pretrained, tokenize_texts
from jaxfed.models.adapters import BiasSettings, BottleneckSettings
from jaxfed.models.bert_weights import convert_bert
from jaxfed.models.lora import LoraSettings
from jaxfed.models.mf import mf
from jaxfed.models.normal_float import NormalFloatMatrix
from jaxfed.models.quantized_encoder import QuantizedMatrix, quantize_encoder, quantize_matrix, restore_floats
from jaxfed.models.text import text_encoder
from jaxfed.models.trained_encoder import encode_texts
from tests.laws.cover import parametrize_cover
from tests.models.test_text_lora import ENCODER, ITEMS, make, texts
from tests.small import KEY, close

STORED = quantize_encoder(ENCODER)
BY_TYPE = {"int8": STORED, "nf4": quantize_encoder(ENCODER, "nf4")}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_number_is_off_by_half_the_scale_of_its_channel(axis):
    """Channels of very different size, one of zeros; rounding of float32 beside the half."""
    matrix = np.random.default_rng(0).normal(size=(6, 5)) * 10.0 ** np.arange(-3, 2 + (axis == 0)).reshape(
        (-1, 1) if axis == 0 else (1, -1)
    )
    matrix = np.moveaxis(np.moveaxis(matrix, axis, 0) * (np.arange(matrix.shape[axis]) > 0)[:, None], 0, axis)
    made = quantize_matrix(matrix, axis)
    largest = np.abs(matrix).max(1 - axis, keepdims=True)
    off = np.abs(np.asarray(restore_floats(made)) - matrix)
    assert (off <= largest / 127 / 2 * (1 + 1e-4)).all()
    assert off.max() > 0
    assert (np.abs(made.codes).max(1 - axis) == np.where(largest.ravel() > 0, 127, 0)).all()


@pytest.mark.parametrize("dtype", BY_TYPE)
def test_matrices_take_a_byte_a_number_or_half(dtype):
    """And four for each scale: of each output and each piece, or of each 64 numbers of a row. The rest is as it was."""
    saved, number = 0, 0
    for name, layer in ENCODER.params.items():
        leaves = (
            {"word": layer["word"]}
            if name == "embeddings"
            else {key: x["kernel"] for key, x in layer.items() if "kernel" in x}
        )
        for key, x in leaves.items():
            number += 1
            if dtype == "int8":
                saved += 3 * x.size - 4 * x.shape[0 if key == "word" else 1]
            else:
                saved += 7 * x.size // 2 - 4 * x.shape[0] * -(-x.shape[1] // 64)
    assert number == 1 + 2 * 6
    assert count_bytes(ENCODER.params) - count_bytes(BY_TYPE[dtype].params) == saved


@pytest.mark.parametrize("dtype", BY_TYPE)
def test_an_encoder_of_codes_is_that_of_the_numbers_that_they_mean(dtype):
    """Its vectors, a parametrization's and a model's scores; what is trained starts from the same values."""
    stored = BY_TYPE[dtype]
    floats = ENCODER._replace(params=jax.tree.map(np.asarray, restore_floats(stored.params)))
    close(encode_texts(stored, texts()), encode_texts(floats, texts()))
    assert np.abs(encode_texts(stored, texts()) - encode_texts(ENCODER, texts())).max() > 1e-4
    for lora in (None, LoraSettings(2)):
        made = [text_encoder(mf(ITEMS, 1, dim=4), each, texts(), 1, lora) for each in (stored, floats)]
        theta = made[0].init(KEY)
        close(theta, made[1].init(KEY), atol=0)
        slopes = [
            jax.grad(lambda theta, it=it: jnp.sum(it.forward(theta, None, it.frozen)["tables"]["item"].rows ** 2))(
                theta
            )
            for it in made
        ]
        close(*slopes, atol=1e-4)
    models = [make(encoder=each) for each in (stored, floats)]
    assert count_bytes(models[0].frozen) < count_bytes(models[1].frozen)
    shared, own = ({**models[0].init(KEY), **each.frozen} for each in models), models[0].private(KEY)
    close(*(it.score(each, own, 0) for it, each in zip(models, shared, strict=True)))
    kernel = models[0].frozen["text"]["base"]["layer_0"]["query"]["kernel"]
    assert isinstance(kernel, QuantizedMatrix if dtype == "int8" else NormalFloatMatrix)


ADAPTERS = {
    "lora": None,
    "lora, the base moved": None,
    "bottleneck": BottleneckSettings(3, "output"),
    "bitfit": BiasSettings("output"),
}


@parametrize_cover(name=[*ADAPTERS], dtype=[*BY_TYPE])
def test_every_adapter_on_a_base_of_codes(name, dtype):
    """Scores and gradients are those on the numbers that the codes mean; some rules add a residual to the base."""
    stored = BY_TYPE[dtype]
    floats = ENCODER._replace(params=jax.tree.map(np.asarray, restore_floats(stored.params)))
    models = [make(encoder=each, adapter=ADAPTERS[name], trained_layers=1) for each in (stored, floats)]
    shared = models[0].init(KEY)
    if name == "lora, the base moved":
        shared = replace_dense(shared, **{RESIDUAL: multiply_factors(shared)})
    shared = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(KEY, x.shape), shared)
    own = models[0].private(KEY)
    scored = [
        jax.value_and_grad(lambda s, it=it: jnp.sum(it.score({**s, **it.frozen}, own, 0) ** 2))(shared) for it in models
    ]
    close(*scored, atol=1e-4, rtol=1e-4)


TITLES = [
    "Toy Story (1995)",
    "Jumanji (1995)",
    "Heat (1995)",
    "Twelve Monkeys (1995)",
    "Star Wars (1977)",
    "Fargo (1996)",
]
TITLES += ["Return of the Jedi (1983)", "The Empire Strikes Back (1980)", "Pulp Fiction (1994)", "Aladdin (1992)"]


@pytest.mark.full  # it reads, and may fetch, 84 MB
@pytest.mark.parametrize(("dtype", "size", "off"), [("int8", 0.27, 0.01), ("nf4", 0.15, 0.06)])
def test_cosines_of_the_published_encoder(dtype, size, off):
    """Those of its model card, and of titles: to a hundredth with 8 bits, to six with 4."""
    pretrained = read_pretrained("")
    encoder = convert_bert(pretrained.config, pretrained.tensors)
    first = "That is a happy person"
    others = ["That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    tokens = tokenize_texts(pretrained, [first, *others], 0).ids
    stored = quantize_encoder(encoder, dtype)
    assert count_bytes(stored.params) < size * count_bytes(encoder.params)
    want = [0.6945773363, 0.9429150820, 0.2568760813]
    for each, atol in ((encoder, 1e-5), (stored, off)):
        vectors = encode_texts(each, tokens)
        np.testing.assert_allclose(vectors[1:] @ vectors[0], want, atol=atol)
    titles = tokenize_texts(pretrained, TITLES, 0).ids
    exact, rough = (encode_texts(each, titles) for each in (encoder, stored))
    np.testing.assert_allclose(rough @ rough.T, exact @ exact.T, atol=off)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="^base_dtype: no type 'int4': choose float32, int8 or nf4$"):
        quantize_encoder(ENCODER, "int4")
