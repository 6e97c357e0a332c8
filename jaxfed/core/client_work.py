"""What one client computes: `ClientWork`, its mini-batches `Batches`, and `local_sgd`, the loop that they share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.tables import add_rows, put_rows, take_rows, take_rows_unmasked, unwrap
from jaxfed.core.types import Array, Broadcast, ClientOutput, Key, Mean, Tree

# loss(params, private, batch) -> Mean over the examples of the batch; plain leaves, positions in the rows it is given.
# Its weight is a matter of the batch alone, never of the model.
Loss = Callable[[Tree, Tree, Tree], Mean]


def identity(tree: Tree) -> Tree:
    """A tree as it is."""
    return tree


def model_parts(params: Tree, private: Tree) -> tuple[Tree, Tree]:
    """A model's two parts as they are."""
    return params, private


class ClientWork(NamedTuple):
    """What one client computes.

    init(params, key) -> (broadcast, client_state): what the server broadcasts, and what one client keeps.
    update(broadcast, client_state, batches, key) -> ClientOutput: a pure function of one client; tables are the
        client's rows [K, ...].
    update_shapes(broadcast) -> an update's shapes, from arrays or shapes of what is broadcast.
    views: {name: view(params, private_part) -> (shared, private) as the model scores it}: "" is the server's model, any
        other one of the clients' own, whose figures carry its name. See `Method.private_part`.
    """

    init: Callable[[Tree, Key], tuple[Broadcast, Tree]]
    update: Callable[[Broadcast, Tree, Any, Key], ClientOutput]
    update_shapes: Callable[[Broadcast], Broadcast] = identity
    views: dict[str, Callable[[Tree, Tree], tuple[Tree, Tree]]] = {"": model_parts}


class Batches(NamedTuple):
    """One client's mini-batches, S of them with at most k rows each."""

    rows: Array  # int [S, k]: positions in the client's slice, distinct in a step; past the end: unused
    live: Array  # bool [S]: False pads; such a step moves nothing
    batch: Tree  # [S, ...]: what the loss reads, beside the rows
    examples: Array  # float []: how many, the client's weight
    frozen: Tree = ()  # what the loss reads and nobody trains, tables [K, ...]; see `Model.frozen`


def frozen_rows(steps: Batches, rows: jax.Array) -> tuple[Tree, ...]:
    """What a loss is given beside the batch with these rows: (what is frozen, of it these rows), or () for nothing."""
    return (unwrap(take_rows_unmasked(steps.frozen, rows)),) if jax.tree.leaves(steps.frozen) else ()


def local_sgd(
    loss: Callable[..., Mean],
    optimizer: optax.GradientTransformation,
    params: Tree,
    steps: Batches,
    by_row: bool = True,
    **extra: Tree,
) -> tuple[Tree, Tree, Mean]:
    """(parameters, the optimiser's state, the mean of the losses met) after one optimiser step per batch.

    loss(params, batch) sees plain leaves; where there is a frozen part, loss(params, batch, frozen). by_row touches
    only the rows of the batch: exact for SGD, the lazy version of anything with a state, a decay or a pull. Otherwise
    every step moves the client's whole slice, K / k times dearer. `extra` trees go to the optimiser, cut like the
    parameters. By row, unused places of a step read some row: a loss gives them no weight, and what the optimiser makes
    of them is dropped.
    """
    opt = optax.with_extra_args_support(optimizer)

    def met(part, rows, batch):
        return loss(unwrap(part if by_row else take_rows(part, rows)), batch, *frozen_rows(steps, rows))

    # what a batch weighs does not depend on the model: all of them at once, outside of the loop
    weights = jax.vmap(
        lambda rows, batch: met(take_rows_unmasked(params, rows) if by_row else params, rows, batch).weight
    )(steps.rows, steps.batch)

    def step(carry, now):
        rows, live, batch, weight = now
        (part, state), more = take_rows_unmasked((carry, extra), rows) if by_row else (carry, extra)

        def objective(part):
            seen = Mean(met(part, rows, batch).total, weight)
            return seen.value, seen.total

        gradient, seen = jax.grad(objective, has_aux=True)(part)
        update, after = opt.update(gradient, state, part, **more)
        update = jax.tree.map(lambda x: jnp.where(live, x, 0), update)
        after = jax.tree.map(lambda new, old: jnp.where(live, new, old), after, state)
        if by_row:
            carry = add_rows(carry[0], rows, update), put_rows(carry[1], rows, after)
        else:
            carry = optax.apply_updates(part, update), after
        return carry, seen

    start = params, opt.init(params)
    (params, state), totals = jax.lax.scan(step, start, (steps.rows, steps.live, steps.batch, weights))
    seen = Mean(totals, weights)
    return params, state, jax.tree.map(lambda x: jnp.sum(jnp.where(steps.live, x, 0)), seen)


def pooled_loss(loss: Callable[..., Mean], params: Tree, steps: Batches) -> Mean:
    """The loss over all of a client's batches, examples alike; loss(params, batch) as `local_sgd` gives it."""

    def one(rows, live, batch):
        seen = loss(unwrap(take_rows(params, rows)), batch, *frozen_rows(steps, rows))
        return jax.tree.map(lambda x: jnp.where(live, x, 0), seen)

    return jax.tree.map(jnp.sum, jax.vmap(one)(steps.rows, steps.live, steps.batch))
