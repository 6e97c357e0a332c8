"""What batches and their negatives cannot be drawn from."""

import numpy as np

from jaxfed.data.batching import Batching
from jaxfed.data.population import NO_TIMES, Population


def check_batching(population: Population, batching: Batching) -> None:
    """Raises ValueError where batches or negatives cannot be drawn."""
    for key, least in (("batch_size", 1), ("epochs", 1), ("negatives", 0)):
        if (value := getattr(batching, key)) < least:
            raise ValueError(f"work.{key} is {value}: it must be at least {least}")
    if batching.draw_on not in ("host", "device", "auto"):
        raise ValueError(f'work.draw_on is "{batching.draw_on}": choose host, device or auto')
    check_negative_sampling(population, batching)
    if batching.sequence:
        check_sequences(population, batching)
        return
    if population.labels is not None and (batching.negatives or batching.pairwise):
        raise ValueError(
            f'data.label = "{population.labels.kind}": rows have labels, none are drawn: set work.negatives to 0'
        )
    if batching.pairwise and batching.negatives < 1:
        raise ValueError("a pairwise loss compares with negatives: set work.negatives to 1 or more")
    full = population.excluded.counts >= population.span(np.arange(len(population.user_names)))[1]
    if batching.negatives and full.any() and batching.negative_sampling != "in_batch":
        raise ValueError(
            f"negatives asked for, but user {population.user_names[full.argmax()]} has every item: "
            "set work.negatives = 0 or leave such users out"
        )


def check_negative_sampling(population: Population, batching: Batching) -> None:
    """Raises ValueError where negatives cannot be drawn by popularity, or from the batch."""
    chosen, sequence = batching.negative_sampling, batching.sequence
    if chosen not in ("uniform", "popularity", "in_batch"):
        raise ValueError(f'work.negative_sampling is "{chosen}": choose uniform, popularity or in_batch')
    if chosen == "uniform":
        return
    if chosen == "in_batch":
        check_batch_negatives(population, batching)
    drawn = batching.negatives or (sequence and sequence.compares and chosen == "in_batch")
    if not drawn or (sequence and sequence.whole_catalogue):
        raise ValueError("work.negative_sampling: no negatives are drawn here: leave it out")
    if sequence and sequence.uniform_negatives:
        raise ValueError(
            "work.negative_sampling: this loss (sampled_softmax, gbce) is right for uniform negatives alone: take "
            'model.loss = "bce" or "bpr", or uniform'
        )
    if population.popularity and not sequence and not population.popularity.open.all():
        user = population.user_names[population.popularity.open.argmin()]
        raise ValueError(
            f"work.negative_sampling: user {user} has every item that anybody has: take uniform, or leave such "
            "users out"
        )


def check_batch_negatives(population: Population, batching: Batching) -> None:
    """Raises ValueError where batches have no other positives, or not those that a user is offered."""
    if population.users_per_client == 1:
        raise ValueError(
            'work.negative_sampling = "in_batch": each client has one user, whose batches have its own items alone: '
            'take clients with several users (data.clients = "silo" and data.silos), or uniform or popularity'
        )
    if population.domains is not None:
        raise ValueError(
            'work.negative_sampling = "in_batch": a batch may have items of several domains: take uniform or popularity'
        )
    least = 2 if batching.sequence else 2 * batching.examples(1)  # two histories, or the examples of two positives
    if batching.batch_size < least:
        raise ValueError(
            f'work.negative_sampling = "in_batch": a batch of {batching.batch_size} has no other positive: set '
            f"work.batch_size to {least} or more"
        )


def check_sequences(population: Population, batching: Batching) -> None:
    """Raises ValueError where clients have no histories that a model of sequences learns from."""
    assert batching.sequence
    if population.domains or population.label_flipped is not None:
        raise ValueError("a model of sequences compares with all items: leave data.merge and data.label_flip out")
    if population.labels is not None:
        raise ValueError(f'data.label = "{population.labels.kind}": a model of sequences counts rows, take mf or fm')
    of_batch = batching.sequence.whole_catalogue or batching.negative_sampling == "in_batch"
    if batching.sequence.compares and not batching.negatives and not of_batch:
        raise ValueError("this loss compares with negatives: set work.negatives, for example to 256")
    if batching.sequence.times != "none" and population.times is None:
        raise ValueError(NO_TIMES)
    if population.train.counts.max() < 2:
        raise ValueError("no user has two train items: there is no sequence to learn from")
