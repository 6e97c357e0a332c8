"""From the pieces of a program to the configuration that names them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from jaxfed.config.optimizer_names import name_optimizer
from jaxfed.config.options import BESIDE, list_batching_keys, section_arguments
from jaxfed.config.registry import REGISTRY
from jaxfed.config.sections import list_client_facts, reads_rounds
from jaxfed.config.stages import Pieces, make_runtime
from jaxfed.core.link import Channel, list_links
from jaxfed.core.recipe import Recipe, find_recipe
from jaxfed.core.types import Sampler
from jaxfed.data.clients import Clients
from jaxfed.data.item_descriptions import item_texts
from jaxfed.data.sources.tables import file_kind, table_source
from jaxfed.sampling.clock import Clock

TABLES = ("interactions", "titles", "user_features", "item_features", "valid", "test", "negatives")  # in memory


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


def describe_piece(section: str, piece: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a piece: its name and its arguments.

    Args:
        section: of the configuration that it belongs to.
        piece: what a function of that section's registry made.
        given: what a run gives such functions beside what a configuration says.

    Raises:
        ValueError: no configuration makes this piece.
    """
    recipe = find_recipe(piece)
    if recipe is None or recipe.section != section:
        raise ValueError(f"the {section} was not made by a function that configurations can name, or was changed since")
    if recipe.name not in REGISTRY[section]:
        raise ValueError(f'the {section} "{recipe.name}" is not registered: call jaxfed.register')
    known = section_arguments(section, recipe.name)
    table: dict[str, Any] = {"name": recipe.name}
    for key, value in recipe.arguments.items():
        if key in known:
            table[key] = to_plain(value)
        elif value is not None and key in given and not is_same(given[key], value):
            raise ValueError(
                f"the {section} {recipe.name} was made with another {key} than that of the run: make it with the same"
            )
        elif key not in given and value is not None:
            raise ValueError(f"the {section} {recipe.name} has a {key} that a configuration cannot write down")
    return table


def describe_channel(channel: Channel | None, given: Mapping[str, Any], items: np.ndarray) -> list[dict[str, Any]]:
    """The tables of the links of a channel, in their order. Raises ValueError."""
    links = list_links(channel) if channel is not None else ()
    tables = [describe_piece("channel", each, given) for each in links if not is_empty_link(each)]
    for table in tables:  # a link knows rows, a configuration the names of items
        if "targets" in table:
            table["targets"] = [str(items[row]) for row in table["targets"]]
    return tables


def is_empty_link(link: Channel) -> bool:
    """Whether a link does nothing, as the channel of a program that wants none."""
    claims = link.claims
    acts = claims.recipe or claims.mechanisms or claims.check or claims.needs_all_rows or claims.reads_cohort_size
    return not acts and not any(link[1:-1])


def describe_optimizer(optimizer: optax.GradientTransformation, whose: str) -> dict[str, Any]:
    """The table of an optimiser. Raises ValueError."""
    table = name_optimizer(optimizer)
    if table is None:
        raise ValueError(
            f"a configuration cannot name the {whose} optimiser: use a function of optax with numbers alone, "
            "such as optax.sgd(0.1), jaxfed.algorithms.group_rates or fedadam"
        )
    return table


def describe_clients(clients: Clients, folder: Path) -> dict[str, Any]:
    """The [data] section of clients. Tables in memory are written to `folder`, from where a configuration reads them.

    Raises ValueError where the clients were not made by `partition` of a data set that `jaxfed.data` read.
    """
    recipe = find_recipe(clients)
    source: Recipe | None = recipe.arguments["data"] if recipe else None
    if recipe is None or source is None:
        raise ValueError("the clients were not made by jaxfed.data.partition of a data set that jaxfed.data read")
    arguments = source.arguments | source.arguments.get("options", {})
    arguments.pop("options", None)
    name = source.name
    if name == "table":
        name, arguments = "parquet", arguments | write_tables(arguments, folder)
    elif name == "read":
        name = arguments.pop("kind") or file_kind(arguments["path"]) or "parquet"  # as `read` chooses it
    elif name not in REGISTRY["data"]:
        raise ValueError(f'the data set "{name}" is not registered')
    known = section_arguments("data", name)
    table = {key: to_plain(value) for key, value in arguments.items() if key in known and value is not None}
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


def describe_config(pieces: Pieces, originals: Originals, seed: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The table of the configuration that makes the same run.

    Args:
        pieces: of the run.
        originals: some of them as they were before they were joined.
        seed: of the run.
        rounds: of the run.
        folder: of the run, where tables in memory are written.

    Returns:
        The table.

    Raises:
        ValueError: a piece has no name in configurations; the message says which.
    """
    clients, method, settings = pieces.clients, find_recipe(pieces.method), pieces.evaluation
    everyone = list_client_facts(clients.population)
    clients_per_server = -(-clients.num_clients // max(pieces.edges.number, 1))  # by one server
    run_facts = everyone | {"num_clients": clients_per_server, "rounds": rounds}
    run_facts |= {"slots": pieces.sampler.slots, "sampler": pieces.sampler}
    made_of = method.arguments if method else {}
    optimizers: dict[str, Any] = {
        key: made_of[key] for key in ("client_optimizer", "server_optimizer") if key in made_of
    }
    given = run_facts | optimizers | {"model": pieces.model}
    rows = make_runtime(pieces.run, clients.num_items).table_rows
    sizes = {"num_items": rows, "num_users": clients.users_per_client, "real_items": clients.num_items}
    work: dict[str, Any] = {key: getattr(pieces.batching, key) for key in list_batching_keys()}
    table: dict[str, Any] = {
        "seed": seed,
        "rounds": rounds,
        "model": describe_piece("model", pieces.model, sizes | {"vocabulary": clients.vocabulary}),
        "algorithm": describe_piece("algorithm", pieces.method, given),
        "work": work,
        "channel": describe_channel(pieces.channel, run_facts, clients.source.items),
        "download": describe_channel(pieces.download, run_facts, clients.source.items),
        "cohort": describe_piece("cohort", originals.sampler, everyone | {"clock": originals.clock}),
        "clock": describe_piece("clock", originals.clock, everyone) if originals.clock else {"name": "none"},
        "evaluation": describe_settings(settings)
        | {"channel": describe_channel(pieces.evaluation_channel, run_facts, clients.source.items)},
        "privacy": describe_settings(pieces.privacy),
        "run": describe_settings(pieces.run),
        "data": describe_clients(clients, folder),
    }
    if pieces.parametrization is not None:
        table["parametrization"] = describe_piece(
            "parametrization", pieces.parametrization, {"model": pieces.model, "texts": item_texts(clients.source)}
        )
    add_optimizers(table, optimizers)
    add_edges(table, pieces)
    if table["model"].get("loss") == "rating":  # which a configuration infers from the labels
        table["model"]["loss"] = "squared"
    table["run"]["imports"] = sorted({*table["run"]["imports"], *list_modules(table)})
    return table


def add_optimizers(table: dict[str, Any], optimizers: dict[str, Any]) -> None:
    """Writes the optimisers of a method into a configuration's table. Raises ValueError for one without a name."""
    if "client_optimizer" in optimizers:
        table["work"]["optimizer"] = describe_optimizer(optimizers["client_optimizer"], "client")
    if "server_optimizer" in optimizers:
        server = describe_optimizer(optimizers["server_optimizer"], "server")
        if server.pop("weight_decay", 0.0):
            raise ValueError("the server optimiser decays weights, which a configuration cannot set: leave it out")
        table["server"] = server


def add_edges(table: dict[str, Any], pieces: Pieces) -> None:
    """Writes edges, and whether the server is lazy, into the table of a configuration, where they are not the default.

    Raises ValueError where edges are dealt by another seed than silos and devices.
    """
    if pieces.edges.number or not pieces.lazy:
        edges = {"edges": pieces.edges.number, "edge_rounds": pieces.edges.rounds, "lazy": pieces.lazy}
        table["server"] = table.get("server", {}) | edges
    if pieces.edges.number and table["data"].setdefault("deal", pieces.edges.seed) != pieces.edges.seed:
        raise ValueError("a configuration has one seed for edges and silos: give Edges the `deal` of partition")


def planned_rounds(pieces: Pieces, config: Any) -> int:
    """The number of rounds that a piece was made for, such as correlated noise or a schedule; 0: none was.

    config: what names the pieces; None: they are a program's.
    """
    if config is not None:
        return config.rounds if reads_rounds(config) else 0
    links = [
        link
        for each in (pieces.channel, pieces.download, pieces.evaluation_channel)
        if each is not None
        for link in list_links(each)
    ]
    recipes = [find_recipe(each) for each in (*links, pieces.method, pieces.model, pieces.sampler)]
    return max((int(each.arguments.get("rounds", 0)) for each in recipes if each), default=0)


def list_modules(table: dict[str, Any]) -> list[str]:
    """The modules of the functions that a configuration names, those of jaxfed left out.

    Raises ValueError for a function that no module holds.
    """
    links = [("channel", each) for key in ("channel", "download") for each in table[key]]
    links += [("channel", each) for each in table["evaluation"]["channel"]]
    pieces = [
        (key, table[key]) for key in REGISTRY if isinstance(table.get(key), dict) and "name" in table[key]
    ] + links
    functions = [REGISTRY[section][piece["name"]] for section, piece in pieces]
    modules = {getattr(each, "func", each).__module__ for each in functions}
    if "__main__" in modules:
        raise ValueError("a registered function is defined in the program that runs: move it to a module of its own")
    return sorted(each for each in modules if each.partition(".")[0] != "jaxfed")


def describe_settings(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as a table."""
    return {key: to_plain(value) for key, value in dataclasses.asdict(settings).items() if key != "channel"}
