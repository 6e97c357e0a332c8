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
from jaxfed.core.link import Channel, list_links
from jaxfed.core.state import State, initial_state
from jaxfed.core.tables import take_rows
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Block, ClientState, Messages, Tree
from jaxfed.deployment.late_messages import PUBLIC_LINKS, discount_update
from jaxfed.deployment.node_data import PublicFacts, make_empty_population, wrap_population
from jaxfed.deployment.node_states import draw_secret_key
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
    noise_key: jax.Array  # of what the server draws for itself; the seed's, or one that no node can compute
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


class HeardMessages(NamedTuple):
    """What came back."""

    messages: dict[int, tuple[Tree, np.ndarray]]  # client -> its message, its rows
    answered: set[int]  # clients of which something came, sound or not
    ages: dict[int, int] = {}  # client -> rounds since it was sent its model; who is not there was sent the present one


def open_server(
    config: Config, facts: PublicFacts, seed: int, say: Callable[[str], None], secret: bytes | None = None
) -> FederationServer:
    """A server before its first round.

    Args:
        config: What to run.
        facts: What everybody knows; the server has nothing else.
        seed: Of cohorts and of public randomness: the configuration's, or a secret one.
        say: Is told what is wrong with messages, a line each.
        secret: What the noise that the server adds comes from. None: public randomness, as in the simulator, so that
            every node can compute it.

    Raises:
        ValueError: the configuration cannot be deployed.
    """
    party = make_deployed_pieces(config, facts, wrap_population(make_empty_population(facts), facts))
    streams = make_run_keys(config.seed)
    nobody = party.plan._replace(num_clients=0)
    state = initial_state(nobody, party.model.init(streams.model), streams.memory)._replace(client_states=())
    counted = np.full(facts.num_clients, -1, np.int32)
    opened = jax.jit(partial(open_block, party), static_argnums=5)
    noise_key = choose_noise_key(party.channel, seed, secret)
    return FederationServer(
        party, make_programs(party.plan), opened, state, counted, seed, noise_key, config.rounds, say
    )


def make_public_key(server: FederationServer, round: int) -> np.ndarray:
    """uint32 [2]: public randomness of a round."""
    return np.asarray(jax.random.key_data(jax.random.fold_in(make_run_keys(server.seed).rounds, round)))


def choose_noise_key(channel: Channel, seed: int, secret: bytes | None) -> jax.Array:
    """The key of what the server draws for itself. Links that undo at the server what public randomness did at the
    client read the same key, so that these do not go with noise by a secret: raises ValueError."""
    if secret is None or not channel.claims.mechanisms:
        return make_run_keys(seed).rounds
    public = [each.claims.name for each in list_links(channel) if each.claims.name in PUBLIC_LINKS]
    if public:
        raise ValueError(f"deploy: beside noise {public[0]} would tell nodes what the noise is: leave it out")
    return jax.random.wrap_key_data(jnp.asarray(draw_secret_key(secret, "noise")))


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

    places: (slots [m], ids [m], ages [m], rows [m, K], positions of these in the total [m, K]). total_rows: of the
    total.
    """
    slots, ids, ages, rows, positions = places
    nobody = jnp.full(party.sampler.slots, party.plan.num_clients, jnp.int32)
    public = PublicRound(public_key, nobody, party.size)

    def one(message, id, age, rows):
        own = ClientInput(id, ClientState((), ()), rows, jnp.float32(0), (), age)
        sender = client_view(own, public)._replace(link_state=None)
        if party.channel.decode_message:  # all of a cohort start from the present model
            sender = sender._replace(drift=zeros_like(take_rows(shared, rows).params))
        opened, is_finite = open_message(party.channel, message, take_rows(links, rows), sender)
        return discount_update(party.channel, opened, sender), is_finite

    opened, is_finite = jax.vmap(one)(messages, ids, ages, rows)
    counts = is_finite & (slots < party.sampler.slots)
    block = Block(slots, positions, jnp.zeros(len(slots)), ())
    ends = total_rows, party.size, party.plan.num_clients
    return flatten_messages(block, counts, ids, rows, opened, (), {}, ends=ends, padded_shape=None)
