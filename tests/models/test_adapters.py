"""Bottlenecks and biases in place of low-rank adapters: the base at the start, what is sent, what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.channels.average import weighted_mean
from jaxfed.core.federate import federate
from jaxfed.core.tree import count_bytes
from jaxfed.models.adapters import BiasSettings, BottleneckSettings, add_biases, init_bottlenecks, make_bottleneck
from jaxfed.models.bert import BertEncoder, BertSizes, encode_tokens
from jaxfed.models.trained_encoder import encode_texts, measure_standardization
from tests.small import KEY, same
from tests.small_text import SIZES, make_adapted_model, make_encoder_and_tokens, pack_adapted_run

WIDTH, HIDDEN, ITEMS, DIM = SIZES["hidden_size"], SIZES["intermediate_size"], 80, 5
SMALL = BertSizes(20, 8, 12, 2, 3, 20)
TOKENS = jax.random.randint(KEY, (3, 8), 0, 24)  # some are padding
ADAPTERS = {  # settings, the numbers of one layer, the paths of what is trained
    "bottleneck": (BottleneckSettings(3), 2 * (WIDTH * 3 + 3 + 3 * WIDTH + WIDTH)),
    "one bottleneck": (BottleneckSettings(3, "/output"), WIDTH * 3 + 3 + 3 * WIDTH + WIDTH),
    "bitfit": (BiasSettings(), 7 * WIDTH + HIDDEN),  # four of attention, two of norms, the second of the network
    "some biases": (BiasSettings("query|output$"), 3 * WIDTH),
    "full": ("full", 4 * (WIDTH + 1) * WIDTH + 4 * WIDTH + (WIDTH + 1) * HIDDEN + (HIDDEN + 1) * WIDTH),
}
RATES = {"bottleneck": 2.0, "bitfit": 2.0, "full": 0.3}  # with which the loss falls in six rounds


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_sent_is_the_adapter_and_the_projection(name):
    """And at the start the vectors are those of the base."""
    settings, numbers = ADAPTERS[name]
    it, cohort = pack_adapted_run(adapter=settings, trained_layers=1)
    rows = np.array([3, 40])
    np.testing.assert_array_equal(it.wire.up(rows), 4 * (1 + (WIDTH + 1) * DIM + numbers) + rows * (4 + 4))
    model, plain = it.model, make_adapted_model(it.data.num_items, trained_layers=1)
    made, private = model.init(KEY), model.private(KEY)
    beside = {"kernel": made["params"]["kernel"], "shift": made["params"]["shift"]}
    base = {**plain.init(KEY), "tables": made["tables"]}
    base = {**base, "params": base["params"] | beside, **plain.frozen}
    start = {**made, **model.frozen}
    np.testing.assert_allclose(model.score(start, private, 0), plain.score(base, private, 0), atol=1e-6)

    if name not in RATES:
        return
    algorithm = federate(
        jf.algorithms.fedavg(model, optax.sgd(RATES[name])), weighted_mean(), it.data.num_clients, frozen=model.frozen
    )
    state, losses = algorithm.init(made, KEY), []
    for _ in range(6):
        state, info = algorithm.step(state, cohort, KEY)
        losses.append(float(info["train/loss"]))
    after = state.shared.params["params"]["adapter"]
    assert sum(x.size for x in jax.tree.leaves(after)) == numbers
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(after))
    assert losses[-1] < losses[0] - 0.02
    assert (
        np.abs(
            model.score({**start, "params": {**made["params"], "adapter": after}}, private, 0)
            - model.score(start, private, 0)
        ).max()
        > 1e-4
    )


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_whole_layers_are_parameters_and_nothing_of_them_is_frozen(layers):
    """What is trained is the pretrained layers; their scores are those of the whole encoder with these in it."""
    model, lora = (make_adapted_model(ITEMS, trained_layers=layers, adapter=adapter) for adapter in ("full", None))
    made, private, (encoder, tokens) = model.init(KEY), model.private(KEY), make_encoder_and_tokens(ITEMS)
    trained = made["params"]["adapter"]
    assert trained.keys() == (
        {"layer_1"} if layers == 1 else encoder.params.keys()
    )  # with all layers the embeddings, too
    same(trained, {name: encoder.params[name] for name in trained})
    assert count_bytes(lora.frozen) - count_bytes(model.frozen) == count_bytes(trained), (
        "no base of these is downloaded"
    )
    moved = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
    vectors = encode_tokens(BertEncoder(encoder.sizes), {"params": encoder.params | moved}, jnp.asarray(tokens))
    standard = measure_standardization(encode_texts(encoder, tokens))
    rows = (vectors - standard.centre) / standard.spread @ made["params"]["kernel"] + made["params"]["shift"]
    got = model.score({**made, "params": made["params"] | {"adapter": moved}, **model.frozen}, private, 0)
    np.testing.assert_allclose(got, rows @ private["private"]["user"][0] + made["tables"]["bias"].rows, atol=2e-5)


def test_a_bottleneck_against_numpy():
    settings = BottleneckSettings(3, "layer_1/attention_output")
    params = BertEncoder(SMALL).init(KEY, TOKENS, TOKENS < 20)["params"]
    module = BertEncoder(SMALL, bottleneck=make_bottleneck(settings))
    inputs = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1, 8), jnp.bool)
    made = init_bottlenecks(module, settings, KEY, *inputs)
    assert jax.tree.map(jnp.shape, made) == {
        "layer_1": {"attention_output_adapter": {"down": (12, 3), "down_bias": (3,), "up": (3, 12), "up_bias": (12,)}}
    }
    plain = encode_tokens(BertEncoder(SMALL), {"params": params}, TOKENS)
    np.testing.assert_array_equal(encode_tokens(module, {"params": params, "adapter": made}, TOKENS), plain)
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), made)
    own = moved["layer_1"]["attention_output_adapter"]
    _, seen = module.apply(
        {"params": params, "adapter": moved}, TOKENS, TOKENS < 20, capture_intermediates=True, mutable=["intermediates"]
    )
    layer = seen["intermediates"]["layer_1"]
    (h,), (got,) = (layer[name]["__call__"] for name in ("attention_output", "attention_output_adapter"))
    inner = np.asarray(nn.gelu(h @ own["down"] + own["down_bias"], approximate=False))
    np.testing.assert_allclose(got, h + inner @ own["up"] + own["up_bias"], atol=1e-5)
    assert np.abs(encode_tokens(module, {"params": params, "adapter": moved}, TOKENS) - plain).max() > 0.01


def test_biases_move_alone():
    params = {"layer": {"query": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"bias": jnp.zeros(2)}}}
    got = add_biases(params, {"layer": {"query": {"bias": jnp.array([1.0, 2.0])}}})
    assert got["layer"]["query"]["bias"].tolist() == [2, 3]
    assert got["layer"]["query"]["kernel"] is params["layer"]["query"]["kernel"]
    assert got["layer"]["norm"] is params["layer"]["norm"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapter": BottleneckSettings(2, "nothing")},
            'adapter_pattern "nothing" is in the path of no layer.*attention_output',
        ),
        ({"adapter": BiasSettings("nothing")}, 'adapter_pattern "nothing" is in the path of no layer.*and 13 more'),
        ({"adapter": BottleneckSettings(0)}, "adapter_size is 0"),
        ({"adapter": BiasSettings("(")}, "is no regular expression"),
        ({"adapter": BottleneckSettings(2, "(")}, "is no regular expression"),
        ({"adapter": BiasSettings(), "rule": "ffa"}, "leave it out for other adapters"),
        ({"adapter": "full", "rule": "fedsa"}, "leave it out for other adapters"),
        ({"adapter": "full", "quantized": True}, "leave base_dtype out"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_adapted_model(ITEMS, **options)
    assert "\n" not in str(error.value)
