"""PTF-FedRec: clients and server send each other scores of items, and no parameters."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import loss_of_pair, output_facts
from jaxfed.algorithms.predictions import (
    Predictions,
    choose_received_items,
    make_client_predictions,
    make_empty_predictions,
)
from jaxfed.core.aggregate import gather_then
from jaxfed.core.client_work import Batches, ClientWork, local_sgd
from jaxfed.core.link import Channel, link
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import find_recipe, named
from jaxfed.core.tables import Table, is_table, num_rows, take_rows, unwrap
from jaxfed.core.tree import subtract, to_compute_dtype
from jaxfed.core.types import Broadcast, ClientOutput, ClientView, Mean, Messages, Tree


class ClientPredictions(NamedTuple):
    """What the clients of a round sent."""

    client: jax.Array  # int [M]: past the end: nobody
    sent: Predictions  # [M, s]


class PredictorState(NamedTuple):
    """A client's state."""

    number: jax.Array  # int []: which client it is
    model: Tree  # its own model: (shared part with all rows, private part), without marks of tables


class HiddenModel(NamedTuple):
    """What the server holds. Nothing of it is sent, but scores that are computed from it."""

    shared: Tree
    private: Tree  # [n, ...]: of each client, as the server learns it from scores, without marks of tables
    uploads: jax.Array  # float [N]: how often an item was among what a client sent
    latest: jax.Array  # int [n, s]: the items that each client sent last; past the end before it sent any


class MarkedModel(NamedTuple):
    """A model whose two parts are kept without marks, and how they are marked again."""

    model: Model
    marks: Tree  # shapes of (shared part, private part), marked

    def mark(self, both: Tree) -> Tree:
        """(shared, private), the tables marked."""
        return jax.tree.map(lambda mark, x: Table(x) if is_table(mark) else x, self.marks, both, is_leaf=is_table)

    @property
    def catalogue_size(self) -> int:
        """Rows of the catalogue."""
        return num_rows(self.marks[0])


def make_predictor_work(
    parts: MarkedModel, optimizer: optax.GradientTransformation, counts: tuple[int, int, int], swap: float, noise: float
) -> ClientWork:
    """Steps of a client's own model, on the scores that it was sent and then on its data.

    counts: (clients, items that one sends, items that one is sent).
    """
    model, end, (num_clients, num_sent, _) = parts.model, parts.catalogue_size, counts

    def init(params, key):
        secret, own = jax.random.split(key)
        private = unwrap(jax.vmap(model.private)(jax.random.split(secret, num_clients)))
        latest = jnp.full((num_clients, num_sent), end, jnp.int32)
        hidden = HiddenModel(params, private, jnp.zeros(end), latest)
        both = to_compute_dtype((model.init(own), model.private(jax.random.fold_in(own, 1))))
        return Broadcast(hidden), PredictorState(jnp.int32(0), unwrap(both))

    def update(shared, client_state, steps, key):
        steps = steps._replace(rows=shared.extra.rows.at[steps.rows].get(mode="fill", fill_value=end))
        used = steps.batch["weight"] > 0
        is_click, nothing = steps.batch["label"] > 0, jnp.zeros(end, bool)
        is_positive = nothing.at[steps.rows].max(used & is_click, mode="drop")
        is_negative = nothing.at[steps.rows].max(used & ~is_click, mode="drop") & ~is_positive
        both, loss = parts.mark(client_state.model), loss_of_pair(model.loss)
        facts = output_facts(model.loss, both, steps)
        both, _, _ = local_sgd(loss, optimizer, both, make_score_batch(shared.params, is_positive, end))
        both, _, seen = local_sgd(loss, optimizer, both, steps)
        score = jax.nn.sigmoid(model.score(*both, jnp.int32(0)))
        sent = make_client_predictions(key, score, is_positive, is_negative, num_sent, swap, noise)
        kept = client_state._replace(model=unwrap(both))
        return ClientOutput(Broadcast(sent), kept, steps.examples, {"train/loss": seen}, **facts)

    views = {
        "": lambda hidden, own: parts.mark((unwrap(hidden.shared), take_private_part(hidden.private, own.number))),
        "personal": lambda hidden, own: parts.mark(own.model),
    }
    return ClientWork(init, update, lambda shared: Broadcast(make_empty_predictions(num_sent)), views)


def make_score_batch(received: Predictions, is_positive: jax.Array, end: int) -> Batches:
    """The scores that a client was sent as one mini-batch, without those of items that it took."""
    live = (received.item < end) & ~is_positive.at[received.item].get(mode="fill", fill_value=False)
    batch = {"label": received.score[None], "weight": live[None].astype(jnp.float32)}
    return Batches(jnp.where(live, received.item, end)[None], live.any()[None], batch, live.sum(dtype=jnp.float32))


def take_private_part(private: Tree, number: jax.Array) -> Tree:
    """A client's own part of those of all clients; zeros for nobody."""
    return jax.tree.map(lambda x: x.at[number].get(mode="fill", fill_value=0), private)


def predict_for_client(
    parts: MarkedModel, shared: Broadcast, client: ClientView, count: int, confident: float
) -> Broadcast:
    """What the server sends to a client: its model's scores of some items. Beside them, which are the rows that the
    client holds: it knows these, and they are not sent."""
    hidden = shared.params
    both = parts.mark((unwrap(hidden.shared), take_private_part(hidden.private, client.id)))
    score = jax.nn.sigmoid(parts.model.score(*both, jnp.int32(0)))
    latest = hidden.latest.at[client.id].get(mode="fill", fill_value=parts.catalogue_size)
    item = choose_received_items(score, hidden.uploads, latest, count, confident)
    return Broadcast(Predictions(item, score.at[item].get(mode="fill", fill_value=0)), Table(client.rows))


def make_score_training(
    parts: MarkedModel, optimizer: optax.GradientTransformation, steps: int
) -> optax.GradientTransformation:
    """`optimizer` of the server's model, as a transform whose "updates" are `ClientPredictions`: so many steps on the
    mean loss over all scores of a round. The vectors of clients that sent nothing stay where they are."""
    model, end = parts.model, parts.catalogue_size

    def update(reported, state, hidden):
        clients = hidden.latest.shape[0]
        live = (reported.sent.item < end) & (reported.client < clients)[:, None]

        def sum_loss(both, client, sent, live):
            own = parts.mark((unwrap(both[0]), take_private_part(both[1], client)))
            batch = {"label": sent.score, "weight": live.astype(jnp.float32)}
            shared, private = unwrap(take_rows(own, sent.item))
            return model.loss(shared, private, batch)

        def objective(both):
            met = jax.vmap(sum_loss, (None, 0, 0, 0))(both, reported.client, reported.sent, live)
            return Mean(met.total.sum(), met.weight.sum()).value

        has_sent = jnp.zeros(clients, bool).at[reported.client].set(True, mode="drop")

        def step(carry, _):
            both, state = carry
            moves, state = optimizer.update(jax.grad(objective)(both), state, both)
            own = jax.tree.map(lambda x: jnp.where(has_sent.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0), moves[1])
            return (optax.apply_updates(both, (moves[0], own)), state), None

        before = hidden.shared, hidden.private
        (after, state), _ = jax.lax.scan(step, (before, state), length=steps)
        shared, private = subtract(after, before)
        latest = hidden.latest.at[reported.client].set(reported.sent.item, mode="drop")
        uploads = jnp.zeros(end).at[reported.sent.item].add(live, mode="drop")
        return HiddenModel(shared, private, uploads, latest - hidden.latest), state

    return optax.GradientTransformation(lambda hidden: optimizer.init((hidden.shared, hidden.private)), update)


def gather_predictions() -> Channel:
    """The link of the method: the server reads what each client sent."""

    def gather(messages: Messages, rows: int) -> Broadcast:
        return Broadcast(ClientPredictions(messages.ids, messages.messages.params))

    return link(aggregator=gather_then(gather), needs_messages="channel = []", name="predictions")


def mark_model(model: Model) -> MarkedModel:
    """The parts of a model. Raises ValueError for one that does not learn from scores of items alone."""
    recipe, key = find_recipe(model), jax.random.key(0)
    marks = jax.eval_shape(lambda: (model.init(key), model.private(key)))
    loss = recipe.arguments.get("loss", "bce") if recipe else "bce"
    reads_more = model.sequence or model.closed or model.features or jax.tree.leaves(model.frozen)
    if reads_more or model.pairwise or loss != "bce" or not jax.tree.leaves(marks[1]):
        raise ValueError(
            'ptf_fedrec: scores between 0 and 1 are all that the server reads: take a model with loss = "bce" and a '
            "private part, and without histories, features or texts, such as mf or neumf"
        )
    return MarkedModel(model, marks)


def check_ptf_arguments(shares: dict[str, float], **values: float) -> None:
    """Raises ValueError for an argument of `ptf_fedrec` that is out of its range. values: whole numbers from 1."""
    for name, value in {**values, **shares}.items():
        least, most = (0, 1 if name != "noise" else math.inf) if name in shares else (1, math.inf)
        if not least <= value <= most:
            above = f" and at most {most}" if most < math.inf else ""
            raise ValueError(f"ptf_fedrec: {name} is {value:g}: it must be at least {least}{above}")


@named("algorithm")
def ptf_fedrec(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    num_clients: int,
    items_sent: int = 64,
    items_received: int = 30,
    confident: float = 0.5,
    swap: float = 0.1,
    noise: float = 0.0,
    server_steps: int = 20,
) -> Method:
    """PTF-FedRec (Yuan et al. 2023, "Hide your model"): clients and server exchange scores, and no parameters.

    A client trains a whole model of its own on the scores that it was sent, as soft labels, and on its data. It sends
    (item, score) for items that it took, among others that it drew as negatives. The server trains its own model, with
    a vector for each client, on the scores of a round, and sends that model's scores of other items.

    `swap` and `noise` change scores. Neither makes a message differentially private: its items depend on the client's
    data, and the server sees them. Evaluated are the server's model and `personal`, a client's own.

    Args:
        model: The model, of the server and of each client; with loss = "bce" and a private part, such as mf or neumf.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Trains the server's model on the scores of a round. Left out: optax.sgd(1.0).
        num_clients: Number of all clients.
        items_sent: Places of a message of a client, for an item and its score each; at most the catalogue.
        items_received: The same of what a client is sent; the paper's alpha.
        confident: Share of these that are the items that clients sent most often; the paper's mu.
        swap: Share of the positives in a message whose scores are exchanged with those of others; the paper's lambda.
        noise: Scale of the Laplace noise on each score that is sent, which is then cut to [0, 1].
        server_steps: Steps of the server's optimiser in a round.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: the model does not learn from scores alone, or a number is out of its range.

    Example:
        >>> import jaxfed as jf, optax
        >>> method = jf.algorithms.ptf_fedrec(jf.models.mf(num_items=100), optax.sgd(0.1), num_clients=20)
        >>> sorted(method.work.views)  # the models that are evaluated; "" is the server's
        ['', 'personal']
    """
    parts = mark_model(model)
    shares = {"confident": confident, "swap": swap, "noise": noise}
    check_ptf_arguments(shares, items_sent=items_sent, items_received=items_received, server_steps=server_steps)
    num_sent, num_received = (min(count, parts.catalogue_size) for count in (items_sent, items_received))
    return Method(
        make_predictor_work(parts, client_optimizer, (num_clients, num_sent, num_received), swap, noise),
        (gather_predictions(),),
        server_optimizer,
        needs_all_rows=True,
        send_to_client=lambda shared, client: predict_for_client(parts, shared, client, num_received, confident),
        own_download=lambda shared: make_empty_predictions(num_received),
        init_client_state=lambda state, client: state._replace(number=client),
        make_server=lambda optimizer: make_score_training(parts, optimizer, server_steps),
    )
