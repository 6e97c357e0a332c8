"""Membership inference: which items a client has interacted with, read off what a server or an observer sees.

Attacks on factorisations, whose item rows all move along one vector, the client's own: towards it where the client has
the item, away from it where the item was drawn as a negative. Whatever hides neither that vector nor the rows' places
along it hides nothing (of the kind: Yuan et al. 2023, "Interaction-level membership inference attack against federated
recommender systems", who train shadow models). An attack is given what is seen and the public model, nothing else.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxfed.channels.noise import WholeTable
from jaxfed.core.tables import Table, is_table
from jaxfed.core.types import Array, Broadcast, Messages, Tree


class ReceivedMessage(NamedTuple):
    """One client's message, opened, as the server has it."""

    id: int
    held: np.ndarray  # int [K]: the items of the rows of its tables; none where it has no tables and so names none
    message: Tree


class ItemEvidence(NamedTuple):
    """What a message says about each of N items."""

    sent: np.ndarray  # bool [N]: its row was sent by name, or is not zero
    steps: np.ndarray  # float64 [N, D]: how it asks the item's numbers to move; biases first


class AttackScores(NamedTuple):
    """A number an item [N], larger where an attack finds it likelier that the client has it."""

    rows: np.ndarray
    update: np.ndarray
    taste: np.ndarray


def split_messages(part: Messages, size: int) -> Iterator[ReceivedMessage]:
    """The messages of a `Messages`, client by client; size: rows of the catalogue."""
    owner, held, ids = (np.asarray(x) for x in (part.owner, part.held, part.ids))
    messages = jax.tree.map(np.asarray, part.messages)
    named = any(map(is_table, jax.tree.leaves(messages, is_leaf=is_table)))
    for place in np.flatnonzero(part.present):
        own_rows = (owner == ids[place]) & (held < size)

        def cut(node, own_rows=own_rows, place=place):
            return Table(jax.tree.map(lambda x: x[own_rows], node.rows)) if is_table(node) else node[place]

        message = jax.tree.map(cut, messages, is_leaf=is_table)
        yield ReceivedMessage(int(ids[place]), held[own_rows & named], message)


def item_matrix(tree: Tree, held: Array, size: int) -> np.ndarray:
    """float64 [size, D]: the numbers of every item, those of tables of one number an item first; zeros where the tree
    has no row of an item. held int [K]: the items of the rows of tables, past the end: nobody's."""
    columns = []
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Table | WholeTable)):
        if isinstance(node, Table | WholeTable):
            for leaf in jax.tree.leaves(node.rows):
                rows = np.asarray(leaf, np.float64)
                if is_table(node):
                    rows = np.zeros((size + 1, *rows.shape[1:]))
                    rows[np.minimum(held, size)] = np.asarray(leaf)
                columns.append(rows[:size].reshape(size, -1))
    if not columns:
        raise ValueError("nothing in this message belongs to items: membership inference needs a model with tables")
    return np.concatenate(sorted(columns, key=lambda x: x.shape[1] > 1), 1)


def collect_evidence(message: Tree, held: Array, size: int) -> ItemEvidence:
    """What a message, opened, says about items; held int [K]: the items it names, see `ReceivedMessage`.

    What links send beside the update (weights, indicators of a norm) is left aside.
    """
    parts = jax.tree.leaves(message, is_leaf=lambda x: isinstance(x, Broadcast))
    steps = -item_matrix(next((x for x in parts if isinstance(x, Broadcast)), message), held, size)
    named = np.isin(np.arange(size), held)
    return ItemEvidence(named | (steps != 0).any(1), steps)


def evidence_of_sum(total: Tree) -> Tree:
    """A sum over a cohort, or what is made of it: its tables have all rows and name none."""
    return jax.tree.map(lambda node: WholeTable(node.rows) if is_table(node) else node, total, is_leaf=is_table)


def taste_direction(steps: np.ndarray) -> np.ndarray:
    """float64 [D]: the unit vector along which steps differ most (their first right singular vector), turned so that
    the first column grows along it.

    Of a factorisation it is the client's vector with a one for the bias before it: an item's bias moves up where the
    client has it, whatever the vector. Without a bias which end is which would remain open.
    """
    along = np.linalg.svd(steps, full_matrices=False)[2][0]
    return along if along[0] >= 0 else -along


def score_membership(evidence: ItemEvidence, public: np.ndarray) -> AttackScores:
    """Scores by three attacks; public float [N, D]: the model's own numbers of each item, as `item_matrix` lays them.

    rows: was the item's row sent? update: how far does it move along `taste_direction`? taste: what does the model
    recommend to a client whose vector is that direction? Noise on many rows hardly hides what all of them share.
    """
    along = taste_direction(evidence.steps)
    return AttackScores(1.0 * evidence.sent, evidence.steps @ along, public @ along)


def standardize(scores: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [N, S]: S scores of one client, each with mean 0 and deviation 1 (0 where it is constant)."""
    x = np.stack(scores, 1) * 1.0
    x, spread = x - x.mean(0), x.std(0)
    return x / np.where(spread > 0, spread, 1)


def fit_discriminant(scores: np.ndarray, member: np.ndarray) -> np.ndarray:
    """float64 [S]: the weights of scores [n, S] that tell members (bool [n]) from others best (Fisher 1936): for an
    attacker who knows the truth of some clients, by having made them up for one."""
    groups = scores[member], scores[~member]
    within = sum((x - x.mean(0)).T @ (x - x.mean(0)) for x in groups) / len(scores)
    return np.linalg.solve(within + 1e-6 * np.eye(len(within)), groups[0].mean(0) - groups[1].mean(0))


def area_under_curve(score: np.ndarray, member: np.ndarray) -> float:
    """The chance that a member has a higher score than another item, ties counted half (Mann and Whitney 1947).

    score [n], member bool [n]. Raises ValueError where there are no members, or nothing but members.
    """
    most = member.sum()
    if not 0 < most < len(member):
        raise ValueError(f"{most} members of {len(member)} items: an AUC needs both members and others")
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # from 1, equal scores share theirs
    return float((rank[member].sum() - most * (most + 1) / 2) / (most * (len(member) - most)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error) over users."""
    x = np.asarray(values)
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))
