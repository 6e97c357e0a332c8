"""What a run takes over from another run: parameters by path and shape, and rows of items by id or by text."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.settings import Start
from jaxfed.config.text_parametrizations import encode_catalogue
from jaxfed.core.excerpt import shorten_list
from jaxfed.core.leaf_paths import list_leaves, map_with_paths, match_paths
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.parametrization import describe_difference
from jaxfed.core.pruning import fill_zeros
from jaxfed.core.tables import Table, is_table, num_rows
from jaxfed.core.types import Tree
from jaxfed.data.clients import Clients
from jaxfed.data.item_descriptions import item_texts

LOGGER = logging.getLogger("jaxfed.start")  # its lines are shown, as those of `training.log` are
ADAPTERS = "params/lora_"  # what the paths of adapters begin with: a part of them means nothing by itself
NEAREST = 10  # rows of which a new one is the mean


class SavedModel(NamedTuple):
    """The model that a run left.

    Args:
        run: The folder.
        params: The shared parameters of the best round, with frozen ones in their places, tables marked.
        theta: What a parametrization held at the server after the last round. None: there is no parametrization.
        items: str [items]: the ids of the rows.
        texts: str [items]: their texts.
        private: The private parts of clients in the best round, leaves [clients, ...].
        clients: str [clients]: the names of the clients.
        score: score(history int [L]) -> float [items]. A history has rows of that run's catalogue, past the end where
            unused. None: the model does not score histories.
    """

    run: str
    params: Tree
    theta: Tree | None
    items: np.ndarray
    texts: np.ndarray
    private: Tree
    clients: np.ndarray
    score: Callable[[jax.Array], jax.Array] | None = None


class FoundRows(NamedTuple):
    """Where the rows of a table come from."""

    places: np.ndarray  # int [N]: rows of the other table; -1: there is none
    nearest: np.ndarray | None  # int [N, k]: rows of the other table that stand in for one that is not there

    def take(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([N, ...]: rows out of a table, bool [N]: which of them are known)."""
        known = self.places >= 0
        rows = table[np.maximum(self.places, 0)]
        if self.nearest is None:
            return rows, known
        known = known | (self.nearest[:, 0] >= 0)
        mean = table[np.maximum(self.nearest, 0)].astype(np.float32).mean(1).astype(table.dtype)
        return np.where((self.places >= 0).reshape(-1, *[1] * (rows.ndim - 1)), rows, mean), known


def match_items(settings: Start, saved: SavedModel, data: Clients, rows: int) -> np.ndarray:
    """int [rows]: the row that each item of the data had in the other run; -1: it had none, or the row has no item."""
    old, new = (saved.items, data.source.items) if settings.match == "id" else (saved.texts, item_texts(data.source))
    place = {name: row for row, name in reversed(list(enumerate(old.tolist()))) if name}
    found = [place.get(name, -1) for name in new.tolist()]
    return np.array(found + [-1] * (rows - len(found)), np.int64)


def find_nearest(places: np.ndarray, texts: np.ndarray) -> np.ndarray | None:
    """int [N, k]: for each item without a row in the other run, the rows of the ten items with the nearest texts, by
    the cosine of text vectors. -1: the item has a row, or no text. None: no item has both a row and a text.

    places: int [N], see `match_items`. texts: str [items].
    """
    known = np.flatnonzero((places >= 0)[: len(texts)] & (texts != ""))
    new = np.flatnonzero((places < 0)[: len(texts)] & (texts != ""))
    if not len(known):
        return None
    found = np.full((len(places), min(NEAREST, len(known))), -1, np.int64)
    vectors = encode_catalogue(len(texts), texts, "", 0).vectors  # of length 1
    cosines = vectors[new] @ vectors[known].T
    found[new] = places[known[np.argsort(-cosines, axis=1, kind="stable")[:, : found.shape[1]]]]
    return found


def choose_leaves(settings: Start, saved: SavedModel, sizes: Tree, source: Tree) -> dict[str, Any]:
    """{path: leaf of the other run} of the leaves that both runs have and that `start.parts` asks for.

    sizes: shapes of what this run begins with. source: the parameters of the other run.

    Raises ValueError where a shape differs, or there is none.
    """
    here, there = list_leaves(sizes), list_leaves(source)
    asked = match_paths(settings.parts, here, "start.parts") if settings.parts else here
    found = {path: there[path] for path in asked if path in there}
    for path, leaf in found.items():
        both = leaf, here[path]
        kinds = [is_table(each) for each in both]
        old, new = (tuple(jax.tree.leaves(each)[0].shape)[1 if all(kinds) else 0 :] for each in both)
        if kinds[0] != kinds[1] or old != new:
            raise ValueError(
                f"start.run: {path} has the shape {list(old)} in {saved.run} and {list(new)} here: give both models "
                "the same size, leave it out by start.parts, or learn that model's scores by start.distil_steps"
            )
    lost = [path for path in there if path.startswith(ADAPTERS) and path not in here]
    if lost and not settings.parts:
        raise ValueError(
            f"start.run: {saved.run} has {lost[0]}, for which this run has no place: take the rule for adapters of "
            "that run, or choose by start.parts what is taken"
        )
    if not found:
        raise ValueError(
            f"start.run: nothing of {saved.run} is a part of this model: it has {shorten_list(there)}; asked for are "
            f"{shorten_list(asked)}: take a run of the same model, or change start.parts"
        )
    return found


def find_start(
    settings: Start, saved: SavedModel, data: Clients, sizes: Tree, of_theta: bool = False
) -> Callable[[Tree], Tree]:
    """fill(drawn) -> what a run begins with: parameters of the other run in place of those drawn at random.

    Args:
        settings: What is taken, and how items are found.
        saved: What the other run left.
        data: The data of this run.
        sizes: Shapes of what this run begins with. `fill` also takes a part of it.
        of_theta: Whether that is what a parametrization holds, and not the model's own parameters.

    Raises:
        ValueError: nothing of the other run fits, or a shape differs.
    """
    source = saved.theta if of_theta and saved.theta is not None else saved.params
    leaves = choose_leaves(settings, saved, sizes, source)
    tables = {path for path, leaf in leaves.items() if is_table(leaf)}
    rows = num_rows({path: leaf for path, leaf in list_leaves(sizes).items() if path in tables})
    places = match_items(settings, saved, data, rows)
    matched, dense = int((places >= 0).sum()), len(leaves) - len(tables)
    if tables and not matched and not dense:
        word = {"id": "ids", "text": "texts"}[settings.match]
        raise ValueError(f"start.run: no item of {saved.run} is in these data by their {word}: set start.match")
    nearest = None
    if settings.new_rows == "text" and tables and 0 < matched < data.num_items:
        nearest = find_nearest(places, item_texts(data.source))
    LOGGER.info("%s", describe_start(saved.run, len(list_leaves(sizes)), dense, tables, matched, data.num_items))
    found = FoundRows(places, nearest)
    known = {path: found.take(np.asarray(leaves[path].rows)) for path in tables}
    return partial(fill_leaves, {path: leaf for path, leaf in leaves.items() if path not in tables}, known)


def fill_leaves(dense: dict[str, Any], tables: dict[str, tuple[np.ndarray, np.ndarray]], drawn: Tree) -> Tree:
    """The parameters that were drawn, with those of the other run in their places.

    Args:
        dense: {path: leaf}.
        tables: {path: (rows [N, ...], bool [N]: which of them are taken)}.
        drawn: what the run would begin with without a start, or a part of it.
    """

    def leaf(path, now):
        if path not in tables:
            return jnp.asarray(dense[path], now.dtype) if path in dense else now
        rows, known = tables[path]
        return Table(jnp.where(known.reshape(-1, *[1] * (rows.ndim - 1)), rows.astype(now.rows.dtype), now.rows))

    return map_with_paths(leaf, drawn)


def with_start(held: Any, fill: Callable[[Tree], Tree]) -> Any:
    """A model or a parametrization that begins with what `find_start` found."""
    drawn, pruning = held.init, getattr(held, "pruning", None)
    if pruning:  # what another run had pruned is none of this run's schedule
        return held._replace(init=lambda key: fill_zeros(pruning, fill(drawn(key))))
    return held._replace(init=lambda key: fill(drawn(key)))


def check_one_model(method: Method, model: Model) -> None:
    """Raises ValueError where a method keeps several models at the server, which would all begin alike."""
    key = jax.random.key(0)
    sent, params = jax.eval_shape(lambda: (method.work.init(params := model.init(key), key)[0].params, params))
    there = list_leaves(sent)  # a rule for adapters may add to the model's own
    if describe_difference({path: there.get(path) for path in list_leaves(params)}, list_leaves(params)):
        raise ValueError(
            "start.run: this method has several models at the server, which would begin alike: leave start.run out"
        )


def with_private(method: Method, model: Model, saved: SavedModel, names: np.ndarray) -> Method:
    """A method whose clients begin with the private part that the client of the same name kept in another run.

    names: str [clients]: those of this run's clients.

    Raises ValueError where clients keep no private part, more than it, or one of another shape, or where no client is
    in both runs.
    """
    key = jax.random.key(0)
    kept, own = jax.eval_shape(lambda: (method.work.init(model.init(key), key)[1], model.private(key)))
    if not jax.tree.leaves(own) or kept != own:
        raise ValueError("start.private: clients here do not keep the private part of the model alone: leave it out")
    if num_rows(own):
        raise ValueError("start.private: the private part of this model has rows of items: leave it out")
    if found := describe_difference(jax.tree.map(lambda x: x[0], saved.private), own):
        raise ValueError(f"start.private: {saved.run} has other private parts: {found}: leave it out")
    place = {name: number for number, name in enumerate(saved.clients.tolist())}
    places = np.array([place.get(name, -1) for name in names.tolist()])
    if not (places >= 0).any():
        raise ValueError(f"start.private: no client of {saved.run} is in these data by its name: leave it out")
    LOGGER.info("start: %s of %s clients keep their private part of %s", (places >= 0).sum(), len(places), saved.run)

    def begin(client_state, client):
        there = jnp.asarray(places)[client]
        state = method.init_client_state(client_state, client)
        return jax.tree.map(lambda now, old: jnp.where(there >= 0, jnp.asarray(old)[there], now), state, saved.private)

    return method._replace(init_client_state=begin)


def describe_start(run: str, leaves: int, dense: int, tables: set[str], matched: int, items: int) -> str:
    """What of a model comes from another run, in one line."""
    rows = f"{matched:,} of {items:,} rows of {', '.join(sorted(tables))}" if tables else "no rows of items"
    return f"start: {rows}, and {dense} of {leaves - len(tables)} other parameters come from {run}"
