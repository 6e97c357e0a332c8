"""The probe: silent on every private chain that a configuration can name, and loud on those that `chain` refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.channels.average import mean, per_row_mean, weighted_mean
from jaxfed.channels.clip import adaptive_clip, clip, clip_per_row, zero_out
from jaxfed.channels.compress import quantize
from jaxfed.channels.correlated import correlated
from jaxfed.channels.discrete import discrete_gaussian
from jaxfed.channels.integer_noise import skellam
from jaxfed.channels.linear_maps import rotate
from jaxfed.channels.noise import densify, gaussian, local_gaussian
from jaxfed.channels.secure_sum import pads, ring
from jaxfed.channels.sparse import top_k
from jaxfed.core.channel import chain
from jaxfed.core.link import link
from jaxfed.core.state import server_model
from jaxfed.core.tables import Table
from jaxfed.core.types import Mechanism
from jaxfed.privacy.accountant import compute_spent
from jaxfed.privacy.audit import audit_lower_bound, probe_channel
from jaxfed.privacy.releases import Sampling
from jaxfed.privacy.sensitivity import search_largest_gain
from jaxfed.sampling import cohort
from tests.small import KEY, MARKED, WHO, factorisation, private_links, row_cohort

EXAMPLE = {"item": Table(jnp.zeros((6, 4))), "bias": Table(jnp.zeros(6)), "scale": jnp.zeros(())}
NEAR = 2e-3  # float32: a difference of sums of four clients


def dp_ftrl():
    return correlated(12, 11, cohort.cyclic_cohort(11, 4), 1.0, "tree")


SOUND = {
    "gaussian": lambda: chain(mean(4), clip(0.5), gaussian()),
    "weights before the clip": lambda: chain(weighted_mean(), clip(0.5), gaussian()),
    "noised denominators": lambda: chain(per_row_mean(floor=2.0), clip(0.5), gaussian()),
    "adaptive clip": lambda: chain(mean(4), adaptive_clip(1.0, count=4), gaussian()),
    "rotated": lambda: chain(mean(4), rotate(), clip(0.5), gaussian()),
    "rotated after the clip": lambda: chain(mean(4), clip(0.5), rotate(), gaussian()),
    "rows, then all": lambda: chain(mean(4), clip_per_row(0.1), clip(0.3), gaussian()),
    "local": lambda: chain(mean(4), clip(0.5), densify(), local_gaussian()),
    "local and central": lambda: chain(mean(4), clip(0.5), densify(), local_gaussian(0.1), clip(2.0), gaussian()),
    "skellam": lambda: chain(mean(4), clip(0.5), skellam(8)),
    "skellam, coarse": lambda: chain(mean(4), clip(0.5), skellam(8, 2.0, 4)),
    "discrete gaussian": lambda: chain(mean(4), clip(0.5), discrete_gaussian(8)),
    "outliers left out": lambda: chain(mean(4), zero_out(0.5), gaussian()),
    "all of the largest": lambda: chain(mean(4), clip(0.5), top_k(1.0, keep_error=False), gaussian()),
    "skellam under pads": lambda: chain(mean(4), clip(0.5), densify(), skellam(8), pads()),
    "dp-ftrl": lambda: chain(mean(4), clip(0.5), dp_ftrl()),
}


@pytest.mark.parametrize("name", SOUND)
def test_nobody_is_found_who_does_more_than_is_claimed(name):
    """And somebody who does nearly as much, or the search would be blind. Few random updates are nearly outliers."""
    assert (0.7 if name == "outliers left out" else 0.9) <= probe_channel(SOUND[name](), EXAMPLE) <= 1 + NEAR


def test_every_private_link_of_the_registry_is_probed():
    assert private_links() >= {"gaussian", "local_gaussian", "skellam", "discrete_gaussian", "correlated"}
    assert private_links() <= {each for make in SOUND.values() for each in make().claims.name.split(", ")}


def unsound(*links, bound):
    """(links, bounds) as somebody would join them who does not ask `chain`: noise for the bound that the clip
    promises."""
    return links, [bound] * len(links)


def doubled(update, sent, client):
    return jax.tree.map(lambda x: 2 * x, update), client.link_state


UNSOUND = {
    "noise before top-k": (clip(0.5), gaussian(), top_k(0.1)),
    "noise before quantize": (clip(0.5), gaussian(), quantize(4)),
    "weighted mean before noise": (clip(0.5), weighted_mean(), gaussian()),
    "mean by row before noise": (clip(0.5), per_row_mean(), gaussian()),
    "what doubles, before local noise": (clip(0.5), link(doubled, name="doubled"), densify(), local_gaussian()),
    "noise under noise of clients": (clip(0.5), gaussian(), densify(), local_gaussian(0.1)),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_chain_refuses_is_caught(name):
    with pytest.raises(ValueError, match="put|bound"):
        chain(*UNSOUND[name])
    assert search_largest_gain(*unsound(*UNSOUND[name], bound=0.5), EXAMPLE) > 1 + 10 * NEAR


def test_a_rounding_that_lengthens_is_caught():
    """A ring rounds at random: what it adds to the norm is not in the bound of a clip."""
    assert (
        search_largest_gain(*unsound(clip(0.5), gaussian(), ring(8, fraction_bits=3, bound=1.0), bound=0.5), EXAMPLE)
        > 1.1
    )


def test_a_chain_without_noise_has_nothing_to_probe():
    with pytest.raises(ValueError, match="no link of it is private"):
        probe_channel(chain(mean(), clip(1.0)), EXAMPLE)


def audited(multiplier, runs=400):
    """A lower bound on epsilon from real rounds: the first client, whose update is the canary, reports or does not."""
    algorithm = factorisation(chain(mean(len(WHO)), clip(0.05), gaussian(multiplier)))
    there = np.arange(len(WHO)) > 0
    changes = {}
    for present in (True, False):
        cohort = row_cohort(present=there | present)
        start = algorithm.init(MARKED, KEY)
        fresh = lambda start=start: jax.tree.map(lambda x: x.copy(), start)
        moved = [
            jax.tree.leaves(server_model(algorithm.step(fresh(), cohort, key)[0]))
            for key in jax.random.split(jax.random.key(1 + present), runs)
        ]
        changes[present] = np.array([np.concatenate([np.ravel(x) for x in each]) for each in moved])
    still = factorisation(chain(mean(len(WHO)), clip(0.05)))
    ends = [
        server_model(still.step(still.init(MARKED, KEY), row_cohort(present=there | here), KEY)[0]) for here in (1, 0)
    ]
    canary = np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, ends), strict=True)])
    return audit_lower_bound(changes[True] @ canary, changes[False] @ canary, 1e-3)


def test_an_audit_of_real_rounds_stays_below_what_is_claimed_and_catches_too_little_noise():
    """The attacker knows the canary's direction and all but who reports: the worst case of the accountant."""
    claimed = compute_spent([Mechanism("gaussian", 2.0)], Sampling("everyone", 8, 8), 1, 1e-3, "pld").epsilon
    assert 0.1 * claimed < audited(2.0) < claimed
    assert audited(0.2) > claimed
