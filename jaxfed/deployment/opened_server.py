"""A server between two rounds, and what it compiles. It holds the model, and no interactions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.settings import Config
from jaxfed.core.client import ClientInput, PublicRound, client_view, flatten_messages, open_message
from jaxfed.core.federate import Programs, make_programs
from jaxfed.core.state import State, initial_state
from jaxfed.core.tables import take_rows
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Block, ClientState, Messages, Tree
from jaxfed.deployment.node_data import PublicFacts, make_empty_population, wrap_population
from jaxfed.deployment.party import DeployedPieces, make_deployed_pieces
from jaxfed.training.rounds import make_run_keys

Exchange = Callable[[dict[int, bytes]], dict[int, bytes]]  # {node: request} -> {node: reply} of those who answered

EMPTY_ROWS = np.zeros(0, np.int32)


@dataclass
class FederationServer:
    """A server between two rounds. `open_server` makes it."""

    party: DeployedPieces
    programs: Programs
    opened: Any  # what opens a block of messages
    state: State  # without what clients keep
    counted: np.ndarray  # int32 [clients]: the last round in which the message of each was counted; -1: none was
    seed: int  # of cohorts and public randomness
    rounds: int
    say: Callable[[str], None]
    wanted: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)  # round -> client -> the rows it asks for
    bytes_out: int = 0  # of all requests, envelopes included
    bytes_in: int = 0


class RoundRequest(NamedTuple):
    """A round as the server asks for it."""

    number: int
    ids: np.ndarray  # int [M]: the cohort
    asked: dict[int, np.ndarray]  # node -> the clients of it that are asked
    digest: bytes  # of the model
    downloaded: dict[int, int]  # client -> bytes of the model that are sent for it


class Heard(NamedTuple):
    """What came back."""

    messages: dict[int, tuple[Tree, np.ndarray]]  # client -> its message, its rows
    answered: set[int]  # clients of which something came, sound or not


def open_server(config: Config, facts: PublicFacts, seed: int, say: Callable[[str], None]) -> FederationServer:
    """A server before its first round.

    Args:
        config: What to run.
        facts: What everybody knows; the server has nothing else.
        seed: Of cohorts and of public randomness: the configuration's, or a secret one.
        say: Is told what is wrong with messages, a line each.

    Raises:
        ValueError: the configuration cannot be deployed.
    """
    party = make_deployed_pieces(config, facts, wrap_population(make_empty_population(facts), facts))
    streams = make_run_keys(config.seed)
    nobody = party.plan._replace(num_clients=0)
    state = initial_state(nobody, party.model.init(streams.model), streams.memory)._replace(client_states=())
    counted = np.full(facts.num_clients, -1, np.int32)
    opened = jax.jit(partial(open_block, party), static_argnums=5)
    return FederationServer(party, make_programs(party.plan), opened, state, counted, seed, config.rounds, say)


def open_block(
    party: DeployedPieces,
    shared: Tree,
    links: Tree,
    messages: Tree,
    places: tuple[jax.Array, ...],
    public_key: jax.Array,
    total_rows: int,
) -> Messages:
    """The server's side of a block of messages: opened, and laid flat as the simulator does.

    places: (slots [m], ids [m], rows [m, K], positions of these in the total [m, K]). total_rows: of the total.
    """
    slots, ids, rows, positions = places
    nobody = jnp.full(party.sampler.slots, party.plan.num_clients, jnp.int32)
    public = PublicRound(public_key, nobody, party.size)

    def one(message, id, rows):
        sender = client_view(ClientInput(id, ClientState((), ()), rows, jnp.float32(0), ()), public)._replace(
            link_state=None
        )
        if party.channel.decode_message:  # all of a cohort start from the present model
            sender = sender._replace(drift=zeros_like(take_rows(shared, rows).params))
        return open_message(party.channel, message, take_rows(links, rows), sender)

    opened, is_finite = jax.vmap(one)(messages, ids, rows)
    counts = is_finite & (slots < party.sampler.slots)
    block = Block(slots, positions, jnp.zeros(len(slots)), ())
    ends = total_rows, party.size, party.plan.num_clients
    return flatten_messages(block, counts, ids, rows, opened, (), {}, ends=ends, padded_shape=None)
