"""Where rounds are drawn: which can be drawn on the device, and which of host and device `draw_on = "auto"` is."""

import jax
import numpy as np

from jaxfed.data.batching import Batching
from jaxfed.data.blocks import BlockShapes
from jaxfed.data.device_data import count_free_items, find_room_problem, list_train_data
from jaxfed.data.population import Population
from jaxfed.data.sequences import list_warm_items
from jaxfed.data.stages import LOGGER

LARGEST = 1 << 30  # no bijection is of as many numbers
MOST_LAPS = 1 << 20  # as often does no client come to the same negative


def choose_draw_place(population: Population, batching: Batching, shapes: BlockShapes) -> Batching:
    """Batches with a place where they are drawn: for "auto" the device, if that is no CPU, can draw them, and has room
    for what clients train on; else the host. The log says which, and why.

    Of several processes each chooses by all clients' data, so that those with equal devices choose alike.
    """
    if batching.draw_on != "auto":
        return batching
    problem = "the device is a CPU" if jax.local_devices()[0].platform == "cpu" else ""
    problem = problem or find_draw_problem(population, batching, shapes)
    problem = problem or find_room_problem(list_train_data(population, batching))
    LOGGER.info("work.draw_on: %s", f"host, since {problem}" if problem else "device")
    return batching._replace(draw_on="host" if problem else "device")


def check_device_draws(population: Population, batching: Batching, shapes: BlockShapes) -> None:
    """Raises ValueError where rounds cannot be drawn on the device."""
    if problem := find_draw_problem(population, batching, shapes):
        raise ValueError(f'work.draw_on = "device": {problem}: set it to "host"')


def find_draw_problem(population: Population, batching: Batching, shapes: BlockShapes) -> str:
    """Why rounds cannot be drawn on the device; "": they can."""
    reasons = {
        "sums for a closed form": batching.ordered,
        "batches of domains of several processes": shapes.share.size > 1 and population.domains is not None,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        return f"{found[0]} are drawn on the host alone"
    users = np.arange(len(population.user_names))
    n, free = population.train.counts, np.maximum(count_free_items(population, users), 1)
    if batching.sequence:  # negatives of a step, whatever its client has
        n, free = np.ones(1, np.int64), np.array([len(list_warm_items(population))])
    drawn = batching.epochs * batching.negatives * n
    of_client = batching.epochs * (batching.negatives + 1) * int(population.num_train.max())
    most = max(population.num_items, 0 if batching.sequence else of_client, int((drawn + batching.epochs * n).max()))
    rows = max(len(population.train.values), len(population.excluded.values))
    if population.popularity:  # each interaction has a number
        most = max(most, len(population.train.values))
    if most >= LARGEST or rows >= 2 * LARGEST or (drawn // free).max() >= MOST_LAPS:
        return "the device counts in 32 bits, too few for these data"
    return ""
