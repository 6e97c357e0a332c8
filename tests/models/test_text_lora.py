"""Adapters on clients: what is sent, the algebra of the rules, and that the encoder is everybody's and nobody's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.fedavg import fedavg
from jaxfed.channels.average import weighted_mean
from jaxfed.config.registry import REGISTRY
from jaxfed.core.client import run_client_block
from jaxfed.core.client_work import Batches
from jaxfed.core.federate import federate
from jaxfed.core.tables import take_rows
from jaxfed.core.tree import count_bytes
from jaxfed.core.types import Block
from jaxfed.models.bert import BertEncoder, encode_tokens
from jaxfed.models.bert_weights import convert_bert
from jaxfed.models.lora import LoraSettings, merge_lora
from jaxfed.models.text_lora import join_factors, split_factors, text_lora
from jaxfed.models.trained_encoder import encode_texts, measure_standardization
from tests.composed import pack_small_run
from tests.small import KEY, close
from tests.small_text import SIZES, random_tensors

CONFIG = {"model_type": "bert", "hidden_act": "gelu"}
ENCODER = convert_bert(CONFIG | SIZES, random_tensors())
WIDTH, WORDS, ITEMS, DIM, RANK = SIZES["hidden_size"], SIZES["vocab_size"], 80, 5, 2
LORA = LoraSettings(RANK, alpha=4.0)
RULES = ("fedit", "ffa", "fedsa")


def texts(number=ITEMS, pieces=7, words=WORDS):
    rng = np.random.default_rng(1)
    ids = rng.integers(1, WORDS, (number, pieces))
    return np.where(np.arange(pieces) < rng.integers(2, pieces + 1, (number, 1)), ids, words).astype(np.int32)


def make(num_items=ITEMS, num_users=1, rule="fedit", encoder=ENCODER, words=WORDS, **more):
    return text_lora(num_items, encoder, texts(num_items, words=words), num_users, DIM, LORA, rule, **more)


@pytest.fixture
def named(monkeypatch):
    """The packer's run of a model under a name: clients of very different lengths, one of which drops out."""

    def make_run(rule, **more):
        def build(num_items, num_users):
            return make(num_items, num_users, rule, **more)

        monkeypatch.setitem(REGISTRY["model"], "adapted", build)
        return pack_small_run(
            model={"name": "adapted"},
            work={"batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.3}},
            channel=[{"name": "weighted_mean"}],
        )

    return make_run


def factors_of(shared, frozen):
    left = frozen["lora_a"] if "lora_a" in frozen else shared["params"]["lora_a"]
    return left, shared["params"].get("lora_b")


@pytest.mark.parametrize("rule", RULES)
def test_what_is_sent_is_factors_and_projection(rule, named):
    it, _ = named(rule)
    factors = 2 * 2 * WIDTH * RANK  # of queries and values, in two layers: each of A and B
    dense = 1 + (WIDTH + 1) * DIM + {"fedit": 2, "ffa": 1, "fedsa": 1}[rule] * factors
    rows = np.array([3, 40])
    # a bias and an id for each row; one number is the weight
    np.testing.assert_array_equal(it.wire.up(rows), 4 * dense + rows * (4 + 4))
    base = count_bytes(ENCODER.params)
    assert it.wire.frozen > base
    assert it.wire.up(np.array([ITEMS])) < 0.5 * base


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layers", [0, 1])
def test_scores_are_those_of_merged_kernels(rule, layers):
    """By another way: factors merged into the kernels, and the whole encoder over each text."""
    model = make(rule=rule, trained_layers=layers)
    shared, private = (
        jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(7), x.shape), part)
        for part in (model.init(KEY), model.private(KEY))
    )
    left, right = factors_of(shared, model.frozen)
    right = private["private"].get("lora_b", right)
    params = merge_lora(ENCODER.params, join_factors(left, right), LORA.scale)
    vectors = encode_tokens(BertEncoder(ENCODER.sizes), {"params": params}, jnp.asarray(texts()))
    standard = measure_standardization(encode_texts(ENCODER, texts()))
    rows = (vectors - standard.centre) / standard.spread @ shared["params"]["kernel"] + shared["params"]["shift"]
    want = rows @ private["private"]["user"][0] + shared["tables"]["bias"].rows
    got = model.score({**shared, **model.frozen}, private, 0)
    np.testing.assert_allclose(got, want, atol=2e-5)


def rounds_alone(it, cohort):
    """{client: the shared parameters after a round in which it alone reports}, weights, and those of all together."""
    algorithm = federate(fedavg(it.model, optax.sgd(0.3)), weighted_mean(), it.data.num_clients, frozen=it.model.frozen)
    start = it.model.init(KEY)

    def after(present):
        state = algorithm.init(start, KEY)
        return algorithm.step(state, cohort._replace(present=present), KEY)[0].shared.params

    slots = np.flatnonzero(cohort.present)[:4]
    alone = {slot: after(np.arange(len(cohort.ids)) == slot) for slot in slots}
    return start, alone, after(np.isin(np.arange(len(cohort.ids)), slots))


def products(shared, frozen):
    left, right = factors_of(shared, frozen)
    return jax.tree.map(lambda a, b: a @ b, left, right)


@pytest.mark.parametrize("rule", ["fedit", "ffa"])
def test_the_mean_of_factors_against_the_mean_of_products(rule, named):
    """ffa: equal. fedit: less by the covariance of A and B over clients, (1/m) sum (A_i - A)(B_i - B)."""
    it, cohort = named(rule)
    _, alone, together = rounds_alone(it, cohort)
    weight = {}
    for block in cohort.blocks:
        weight |= dict(zip(block.slots.tolist(), np.asarray(block.data.examples).tolist(), strict=True))
    share = np.array([weight[slot] for slot in alone])
    share /= share.sum()

    def average(trees):
        return jax.tree.map(lambda *x: sum(w * each for w, each in zip(share, x, strict=True)), *trees)

    frozen = it.model.frozen
    of_products = average([products(each, frozen) for each in alone.values()])
    of_factors = products(together, frozen)
    gap = jax.tree.map(jnp.subtract, of_products, of_factors)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gap))
    if rule == "ffa":
        assert size < 1e-6
        return
    left, right = factors_of(together, frozen)
    each = [factors_of(one, frozen) for one in alone.values()]
    covariance = average([jax.tree.map(lambda a, b, x, y: (a - x) @ (b - y), *one, left, right) for one in each])
    assert size > 1e-5, "clients pull apart"
    close(gap, covariance, atol=1e-6, rtol=1e-3)


def test_b_of_fedsa_stays_on_its_client(named):
    it, cohort = named("fedsa")
    algorithm = federate(fedavg(it.model, optax.sgd(0.3)), weighted_mean(), it.data.num_clients, frozen=it.model.frozen)
    state = algorithm.init(it.model.init(KEY), KEY)
    state, _ = algorithm.step(state, cohort, KEY)
    own = state.client_states.work["private"]["lora_b"]["layer_1"]["query"]["factors"]
    moved = np.abs(np.asarray(own)).max((1, 2)) > 0
    assert moved[cohort.ids[cohort.present]].all()
    assert not moved[np.setdiff1d(np.arange(it.data.num_clients), cohort.ids[cohort.present])].any()
    distinct = np.unique(np.round(np.asarray(own)[moved].reshape(moved.sum(), -1), 7), axis=0)
    assert len(distinct) == moved.sum()


def test_memory_grows_by_adapters_and_activations_not_by_the_base():
    """Of a program for 2 m clients beside that for m: an encoder of 1.2 million numbers is there once."""
    words = 100_000
    sizes = SIZES | {"vocab_size": words}
    encoder = convert_bert(CONFIG | sizes, random_tensors(sizes))
    base, temp = count_bytes(encoder.params), []
    model = make(200, encoder=encoder, words=words)
    algorithm = federate(fedavg(model, optax.sgd(0.3)), weighted_mean(), 64, frozen=model.frozen)
    plan, _, frozen = algorithm.step.args
    state = algorithm.init(model.init(KEY), KEY)
    for clients in (8, 16):
        rows = jnp.tile(jnp.arange(20), (clients, 1))
        step = jnp.tile(jnp.arange(20)[None, None], (clients, 2, 1))
        batch = {"label": jnp.ones(step.shape), "weight": jnp.ones(step.shape)}
        data = Batches(step, jnp.ones((clients, 2), bool), batch, jnp.full(clients, 40.0))
        block = Block(jnp.arange(clients), rows, jnp.full(clients, 40.0), data)
        ids, present = jnp.arange(16), jnp.ones(16, bool)
        run = jax.jit(partial(run_client_block, plan))
        lowered = run.lower(state, ids, present, None, None, KEY, block, None, None, frozen.clients)
        temp.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    places, numbers = 8 * 20 * 7, SIZES["intermediate_size"] + 12 * WIDTH  # of 8 clients more; of a place in a layer
    activations = 4 * places * numbers * SIZES["num_hidden_layers"]
    assert (
        0 < temp[1] - temp[0] < 2 * activations < base
    )  # forward and backward; copies would take eight times the base


def test_it_learns_by_the_registry(named):
    it, cohort = named("fedit", trained_layers=1)
    state, losses = it.algorithm.init(it.model.init(KEY), KEY), []
    for _ in range(12):
        state, info = it.algorithm.step(state, cohort, KEY)
        losses.append(float(info["train/loss"]))
    assert losses[-1] < losses[0] - 0.02
    right = jax.tree.leaves(state.shared.params["params"]["lora_b"])
    assert all(np.abs(x).max() > 0 for x in right)


def test_factors_are_split_and_joined():
    factors = {"layer": {"factors": {"a": jnp.ones(2), "b": jnp.zeros(3)}}}
    assert split_factors(factors)[1]["layer"]["factors"].shape == (3,)
    close(join_factors(*split_factors(factors)), factors)


def test_a_client_reads_its_rows_alone():
    model = make()
    whole = {**model.init(KEY), **jax.tree.map(jnp.asarray, model.frozen)}
    some = take_rows(whole, jnp.array([5, 17, 2]))
    private = model.private(KEY)
    want = model.score(whole, private, 0)[jnp.array([5, 17, 2])]
    np.testing.assert_allclose(model.score(some, private, 0), want, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "flora"}, "no rule 'flora'"),
        ({"trained_layers": 9}, "the encoder has 2 layers"),
        ({"lora": LoraSettings(50)}, "has a width of 12"),
        ({"lora": LoraSettings(2, pattern="nothing")}, "in the path of no layer"),
        ({"dim": 0}, "model.dim"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        text_lora(ITEMS, ENCODER, texts(), **options)
    with pytest.raises(ValueError, match="80 texts for 81 items"):
        text_lora(ITEMS + 1, ENCODER, texts())
