"""Rounds of domains that are drawn on the device: a user is offered items of its domain alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfed.data.batching import Batching
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.device_cohorts import bound_held_rows, make_drawer
from jaxfed.data.device_data import find_negatives, list_train_data, put_train_data
from jaxfed.data.packing import pack_cohort
from jaxfed.data.population import ProcessShare
from jaxfed.data.preparation import prepare_population
from tests.data.test_device_draws import draw_round, read_steps
from tests.data.test_domains import SOURCE

MERGED = prepare_population(SOURCE, clients="domain", merge="domains")[1]


def list_offered_items(user):
    """The items of a user's domain that are not excluded."""
    domains = MERGED.domains
    domain = domains.of[MERGED.train.of(user)[0]]
    return np.setdiff1d(np.flatnonzero(domains.of == domain), MERGED.excluded.of(user))


def test_ranks_are_those_of_the_items_of_a_users_domain():
    data = put_train_data(list_train_data(MERGED, Batching()))
    longest = int(MERGED.excluded.counts.max())
    for user in range(len(MERGED.user_names)):
        offered = list_offered_items(user)
        ranks, user = jnp.arange(len(offered))[None], jnp.array([[user]])
        found = find_negatives(data, user, ranks, MERGED.num_items, longest)
        assert found[0].tolist() == offered.tolist()


@pytest.mark.parametrize("batching", [Batching(16, 5), Batching(128, 12, 2)], ids=["usual", "every item comes again"])
def test_an_epoch_has_every_train_item_once_and_negatives_of_its_domain(batching):
    clients = np.arange(0, MERGED.num_clients, 7)
    cohort, shapes = draw_round(batching, clients, population=MERGED)
    found = read_steps(cohort, shapes, MERGED)
    assert found.keys() == set(clients.tolist())
    lengths = MERGED.num_train[clients]
    assert lengths.max() > 4 * lengths.min(), "clients of very different lengths"
    for client, (steps, held) in found.items():
        train, offered = MERGED.train.of(client).tolist(), list_offered_items(client)
        rows, counts = [row for step in steps for row in step], np.zeros(MERGED.num_items)
        positives = [item for item, label, _ in rows if label == 1]
        assert sorted(positives) == sorted(train * batching.epochs)
        for item, label, weight in rows:
            counts[item] += weight * (label == 0)
        assert counts.sum() == counts[offered].sum() == len(train) * batching.negatives * batching.epochs
        assert np.ptp(counts[offered]) <= 1, "none comes again before all have come"
        assert held == {*train, *np.flatnonzero(counts).tolist()}
        assert len(held) == bound_held_rows(MERGED, batching, np.array([client]))[0]


def test_items_of_a_domain_come_equally_often():
    client, batching, rounds = 3, Batching(4096, 2), 2000
    shapes = make_block_shapes(MERGED, batching, 1, 1, 16, False)
    drawer, n = make_drawer(MERGED, batching, shapes), int(MERGED.num_train[3])
    drawn = [
        np.asarray(drawer.draw(np.array([client]), np.ones(1, bool), 0, round).blocks[0].rows)[0, n : n + 2]
        for round in range(rounds)
    ]
    offered = list_offered_items(client)
    first, second = np.searchsorted(offered, np.array(drawn)).T
    for each in (first, second):
        assert stats.chisquare(np.bincount(each, minlength=len(offered))).pvalue > 1e-4
    assert (first != second).all()


def test_the_host_runs_the_same_programs():
    batching, ids = Batching(16, 5), np.arange(MERGED.num_clients)
    cohort, shapes = draw_round(batching, ids, population=MERGED)
    host = pack_cohort(MERGED, batching, shapes, ids, np.ones(len(ids), bool), 3, 0)
    forms = [[(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(each)] for each in (host, cohort)]
    assert forms[0] == forms[1]


def test_domains_of_several_processes_are_left_to_the_host():
    batching = Batching(16, 5)
    shapes = make_block_shapes(MERGED, batching, 4, 2, share=ProcessShare(0, 2))
    with pytest.raises(ValueError, match='domains of several processes.*set it to "host"'):
        make_drawer(MERGED, batching, shapes)
