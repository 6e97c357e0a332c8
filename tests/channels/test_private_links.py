"""Clipping, noise and secure sums as links: what they bound, which orders are refused, and what cancels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.channels.average import mean, per_row_mean, weighted_mean
from jaxfed.channels.clip import adaptive_clip, clip, clip_per_row, zero_out
from jaxfed.channels.compress import quantize
from jaxfed.channels.linear_maps import rotate
from jaxfed.channels.noise import densify, gaussian, local_gaussian
from jaxfed.channels.secure_sum import pads, ring
from jaxfed.channels.sparse import top_k
from jaxfed.core.aggregate import gather_then, sum_messages
from jaxfed.core.channel import at_server, chain
from jaxfed.core.link import link, list_mechanisms
from jaxfed.core.state import server_model
from tests.small import DATA, KEY, MARKED, PLAIN, WHO, close, factorisation, on_rows, row_cohort, run, same

COHORT = len(WHO)
ONE = np.arange(COHORT) == 0


def moved(channel, cohort=None):
    """The norm of what one round moves the model by."""
    state, info = run(factorisation(channel), row_cohort(present=ONE) if cohort is None else cohort, rounds=1)
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, server_model(state), PLAIN))), info


def test_clip_bounds_the_norm_and_counts_whom():
    free, _ = moved(mean())
    assert moved(chain(mean(), clip(0.05)))[0] == pytest.approx(0.05, rel=1e-5)
    assert moved(chain(mean(), clip(10 * free)))[0] == pytest.approx(free, rel=1e-6)
    assert float(moved(chain(mean(), clip(0.05)))[1]["clip/clients"]) == 1
    assert float(moved(chain(mean(), clip(10 * free)))[1]["clip/clients"]) == 0


def test_an_outlier_has_no_say():
    free, _ = moved(mean())
    assert moved(chain(mean(), zero_out(free / 2)))[0] == 0
    assert moved(chain(mean(), zero_out(free * 2)))[0] == pytest.approx(free, rel=1e-6)


def test_rows_are_clipped_one_by_one():
    state, _ = run(factorisation(chain(mean(), clip_per_row(0.01))), row_cohort(present=ONE), rounds=1)
    step = np.linalg.norm(np.asarray(server_model(state)["item"] - PLAIN["item"]), axis=1)
    assert 0 < step.max() <= 0.01 * (1 + 1e-5)


def test_the_bound_follows_the_quantile():
    """From far above and far below it comes to where half the norms lie within; nothing else is then different."""
    for start in (100.0, 1e-3):
        _, info = run(factorisation(chain(mean(), adaptive_clip(start, rate=0.5))), row_cohort(), rounds=60)
        assert 0.2 <= float(info["clip/clients"]) <= 0.8
    wide = adaptive_clip(100.0, quantile=0.5)
    close(server_model(run(factorisation(chain(mean(), wide)), row_cohort(), rounds=1)[0]),
          server_model(run(factorisation(mean()), row_cohort(), rounds=1)[0]), atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("bound", [0.05, 0.3])
@pytest.mark.parametrize("multiplier", [0.5, 2.0])
def test_the_noise_has_the_standard_deviation_it_says(bound, multiplier):
    """Every number of the model is noised, rows that nobody holds too; the mean divides the noise by the cohort."""
    channel = chain(mean(COHORT), clip(bound), gaussian(multiplier))
    plain = chain(mean(COHORT), clip(bound))
    noisy, info = run(factorisation(channel), row_cohort(), rounds=1)
    still, _ = run(factorisation(plain), row_cohort(), rounds=1)
    noise = np.concatenate(
        [np.ravel(a - b) for a, b in zip(*(jax.tree.leaves(server_model(s)) for s in (noisy, still)), strict=True)]
    )
    want = multiplier * bound
    assert float(info["noise/stddev"]) == pytest.approx(want)
    # a chi-square of so many numbers stays within five standard deviations
    assert noise.std() * COHORT == pytest.approx(want, rel=5 / math.sqrt(2 * noise.size))
    assert (np.abs(noise) > 0).all()


def test_noise_of_clients_has_the_standard_deviation_it_says():
    """Of a sum of so many clients, each with the multiplier times the bound; every number of it is noised."""
    plain = chain(mean(COHORT), clip(0.3), densify())
    noisy, still = (server_model(run(factorisation(each), row_cohort(), rounds=1)[0])
                    for each in (chain(plain, local_gaussian(2.0)), plain))  # fmt: skip
    noise = np.concatenate(jax.tree.leaves(jax.tree.map(lambda a, b: np.ravel(a - b), noisy, still)))
    of_one = noise.std() * math.sqrt(COHORT)
    assert of_one == pytest.approx(2.0 * 0.3, rel=5 / math.sqrt(2 * noise.size))  # five deviations of a chi-square
    assert (np.abs(noise) > 0).all()


def test_the_share_of_those_within_an_adaptive_bound_is_of_those_who_reported():
    """All seven who report are within: the bound goes down by exp(-rate (1 - quantile)), as if the eighth had not been
    asked; and a message that says so has the norm sqrt(1 + share^2 / 4), which is what noise is made for."""
    channel = chain(mean(), adaptive_clip(100.0, quantile=0.3, rate=0.5))
    _, info = run(factorisation(channel), row_cohort(present=~ONE), rounds=2)
    assert float(info["clip/bound"]) == pytest.approx(100 * math.exp(-0.5 * 0.7), rel=1e-6)
    private = chain(mean(COHORT), adaptive_clip(share=2.0, count=COHORT), gaussian(0.5))
    assert list_mechanisms(private)[0].l2 == pytest.approx(math.sqrt(2))


def test_a_mean_by_row_whose_weights_are_noised_too():
    """Weights are in the clipped message: without noise it is the plain one, whatever they are multiplied by; and no
    denominator is below the floor, so noise of rows that nobody holds stays small."""
    plain = server_model(run(factorisation(per_row_mean()), row_cohort(), rounds=1)[0])
    for counted in (0.5, 0.01):
        inside = chain(per_row_mean(counted=counted), clip(100.0))
        close(server_model(run(factorisation(inside), row_cohort(), rounds=1)[0]), plain)
    floored = server_model(run(factorisation(per_row_mean(floor=COHORT)), row_cohort(), rounds=1)[0])
    close(floored, server_model(run(factorisation(mean(COHORT)), row_cohort(), rounds=1)[0]))
    noisy = chain(per_row_mean(floor=2.0, counted=0.1), clip(1.0), gaussian(0.5))
    moved = server_model(run(factorisation(noisy), row_cohort(), rounds=1)[0])["item"] - PLAIN["item"]
    assert np.abs(moved).max() <= (1.0 + 6 * 0.5) / 2.0  # six standard deviations of noise, over the floor


def longer(factor):
    """A link that says that it makes a message so much longer."""
    return link(
        lambda update, sent, client: (jax.tree.map(lambda x: factor * x, update), client.link_state),
        l2_gain=lambda bound: factor * bound,
        name="longer",
    )


def rule_of_its_own():
    return link(aggregator=gather_then(lambda messages, rows: None))


def silent_about_means():
    return link(decode=lambda total, state, round: (total, state, {}))


REFUSED = {
    "a count divided twice": (lambda: chain(adaptive_clip(), mean()), "put mean before"),
    "noise for a sum, on a mean": (lambda: chain(clip(), gaussian(), mean(8)), "put mean before"),
    "nothing bounds": (lambda: chain(mean(8), gaussian()), "nothing to its left bounds"),
    "weighted mean before noise": (lambda: chain(weighted_mean(), gaussian()), "nothing to its left bounds"),
    "weights after noise": (lambda: chain(clip(), gaussian(), weighted_mean()), "weighted_mean after gaussian"),
    "noise before top-k": (lambda: chain(clip(), gaussian(), top_k()), "top_k after gaussian"),
    "noise before quantize": (lambda: chain(clip(), gaussian(), quantize()), "quantize after gaussian"),
    "a server that enlarges": (lambda: chain(clip(), gaussian(), at_server(optax.scale(9.0))), "after gaussian"),
    "who reported": (lambda: chain(mean(), clip(), gaussian()), "mean divides by how many reported"),
    "what doubles after noise": (lambda: chain(clip(), gaussian(), longer(2.0)), "longer after gaussian lets"),
    "what adds a per cent": (lambda: chain(clip(), gaussian(), longer(1.01)), "longer after gaussian lets"),
    "no noise": (lambda: chain(clip(), gaussian(0.0)), "gaussian.multiplier is 0.0"),
    "integers before codes": (lambda: chain(clip(), top_k(0.1, False), ring(8)), "top_k must be opened"),
    "an open ring": (lambda: chain(mean(), ring(8)), "nothing bounds the numbers"),
    "a small ring": (lambda: chain(mean(), clip(100.0), ring(1000, 20)), "needs 38 bits, .* lower .* to 14"),
    "two reductions": (lambda: chain(clip(), ring(8), rule_of_its_own()), "different reductions"),
    "two means": (lambda: chain(mean(), weighted_mean()), "mean and weighted_mean both make a mean"),
    "a mean that does not say so": (silent_about_means, "link: a link with a decode must say"),
    "no clip": (lambda: clip(0.0), "clip.bound is 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_chains_that_are_refused(name):
    make, why = REFUSED[name]
    with pytest.raises(ValueError, match=why):
        chain(make())


def test_refused_when_the_shapes_are_known():
    with pytest.raises(ValueError, match="put densify before it"):
        run(factorisation(chain(clip(), local_gaussian())), row_cohort())
    with pytest.raises(ValueError, match="put densify before ring"):
        run(factorisation(chain(clip(), ring(8), pads())), row_cohort())
    with pytest.raises(ValueError, match="put ring before pads"):
        run(factorisation(chain(clip(), densify(), pads())), row_cohort())
    with pytest.raises(ValueError, match="was given integers"):
        run(factorisation(chain(clip(), densify(), ring(8), ring(8, bound=9.0))), row_cohort())


def test_what_does_not_enlarge_may_follow():
    assert chain(mean(8), clip(), gaussian(), rotate()).claims.mechanisms
    assert chain(
        per_row_mean(), clip(), gaussian()
    ).claims.mechanisms  # its counts are inside of what is clipped and noised


def test_dense_messages_are_the_same_sum():
    want = server_model(run(factorisation(per_row_mean()), row_cohort())[0])
    close(server_model(run(factorisation(chain(per_row_mean(), densify())), row_cohort())[0]), want, atol=1e-6)


def test_what_needs_every_row_is_not_given_some():
    with pytest.raises(ValueError, match="it needs every row"):
        run(factorisation(chain(mean(8), clip(), gaussian())), on_rows(row_cohort()))


def test_the_ring_is_the_mean_to_its_last_bit():
    got, _ = run(factorisation(chain(mean(), clip(10.0), ring(COHORT, 20))), row_cohort(), rounds=1)
    want, _ = run(factorisation(mean()), row_cohort(), rounds=1)
    close(server_model(got), server_model(want), atol=2**-20)
    assert chain(mean(), clip(), ring(8)).claims.reveals == "sum"


def test_a_ring_cuts_what_is_beyond_its_bound():
    """Eight clients send a million, which would wrap: it is 2 of each of them, and 16 together."""
    much = link(lambda update, sent, client: (jax.tree.map(lambda x: jnp.full_like(x, 1e6), update), client.link_state))
    sums, _ = run(factorisation(chain(much, ring(COHORT, 20, bound=2.0))), row_cohort(whole=True), rounds=1)
    close(PLAIN["bias"] - server_model(sums)["bias"], jnp.full_like(PLAIN["bias"], 16.0))


def test_what_a_ring_cuts_of_weights_is_counted():
    """Weights are the examples of a client, 3 to 32 here: beyond 10 they are cut, and the mean is not that of all."""
    heavy = np.array([len(DATA[client][0]) > 10 for client in WHO])
    _, info = run(factorisation(chain(weighted_mean(), ring(COHORT, 20, bound=10.0))), row_cohort(), rounds=1)
    assert 0 < heavy.sum() < COHORT
    assert float(info["ring/cut"]) == pytest.approx(heavy.mean())
    _, info = run(factorisation(chain(mean(), clip(1.0), ring(COHORT, 20))), row_cohort(), rounds=1)
    assert "ring/cut" not in info


def test_clients_round_each_for_itself():
    """All send a half, made 0 or 1 in the ring: by one key they would all go the same way, in every entry."""
    half = link(lambda update, sent, client: (jax.tree.map(lambda x: jnp.full_like(x, 0.5), update), client.link_state))
    sums, _ = run(factorisation(chain(half, ring(COHORT, 0, bound=2.0))), row_cohort(whole=True), rounds=1)
    moved = np.asarray(PLAIN["bias"] - server_model(sums)["bias"])
    assert set(np.unique(moved)) <= set(range(COHORT + 1))
    assert ((moved > 0) & (moved < COHORT)).mean() > 0.5  # 1 - 2 / 2^8 on average


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("neighbours", "present"), [(0, [1, 1, 0, 1, 1, 1, 1, 0]), (4, [1] * 8), (2, [0, 0, 0, 0, 0, 0, 0, 1])]
)
def test_pads_cancel_bit_for_bit(neighbours, present):
    """With drop-outs too: the model is the same to the bit as without pads, though no message is."""
    there = np.array(present, bool)
    secret = chain(mean(), clip(10.0), densify(), ring(COHORT, 20), pads(neighbours))
    open_ = chain(mean(), clip(10.0), densify(), ring(COHORT, 20))
    got, _ = run(factorisation(secret), row_cohort(present=there), rounds=2)
    want, _ = run(factorisation(open_), row_cohort(present=there), rounds=2)
    same(server_model(got), server_model(want))


def test_a_padded_message_looks_like_noise():
    """Its bits are fair: what a server sees of one client is uniform, within five standard deviations."""
    seen = []

    def spy(part, size):
        jax.debug.callback(lambda messages: seen.append(jax.tree.map(np.asarray, messages)), part.messages)
        return sum_messages(part, size)

    padded = pads()
    channel = chain(
        clip(10.0), densify(), ring(COHORT, 20)._replace(aggregator=None), padded._replace(aggregator=gather_then(spy))
    )
    run(factorisation(channel), row_cohort(), rounds=1)
    jax.effects_barrier()
    words = np.concatenate([np.ravel(x[:COHORT]) for x in jax.tree.leaves(seen[0])]).view(np.uint32)
    share = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(words.size * 32)
    assert len(np.unique(words)) > 0.99 * words.size


def test_a_link_alone_is_put_in_a_chain():
    state, _ = run(factorisation(clip(0.05)), row_cohort(), rounds=1)
    assert np.isfinite(np.asarray(server_model(state)["item"])).all()
    assert MARKED


def test_no_public_key_leads_to_a_clients_own():
    """A link may fold a client's id into its public key, as random_k does: that must not be where secrets come from."""
    seen = set()

    def spy(update, sent, client):
        jax.debug.callback(lambda key: seen.add(key.tobytes()), jax.random.key_data(client.key))
        return update, client.link_state

    run(factorisation(chain(mean(), link(spy, name="spy"), link(spy, name="spy"))), row_cohort(), rounds=1)
    jax.effects_barrier()
    of_round = jax.random.fold_in(KEY, 0)
    told = set()
    for place in range(3):
        for who in WHO:
            base = jax.random.fold_in(jax.random.fold_in(of_round, place), who)
            for key in (base, *jax.random.split(base)):
                told |= {np.asarray(jax.random.key_data(jax.random.fold_in(key, i))).tobytes() for i in range(3)}
    assert len(seen) == 2 * len(WHO)
    assert not seen & told
