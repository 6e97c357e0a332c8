"""What one client computes: `ClientWork`, its mini-batches `Batches`, and `local_sgd`, the loop that they share."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.tables import add_rows, map_tables, num_rows, put_rows, take_rows, take_rows_unmasked, unwrap
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

    Args:
        init: init(params, key) -> (broadcast, client_state): what the server broadcasts, and what one client keeps.
        update: update(broadcast, client_state, batches, key) -> `ClientOutput`: a pure function of one client; tables
            are the client's rows [K, ...].
        update_shapes: update_shapes(broadcast) -> an update's shapes, from arrays or shapes of what is broadcast.
        views: {name: view(params, private_part) -> (shared, private) as the model scores it}. The name "" is the
            server's model, any other one a model of the clients' own, whose figures carry its name. See
            `Method.private_part`.

    Example:
        >>> import jaxfed as jf, jax, jax.numpy as jnp
        >>> def update(broadcast, client_state, batches, key):
        ...     change = jf.Broadcast(jax.tree.map(jnp.ones_like, broadcast.params))
        ...     return jf.ClientOutput(change, client_state, batches.examples, metrics={})
        >>> work = jf.ClientWork(lambda params, key: (jf.Broadcast(params), ()), update)
        >>> work.init(jnp.zeros(3), jax.random.key(0))[1]  # what a client keeps
        ()
    """

    init: Callable[[Tree, Key], tuple[Broadcast, Tree]]
    update: Callable[[Broadcast, Tree, Any, Key], ClientOutput]
    update_shapes: Callable[[Broadcast], Broadcast] = identity
    views: dict[str, Callable[[Tree, Tree], tuple[Tree, Tree]]] = {"": model_parts}


class Batches(NamedTuple):
    """One client's mini-batches: S of them, with at most k rows each.

    Args:
        rows: int [S, k]: positions in the client's slice of the tables, distinct in a step; past the end: unused.
        live: bool [S]: False for padding; such a step moves nothing.
        batch: [S, ...]: what the loss reads, beside the rows.
        examples: float []: number of examples, which is the client's weight.
        frozen: What the loss reads and nobody trains, tables [K, ...], see `Model`.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> rows, live = jnp.array([[0, 1], [2, 0]]), jnp.array([True, True])
        >>> jf.Batches(rows, live, batch={"label": jnp.ones((2, 2))}, examples=jnp.array(4.0)).rows.shape
        (2, 2)
    """

    rows: Array
    live: Array
    batch: Tree
    examples: Array
    frozen: Tree = ()


def frozen_rows(steps: Batches, rows: jax.Array) -> tuple[Tree, ...]:
    """What a loss is given beside the batch with these rows: (what is frozen, of it these rows), or () for nothing."""
    return (unwrap(take_rows_unmasked(steps.frozen, rows)),) if jax.tree.leaves(steps.frozen) else ()


def batch_weights(loss: Callable[..., Mean], params: Tree, steps: Batches, by_row: bool) -> jax.Array:
    """[S]: what each batch weighs, which does not depend on the model: all at once, outside of the loop of steps."""

    def weigh(rows, batch):
        part = (take_rows_unmasked if by_row else take_rows)(params, rows)
        return loss(unwrap(part), batch, *frozen_rows(steps, rows)).weight

    return jax.vmap(weigh)(steps.rows, steps.batch)


def takes_examples(update: Callable[..., Any]) -> bool:
    """Whether an optimiser's update may be told `examples`."""
    parameters = inspect.signature(update).parameters
    return "examples" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def local_sgd(
    loss: Callable[..., Mean],
    optimizer: optax.GradientTransformation,
    params: Tree,
    steps: Batches,
    by_row: bool = True,
    accumulate: int = 1,
    **extra: Tree,
) -> tuple[Tree, Tree, Mean]:
    """One step of an optimiser for each of a client's batches, or for each few of them (`accumulate`).

    By row, unused places of a step read some row: a loss must give them no weight, and their updates are dropped.

    Args:
        loss: loss(params, batch) -> `Mean`, of plain leaves without marks of tables; (params, batch, frozen) where the
            batches have a frozen part.
        optimizer: A transform of Optax. It is told the `examples` of the batch, where its update takes them.
        params: What is trained; tables are the client's rows [K, ...].
        steps: The batches, of at most k rows each.
        by_row: True: a step touches only the rows of its batch. This is exact for SGD, and the lazy version of anything
            with a state, a decay or a pull. False: every step moves all rows of the client, at K / k times the cost.
        accumulate: Number of batches in a row whose gradients make one step, see `accumulated_sgd`.
        extra: Trees that go to the optimiser, cut like the parameters.

    Returns:
        (the parameters, the optimiser's state, the mean of the losses met), after all steps.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp, optax
        >>> steps = jf.Batches(jnp.array([[0], [2]]), jnp.array([True, True]), (), jnp.array(2.0))
        >>> table = jf.Table(jnp.zeros(3))
        >>> jf.local_sgd(lambda x, batch: jf.Mean(x.sum(), 1.0), optax.sgd(0.5), table, steps)[0].rows.tolist()
        [-0.5, 0.0, -0.5]
    """
    if accumulate > 1:
        return accumulated_sgd(loss, optimizer, params, steps, by_row, accumulate, extra)
    opt, weights = optax.with_extra_args_support(optimizer), batch_weights(loss, params, steps, by_row)

    def step(carry, now):
        rows, live, batch, weight = now
        (part, state), more = take_rows_unmasked((carry, extra), rows) if by_row else (carry, extra)

        def objective(part):
            met = loss(unwrap(part if by_row else take_rows(part, rows)), batch, *frozen_rows(steps, rows))
            return Mean(met.total, weight).value, met.total

        gradient, seen = jax.grad(objective, has_aux=True)(part)
        more = more | ({"examples": weight} if takes_examples(opt.update) else {})
        update, after = opt.update(gradient, state, part, **more)
        update = jax.tree.map(lambda x: jnp.where(live, x, 0), update)
        after = jax.tree.map(lambda new, old: jnp.where(live, new, old), after, state)
        if by_row:
            carry = add_rows(carry[0], rows, update), put_rows(carry[1], rows, after)
        else:
            carry = optax.apply_updates(part, update), after
        return carry, seen

    over = steps.rows, steps.live, steps.batch, weights
    (params, state), totals = jax.lax.scan(step, (params, opt.init(params)), over)
    return params, state, Mean(*(jnp.sum(jnp.where(steps.live, x, 0)) for x in (totals, weights)))


def group_steps(tree: Tree, accumulate: int) -> Tree:
    """Arrays [S, ...] as groups [G, accumulate, ...], zeros after the last step. Fewer steps make one shorter group."""

    def group(x):
        size = max(min(accumulate, len(x)), 1)
        return jnp.pad(x, ((0, -len(x) % size), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

    return jax.tree.map(group, tree)


def sum_gradients(loss: Callable[..., Mean], params: Tree, group: Batches, by_row: bool) -> tuple[Tree, Array, Array]:
    """(the sum of the gradients over the examples of some batches, bool [K]: the rows that these hold, the sum of the
    loss of each batch)."""

    def add_batch(carry, now):
        rows, live, batch = now
        part = take_rows_unmasked(params, rows) if by_row else params

        def total(part):
            return loss(unwrap(part if by_row else take_rows(part, rows)), batch, *frozen_rows(group, rows)).total

        seen, gradient = jax.value_and_grad(total)(part)
        gradient = jax.tree.map(lambda x: jnp.where(live, x, 0), gradient)
        return (add_rows(carry[0], rows if by_row else None, gradient), carry[1].at[rows].max(live, mode="drop")), seen

    start = jax.tree.map(jnp.zeros_like, params), jnp.zeros(num_rows(params), bool)
    (gradient, held), seen = jax.lax.scan(add_batch, start, (group.rows, group.live, group.batch))
    return gradient, held, seen


def accumulated_sgd(
    loss: Callable[..., Mean],
    optimizer: optax.GradientTransformation,
    params: Tree,
    steps: Batches,
    by_row: bool,
    accumulate: int,
    extra: dict[str, Tree],
) -> tuple[Tree, Tree, Mean]:
    """`local_sgd` whose optimiser takes one step for each `accumulate` batches in a row.

    The step is that of one batch with all their examples: the gradient is that of the mean over these examples, and by
    row it touches the rows of all of the batches. Padding has no weight. The last group may have fewer batches.
    """
    opt, weights = optax.with_extra_args_support(optimizer), batch_weights(loss, params, steps, by_row)

    def step(carry, now):
        (params, state), (rows, live, batch, weights) = carry, now
        gradient, held, totals = sum_gradients(loss, params, steps._replace(rows=rows, live=live, batch=batch), by_row)
        weight = jnp.sum(jnp.where(live, weights, 0))
        gradient = jax.tree.map(lambda x: Mean(x, weight).value, gradient)
        more = extra | ({"examples": weight} if takes_examples(opt.update) else {})
        update, after = opt.update(gradient, state, params, **more)
        moves = live.any()
        of_tables = held if by_row else jnp.full_like(held, moves)

        def choose(new, old):
            return map_tables(
                lambda x, y: jnp.where(of_tables.reshape(-1, *(1,) * (x.ndim - 1)), x, y),
                lambda x, y: jnp.where(moves, x, y),
                new,
                old,
            )

        update = choose(update, jax.tree.map(jnp.zeros_like, update))
        return (optax.apply_updates(params, update), choose(after, state)), totals

    groups = group_steps((steps.rows, steps.live, steps.batch, weights), accumulate)
    (params, state), totals = jax.lax.scan(step, (params, opt.init(params)), groups)
    live, weights = groups[1], groups[3]
    return params, state, Mean(*(jnp.sum(jnp.where(live, x, 0)) for x in (totals, weights)))


def pooled_loss(loss: Callable[..., Mean], params: Tree, steps: Batches) -> Mean:
    """The loss over all of a client's batches, examples alike; loss(params, batch) as `local_sgd` gives it."""

    def one(rows, live, batch):
        seen = loss(unwrap(take_rows(params, rows)), batch, *frozen_rows(steps, rows))
        return jax.tree.map(lambda x: jnp.where(live, x, 0), seen)

    return jax.tree.map(jnp.sum, jax.vmap(one)(steps.rows, steps.live, steps.batch))
