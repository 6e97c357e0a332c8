"""No two purposes share random numbers, and those of runs stay what they were."""

import itertools

import jax
import numpy as np
import pytest

from jaxfed.core.streams import CLIENTS, DOWN, STORE, WEIGHTS, SetupStream, Stream, host_rng, philox_key, setup_rng
from jaxfed.data.batching import client_random_numbers

OF_CLIENTS = {Stream.EVALUATION_NEGATIVES, Stream.AWAKE, Stream.TRIPS, Stream.EXAMPLES}
SEEDS, ROUNDS, SOME = (0, 1, 3), range(6), range(6)
SIZES = range(1, 20)  # of deals


def raw(rng, count=12):
    return rng.bit_generator.random_raw(count)


def numbers_of(stream):
    """{(seed, ...): numbers} of a stream: of several rounds, clients and visits."""
    found = {}
    for seed, round in itertools.product(SEEDS, ROUNDS):
        if stream not in OF_CLIENTS:
            found[seed, round] = raw(host_rng(seed, stream, round), 40)
        elif stream is Stream.EXAMPLES or not round:
            who, visit = np.array([*itertools.product(SOME, SOME)]).T
            drawn = client_random_numbers(seed, stream, who, visit, np.full(len(who), 12), round)
            found[seed, round] = drawn
    return found


def test_no_two_streams_of_the_host_share_numbers():
    drawn = np.concatenate([each for stream in Stream for each in numbers_of(stream).values()])
    assert len(np.unique(drawn)) == len(drawn) > 5_000


def deals():
    for deal in SetupStream:
        for sizes in itertools.product(SIZES, repeat=deal.value[0]):
            yield deal, sizes


def test_no_two_deals_share_numbers():
    """As many silos as another purpose's number included."""
    drawn = np.concatenate([raw(setup_rng(seed, *each[:1], *each[1]), 4) for seed in (0, 3) for each in deals()])
    assert len(np.unique(drawn)) == len(drawn) > 2_000


def test_no_two_purposes_share_a_key():
    """As they are folded: from a round's key by links and by STORE, DOWN and CLIENTS; from a link's key at a client by
    leaves and by WEIGHTS."""
    fold, keys = jax.random.fold_in, []
    for round in range(3):
        key = fold(jax.random.key(0), round)
        at_server = [fold(key, link) for link in range(3)]  # also what is public on the clients
        keys += [fold(key, STORE), *at_server, *(fold(each, leaf) for each in at_server for leaf in range(3))]
        public, secret = jax.random.split(fold(key, DOWN))
        keys += [public, secret, *(fold(secret, client) for client in range(4))]
        for client in range(4):
            work, noise = jax.random.split(fold(fold(key, CLIENTS), client))
            at_client = [fold(noise, link) for link in range(3)]
            keys += [work, noise, *at_client]
            keys += [fold(each, part) for each in at_client for part in (0, 1, 2, WEIGHTS)]
    data = {tuple(jax.random.key_data(key).tolist()) for key in keys}
    assert len(data) == len(keys)


@pytest.mark.parametrize(
    ("ours", "literal"),
    [
        (host_rng(5, Stream.COHORT, 7), [[5, 3], [0, 0, 7, 0]]),
        (host_rng(5, Stream.DROPOUT, 7), [[5, 3], [0, 1, 7, 0]]),
        (host_rng(5, Stream.CYCLE), [[5, 3], [0, 2, 0, 0]]),
        (host_rng(5, Stream.ARRIVALS), [[5, 3], [0, 3, 0, 0]]),
    ],
)
def test_the_numbers_of_runs_stay(ours, literal):
    key, counter = literal
    assert raw(ours).tolist() == np.random.Philox(key=key, counter=counter).random_raw(12).tolist()


def test_the_keys_of_clients_streams_stay():
    assert philox_key(5, Stream.EVALUATION_NEGATIVES) == [5, 2]
    assert philox_key(5, Stream.AWAKE) == [5, 4]
    assert philox_key(5, Stream.EXAMPLES, 9) == [5, (1 << 32) + 9]
    assert (STORE, DOWN, CLIENTS, WEIGHTS) == ((1 << 31) - 1, (1 << 31) - 2, (1 << 31) - 3, (1 << 31) - 1)


@pytest.mark.parametrize(
    ("deal", "sizes", "words"),
    [
        (SetupStream.EVALUATED_CLIENTS, (), [4, 3]),
        (SetupStream.COLD_CLIENTS, (), [4, 5]),
        (SetupStream.SYNTHETIC_DATA, (), [4, 7]),
        (SetupStream.DEVICES, (2,), [4, 2, 7]),
        (SetupStream.EDGES, (4,), [4, 4, 13]),
        (SetupStream.SILOS, (10,), [4, 10]),
        (SetupStream.DEVICE_CLASSES, (), 4),
        (SetupStream.SPLIT, (100,), [4, 100, 19]),
    ],
)
def test_the_numbers_of_deals_stay(deal, sizes, words):
    assert raw(setup_rng(4, deal, *sizes)).tolist() == raw(np.random.default_rng(words)).tolist()
