"""What one client changes in what a private run releases: real rounds, with the client and without it.

A search: it can show that a guarantee does not hold, never that it does.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.build import RunParts, build_from_config
from jaxfed.config.settings import Config
from jaxfed.core.channel import chain
from jaxfed.core.channel_checks import message_shapes
from jaxfed.core.link import Channel, broadcast_state, decode_total, encode_message, list_links, list_mechanisms
from jaxfed.core.state import State
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.core.tables import l2_norm, num_rows
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Mechanism, Tree
from jaxfed.data.clients import Clients
from jaxfed.training.best_model import read_start
from jaxfed.training.rounds import draw_cohort, initial_arrays, make_run_keys

# A difference of two float32 sums of hundreds of clients is right to some thousandth of one client's bound.
TOLERANCE = 1e-3


class ReleaseChange(NamedTuple):
    """What the release of one link changed by when one client of one round was taken away or replaced."""

    link: str
    client: int
    interactions: int  # of the client
    round: int
    done: str  # removed | replaced | sent (the length of the client's own message, where that is noised)
    ratio: float  # the change, over the largest that the noise of the link was made for


def record_link(link: Channel) -> Channel:
    """The same private link, which keeps what it was given before its noise: a sum in its state at the server, the norm
    of a message in its link state on the client."""

    def init(example):
        state, link_state = link.init(example)
        total = message_shapes(
            link, example, state, link_state, num_rows(example), bound=1.0
        )  # of any bound, for shapes
        return (state, zeros_like(total)), (link_state, jnp.zeros(()))

    def encode(update, sent, client):
        message, link_state = encode_message(link, update, sent, client._replace(link_state=client.link_state[0]))
        return message, (link_state, l2_norm(update))

    def decode(total, state, round):
        released, after, info = decode_total(link, total, state[0], round)
        return released, (after, total), info

    return link._replace(
        init=init, encode=encode, decode=decode, broadcast=lambda state: broadcast_state(link, state[0])
    )


def record_channel(channel: Channel) -> Channel:
    """The same chain, whose private links are recorded (`record_link`). Raises ValueError where there are none."""
    if not channel.claims.mechanisms:
        raise ValueError(f"{channel.claims.name}: no link adds noise, so there is no guarantee to probe")
    return chain(*(record_link(each) if each.claims.mechanisms else each for each in list_links(channel)))


class RecordedInputs(NamedTuple):
    """What the private links of a chain were given in a round, in the order of the links."""

    sums: list[list[np.ndarray]]  # leaves of the sum over the cohort
    norms: list[np.ndarray]  # float [clients]: of the last message of each client


def recorded_inputs(state: State, channel: Channel) -> RecordedInputs:
    """Reads what links of `record_link` kept."""
    places = [i for i, each in enumerate(list_links(channel)) if each.claims.mechanisms]
    sums = [[np.asarray(x) for x in jax.tree.leaves(state.channel[i][1])] for i in places]
    return RecordedInputs(sums, [np.asarray(state.client_states.channel[i][1]) for i in places])


def relative_distance(mechanism: Mechanism, one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """How far two sums are apart, over what the mechanism allows one client to add, in L2 and (if it has one) in L1.

    Integers are those of a ring: their difference wraps as they do.
    """
    gap = np.concatenate([np.ravel(a - b).astype(np.float64) for a, b in zip(one, other, strict=True)])
    ratios = [np.linalg.norm(gap) / mechanism.l2]
    if mechanism.l1:
        ratios.append(np.abs(gap).sum() / mechanism.l1)
    return float(max(ratios))


def play_round(
    parts: RunParts, state: State, seed: int, round: int, ids: np.ndarray, present: np.ndarray
) -> tuple[State, np.ndarray]:
    """(the state after a round of these clients, bool [slots]: who reported); `state` is not consumed."""
    sampler, place = parts.sampler, parts.placement
    cohort = draw_cohort(parts, (ids, present), seed, round)
    ages = sampler.ages(seed, round).astype(np.int32) if sampler.ages else None
    cohort = cohort._replace(blocks=place.block(cohort.blocks), ages=ages)
    state, info = parts.algorithm.step(copy_state(state), cohort, make_run_keys(seed).rounds)
    return state, np.asarray(info["clients/present"])


def copy_state(state: Tree) -> Tree:
    """A copy, as a round consumes the state that it is given."""
    return jax.tree.map(lambda x: x.copy(), state)


def choose_slots(num_train: np.ndarray, count: int) -> np.ndarray:
    """`count` places of an array of activities: the least and most active, and others spread evenly between them."""
    order = np.argsort(num_train, kind="stable")
    return order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))]


def probe_rounds(config: Config, data: Clients, clients: int = 16, rounds: int = 2) -> Iterator[ReleaseChange]:
    """Removes some clients of each of the first rounds in turn, and puts others in their place.

    Args:
        config: a configuration whose channel is private.
        data: its data.
        clients: how many clients of each round are tried, from the least to the most active one.
        rounds: how many rounds are played.

    Yields:
        a `ReleaseChange` for each client that reported, link and way; a ratio above 1 breaks the guarantee.

    Raises:
        ValueError: where no link is private, or several processes take part.
    """
    parts = build_from_config(config, data, record_channel, read_start(config))
    if parts.processes.size > 1:
        raise ValueError("jaxfed privacy probe works in one process: start it without a launcher")
    population, mechanisms, channel = data.population, list_mechanisms(parts.channel), parts.channel
    names = [each.claims.name for each in list_links(channel) if each.claims.mechanisms]
    state, everyone = initial_arrays(parts, config.seed)["state"], np.arange(population.num_clients)
    for round in range(rounds):
        ids, present = parts.sampler.draw(config.seed, round)
        after, reported = play_round(parts, state, config.seed, round, ids, present)
        filled = np.flatnonzero(reported)
        whole, strangers = recorded_inputs(after, channel), np.setdiff1d(everyone, ids)
        for slot in filled[choose_slots(population.num_train[ids[filled]], clients)] if len(filled) else ():
            client = int(ids[slot])
            about = {"client": client, "interactions": int(population.num_train[client]), "round": round}
            others = {"removed": population.num_clients}
            if len(strangers):
                others["replaced"] = int(setup_rng(config.seed, SetupStream.PROBE, round, client).choice(strangers))
            for done, other in others.items():
                now = np.where(np.arange(len(ids)) == slot, other, ids)
                there = present & (now < population.num_clients)
                rest = recorded_inputs(play_round(parts, state, config.seed, round, now, there)[0], channel)
                for i, mechanism in enumerate(mechanisms):
                    if mechanism.kind != "local":
                        most = 2.0 if done == "replaced" else 1.0
                        ratio = relative_distance(mechanism, whole.sums[i], rest.sums[i]) / most
                        yield ReleaseChange(names[i], done=done, ratio=ratio, **about)
            for i, mechanism in enumerate(mechanisms):
                if mechanism.kind == "local":
                    yield ReleaseChange(
                        names[i], done="sent", ratio=float(whole.norms[i][client]) / mechanism.l2, **about
                    )
        state = after
