"""The decoder against NumPy on random weights; causality, padding, grouped queries, rotary positions, scan, remat."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.models.decoder import Decoder, DecoderLayer, rotate_pairs
from jaxfed.models.decoder_weights import convert_llama, map_decoder_parameters, read_decoder_sizes
from jaxfed.models.lora import LoraSettings, make_lora_product, merge_lora
from jaxfed.models.tensor_names import path_shapes
from tests.small_decoder import CONFIG, random_decoder_tensors

TIED, LAYERS = CONFIG | {"tie_word_embeddings": True}, CONFIG["num_hidden_layers"]
EQUAL = CONFIG | {"num_key_value_heads": CONFIG["num_attention_heads"]}
TOKENS = np.array([[2, 5, 7, 3, 4, 9, 11], [2, 6, 3, 3, 8, 1, 5]], np.int32)
ALL = np.ones_like(TOKENS, bool)
ATOL = 1e-5  # float32 against float64 over three layers, logits of size one


# --- in NumPy, in float64, text by text, from the equations ----------------------------------------


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"]) * scale


def rotate_by_hand(x):
    """[T, D]: each pair of numbers (i, i + D/2) as a complex one, times exp(i place theta^(-2i/D))."""
    half = x.shape[-1] // 2
    speed = CONFIG["rope_theta"] ** (-2 * np.arange(half) / x.shape[-1])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] * speed)
    return np.hstack([turned.real, turned.imag])


def logits_by_hand(config, tensors, pieces):
    held = {name: np.float64(x) for name, x in tensors.items()}
    x = held["model.embed_tokens.weight"][pieces]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    for number in range(config["num_hidden_layers"]):
        weight = {name.split(".")[-2]: w for name, w in held.items() if name.startswith(f"model.layers.{number}.")}
        inner = rms_norm(x, weight["input_layernorm"])
        queries, keys, values = (
            np.split(inner @ weight[name].T, weight[name].shape[0] // config["head_dim"], -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        found = []
        for head, query in enumerate(queries):
            scores = rotate_by_hand(query) @ rotate_by_hand(keys[head // group]).T / np.sqrt(config["head_dim"])
            scores[np.triu_indices(len(pieces), 1)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            found.append(share / share.sum(-1, keepdims=True) @ values[head // group])
        x = x + np.hstack(found) @ weight["o_proj"].T
        inner = rms_norm(x, weight["post_attention_layernorm"])
        gate = inner @ weight["gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (inner @ weight["up_proj"].T)) @ weight["down_proj"].T
    head = held["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, held["model.norm.weight"]) @ head.T


def logits_of(made, tokens, live=None, **options):
    module = Decoder(made.sizes, **options)
    return module.apply({"params": made.params}, tokens, np.ones_like(tokens, bool) if live is None else live)[0]


@pytest.fixture(scope="module")
def made():
    return convert_llama(CONFIG, random_decoder_tensors())


@pytest.mark.parametrize("config", [CONFIG, TIED, EQUAL], ids=["grouped", "tied", "equal heads"])
def test_logits_against_numpy(config):
    tensors = random_decoder_tensors(config)
    got = logits_of(convert_llama(config, tensors), TOKENS)
    want = [logits_by_hand(config, tensors, row) for row in TOKENS]
    np.testing.assert_allclose(got, want, atol=ATOL)
    assert np.std(want) > 0.5


def test_grouped_queries_are_many_heads_with_repeated_keys():
    tensors = random_decoder_tensors()
    wide = dict(tensors)
    for name, x in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            wide[name] = np.repeat(x.reshape(2, 6, -1), 2, 0).reshape(24, -1)
    got, want = (logits_of(convert_llama(*each), TOKENS) for each in ((EQUAL, wide), (CONFIG, tensors)))
    np.testing.assert_allclose(got, want, atol=ATOL)


def test_what_comes_later_changes_nothing(made):
    other = TOKENS.copy()
    other[:, 4:] = other[:, 4:][:, ::-1]
    got, want = logits_of(made, other), logits_of(made, TOKENS)
    np.testing.assert_array_equal(got[:, :4], want[:, :4])
    assert np.abs(got[:, 4:] - want[:, 4:]).max() > 0.1


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 5, 6, 8, 9]])
def test_padding_changes_nothing(made, places):
    """After the pieces, before them and among them, whatever number stands there."""
    wide, live = np.full((2, 10), CONFIG["vocab_size"] + 5, np.int32), np.zeros((2, 10), bool)
    wide[:, places], live[:, places] = TOKENS, True
    np.testing.assert_allclose(logits_of(made, wide, live)[:, places], logits_of(made, TOKENS), atol=ATOL)


def test_rotary_scores_depend_on_distances():
    """Moved by 1,000 places: to the last bits of an angle in float32, 6e-5, times sums of eight products."""
    query, key = (jax.random.normal(jax.random.key(n), (1, 5, 2, 8)) for n in (0, 1))

    def scores(query_place, key_place):
        turned = (
            rotate_pairs(x, place + jnp.arange(5)[None], 10000.0)
            for x, place in ((query, query_place), (key, key_place))
        )
        return jnp.einsum("bthd,bshd->bhts", *turned)

    np.testing.assert_allclose(scores(1000, 1003), scores(0, 3), atol=5e-4)
    assert np.abs(scores(0, 4) - scores(0, 3)).max() > 0.1
    plain = rotate_pairs(query, jnp.zeros((1, 5), int), 10000.0)
    np.testing.assert_array_equal(plain, query)


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_pieces_go_on_from_what_was_kept(made, cut):
    """With padding between the parts."""
    module, params = Decoder(made.sizes), {"params": made.params}
    first = np.pad(TOKENS[:, :cut], ((0, 0), (0, 2)))
    live = np.arange(cut + 2)[None] < np.array([[cut], [cut]])
    _, past = module.apply(params, first, live)
    got, kept = module.apply(params, TOKENS[:, cut:], ALL[:, cut:], past)
    np.testing.assert_allclose(got, logits_of(made, TOKENS)[:, cut:], atol=ATOL)
    assert kept.keys.shape[2] == kept.live.shape[1] == 9


def layer_after_layer(sizes, params, tokens):
    """The same without scan and without remat."""
    places, order = jnp.arange(tokens.shape[1])[None], jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
    x = params["embed_tokens"][tokens]
    for number in range(LAYERS):
        own = jax.tree.map(lambda leaf, at=number: leaf[at], params["layers"])
        x, _ = DecoderLayer(sizes).apply({"params": own}, x, places, order)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + sizes.epsilon) * params["norm"]["scale"]
    return x @ params["lm_head"]["kernel"]


@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_remat_change_no_value_and_no_gradient(made, remat):
    def loss(logits):
        return jnp.mean(jnp.square(logits))

    def scanned(params):
        return loss(Decoder(made.sizes, remat=remat).apply({"params": params}, TOKENS, ALL)[0])

    got = jax.value_and_grad(scanned)(made.params)
    want = jax.value_and_grad(lambda params: loss(layer_after_layer(made.sizes, params, TOKENS)))(made.params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_adapters_of_scanned_layers_merge_into_them(made):
    """Factors lie layer by layer, as what they adapt; merged they give the same logits."""
    settings = LoraSettings(rank=2, pattern="q_proj|v_proj")
    module = Decoder(made.sizes, dot_general_cls=make_lora_product(settings))
    drawn = module.init(jax.random.key(0), TOKENS, ALL)
    assert jax.tree.structure(drawn["params"]) == jax.tree.structure(made.params)
    factors = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), drawn["lora"])
    assert path_shapes(factors) == {
        f"layers/{name}/factors/{part}": shape
        for name, out in (("q_proj", 24), ("v_proj", 12))
        for part, shape in (("a", (LAYERS, 12, 2)), ("b", (LAYERS, 2, out)))
    }
    got, _ = module.apply({"params": made.params, "lora": factors}, TOKENS, ALL)
    merged = jax.vmap(partial(merge_lora, scale=settings.scale))(made.params["layers"], factors["layers"])
    np.testing.assert_allclose(
        got, logits_of(made._replace(params=made.params | {"layers": merged}), TOKENS), atol=ATOL
    )
    assert np.abs(got - logits_of(made, TOKENS)).max() > 0.1


# --- what cannot be read ----------------------------------------

WRONG = {
    "missing": (
        lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
        "1 tensors are missing (model.layers.1.self_a",
    ),
    "many missing": (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], "9 tensors are missing"),
    "extra": (
        lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t["model.norm.weight"]}),
        "1 tensors are of no decoder of the Llama family (model.layers.3.mlp.up_proj.weight)",
    ),
    "shape": (
        lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": np.zeros((24, 12), np.float32)}),
        "model.layers.0.self_attn.k_proj.weight is [24, 12], and config.json says [12, 12]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_named(name):
    tensors = random_decoder_tensors()
    spoil, said = WRONG[name]
    spoil(tensors)
    with pytest.raises(ValueError, match="model.safetensors") as error:
        convert_llama(CONFIG, tensors)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "llama3"}}, 'rotary positions of the type "llama3"'),
        ({"num_key_value_heads": 3}, "3 heads of keys do not divide 4 heads of queries"),
        ({"head_dim": 5}, "heads have 5 numbers"),
        ({"hidden_size": "12"}, "hidden_size is '12'"),
        ({"bos_token_id": 99}, "bos_token_id is 99"),
    ],
)
def test_configs_of_other_models_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        convert_llama(CONFIG | change, random_decoder_tensors())


def test_old_and_new_configurations_say_the_same():
    """The base of the frequencies stands in a section of its own since transformers 5; inv_freq is no parameter."""
    new = {name: x for name, x in CONFIG.items() if name != "rope_theta"}
    new |= {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    assert read_decoder_sizes(new) == read_decoder_sizes(CONFIG)
    old = random_decoder_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    assert convert_llama(CONFIG, old).sizes == read_decoder_sizes(CONFIG)


def test_a_tied_head_is_left_out(made):
    tensors = random_decoder_tensors()
    tied = convert_llama(TIED, tensors)
    assert "lm_head" not in tied.params
    assert "lm_head.weight" not in map_decoder_parameters(tied.sizes)
