"""Adapters on dense layers and attention: equations, sizes, merging, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.models.bert import BertEncoder, BertSizes, encode_tokens
from jaxfed.models.lora import LoraSettings, init_lora, make_lora_product, merge_lora

KEY = jax.random.key(0)
MINILM = BertSizes(30522, 512, 384, 6, 12, 1536)
SMALL = BertSizes(20, 8, 12, 2, 3, 20)
TOKENS = jax.random.randint(KEY, (3, 8), 0, 24)  # some are padding


def adapted(sizes, settings, **more):
    return BertEncoder(sizes, dot_general_cls=make_lora_product(settings), **more)


def factors_of(sizes, settings, **more):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1, 8), jnp.bool)
    return init_lora(adapted(sizes, settings, **more), settings, KEY, *tokens)


def move(factors, size=0.3):
    """Factors of which neither is zero."""
    leaves, structure = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return jax.tree.unflatten(
        structure, [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.mark.parametrize(
    ("rank", "pattern", "numbers"),
    [(8, "query|value", 73_728), (8, "", 331_776), (4, "layer_5/query", 3_072)],
)
def test_sizes_of_minilm(rank, pattern, numbers):
    """73,728 numbers are .32 % of the encoder's."""
    settings = LoraSettings(rank, pattern=pattern)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1, 8), jnp.bool)
    made = jax.eval_shape(adapted(MINILM, settings).init, KEY, *tokens)
    assert sum(x.size for x in jax.tree.leaves(made["lora"])) == numbers
    plain = jax.eval_shape(BertEncoder(MINILM).init, KEY, *tokens)
    assert jax.tree.structure(plain["params"]) == jax.tree.structure(made["params"])


def test_adapters_begin_with_the_same_function():
    settings = LoraSettings(2)
    params = BertEncoder(SMALL).init(KEY, TOKENS, TOKENS < 20)["params"]
    factors = factors_of(SMALL, settings)
    got = encode_tokens(adapted(SMALL, settings), {"params": params, "lora": factors}, TOKENS)
    np.testing.assert_array_equal(got, encode_tokens(BertEncoder(SMALL), {"params": params}, TOKENS))
    size = np.std(np.concatenate([np.ravel(each["factors"]["a"]) for each in factors["layer_0"].values()]))
    assert size == pytest.approx(12**-0.5, rel=0.4)  # of 48 numbers


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("pattern", ["query|value", "", "layer_1"])
def test_merged_kernels_give_the_same(pattern, remat):
    settings = LoraSettings(2, alpha=3.0, pattern=pattern)
    params = BertEncoder(SMALL).init(KEY, TOKENS, TOKENS < 20)["params"]
    factors = move(factors_of(SMALL, settings, remat=remat))
    got = encode_tokens(adapted(SMALL, settings, remat=remat), {"params": params, "lora": factors}, TOKENS)
    merged = merge_lora(params, factors, settings.scale)
    np.testing.assert_allclose(got, encode_tokens(BertEncoder(SMALL), {"params": merged}, TOKENS), atol=1e-6)
    plain = encode_tokens(BertEncoder(SMALL), {"params": params}, TOKENS)
    assert np.abs(got - plain).max() > 0.01
    layers = {name for name in params if name in factors}
    assert layers == ({"layer_1"} if pattern == "layer_1" else {"layer_0", "layer_1"})


class Attention(nn.Module):
    """Attention of linen, whose kernels are [in, heads, size] and [heads, size, out]."""

    product: object = None

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(
            3, qkv_dot_general_cls=self.product, out_dot_general_cls=self.product, name="attention"
        )(x)


def test_attention_of_linen():
    settings = LoraSettings(2, alpha=1.0, pattern="attention/(key|out)")
    module, x = Attention(make_lora_product(settings)), jax.random.normal(KEY, (2, 5, 12))
    params = Attention().init(KEY, x)["params"]
    factors = move(init_lora(module, settings, KEY, x))
    assert jax.tree.map(jnp.shape, factors["attention"]) == {
        "key": {"factors": {"a": (12, 2), "b": (2, 3, 4)}},
        "out": {"factors": {"a": (3, 4, 2), "b": (2, 12)}},
    }
    got = module.apply({"params": params, "lora": factors}, x)
    want = Attention().apply({"params": merge_lora(params, factors, 0.5)}, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_one_product_against_numpy():
    settings = LoraSettings(2, alpha=6.0, pattern="^$")  # the path of a layer alone is empty
    layer, x = nn.Dense(5, dot_general_cls=make_lora_product(settings)), jax.random.normal(KEY, (3, 4))
    made = layer.init(KEY, x)
    factors = move(made["lora"])
    a, b = (np.float64(factors["factors"][name]) for name in "ab")
    want = np.float64(x) @ (np.float64(made["params"]["kernel"]) + 3.0 * a @ b)
    np.testing.assert_allclose(layer.apply({"params": made["params"], "lora": factors}, x), want, atol=1e-5)


def test_half_precision_stays_half():
    settings = LoraSettings(2, pattern="")
    layer = nn.Dense(5, dtype=jnp.bfloat16, dot_general_cls=make_lora_product(settings))
    x = jax.random.normal(KEY, (3, 4))
    made = layer.init(KEY, x)
    assert layer.apply(made, x).dtype == jnp.bfloat16
    assert made["lora"]["factors"]["a"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            LoraSettings(2, pattern="quarry"),
            'lora_pattern "quarry" is in the path of no layer: there are layer_0/atten',
        ),
        (LoraSettings(13), "lora_rank is 13: layer_0/query has a width of 12, set it from 1 to that"),
        (LoraSettings(0), "lora_rank is 0: it must be at least 1"),
        (LoraSettings(2, pattern="("), 'lora_pattern "\\(" is no regular expression'),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, said):
    with pytest.raises(ValueError, match=said) as error:
        factors_of(SMALL, settings)
    assert "\n" not in str(error.value)
