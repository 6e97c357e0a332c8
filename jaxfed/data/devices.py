"""One user on several devices, and clients that never take part: populations made of others."""

from collections.abc import Collection
from typing import Any

import numpy as np

from jaxfed.core.excerpt import excerpt, shorten, shorten_list
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.data.interactions import Dataset
from jaxfed.data.population import Labels, Population, Times
from jaxfed.data.ragged import Ragged, concatenate_ranges, make_domains, make_negative_index, make_ragged
from jaxfed.data.splits import TRAIN, Split


def column_kinds(data: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(the values of a column, the number of each row's [n]). Raises ValueError for a column the data do not have."""
    if column == "device" and column not in data.columns:
        raise ValueError("data.merge: devices dealt at random need none: leave data.merge out, or name a column")
    if column not in data.columns:
        choices = shorten_list(["user", "silo", "device", *(name for name in data.columns if name[:1] != " ")])
        raise ValueError(f"clients by {excerpt(column)}: the data have no such column; choose one of {choices}")
    return np.unique(data.columns[column].astype(str), return_inverse=True)


def collect_labels_and_times(population: Population, users: np.ndarray) -> dict[str, Any]:
    """The labels and the times of what some users did, user by user."""
    labels, times = population.labels, population.times

    def collect(of_rows):
        lists = zip(of_rows, (population.train, population.valid, population.test), strict=True)
        return [Ragged(values, each.start).some(users).values for values, each in lists]

    return {
        "labels": labels and Labels(labels.kind, *collect(labels[1:])),
        "times": times and Times(*collect(times)),
    }


def select_clients(population: Population, clients: np.ndarray) -> Population:
    """The `clients` [c] by themselves, numbered in that order; the catalogue stays whole."""
    count = np.diff(population.client_offsets)[clients]
    users = concatenate_ranges(population.client_offsets[clients], count)
    train, excluded, valid, test = (
        each.some(users) for each in (population.train, population.excluded, population.valid, population.test)
    )
    return population._replace(
        names=population.names[clients],
        client_offsets=np.concatenate([[0], np.cumsum(count)]),
        train=train,
        excluded=excluded,
        negative_index=make_negative_index(excluded, population.num_items),
        valid=valid,
        test=test,
        user_names=population.user_names[users],
        num_train=population.num_train[clients],
        users_per_client=int(count.max()),
        label_flipped=None if population.label_flipped is None else population.label_flipped[clients],
        **collect_labels_and_times(population, users),
        user_features=None if population.user_features is None else population.user_features.some(users),
        negatives=None if population.negatives is None else population.negatives.some(users),
    )


def split_cold_clients(population: Population, share: float, seed: int) -> Population:
    """The clients that take part, with a `share` of all (of users, where they have several devices) beside them that
    never do, drawn by the seed.

    Samplers, links and accountants know of the former alone: what the latter hold is in no block. Raises ValueError for
    what is no share, or leaves nobody on a side.
    """
    asked = population.asked
    clients = asked.num_clients
    count = round(share * clients)
    if not 0 < share < 1:
        raise ValueError(f"data.cold is {share}: a share of the clients, from 0 to below 1")
    if not 0 < count < clients:
        raise ValueError(f"data.cold is {share}: of {clients:,} clients that leaves nobody on one side")
    is_cold = setup_rng(seed, SetupStream.COLD_CLIENTS).permutation(clients) < count
    warm, cold = (select_clients(asked, np.flatnonzero(some)) for some in (~is_cold, is_cold))
    if population.owner is None:
        return warm._replace(cold=cold)
    is_warm = ~is_cold[population.owner]
    owner = np.unique(population.owner[is_warm], return_inverse=True)[1]
    devices = select_clients(population, np.flatnonzero(is_warm))
    return devices._replace(owner=owner, people=warm, cold=cold)


def split_into_devices(people: Population, kind: np.ndarray, names: np.ndarray) -> Population:
    """The devices of `people`, each of whom is one user: a client for every (user, kind) with train interactions.

    kind int [total]: of the device on which each train interaction happened; names [kinds]. A device knows what
    happened on it alone: that it trains on, and only that is no negative of its. What is held out is the user's, who is
    asked once.
    """
    items, train = people.num_items, people.train
    user = np.repeat(np.arange(people.num_clients), train.counts)
    pairs, device = np.unique(user * len(names) + kind, return_inverse=True)
    order = np.argsort(device, kind="stable")
    device_items = np.unique(device * items + train.values)
    excluded = make_ragged((device_items % items).astype(np.int32), device_items // items, len(pairs))
    own = make_ragged(train.values[order], device[order], len(pairs))
    owner, no_items = pairs // len(names), Ragged(np.zeros(0, np.int32), np.zeros(len(pairs) + 1, np.int64))
    labels, features, no_labels = people.labels, people.user_features, np.zeros(0, np.float32)
    times, no_times = people.times, np.zeros(0, np.int32)
    return people._replace(
        names=np.char.add(np.char.add(people.names[owner], "/"), names[pairs % len(names)]),
        client_offsets=np.arange(len(pairs) + 1),
        train=own,
        excluded=excluded,
        negative_index=make_negative_index(excluded, items),
        valid=no_items,
        test=no_items,
        user_names=people.user_names[owner],
        num_train=own.counts,
        labels=None if labels is None else labels._replace(train=labels.train[order], valid=no_labels, test=no_labels),
        times=None if times is None else Times(times.train[order], no_times, no_times),
        user_features=None if features is None else features.some(owner),
        owner=owner,
        people=people,
        negatives=None,
    )


def group_by_user_and_kind(data: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(the client of each row [n], the clients' names), a client for every (user, value of a column), user by user.

    Raises ValueError for a column that is not there.
    """
    names, kind = column_kinds(data, column)
    pairs, group = np.unique(data.interactions.user.astype(np.int64) * len(names) + kind, return_inverse=True)
    return group, np.char.add(np.char.add(data.users[pairs // len(names)], "/"), names[pairs % len(names)])


def split_into_domains(population: Population, data: Dataset, column: str) -> Population:
    """Clients `apart` by a column as domains that share users: each has the items of one, from which its negatives come
    and among which it is ranked, and a user's clients share one private part.

    Raises ValueError for an item of two domains.
    """
    names, kind = column_kinds(data, column)
    item = data.interactions.item
    of = kind[np.unique(item, return_index=True)[1]]
    if (wrong := np.flatnonzero(of[item] != kind)).size:
        item_id, other_domain = item[wrong[0]], names[kind[wrong[0]]]
        raise ValueError(
            f'data.merge: item "{shorten(data.items[item_id])}" is in {shorten(names[of[item_id]])} and in '
            f"{shorten(other_domain)}: "
            "domains have items of their own, give each its own id"
        )
    domains = make_domains(of)
    index = make_negative_index(population.excluded, population.num_items, domains)
    owner = np.cumsum(np.append(False, population.user_names[1:] != population.user_names[:-1]))
    return population._replace(negative_index=index, owner=owner, domains=domains)


def assign_devices(data: Dataset, parts: Split, column: str, devices: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(the device of each train row, in a population's order, what devices are called): by a column, or dealt at random
    by the seed where that is empty. Raises ValueError for a column that is not there."""
    index = parts.order[parts.part[parts.order] == TRAIN]
    if column:
        names, kind = column_kinds(data, column)
        return kind[index], names
    names = np.array([f"device {i}" for i in range(devices)])
    return setup_rng(seed, SetupStream.DEVICES, devices).integers(devices, size=len(index)), names


def check_merge_options(
    clients: str, merge: str, devices: int, malicious: float, protocol: str, cold: float, columns: Collection[str] = ()
) -> None:
    """Raises ValueError for what does not go together, and for a word that is also one of the data's columns."""
    if clients in ("silo", "device") and clients in columns and not merge:
        dealt = "users to silos" if clients == "silo" else "rows to devices"
        raise ValueError(
            f'data.clients = "{clients}" assigns {dealt} at random, but the data also have a column named "{clients}": '
            "rename the column (and set data.clients to its new name to group by it)"
        )
    if devices < 1:
        raise ValueError(f"data.devices is {devices}: a user has at least 1")
    if merge and clients in ("user", "silo"):
        raise ValueError(f"data.merge: set data.clients to the column that tells the {merge} of a user apart")
    if merge == "domains" and cold:
        raise ValueError("data.cold: a private part is folded in from one catalogue, not from domains: set it to 0")
    if malicious and (merge or clients == "device" or cold):
        raise ValueError(
            "data.malicious: the malicious are known by the numbers of users, which data.cold and devices change: "
            "choose one of both"
        )
    if protocol == "compat-pfedrec" and (merge or clients == "device"):
        raise ValueError("data.protocol: compat-pfedrec has one client a user: choose loo-clean or ratio-clean")
