"""`Clients`: a data set dealt to clients, with what is held out of each."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from jaxfed.core.recipe import Recipe, find_recipe, put_recipe
from jaxfed.data.given_parts import given_parts_digest
from jaxfed.data.interactions import Dataset, data_digest
from jaxfed.data.population import Population
from jaxfed.data.preparation import prepare_population
from jaxfed.data.stages import log_stage

SplitName = Literal[
    "leave-one-out",
    "ratio",
    "random-leave-one-out",
    "random-ratio",
    "global-random",
    "global-time",
    "compat-pfedrec",
]
PROTOCOLS = {
    "leave-one-out": "loo-clean",
    "ratio": "ratio-clean",
    "random-leave-one-out": "loo-random",
    "random-ratio": "ratio-random",
    "global-random": "global-random",
    "global-time": "global-time",
    "compat-pfedrec": "compat-pfedrec",
}
LEAKY = "compat-pfedrec"


class Clients(NamedTuple):
    """The clients of a run and their data; `jaxfed.data.partition` makes them.

    Args:
        source: The data set, numbered like the users of the population. Its notes say what was left out.
        population: Who is a client, and the items of each for training, validation and test.
        digest: SHA-256 of the rows in their order, as they came, and of features that do not follow from them.
        leaky: Whether results must be marked LEAKY.
        recipe: How they were made. Its argument `data` is the recipe of the data set.
    """

    source: Dataset
    population: Population
    digest: str
    leaky: bool
    recipe: Recipe | None = None

    @property
    def num_items(self) -> int:
        """How many items there are."""
        return self.population.num_items

    @property
    def density(self) -> float:
        """Share of all pairs of a user and an item that are train interactions; what `jaxfed.models.ials` asks for."""
        population = self.population
        return len(population.train.values) / (len(population.user_names) * population.num_items)

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return self.population.num_clients

    @property
    def users_per_client(self) -> int:
        """The most users that one client holds: 1 where every user is a client."""
        return self.population.users_per_client

    @property
    def vocabulary(self) -> tuple[int, int]:
        """How many features (users, items) have; what `jaxfed.models.fm` and `two_tower` ask for."""
        user, item = self.population.user_features, self.population.item_features
        return len(user.names) if user else 0, len(item.names) if item else 0

    @property
    def protocol(self) -> str:
        """How what is held out was chosen, in some words."""
        return self.population.protocol

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the data, for the reader."""
        return self.source.notes


def make_clients(data: Dataset, **options: Any) -> Clients:
    """A data set as clients.

    Args:
        data: what was read.
        options: the arguments of `prepare_population`.

    Returns:
        The clients, without a recipe.

    Raises:
        ValueError: see `prepare_population`.
    """
    pa.default_memory_pool().release_unused()  # what the file was read in: Arrow would keep it
    with ThreadPoolExecutor(1) as beside:
        rows_digest = beside.submit(data_digest, data, features=not data.features_follow)
        source, population = prepare_population(data._replace(recipe=None), **options)
        with log_stage(f"hashing {len(data.interactions.user):,} rows"):  # what is left of it
            digest = given_parts_digest(rows_digest.result(), data)
    return Clients(source, population, digest, options.get("protocol") == LEAKY)


def partition(data: Dataset, by: str = "user", split: SplitName = "leave-one-out", **options: Any) -> Clients:
    """Deals a data set to clients, and holds validation and test items out of every history.

    Args:
        data: A data set, of `load`, `read`, `from_arrays`, `from_pandas` or `from_arrow`.
        by: Who is a client: each `user`, each `silo` (users dealt to organisations), each `device` (a user's rows are
            dealt to devices), or each value of a column that was kept (`keep` of `read`).
        split: leave-one-out: each user's latest item is the test item, the one before validates. ratio: the latest
            shares of each history. random-leave-one-out, random-ratio: the same by chance, drawn by the seed `deal`.
            global-random, global-time: random shares, or the latest shares, of all rows. compat-pfedrec: leave-one-out
            as in PFedRec's public code, which leaks; its results are marked LEAKY. Where the data say which rows test
            (`test` or `part` of `read`), these do; without validation rows the split takes some from each user's train
            rows.
        options: Further arguments of `jaxfed.data.preparation.prepare_population`: `silos`, `devices`, `ratio`,
            `user_core`, `item_core`, `label`, `threshold`, `cold`, `cold_items`, `deal`, ...

    Returns:
        The clients. `notes` says what was left out.

    Raises:
        ValueError: there is no such column or split, or no user has enough interactions.

    Example:
        >>> import jaxfed as jf
        >>> clients = jf.data.partition(jf.data.load("synthetic", users=50, items=40), by="user")
        >>> clients.num_clients, clients.num_items
        (50, 40)
    """
    if not isinstance(data, Dataset):
        raise ValueError(
            f"partition: a data set, not a {type(data).__name__}: read it with jaxfed.data.from_pandas, from_arrow, "
            "from_arrays, read or load"
        )
    if split not in PROTOCOLS:
        names = {protocol: name for name, protocol in PROTOCOLS.items()}
        meant = f"that is {names[split]!r} here" if split in names else f"choose one of {', '.join(PROTOCOLS)}"
        raise ValueError(f"partition: no split {split!r}: {meant}")
    asked = {"clients": by, "protocol": PROTOCOLS[split], **options}
    recipe = find_recipe(data)
    clients = make_clients(data, **asked)
    arguments = asked | {"data": recipe._replace(made=()) if recipe else None}
    return put_recipe(clients, Recipe("clients", "partition", arguments, ()))
