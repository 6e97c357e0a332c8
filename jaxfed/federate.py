"""The federated round. Every method is `federate(work, channel, server)`; this file is all that ever happens in it.

    gather rows -> work.run -> channel.encode  |  sum  ->  channel.decode -> server.update
    one client, vmapped over a block           |  the server

Four programs run a round: `clients` (one compilation for each shape of block), `silence`, `absorb` and `finish` (one
each).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed import memory as stores
from jaxfed import rows, tree
from jaxfed.channel import CLIENTS, STORE, Channel, accumulate, chain, collect, empty, total, vacant
from jaxfed.placement import Placement, place
from jaxfed.types import Array, Client, Cohort, Key, Mean, Part, Round, Shared, Tree
from jaxfed.work import Work


class State(NamedTuple):
    """All that a run is, beside its seed. Tables are marked (`rows.Table`); `model` takes the marks off."""

    shared: Shared
    opt: Tree  # of the server optimiser
    channel: Tree  # of the links, at the server
    memory: Tree  # (of the work, of the links) at the clients [n, ...]; tables [n, N, ...]
    round: jax.Array  # int []: rounds done
    past: Tree = ()  # what was shared before round t, at t % versions: [versions, ...], tables [versions, N, ...]


class Algorithm(NamedTuple):
    """init(params, key) -> State; step(state, cohort, key) -> (State, info). A step consumes (donates) its state."""

    init: Callable[[Tree, Key], State]
    step: Callable[[State, Cohort, Key], tuple[State, dict[str, jax.Array]]]


class Tally(NamedTuple):
    """What the server has heard so far in a round."""

    total: Tree  # the running sum of messages, tables whole; a `Part` of them all for a link's own reduction
    memory: Tree  # the client store, new memories written
    present: Array  # bool [M]
    metrics: dict[str, Mean]
    rows: Array  # int [M]: table rows that each has sent
    sent: Array  # bool [rows of the total]: whether anybody did


def model(state: State) -> Tree:
    """The server's parameters, without marks."""
    return rows.plain(state.shared.params)


def catalogue(state: State) -> int:
    """Rows of the tables that are shared or kept by clients (0: there are none)."""
    return max(rows.catalogue(state.shared), rows.catalogue(state.memory, axis=1))


def flat(block, counts, ids, held, messages, memory, metrics, ends, lay) -> Part:
    """Lays what a block of m clients gave flat, nothing of those who do not count, all of it padded to `lay`."""
    room, size, num_clients = ends  # past the end of the total, of the catalogue, of the clients
    owner = jnp.where(counts, ids, num_clients)
    places, held = (jnp.where(counts[:, None], x, end).ravel() for x, end in ((block.rows, room), (held, size)))
    wide, long = lay or (owner.size, held.size)

    def clear(x):
        return jnp.where(counts.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    def fill(x, to, value):
        return jnp.pad(x, (0, to - x.size), constant_values=value)

    # rows of those who do not count lie past the end already: no pass over tables to clear them
    messages, memory = rows.lift(lambda x: x, clear, (messages, memory))
    messages, memory = rows.pad(rows.flatten((messages, memory)), wide, long)
    return Part(
        messages,
        memory,
        present=fill(counts, wide, False),
        sizes=fill(jnp.where(counts, (held.reshape(block.rows.shape) < size).sum(1), 0), wide, 0),
        slots=fill(block.slots, wide, jnp.iinfo(jnp.int32).max),
        ids=fill(owner, wide, num_clients),
        rows=fill(places, long, room),
        held=fill(held, long, size),
        owner=fill(jnp.where(held < size, jnp.repeat(owner, block.rows.shape[1]), num_clients), long, num_clients),
        metrics=jax.tree.map(lambda x: clear(x).sum(0), metrics),
    )


def federate(
    work: Work,
    channel: Channel,
    server: optax.GradientTransformation,
    num_clients: int,
    placement: Placement | None = None,
    lay: tuple[int, int] | None = None,
    budget: float = 8e9,
    chunk: int = 0,
    host: bool = False,
    download: Callable[[Shared, Client], Shared] | None = None,
    room: int = 0,
    versions: int = 0,
) -> Algorithm:
    """Builds an algorithm from what a client computes, what happens to its update, and how the model moves.

    num_clients: rows of the client store.
    lay: (clients, table rows) to which the part of every block is padded, so that one program absorbs all shapes.
    budget: bytes of client memory above which `init` raises ValueError.
    chunk: blocks whose messages are held at a time, for memory; 0: all of a cohort's. Only for sums.
    host: the client store stays in the host's memory (`memory`); a round then waits for its clients.
    download: what a client reads of the model that it is sent (`download`); None: the model's rows as they are.
    room: for a reduction of a link's own, blocks laid by `lay` whose messages find room side by side, so that one
    program reduces cohorts of fewer blocks, too; for more the room is doubled. 0: as many as there are.
    versions: of the model that are kept, for cohorts whose clients were sent different ones (`Cohort.ages`); each takes
    a copy of the model a round, and counts as client memory does. 0: all are sent the present one.
    """
    channel = channel if channel.links else chain(channel)
    place_on, reduce = placement or place(), channel.reduce or total
    streams = reduce is total
    if chunk and not streams:
        raise ValueError("run.chunk: only sums can be added chunk by chunk, and a link has a reduction of its own")

    def init(params, key):
        shared, _ = jax.eval_shape(work.init, params, key)

        def memories(ids, key):
            full = tree.wide(params)
            mine = jax.vmap(lambda i: work.init(full, jax.random.fold_in(key, i))[1])(ids)
            theirs = channel.init(jax.eval_shape(lambda x: work.sends(tree.wide(x)), shared))[1]
            return mine, jax.tree.map(lambda x: jnp.broadcast_to(x, (len(ids), *x.shape)), theirs)

        everyone = jnp.arange(num_clients)
        held = tree.nbytes(jax.eval_shape(memories, everyone, key))
        if versions * tree.nbytes(shared) > budget:
            raise ValueError(
                f"{versions} versions of the model take {versions * tree.nbytes(shared) / 1e9:.1f} GB, the budget is "
                f"{budget / 1e9:.1f}: set cohort.max_age lower, or raise the budget (run.client_memory_gb)"
            )
        if held > budget:
            raise ValueError(
                f"client memory takes {held / 1e9:.1f} GB, the budget is {budget / 1e9:.1f}: "
                "keep less on a client (memory of tables costs clients x catalogue) "
                "or raise the budget (run.client_memory_gb)"
            )

        def fresh(params, key):
            params = jax.tree.map(jnp.copy, params)  # a step donates its state: never the caller's arrays
            shared, _ = work.init(params, key)
            full = tree.wide(shared)
            store = () if host else memories(everyone, key)
            state = channel.init(jax.eval_shape(work.sends, full))[0]
            past = jax.tree.map(lambda x: jnp.broadcast_to(x, (versions, *x.shape)), shared) if versions else ()
            return State(shared, server.init(full.params), state, store, jnp.int32(0), past)

        shared, opt, links, *rest = jax.jit(fresh)(params, key)
        state = State(*place_on.server((shared, opt, links)), *place_on.common(rest))
        if host:
            state = state._replace(memory=stores.make(jax.jit(lambda ids: memories(ids, key)), num_clients))
        return state

    def client(common, one):
        """One client's round, from the model it is sent to the message it sends. A pure function."""
        (shared, past, sent, number, cohort, round_key), (id, age, mine, theirs, held, block) = common, one
        size = rows.catalogue(shared)
        secret, noise = jax.random.split(jax.random.fold_in(jax.random.fold_in(round_key, CLIENTS), id))
        at = Client((), None, round_key, id, jnp.float32(1), block.activity, held, size, cohort)
        if versions:  # (version, rows) is one indexing, as (client, rows) is
            slices = tree.wide(rows.gather(past, (number - age) % versions, held))
        else:
            slices = download(shared, at) if download else tree.wide(rows.take(shared, held))
        slices = jax.lax.optimization_barrier(slices)
        report = work.run(slices, mine, block.data, secret)
        me = Client(theirs, noise, round_key, id, report.weight, block.activity, held, size, cohort)
        me = me._replace(steps=report.steps, loss=report.loss, age=age)
        got = rows.take(sent, held)
        message, theirs = channel.encode(report.update, got, me)
        metrics = report.metrics | (channel.watch(report.update, got, me) if channel.watch else {})
        if channel.open:  # the server's side of codes that mean something alone only
            now = tree.wide(rows.take(shared, held)) if versions else slices
            seen = me._replace(memory=None, key=None, drift=tree.sub(now.params, slices.params))
            message = channel.open(message, got, seen)
        message = jax.lax.optimization_barrier(message)
        # a link that makes integers of what is not a number could hide it
        hidden = () if all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(message)) else report.update
        fine = tree.finite((report.weight, report.memory, message, theirs, hidden))
        return message, (report.memory, theirs), fine, metrics

    @jax.jit
    def clients(state, ids, present, touched, ages, key, block, memory) -> Part:
        """All that happens on devices, one block of clients. Only the messages leave. memory: None to read it here."""
        key, size = jax.random.fold_in(key, state.round), catalogue(state)
        who = ids.at[block.slots].get(mode="fill", fill_value=num_clients)
        held = block.rows if touched is None else touched.at[block.rows].get(mode="fill", fill_value=size)
        if memory is None:
            memory = jax.vmap(rows.gather, (None, 0, 0))(state.memory, who, held)
        since = jnp.zeros_like(block.slots) if ages is None else ages.at[block.slots].get(mode="fill", fill_value=0)
        common = state.shared, state.past, channel.send(state.channel), state.round, ids, key
        messages, memory, fine, metrics = place_on.clients(client)(common, (who, since, *memory, held, block))
        # a client whose update, or what would be sent of it, is not finite withdraws: as if it had never reported
        counts = fine & present.at[block.slots].get(mode="fill", fill_value=False)
        ends = size if touched is None else touched.size, size, num_clients
        return place_on.together(flat(block, counts, who, held, messages, memory, metrics, ends, lay))

    @partial(jax.jit, donate_argnums=0)
    def absorb(tally, part, at) -> Tally:
        """Adds one block's part to what the server has heard; at: how many rows lie before it (`collect`)."""
        return Tally(
            accumulate(tally.total, part) if streams else collect(tally.total, part, at),
            rows.scatter(tally.memory, part.ids, part.owner, part.held, part.memory),
            tally.present.at[part.slots].set(part.present, mode="drop"),
            jax.tree.map(jnp.add, tally.metrics, part.metrics),
            tally.rows.at[part.slots].set(part.sizes, mode="drop"),
            tally.sent.at[part.rows].set(True, mode="drop"),
        )

    @partial(jax.jit, donate_argnums=0)
    def finish(state, heard, ids, asked, touched, key):
        """The server's side of the round: undo the links, move the model, of its tables only the rows touched."""
        shared, opt, links, memory, number, past = state
        seen = (shared, opt, links) if touched is None else rows.take((shared, opt, links), touched)
        seen = tree.wide(seen[0]), *seen[1:]
        round = Round(jax.random.fold_in(key, number), ids, heard.present)
        summed = heard.total if streams else reduce(heard.total, heard.sent.size)
        update, links_now, info = channel.decode(summed, seen[2], round)
        delta, opt_now = server.update(update.params, seen[1], seen[0].params)
        extra = work.moves(seen[0].extra, update.extra)
        # what only absent clients hold rests, as if they had not been asked
        at = None if touched is None else jnp.where(heard.sent, touched, rows.catalogue(shared))
        if tree.narrow(shared):
            after = Shared(optax.apply_updates(seen[0].params, delta), extra)
            shared = rows.put(shared, at, tree.stored(after, shared, jax.random.fold_in(round.key, STORE)))
        else:  # an optimiser that does not ask for the model never has its rows read
            shared = Shared(rows.add(shared.params, at, delta), rows.put(shared.extra, at, extra))
        opt, links = rows.put((opt, links), at, (opt_now, links_now))
        counts = {"clients/reported": heard.present.sum(), "clients/refused": (asked & ~heard.present).sum()}
        counts |= {"clients/dropped": ((ids < num_clients) & ~asked).sum()}
        counts |= {"clients/present": heard.present, "rows/sent": heard.rows}  # [M], as are no other figures
        figures = {name: mean.value for name, mean in heard.metrics.items()}
        shared, opt, links = place_on.server((shared, opt, links))
        number += 1
        past = jax.tree.map(lambda x, new: x.at[number % versions].set(new), past, shared) if versions else ()
        return State(shared, opt, links, memory, number, past), figures | info | counts

    @partial(jax.jit, static_argnums=(2, 3))
    def silence(part, asked, size, long):
        """The tally before anybody is heard, but for the memory; placed as `absorb` gives it back, or that compiles
        twice."""
        heard = tree.zeros(empty(part.messages, size)) if streams else vacant(part, asked.size, long)
        shapes = part.metrics, asked, jnp.zeros(len(asked), jnp.int32)
        heard, (metrics, present, count) = place_on.together((heard, tree.zeros(shapes)))
        return Tally(heard, (), present, metrics, count, place_on.together(jnp.zeros(size, bool)))

    def step(state, cohort, key):
        """One round. Every block is a program of its own, so several run side by side."""
        ids, asked, blocks, touched, ages = cohort
        if channel.whole and touched is not None:
            raise ValueError(f"{channel.name}: it needs every row, and the cohort lists some: set server.lazy = false")
        if ages is not None and not versions:
            raise ValueError("the cohort's clients were sent models of different rounds: federate with versions")
        end, store = catalogue(state), state.memory if stores.on_host(state.memory) else None
        if store is not None:
            state = state._replace(memory=())
        size = end if touched is None else len(touched)
        tally: Tally | None = None
        for low in range(0, len(blocks), chunk or len(blocks)):
            now = state if tally is None else state._replace(memory=tally.memory)
            parts = []
            for block in blocks[low:][: chunk or None]:
                kept = None if store is None else place_on.block(stores.read_block(store, cohort, block, end))
                parts.append(clients(now, ids, asked, touched, ages, key, block, kept))
            before = np.cumsum([0] + [part.rows.size for part in parts]).astype(np.int32)
            long = 0 if streams else room * parts[0].rows.size
            while not streams and long < before[-1]:
                long = 2 * long or int(before[-1])
            tally = tally or silence(parts[0], asked, size, long)._replace(memory=state.memory)
            for part, at in zip(parts, before[:-1], strict=True):
                tally = absorb(tally, part if store is None else part._replace(memory=()), at)
            if store is not None:
                store = stores.write(store, parts)
        assert tally  # a cohort has a block at least
        tally, memory = tally._replace(memory=()), tally.memory
        state, info = finish(state._replace(memory=memory), tally, ids, asked, touched, key)
        return state if store is None else state._replace(memory=store), info

    return Algorithm(init, step)
