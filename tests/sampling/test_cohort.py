"""Cohorts: who is asked is a function of seed and round."""

from functools import partial

import numpy as np
import pytest

import jaxfed as jf
from jaxfed.config.registry import REGISTRY
from jaxfed.sampling.clock import constant_times
from jaxfed.sampling.cohort import cyclic_cohort, everyone_cohort, poisson_cohort, uniform_cohort

N = 50
OWN = {
    "everyone": {},
    "deadline": {"size": 8, "clock": constant_times(N, np.ones(N))},
    "buffered": {"size": 8, "concurrency": 20, "clock": constant_times(N, np.ones(N))},
}
MAKERS = {name: partial(make, N, **OWN.get(name, {"size": 8})) for name, make in REGISTRY["cohort"].items()}


@pytest.mark.parametrize("name", MAKERS)
def test_laws_of_a_sampler(name):
    sampler = MAKERS[name]()
    seen = []
    for round in range(20):
        ids, present = sampler.draw(3, round)
        again = sampler.draw(3, round)
        assert (ids == again[0]).all()
        assert (present == again[1]).all()
        assert len(ids) == len(present) == sampler.slots
        real = ids[ids < N]
        assert len(set(real.tolist())) == len(real)
        assert ids.min() >= 0
        assert ids.max() <= N
        assert (present == (ids < N)).all()  # without drop-outs all who are asked report
        seen.append(tuple(ids))
    if name != "everyone":
        assert len(set(seen)) > 10
        assert any((sampler.draw(4, t)[0] != sampler.draw(3, t)[0]).any() for t in range(3))


@pytest.mark.parametrize("name", MAKERS)
def test_drop_outs(name):
    sampler = MAKERS[name](dropout=0.3)
    draws = [sampler.draw(0, t) for t in range(400)]
    asked = sum((ids < N).sum() for ids, _ in draws)
    gone = sum(((ids < N) & ~present).sum() for ids, present in draws)
    assert abs(gone / asked - 0.3) < 5 * np.sqrt(0.21 / asked)
    assert not any(present[ids == N].any() for ids, present in draws)
    with pytest.raises(ValueError, match="a probability"):
        MAKERS[name](dropout=1.0)


def test_a_drop_out_is_the_clients_not_the_cohorts():
    few, many = uniform_cohort(N, 8, 0.5), uniform_cohort(N, 40, 0.5)
    for round in range(5):
        a, b = (dict(zip(*map(np.ndarray.tolist, s.draw(0, round)), strict=True)) for s in (few, many))
        assert all(a[i] == b[i] for i in a.keys() & b.keys())


def test_uniform_takes_all_clients_alike():
    counts = np.bincount(np.concatenate([uniform_cohort(N, 8).draw(0, t)[0] for t in range(2000)]), minlength=N)
    assert abs(counts - 320).max() < 5 * np.sqrt(320 * 0.84)


def test_poisson_has_the_size_it_says_on_average_and_never_more_than_its_cap():
    sampler = poisson_cohort(N, 8)
    sizes = np.array([(sampler.draw(0, t)[0] < N).sum() for t in range(2000)])
    assert abs(sizes.mean() - 8) < 5 * np.sqrt(8 * 0.84 / 2000)
    assert abs(sizes.var() - 8 * 0.84) < 1.5  # it is not a fixed size
    tight = poisson_cohort(N, 8, cap=6)
    assert tight.slots == 6
    assert max((tight.draw(0, t)[0] < N).sum() for t in range(200)) == 6


def test_poisson_leaves_out_clients_at_random_beyond_its_cap():
    """Which the accountant counts on: the first ids, or the last, are no likelier to stay than the others."""
    sampler, rounds = poisson_cohort(N, 20, cap=6), 2000
    ids = np.concatenate([sampler.draw(0, t)[0] for t in range(rounds)])
    counts = np.bincount(ids[ids < N], minlength=N)
    assert abs(counts - counts.mean()).max() < 5 * np.sqrt(6 * rounds / N)


def test_cyclic_asks_everyone_before_anyone_twice():
    sampler = cyclic_cohort(N, 10)
    assert sorted(np.concatenate([sampler.draw(0, t)[0] for t in range(5)]).tolist()) == list(range(N))
    assert (sampler.draw(0, 0)[0] == sampler.draw(0, 5)[0]).all()


def test_everyone():
    assert everyone_cohort(N).draw(0, 0)[0].tolist() == list(range(N))


@pytest.mark.parametrize("make", [uniform_cohort, poisson_cohort, cyclic_cohort])
def test_cohorts_that_cannot_be(make):
    with pytest.raises(ValueError, match=r"cohort.size 51 is larger than the population of 50"):
        make(N, 51)
    with pytest.raises(ValueError, match="at least 1"):
        make(N, -1)


@pytest.mark.parametrize("name", ["uniform", "poisson", "cyclic", "deadline", "buffered"])
@pytest.mark.parametrize("clients", [3, 60, 1000])
def test_a_cohort_whose_size_nobody_said_fits_the_population(name, clients):
    timed = {"clock": constant_times(clients, np.ones(clients))} if name in OWN else {}
    sampler = REGISTRY["cohort"][name](clients, **timed)
    assert sampler.size == (min(32, clients // 6) or 1 if name == "buffered" else min(128, clients))
    assert [(sampler.draw(0, t)[0] < clients).any() for t in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("clients", "mean_holders", "size"),
    [
        (6040, 1138.9, 213),
        (1336, 56.8, 941),
        (8072, 31.6, 8072),
        (22363, 100.5, 8192),
        (943, 900.0, 128),
        (50, 40.0, 50),
    ],
)
def test_a_cohort_in_which_a_row_has_holders(clients, mean_holders, size):
    """40 of them: a share 40 / mean_holders of the clients, from 128 to 8,192 of them, and no more than there are."""
    assert uniform_cohort(clients, holders=40.0, mean_holders=mean_holders).size == size
    assert uniform_cohort(clients, 7, holders=40.0, mean_holders=mean_holders).size == 7


def test_the_mean_holders_of_a_population():
    """By hand: three users hold item 0, one item 1, so of four interactions three have 3 holders and one 1."""
    data = jf.data.from_arrays([0, 0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 5, 6, 0, 7, 8, 0, 1, 9, 10])
    clients = jf.data.partition(data, by="user", split="leave-one-out")
    assert clients.population.mean_holders == (3 * 3 + 1) / 4
    with pytest.raises(ValueError, match="holders need mean_holders"):
        jf.sampling.uniform(holders=1.0)(num_clients=400)
    sampler = jf.sampling.uniform(holders=1.0)(num_clients=400, mean_holders=2.0)
    assert sampler.size == 200
