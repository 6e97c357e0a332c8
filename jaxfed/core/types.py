"""Names of things: what travels between the places of a round."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.core.recipe import Recipe

Array = jax.Array | np.ndarray  # on a device, or still on the host
Tree = Any
Key = jax.Array


class Broadcast(NamedTuple):
    """Everything that the server broadcasts: the model, and what is sent with it. Updates have the same form.

    Args:
        params: The model's shared parameters.
        extra: What is sent beside them; () where there is nothing.

    Example:
        >>> import jaxfed as jf
        >>> jf.Broadcast({"bias": 0.0}).extra
        ()
    """

    params: Tree
    extra: Tree = ()


class Mean(NamedTuple):
    """A weighted mean as a monoid: add the parts, divide once at the end.

    Args:
        total: The sum of weighted values.
        weight: The sum of the weights.

    Example:
        >>> import jaxfed as jf
        >>> jf.Mean(total=6.0, weight=4.0).value
        1.5
    """

    total: jax.Array | float
    weight: jax.Array | float

    @property
    def value(self) -> Any:
        """total / weight; 0 where nothing was weighed."""
        return self.total / (self.weight + (self.weight == 0))


class RoundView(NamedTuple):
    """What the server may know about a round once it is over."""

    key: Key  # public randomness of the round
    clients: jax.Array  # int [M]: who was asked; the number of clients marks an empty slot
    present: jax.Array  # bool [M]: who reported
    bound: float = math.inf  # the largest norm that a message can have where it comes to the link
    noise_in_sum: bool = False  # whether the sum has the link's noise already, which nodes added: the link adds none


class ClientView(NamedTuple):
    """What one client may know while it encodes. Drop-outs are not known yet, so `present` is not here."""

    link_state: Tree  # what this link keeps on the client between rounds; tables [K, ...]
    key: Any  # randomness nobody else has, a (seed, round, client, link); None where the server opens a message
    public: Key  # randomness everyone has, one key a (seed, round, link)
    id: jax.Array  # int []
    weight: jax.Array  # float []: training examples it used
    num_train: jax.Array  # float []: its number of train interactions
    rows: jax.Array  # int [K]: its rows of every table, past the end where unused
    size: int  # rows of the whole catalogue
    cohort: jax.Array  # int [M]: who was asked
    steps: Any = 1.0  # float []: optimiser steps it took
    loss: Any = 0.0  # float []: mean loss over its examples of the model that it was sent
    age: Any = 0  # int []: rounds since the model that it was sent was the server's
    drift: Tree = ()  # today's parameters less those that it was sent, its rows; the server's: `Channel.decode_message`
    bound: float = math.inf  # the largest norm that a message can have where it comes to the link

    @property
    def held(self) -> jax.Array:
        """bool [K]: which of `rows` it holds. The others are padding: how many there are depends on other clients."""
        return self.rows < self.size


class Mechanism(NamedTuple):
    """What one link releases in every round: a noised sum over the cohort, or (local) every client's noised message.

    gaussian: `multiplier`.
    skellam: integer noise of total variance (multiplier * l2)^2, in grid units. It must not depend on who takes part:
      somebody else adds the share of an absent client.
    discrete_gaussian: integer noise of standard deviation multiplier * l2, in grid units.
    correlated: `multiplier` is the noise over the sensitivity of the whole run, for the participations that the
      sampler allows: all rounds are one release.
    local: a message that is private by itself, by Gaussian noise (`multiplier`) or a pure guarantee (`epsilon`).

    Args:
        kind: One of the words above.
        multiplier: Standard deviation of the noise, divided by the largest L2 norm that one client can add.
        l1: Of integers: the largest L1 norm that one client can add, in grid units, after rounding.
        l2: The largest L2 norm that one client can add where the noise is; of integers, in grid units.
        epsilon: Of local ones: that of one message, for any two inputs.
        name: What is released, for the reader.

    Example:
        >>> import jaxfed as jf
        >>> jf.Mechanism("gaussian", multiplier=2.0, l2=0.5).multiplier
        2.0
    """

    kind: str
    multiplier: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    epsilon: float = 0.0
    name: str = ""


class History(NamedTuple):
    """What one user did, earliest first: L places, the unused ones at the end."""

    rows: Any  # int [L]: positions in the tables given; past the end: unused
    ids: Any  # int [L]: the same as rows of the whole catalogue, of which there are `size`; past the end: unused
    size: int
    times: Any = None  # int [L + 1]: of the places used, and then of the request; None: unknown. See `SequenceFormat`

    @property
    def live(self) -> Any:
        """bool [L]: which places are used."""
        return self.ids < self.size

    @property
    def age(self) -> Any:
        """int [L]: interactions since; the latest has 0. Negative where unused."""
        return self.live.sum() - 1 - jax.numpy.arange(self.ids.shape[0])


class ClientState(NamedTuple):
    """What a client keeps between rounds; of all clients in a store leaves are [n, ...], tables [n, N, ...]."""

    work: Tree  # of the client work: the private part of the model, and what the method adds
    channel: Tree  # of the links, one entry for each


class ClientOutput(NamedTuple):
    """What a client's computation gives back.

    Args:
        update: Points uphill, like a gradient; tables are the client's rows [K, ...].
        client_state: What the client keeps after training.
        weight: float []: number of training examples used.
        metrics: {name: `Mean`}, such as the training loss.
        steps: float []: number of optimiser steps taken.
        loss: float []: mean loss at the start; compiled only where a link reads it.

    Example:
        >>> import jaxfed as jf
        >>> jf.ClientOutput(jf.Broadcast({"bias": 0.1}), client_state=(), weight=20.0, metrics={}).steps
        1.0
    """

    update: Broadcast
    client_state: Tree
    weight: jax.Array
    metrics: dict[str, Mean]
    steps: Any = 1.0
    loss: Any = 0.0


class Block(NamedTuple):
    """m clients of similar length in one static shape."""

    slots: Array  # int [m]: positions in the cohort; M (one past the end) is an empty place
    rows: Array  # int [m, K]: rows a client holds, distinct: positions in the cohort's; past the end is unused
    num_train: Array  # float [m]
    data: Tree  # [m, ...]: what `ClientWork.update` reads


class Cohort(NamedTuple):
    """The clients of one round: a fixed number of slots, and their data in blocks.

    Args:
        ids: int [M]: the clients; the number of all clients marks an empty slot.
        present: bool [M]: who will report.
        blocks: Their data, clients of similar length together.
        rows: int [U]: rows of the catalogue that the cohort holds, ascending; past the end: unused. None: all N. Where
            sums are over pairs of rows: the pairs; blocks then have rows of the catalogue.
        ages: int [M]: rounds since each was sent its model, below `history_length` of `federate`. None: all are sent
            the present one.
    """

    ids: Array
    present: Array
    blocks: tuple[Block, ...]
    rows: Array | None = None
    ages: Array | None = None


class Sampler(NamedTuple):
    """Who takes part in each round; `jaxfed.sampling` makes them.

    Args:
        slots: Number of slots of a cohort, always the same.
        draw: draw(seed, round) -> (ids int [slots], present bool [slots]). The id `num_clients` (one past the end) is
            an empty slot. present: who was asked and will report.
        kind: poisson, fixed (without replacement), everyone or cyclic: what the accountant needs to know; or another
            word.
        size: Number of clients of a cohort; of poisson, the expected one.
        history_length: Number of models that clients of one cohort may have been sent. 0: all were sent the present
            one.
        ages: ages(seed, round) -> int [slots]: rounds since each was sent its model, below `history_length`.
        clock: clock(seed, round) -> simulated seconds at the end of the round.
        recipe: The call that made it, see `Recipe`.

    Example:
        Client 0 alone, in every round:

        >>> import jaxfed as jf, numpy as np
        >>> alone = jf.Sampler(slots=1, draw=lambda seed, round: (np.array([0]), np.array([True])), kind="one", size=1)
        >>> alone.draw(0, 5)[0].tolist()
        [0]
    """

    slots: int
    draw: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    kind: str
    size: int
    history_length: int = 0
    ages: Callable[[int, int], np.ndarray] | None = None
    clock: Callable[[int, int], float] | None = None
    recipe: Recipe | None = None


class Messages(NamedTuple):
    """What one block gives back, laid flat so that every block's part may have one shape.

    W clients and R table rows; clients without a part in the sum lie past the end everywhere.
    """

    messages: Tree  # tables [R, ...], other leaves [W, ...], these zero for the absent
    client_states: Tree  # new ones: tables [R, ...], other leaves [W, ...]
    present: jax.Array  # bool [W]
    sizes: jax.Array  # int [W]: table rows that each has sent
    slots: jax.Array  # int [W]: positions in the cohort
    ids: jax.Array  # int [W]: client ids, past the end for the absent
    rows: jax.Array  # int [R]: rows of the total: positions in the cohort's rows, past the end for the absent
    held: jax.Array  # int [R]: the same as rows of the catalogue
    owner: jax.Array  # int [R]: the client id of each row
    metrics: dict[str, Mean]


class Weights(NamedTuple):
    """A part of a message that says what the rest of it weighs, row by row: codes lose nothing of it where it is one
    number throughout."""

    values: Any


class Summed(NamedTuple):
    """A part of an update of which the server wants the sum over those who reported: links that average leave it."""

    values: Any


def is_summed(node: Any) -> bool:
    """Whether a node of an update is `Summed`."""
    return isinstance(node, Summed)


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["bits"])
@dataclass(frozen=True)
class Coded:
    """A leaf of a message: integers from 0 to 2 ** bits - 1, which take so many bits each on the wire."""

    values: Any
    bits: int


@partial(jax.tree_util.register_dataclass, data_fields=["values", "chosen"], meta_fields=["share", "known"])
@dataclass(frozen=True)
class Kept:
    """A leaf of a message of which a share of the entries is sent, rounded up; the others are zeros.

    known: both ends draw the places from public randomness, so that they need not be sent.
    """

    values: Any
    chosen: Any  # bool, like the values
    share: float
    known: bool
