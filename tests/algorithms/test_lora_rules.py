"""Rules of aggregation for low-rank adapters: the algebra of each, what is sent, and beside what they are refused."""

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.algorithms.discordance import draw_probes, measure_discordance
from jaxfed.algorithms.lora_products import RESIDUAL, multiply_factors
from jaxfed.algorithms.rolora import FACTORS, replace_dense
from jaxfed.channels.average import per_row_mean
from jaxfed.core.federate import federate
from jaxfed.core.link import link
from jaxfed.core.method import Method
from jaxfed.core.types import Broadcast, RoundView
from jaxfed.core.wire import make_wire
from jaxfed.models.lora import add_products, merge_lora
from jaxfed.models.text_lora import join_factors
from tests.small import KEY, close
from tests.small_text import pack_adapted_run

SGD = optax.sgd(2.0)
PRODUCTS = ("flora", "fedex_lora", "flexlora")


@cache
def packed():
    """(the packer's run, a cohort of one block, four slots of it that report)."""
    it, cohort = pack_adapted_run(trained_layers=1)
    return it, cohort, np.flatnonzero(cohort.present)[:4]


@cache
def start():
    """Shared parameters whose factors B are not zero."""
    params = packed()[0].model.init(KEY)
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), params["params"]["lora_b"])
    return replace_dense(params, lora_b=moved)


def build(method, channel=None):
    it, _, _ = packed()
    return federate(method, channel or link(), it.data.num_clients, frozen=it.model.frozen)


def run(algorithm, slots, rounds=1):
    """(the shared parameters before each round and after the last, figures of the last)."""
    _, cohort, _ = packed()
    state, seen = algorithm.init(start(), KEY), []
    for _ in range(rounds):
        seen.append(jax.tree.map(np.array, state.shared.params))
        present = cohort.present & np.isin(np.arange(len(cohort.ids)), slots)
        state, info = algorithm.step(state, cohort._replace(present=present), KEY)
    return [*seen, jax.tree.map(np.array, state.shared.params)], info


def fedavg():
    return jf.algorithms.fedavg(packed()[0].model, SGD)


@cache
def of_means():
    """FedIT, with discordance, by rounds."""
    return build(measure_discordance(fedavg()), per_row_mean())


@cache
def of_products(name, rate=2.0):
    return build(getattr(jf.algorithms, name)(packed()[0].model, optax.sgd(rate)))


@cache
def mean_of_products():
    """(the mean over four clients of A_i B_i, each of a round in which it alone reports; that round with all four)."""
    slots = packed()[2]
    alone = [multiply_factors(run(of_means(), [slot])[0][-1]) for slot in slots]
    together, info = run(of_means(), slots)
    return jax.tree.map(lambda *x: sum(x) / len(x), *alone), together[-1], info


def norm(tree):
    return float(optax.global_norm(tree))


def test_discordance_is_the_covariance_over_the_update():
    """The layers are no wider than the directions it is measured in, so that it is exact."""
    products, together, info = mean_of_products()
    gap = jax.tree.map(jnp.subtract, products, multiply_factors(together))
    moved = jax.tree.map(jnp.subtract, products, multiply_factors(start()))
    assert norm(gap) > 1e-3
    assert info["lora/discordance"] == pytest.approx(norm(gap) / norm(moved), rel=1e-3)
    assert not [name for name in info if name.startswith("lora/layer")]
    assert run(of_means(), packed()[2][:1])[1]["lora/discordance"] < 1e-5  # of one client


def test_wide_layers_are_measured_in_few_directions():
    probes = draw_probes(600, 0)
    close(probes.T @ probes, np.eye(16, dtype=np.float32), atol=1e-5)
    x, y = (np.random.default_rng(i).normal(size=(50, 600)) for i in (1, 2))
    # 800 numbers: their mean square has a relative standard deviation of 5 %
    assert np.linalg.norm(x @ probes) / np.linalg.norm(3 * y @ probes) == pytest.approx(1 / 3, rel=0.15)


@pytest.mark.parametrize("server", [optax.sgd(1.0), optax.adam(0.01)], ids=["sgd", "adam"])
def test_rolora_moves_one_factor_at_a_time(server):
    """B first, as it is zero at the start; also where the server has momentum. The mean of factors is exact."""
    it, _, slots = packed()
    seen, info = run(build(measure_discordance(jf.algorithms.rolora(it.model, SGD, server)), per_row_mean()), slots, 4)
    for t, (before, after) in enumerate(pairwise(seen)):
        moves = {
            name: norm(jax.tree.map(jnp.subtract, *(x["params"][name] for x in (after, before)))) for name in FACTORS
        }
        rests = FACTORS[1 - t % 2]
        assert moves[rests] == 0
        assert moves[FACTORS[t % 2]] > 1e-3
    assert info["lora/discordance"] < 1e-5


def test_rolora_trains_the_factor_of_the_round_as_fedavg_does():
    """The first round is that of B alone: local steps of a model in which A is a constant."""
    it, _, slots = packed()
    fixed = start()["params"]["lora_a"]
    model = it.model._replace(loss=lambda params, *rest: it.model.loss(replace_dense(params, lora_a=fixed), *rest))
    fixed_run = build(jf.algorithms.fedavg(model, SGD), per_row_mean())
    want = run(fixed_run, slots)[0][-1]
    got = run(build(jf.algorithms.rolora(it.model, SGD), per_row_mean()), slots)[0][-1]
    close(got, want)


def test_rolora_sends_half_of_the_factors():
    it, _, _ = packed()
    rows = np.array([3, 40])

    def price(method):
        shared = jax.eval_shape(lambda: method.work.init(it.model.init(KEY), KEY)[0])
        return make_wire(jf.chain(*method.links), shared, sends=method.work.update_shapes).up(rows)

    factors = it.model.init(KEY)["params"]
    whole, half = (sum(4 * x.size for x in jax.tree.leaves(factors[name])) for name in FACTORS)
    assert whole == half
    np.testing.assert_array_equal(price(fedavg()) - price(jf.algorithms.rolora(it.model, SGD)), whole)


def test_rolora_goes_with_secure_sums_and_noise():
    it, _, slots = packed()
    secure = jf.chain(jf.channels.clip(100.0), jf.channels.ring(slots=30))
    got, want = (
        run(build(jf.algorithms.rolora(it.model, SGD), jf.chain(jf.channels.mean(), each)), slots)[0][-1]
        for each in (secure, link())
    )
    close(got, want, atol=1e-3)  # of codes
    noised = jf.chain(jf.channels.mean(30), jf.channels.clip(1.0), jf.channels.gaussian(1.0))
    seen, _ = run(build(jf.algorithms.rolora(it.model, SGD), noised), slots)
    close(seen[1]["params"]["lora_a"], seen[0]["params"]["lora_a"])


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_averaged_exactly(name):
    """flora, fedex_lora: base and factors together give the mean of the products. flexlora: the best of its rank."""
    _, _, slots = packed()
    products, together, _ = mean_of_products()
    seen, _ = run(of_products(name), slots)
    after = seen[-1]
    got = multiply_factors(after)
    close(after["tables"], together["tables"])
    if name == "flexlora":
        for x, want in zip(jax.tree.leaves(got), jax.tree.leaves(products), strict=True):
            u, s, v = np.linalg.svd(want)
            np.testing.assert_allclose(x, u[:, :2] * s[:2] @ v[:2], atol=1e-5)
        return
    close(jax.tree.map(jnp.add, got, after["params"][RESIDUAL]), products)
    assert norm(jax.tree.map(jnp.subtract, multiply_factors(together), products)) > 1e-3
    if name == "flora":
        assert norm(after["params"]["lora_b"]) == 0
        assert norm(jax.tree.map(jnp.subtract, after["params"]["lora_a"], seen[0]["params"]["lora_a"])) > 1
    else:
        close(after["params"], {**together["params"], RESIDUAL: after["params"][RESIDUAL]})


@pytest.mark.parametrize("name", PRODUCTS)
def test_rules_that_read_products_learn(name):
    _, cohort, _ = packed()
    slots = np.flatnonzero(cohort.present)
    losses = [run(of_products(name, 0.3), slots, t)[1]["train/loss"] for t in (1, 6)]
    assert losses[1] < losses[0] - 0.02


def test_the_residual_is_downloaded_and_never_sent():
    it, _, _ = packed()

    def price(method):
        shared = jax.eval_shape(lambda: method.work.init(it.model.init(KEY), KEY)[0])
        return make_wire(jf.chain(*method.links), shared, sends=method.work.update_shapes)

    rows, plain = np.array([3]), price(Method(fedavg().work, (per_row_mean(),)))
    products = sum(4 * x.size for x in jax.tree.leaves(multiply_factors(start())))
    for name in PRODUCTS:
        wire = price(getattr(jf.algorithms, name)(it.model, SGD))
        assert wire.up(rows) == plain.up(rows)
        assert wire.down(rows) - plain.down(rows) == 4 + products * (name != "flexlora")  # the number of the round


def test_a_residual_is_a_change_of_the_base():
    it, _, _ = packed()
    made, private = start(), it.model.private(KEY)
    low = multiply_factors(made)
    twice = jax.tree.map(lambda x: 2 * x, made["params"]["lora_b"])
    want = it.model.score({**replace_dense(made, lora_b=twice), **it.model.frozen}, private, 0)
    got = it.model.score({**replace_dense(made, **{RESIDUAL: low}), **it.model.frozen}, private, 0)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("secure", [False, True])
def test_sums_of_sketches_give_the_best_factors(secure):
    """Exact where the sketch is no narrower than the mean product; also under a secure sum, to its codes."""
    it, _, slots = packed()
    products, together, _ = mean_of_products()
    hidden = [jf.channels.clip(100.0), jf.channels.ring(slots=30)] if secure else []
    method = jf.algorithms.fedask(it.model, SGD, sketch=8)  # four clients of rank 2, and A B, of which each has a part
    after = run(build(method, jf.chain(per_row_mean(), *hidden)), slots)[0][-1]
    for x, want in zip(jax.tree.leaves(multiply_factors(after)), jax.tree.leaves(products), strict=True):
        u, s, v = np.linalg.svd(want)
        np.testing.assert_allclose(x, u[:, :2] * s[:2] @ v[:2], atol=2e-3 if secure else 2e-5)
    close(after["tables"], together["tables"], atol=1e-3 if secure else 1e-6)


def test_sketches_are_what_is_sent():
    it, _, _ = packed()
    method, layers, width = jf.algorithms.fedask(it.model, SGD, sketch=3), 2, 12
    shared = jax.eval_shape(lambda: method.work.init(it.model.init(KEY), KEY)[0])
    wire = make_wire(jf.chain(*method.links), shared, sends=method.work.update_shapes)
    plain = make_wire(link(), Broadcast(it.model.init(KEY)))
    factors = sum(4 * x.size for name in FACTORS for x in jax.tree.leaves(it.model.init(KEY)["params"][name]))
    assert wire.up(np.array([3])) - plain.up(np.array([3])) == 4 * layers * (3 + 6) * width - factors
    assert wire.down(np.array([3])) - plain.down(np.array([3])) == 4
    with pytest.raises(ValueError, match="fedask.sketch is 1: it must be at least the rank of the adapters, 2"):
        jf.algorithms.fedask(it.model, SGD, sketch=1).work.init(it.model.init(KEY), KEY)


SECURE = (
    jf.chain(jf.channels.clip(1.0), jf.channels.ring(slots=30)),
    jf.chain(jf.channels.clip(1.0), jf.channels.pads()),
    jf.chain(jf.channels.clip(1.0), jf.channels.gaussian(1.0)),
    jf.channels.median(),
)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("channel", SECURE, ids=lambda each: each.claims.name)
def test_rules_that_read_products_are_refused(name, channel):
    method = getattr(jf.algorithms, name)(packed()[0].model, SGD)
    with pytest.raises(ValueError, match=f"{name} needs each client's message .*take rolora, fedask, or") as error:
        jf.chain(*method.links, channel)
    assert "\n" not in str(error.value)


def test_equal_ranks_are_fedit():
    it, _, slots = packed()
    same = jf.algorithms.raflora(it.model, SGD, num_clients=it.data.num_clients, ranks=(2, 2))
    close(run(build(same), slots, 2)[0][-1], run(of_means(), slots, 2)[0][-1])


def test_each_rank_is_averaged_over_those_who_have_it():
    """All clients send the same: a mean of padded factors would shrink the second rank, this one does not."""
    it, _, _ = packed()
    method = jf.algorithms.raflora(it.model, SGD, num_clients=it.data.num_clients, ranks=(2, 1))
    (mean,) = method.links
    moved = start()
    counts = np.array([1.0, 3.0])  # clients of rank 2 and 1
    rank = {"lora_a": lambda x: x * np.array([4.0, 1.0]), "lora_b": lambda x: x * np.array([[4.0], [1.0]])}
    params = {name: 4 * x if not isinstance(x, dict) else x for name, x in moved["params"].items()}
    params |= {name: jax.tree.map(times, moved["params"][name]) for name, times in rank.items()}
    tables = jax.tree.map(lambda x: 4 * x, moved["tables"])
    held = jf.core.types.Weights(jf.Table(jnp.tile(jnp.array(counts), (it.data.num_items, 1))))
    total = Broadcast({"params": params, "tables": tables}), held, jnp.array(counts)
    got, _, _ = mean.decode(total, jnp.int32(0), RoundView(KEY, jnp.arange(4), jnp.ones(4, bool)))
    close(got.params, moved)


def test_clients_send_the_ranks_that_they_have():
    it, cohort, _ = packed()
    method = jf.algorithms.raflora(it.model, SGD, num_clients=it.data.num_clients, ranks=(2, 1), seed=3)
    groups, cut, number = method.submodels
    assert number == 2
    assert set(groups) == {0, 1}
    shared = jax.eval_shape(lambda: method.work.init(it.model.init(KEY), KEY)[0])
    sizes = [
        sum(x.size for x in jax.tree.leaves([cut(i, shared).params["params"][n] for n in FACTORS])) for i in (0, 1)
    ]
    assert sizes[0] == 2 * sizes[1]
    ids, present = cohort.ids, cohort.present
    low = [slot for slot in range(len(ids)) if groups[ids[slot]] == 1 and present[slot]][:2]
    before, after = run(build(method), low)[0]
    still, moved = (
        [
            np.abs(y - x)[..., i].max()
            for x, y in zip(*(jax.tree.leaves(s["params"]["lora_a"]) for s in (before, after)), strict=True)
        ]
        for i in (1, 0)
    )
    assert max(still) == 0, "nobody has the second rank"
    assert min(moved) > 1e-5


@pytest.mark.parametrize("name", ["rolora", "raflora", "fedask", *PRODUCTS])
def test_a_model_without_factors_is_refused(name):
    model = jf.models.mf(num_items=9, dim=2)
    more = {"num_clients": 5} if name == "raflora" else {}
    method = getattr(jf.algorithms, name)(model, SGD, **more)
    with pytest.raises(ValueError, match=f"{name}: the model does not share both factors"):
        federate(method, link(), 5).init(model.init(KEY), KEY)
    with pytest.raises(ValueError, match="ranks are 4, 0"):
        jf.algorithms.raflora(model, SGD, num_clients=5, ranks=(4, 0))


def test_ranks_above_the_model_are_refused():
    it, _, _ = packed()
    method = jf.algorithms.raflora(it.model, SGD, num_clients=5, ranks=(8, 1))
    with pytest.raises(ValueError, match="the largest is 8, the adapters have rank 2"):
        federate(method, link(), 5).init(it.model.init(KEY), KEY)


def test_products_are_merged_as_factors_are():
    params = {"layer": {"kernel": jnp.zeros((4, 6))}}
    factors = join_factors({"layer": {"factors": jnp.ones((4, 2))}}, {"layer": {"factors": jnp.ones((2, 6))}})
    products = {"layer": {"factors": jnp.full((4, 6), 2.0)}}
    close(add_products(params, products, 0.5), merge_lora(params, factors, 0.5))
