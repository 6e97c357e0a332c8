"""What everybody knows of a federation, and the file in which a node holds the data of its own clients."""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfed.data.clients import Clients
from jaxfed.data.interactions import Dataset, Interactions
from jaxfed.data.population import Label, Labels, Population, Times
from jaxfed.data.ragged import Ragged, make_negative_index
from jaxfed.training.run_dir import OWNER_ALONE, write_arrays, write_file

PARTS = ("train", "valid", "test", "excluded")
LABELLED = PARTS[:3]


class PublicFacts(NamedTuple):
    """What the server and all nodes know of the clients and items, and nothing else.

    Args:
        num_clients: Number of clients; each has a number below it.
        users_per_client: The most users that one client holds.
        label: What rows are labelled with: "implicit", "rating" or "click".
        protocol: How each client holds rows out.
        kinds: (steps, examples of a step) of the blocks in which clients compute: they say roughly how much the longest
            clients have. Empty: each node chooses its own.
        items: str [N]: the ids of the items, in the order of the rows of tables.
        keys: The Ed25519 public keys of the nodes, in hexadecimal: those that take part in secure sums. Empty: there
            are no secure sums.
        noise_shares: Whether the nodes add the noise of the link skellam in shares, and the server adds none.
    """

    num_clients: int
    users_per_client: int
    label: Label
    protocol: str
    kinds: tuple[tuple[int, int], ...]
    items: tuple[str, ...]
    keys: tuple[str, ...] = ()
    noise_shares: bool = False


def find_facts(population: Population, kinds: tuple[tuple[int, int], ...], items: np.ndarray) -> PublicFacts:
    """The facts of a federation whose data lie in one place, to try it out."""
    label = population.labels.kind if population.labels else "implicit"
    names = tuple(str(item) for item in items)
    return PublicFacts(population.num_clients, population.users_per_client, label, population.protocol, kinds, names)


def write_facts(path: Path, facts: PublicFacts) -> None:
    """Writes facts as JSON."""
    write_file(path, json.dumps(facts._asdict()))


def read_facts(path: Path) -> PublicFacts:
    """Undoes `write_facts`. Raises ValueError with one line for what is not such a file."""
    try:
        table = json.loads(path.read_text())
        kinds = tuple((int(steps), int(size)) for steps, size in table["kinds"])
        items, keys = (tuple(str(word) for word in table[name]) for name in ("items", "keys"))
        facts = PublicFacts(**{**table, "kinds": kinds, "items": items, "keys": keys})
        sound = facts.num_clients > 0 and facts.users_per_client > 0 and bool(facts.items)
        sound = sound and isinstance(facts.noise_shares, bool)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: no facts of a federation ({type(error).__name__}): copy the server's file") from None
    if not sound:
        raise ValueError(f"{path}: a federation without clients, users or items: copy the server's file")
    return facts


def facts_digest(facts: PublicFacts) -> str:
    """SHA-256 of the facts."""
    return hashlib.sha256(json.dumps(facts._asdict(), sort_keys=True).encode()).hexdigest()


def write_node_data(path: Path, population: Population, clients: np.ndarray) -> None:
    """Writes what some clients of a population hold, for a node of their own.

    Args:
        path: A new .npz file.
        population: Of all clients.
        clients: int [n]: the node's, ascending.
    """
    offsets = population.client_offsets
    users = np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in clients] or [np.zeros(0, np.int64)])
    arrays: dict[str, Any] = {"clients": np.asarray(clients, np.int64), "users": np.diff(offsets)[clients]}
    for name in PARTS:
        whole = getattr(population, name)
        some = whole.some(users)
        arrays |= {name: some.values, f"{name}_counts": some.counts}
        for known, values in (("labels", population.labels), ("times", population.times)):
            if values is not None and name in LABELLED:
                arrays[f"{known}_{name}"] = Ragged(getattr(values, name), whole.start).some(users).values
    write_arrays(path, arrays, OWNER_ALONE)


def write_user_data(path: Path, client: int, history: Sequence[int]) -> None:
    """Writes what one user did, for a node that has this client alone; nothing is held out.

    history: items, earliest first; of an item that comes again the last time counts.
    """
    train = np.array(list(dict.fromkeys(reversed(history)))[::-1], np.int32)
    none, one = np.zeros(0, np.int32), np.ones(1, np.int64)
    arrays: dict[str, Any] = {"clients": np.array([client], np.int64), "users": one}
    arrays |= {"train": train, "excluded": np.sort(train), "valid": none, "test": none}
    arrays |= {f"{name}_counts": len(arrays[name]) * one for name in PARTS}
    write_arrays(path, arrays, OWNER_ALONE)


def read_node_data(path: Path, facts: PublicFacts) -> Clients:
    """The clients of a node, which have their numbers among all clients; the others hold nothing.

    Args:
        path: A file of `write_node_data`.
        facts: Of the federation.

    Raises:
        ValueError: it is no such file, or does not fit the facts: one line.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        population = make_node_population(arrays, facts)
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile) as error:
        said = f": {error}" if type(error) is ValueError else f" ({type(error).__name__})"
        raise ValueError(f"{path}: no data of this federation's clients{said}") from None
    return wrap_population(population, facts)


def make_node_population(arrays: dict[str, np.ndarray], facts: PublicFacts) -> Population:
    """The population of a node's arrays. Raises ValueError where they do not fit together, or the facts."""
    clients, users = arrays["clients"], arrays["users"]
    if len(clients) != len(users) or (np.diff(clients) <= 0).any() or not len(clients):
        raise ValueError("clients are ascending numbers, each with its number of users")
    if clients[0] < 0 or clients[-1] >= facts.num_clients or users.min() < 1 or users.max() > facts.users_per_client:
        raise ValueError(
            f"a client is none of {facts.num_clients:,}, or has more than {facts.users_per_client:,} users"
        )
    parts = {}
    for name in PARTS:
        values, counts = arrays[name], arrays[f"{name}_counts"]
        if len(counts) != users.sum() or (counts < 0).any() or counts.sum() != len(values):
            raise ValueError(f"the counts of {name} are not those of its items")
        if len(values) and (values.min() < 0 or values.max() >= len(facts.items)):
            raise ValueError(f"{name} names an item that is none of {len(facts.items):,}")
        parts[name] = Ragged(values.astype(np.int32), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    of_client = np.zeros(facts.num_clients, np.int64)
    of_client[clients] = users
    num_train = np.zeros(facts.num_clients, np.int64)
    np.add.at(num_train, np.repeat(clients, users), parts["train"].counts)
    labels = read_columns(arrays, "labels", parts) if facts.label != "implicit" else None
    times = read_columns(arrays, "times", parts) if "times_train" in arrays else None
    return make_empty_population(facts)._replace(
        client_offsets=np.concatenate([[0], np.cumsum(of_client)]),
        train=parts["train"],
        valid=parts["valid"],
        test=parts["test"],
        excluded=parts["excluded"],
        negative_index=make_negative_index(parts["excluded"], len(facts.items)),
        user_names=np.arange(int(users.sum())).astype(str),
        num_train=num_train,
        labels=Labels(facts.label, *labels) if labels else None,
        times=Times(*times) if times else None,
    )


def read_columns(arrays: dict[str, np.ndarray], known: str, parts: dict[str, Ragged]) -> list[np.ndarray]:
    """What is known of the rows of each part. Raises ValueError where it is not of as many rows."""
    columns = [arrays[f"{known}_{name}"] for name in LABELLED]
    if any(len(column) != len(parts[name].values) for name, column in zip(LABELLED, columns, strict=True)):
        raise ValueError(f"{known} are not those of its items")
    return columns


def make_empty_population(facts: PublicFacts) -> Population:
    """Clients of which nothing is known, as the server has them."""
    none, count = Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64)), facts.num_clients
    return Population(
        num_items=len(facts.items),
        names=np.arange(count).astype(str),
        client_offsets=np.zeros(count + 1, np.int64),
        train=none,
        excluded=none,
        negative_index=make_negative_index(none, len(facts.items)),
        valid=none,
        test=none,
        user_names=np.zeros(0, "U1"),
        num_train=np.zeros(count, np.int64),
        users_per_client=facts.users_per_client,
        protocol=facts.protocol,
    )


def wrap_population(population: Population, facts: PublicFacts) -> Clients:
    """A population as the clients of a run, whose data set has the items' ids and no rows."""
    columns = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64)
    return Clients(Dataset(Interactions(*columns), population.user_names, np.array(facts.items)), population, "", False)
