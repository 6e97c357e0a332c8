"""From the pieces of a program to the configuration that names them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from jaxfed.config.optimizer_names import name_optimizer
from jaxfed.config.registry import BESIDE, REGISTRY, section_arguments
from jaxfed.config.stages import Pieces
from jaxfed.core.link import Channel, list_links
from jaxfed.core.recipe import Recipe, find_recipe
from jaxfed.core.types import Sampler
from jaxfed.data.clients import Clients
from jaxfed.data.sources.tables import table_source
from jaxfed.sampling.clock import Clock

TABLES = ("interactions", "titles", "user_features", "item_features")  # of a data set in memory


class UnnamedError(ValueError):
    """A piece has no name in configurations."""


class Originals(NamedTuple):
    """Pieces as a program handed them over, before they were joined to others."""

    sampler: Sampler
    clock: Clock | None


def to_plain(value: Any) -> Any:
    """A value in TOML's types."""
    if isinstance(value, tuple | list):
        return [to_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are one, or equal numbers, words or arrays."""
    return a is b or (isinstance(a, np.ndarray | list | tuple) and np.array_equal(a, b)) or bool(np.all(a == b))


def spell_piece(section: str, piece: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a piece: its name and its arguments.

    Args:
        section: of the configuration that it belongs to.
        piece: what a function of that section's registry made.
        given: what a run gives such functions beside what a configuration says.

    Raises:
        UnnamedError: no configuration makes this piece.
    """
    recipe = find_recipe(piece)
    if recipe is None or recipe.section != section:
        raise UnnamedError(
            f"the {section} was not made by a function that configurations can name, or was changed since"
        )
    if recipe.name not in REGISTRY[section]:
        raise UnnamedError(f'the {section} "{recipe.name}" is not registered: see jaxfed.config.registry.register')
    known = section_arguments(section, recipe.name)
    table: dict[str, Any] = {"name": recipe.name}
    for key, value in recipe.arguments.items():
        if key in known:
            table[key] = to_plain(value)
        elif key in given and not is_same(given[key], value):
            raise UnnamedError(
                f"the {section} {recipe.name} has {key} = {value}, a configuration gives it {given[key]}"
            )
        elif key not in given and value is not None:
            raise UnnamedError(f"the {section} {recipe.name} has a {key} that a configuration cannot write down")
    return table


def spell_channel(channel: Channel | None, given: Mapping[str, Any], items: np.ndarray) -> list[dict[str, Any]]:
    """The tables of the links of a channel, in their order. Raises UnnamedError."""
    links = list_links(channel) if channel is not None else ()
    tables = [spell_piece("channel", each, given) for each in links if not is_empty_link(each)]
    for table in tables:  # a link knows rows, a configuration the names of items
        if "targets" in table:
            table["targets"] = [str(items[row]) for row in table["targets"]]
    return tables


def is_empty_link(link: Channel) -> bool:
    """Whether a link does nothing, as the channel of a program that wants none."""
    return link.claims.recipe is None and not any((link.encode, link.decode, link.decode_message, link.aggregator))


def spell_optimizer(optimizer: optax.GradientTransformation, whose: str) -> dict[str, Any]:
    """The table of an optimiser. Raises UnnamedError."""
    table = name_optimizer(optimizer)
    if table is None:
        raise UnnamedError(
            f"the {whose} optimiser is none that configurations can name: a function of optax with numbers alone, "
            "such as optax.sgd(0.1), jaxfed.algorithms.group_rates or fedadam"
        )
    return table


def spell_data(clients: Clients, folder: Path) -> dict[str, Any]:
    """The [data] section of clients. Tables in memory are written to `folder`, whence a configuration reads them.

    Raises UnnamedError where the clients were not made by `partition` of a data set that `jaxfed.data` read.
    """
    recipe = find_recipe(clients)
    source: Recipe | None = recipe.arguments["data"] if recipe else None
    if recipe is None or source is None:
        raise UnnamedError("the clients were not made by jaxfed.data.partition of a data set that jaxfed.data read")
    arguments = source.arguments | source.arguments.get("options", {})
    arguments.pop("options", None)
    name = source.name
    if name == "table":
        name, arguments = "parquet", arguments | write_tables(arguments, folder)
    elif name == "read":
        name = arguments.pop("kind")
    elif name not in REGISTRY["data"]:
        raise UnnamedError(f'the data set "{name}" is not registered')
    known = section_arguments("data", name)
    table = {key: to_plain(value) for key, value in arguments.items() if key in known}
    options = {key: to_plain(value) for key, value in recipe.arguments.items() if key in BESIDE["data"]}
    return {"name": name, **table, **options}


def write_tables(arguments: dict[str, Any], folder: Path) -> dict[str, str]:
    """Writes the tables that a data set was made of to parquet files; returns {key of [data]: path}."""
    import pyarrow.parquet

    paths = {}
    for key in TABLES:
        if arguments.get(key) is not None:
            file = folder / f"{key}.parquet"
            pyarrow.parquet.write_table(table_source(arguments[key], key).table, file)
            paths["path" if key == "interactions" else key] = str(file.absolute())
    return paths


def spell_config(pieces: Pieces, originals: Originals, seed: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The table of the configuration that makes the same run.

    Args:
        pieces: of the run.
        originals: some of them as they were before they were joined.
        seed: of the run.
        rounds: of the run.
        folder: of the run, where tables in memory are written.

    Raises:
        UnnamedError: a piece has no name in configurations; the message says which.
    """
    clients, method, settings = pieces.clients, find_recipe(pieces.method), pieces.evaluation
    everyone = {"num_clients": clients.num_clients, "num_train": clients.population.num_train}
    run_facts = everyone | {"slots": pieces.sampler.slots, "sampler": pieces.sampler, "rounds": rounds}
    optimizers = (
        {}
        if method is None
        else {
            key: method.arguments.get(key)
            for key in ("client_optimizer", "server_optimizer")
            if key in method.arguments
        }
    )
    given = run_facts | optimizers | {"model": pieces.model}
    sizes = {"num_items": clients.num_items, "num_users": clients.users_per_client, "real_items": clients.num_items}
    names = {"names": clients.population.names, "clock": originals.clock}
    work: dict[str, Any] = {key: getattr(pieces.batching, key) for key in ("batch_size", "negatives", "epochs")}
    table: dict[str, Any] = {
        "seed": seed,
        "rounds": rounds,
        "model": spell_piece("model", pieces.model, sizes | {"vocabulary": clients.vocabulary}),
        "algorithm": spell_piece("algorithm", pieces.method, given),
        "work": work,
        "channel": spell_channel(pieces.channel, run_facts, clients.source.items),
        "download": spell_channel(pieces.download, run_facts, clients.source.items),
        "cohort": spell_piece("cohort", originals.sampler, everyone | names),
        "clock": spell_piece("clock", originals.clock, everyone | names) if originals.clock else {"name": "none"},
        "evaluation": spell_settings(settings)
        | {"channel": spell_channel(pieces.evaluation_channel, run_facts, clients.source.items)},
        "privacy": spell_settings(pieces.privacy),
        "run": spell_settings(pieces.run),
        "data": spell_data(clients, folder),
    }
    if pieces.parametrization is not None:
        table["parametrization"] = spell_piece("parametrization", pieces.parametrization, {"model": pieces.model})
    if "client_optimizer" in optimizers:
        work["optimizer"] = spell_optimizer(optimizers["client_optimizer"], "client")
    if "server_optimizer" in optimizers:
        server = spell_optimizer(optimizers["server_optimizer"], "server")
        if server.pop("weight_decay", 0.0):
            raise UnnamedError("the server optimiser decays weights, which a configuration cannot say")
        edges = {"edges": pieces.edges.number, "edge_rounds": pieces.edges.rounds}
        table["server"] = server | edges | {"lazy": pieces.lazy}
        table["data"]["deal"] = pieces.edges.seed if pieces.edges.number else table["data"]["deal"]
    return table


def spell_settings(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as a table."""
    return {key: to_plain(value) for key, value in dataclasses.asdict(settings).items() if key != "channel"}
