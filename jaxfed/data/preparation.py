"""From interactions to a population: who is a client, what is held out, what is poisoned."""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxfed.core.malicious import check_fraction, is_malicious
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.data.cold_items import exclude_untrained_items, hold_out_items
from jaxfed.data.devices import (
    assign_devices,
    check_merge_options,
    column_kinds,
    group_by_user_and_kind,
    split_cold_clients,
    split_into_devices,
    split_into_domains,
)
from jaxfed.data.domains import select_domain
from jaxfed.data.given_parts import add_given_negatives, check_given_parts, prepare_parts
from jaxfed.data.interactions import CLIENT, Dataset, drop_repeats, k_core
from jaxfed.data.poisoning import poison_histories
from jaxfed.data.population import Label, Labels, Population, Times, scale_times
from jaxfed.data.ragged import make_negative_index, make_ragged
from jaxfed.data.row_labels import row_labels
from jaxfed.data.split_notes import (
    describe_file_order,
    describe_protocol,
    note_few_candidates,
    note_file_order,
    note_ties,
    note_zero_ratings,
)
from jaxfed.data.splits import PART, TEST, TRAIN, VALID, Protocol, Split, split_histories
from jaxfed.data.stages import log_stage

Merge = Literal["", "devices", "domains"]


def assign_clients(data: Dataset, clients: str, silos: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(the client of each row [n], the clients' names) for `user`, `silo`, or a column of the data.

    Raises ValueError for a column the data do not have.
    """
    user = data.interactions.user
    if clients == "user":
        return user.astype(np.int64), data.users
    if clients == "silo":
        if not 1 <= silos <= len(data.users):
            raise ValueError(f"{silos} silos for {len(data.users)} users: choose from 1 to {len(data.users)}")
        deal = setup_rng(seed, SetupStream.SILOS, silos).permutation(len(data.users)) % silos
        return deal[user], np.array([f"silo {i}" for i in range(silos)])
    names, group = column_kinds(data, clients)
    return group, names


def number_pairs(group: np.ndarray, user: np.ndarray, users: int) -> tuple[np.ndarray, np.ndarray]:
    """(group * users + user of each pair that there is, ascending; int [n]: the place of each row's pair there)."""
    group_of = np.full(users, -1, np.int64)
    group_of[user] = group
    if (group_of[user] != group).any():  # somebody is in several
        return np.unique(group * users + user, return_inverse=True)
    there = np.flatnonzero(group_of >= 0)
    order = there[np.argsort(group_of[there], kind="stable")]
    place = np.empty(users, np.int64)
    place[order] = np.arange(len(order))
    return group_of[order] * users + order, place[user]


def split_shared_users(data: Dataset, group: np.ndarray) -> Dataset:
    """Makes users of (client, user) pairs: who appears at two clients is two users, as neither knows of the other.

    Numbers them client by client and adds the column `CLIENT`, the client of each row.
    """
    user = data.interactions.user
    pairs, number = number_pairs(group, user, len(data.users))
    ids = int((np.bincount(user, minlength=len(data.users)) > 0).sum())
    note = (
        ()
        if len(pairs) == ids
        else (f"{ids:,} ids are {len(pairs):,} users: who appears at several clients is one user at each",)
    )
    rows = data.interactions._replace(user=number.astype(np.int32))
    who = pairs % len(data.users)
    return data._replace(
        interactions=rows,
        users=data.users[who],
        columns={**data.columns, CLIENT: group},
        notes=data.notes + note,
        user_features=None if data.user_features is None else data.user_features.some(who),
    )


def make_population(
    data: Dataset, parts: Split, names: np.ndarray, label: Label = "implicit", threshold: float = 4.0
) -> Population:
    """Lays a split data set out by client. Users are numbered client by client (`split_shared_users`)."""
    user, item, rating, time = data.interactions
    users, items = len(data.users), len(data.items)
    in_order = parts.part[parts.order]
    index = {part: parts.order[in_order == part] for part in (TRAIN, VALID, TEST)}
    train, valid, test = (make_ragged(item[rows], user[rows], users) for rows in index.values())
    excluded = (make_ragged(item[parts.order], user[parts.order], users) if parts.leaky else train).distinct(items)
    client_of = np.zeros(users, np.int64)
    client_of[user] = data.columns[CLIENT]
    kept_clients, client = np.unique(client_of, return_inverse=True)  # clients that lost all their users are none
    offsets = np.concatenate([[0], np.cumsum(np.bincount(client, minlength=len(kept_clients)))])
    num_train, most = np.diff(train.start[offsets]), int(np.diff(offsets).max())
    labels = None
    if label != "implicit":
        every = row_labels(rating, label, threshold)
        labels = Labels(label, *(every[rows] for rows in index.values()))
    seconds = scale_times(time) if data.has_times and data.one_clock else None
    return Population(
        items,
        names[kept_clients],
        offsets,
        train,
        excluded,
        make_negative_index(excluded, items),
        valid,
        test,
        data.users,
        num_train,
        most,
        labels=labels,
        user_features=data.user_features,
        item_features=data.item_features,
        times=None if seconds is None else Times(*(seconds[rows] for rows in index.values())),
    )


def add_notes(data: Dataset, *notes: str) -> Dataset:
    """The same data with more notes for the reader."""
    return data._replace(notes=(*data.notes, *notes))


class PopulationOptions(NamedTuple):
    """How the rows of a source become clients.

    Args:
        clients: Who a client is: each user, each silo (users dealt to organisations), each device (a user's train rows
            are dealt to devices), or each value of a column.
        silos: Number of organisations, where clients are silos.
        devices: Number of devices of a user, where clients are devices.
        merge: Set if data.clients names a column. Empty: each value is an independent client (organisation). devices:
            its values are a user's devices. domains: they are item domains. In both a user has one private part.
        protocol: loo-clean: each user's latest item is the test item, the one before validates. ratio-clean: the latest
            shares of each history. loo-random: a random item of each user tests, another validates. ratio-random:
            random shares of each history. global-random: random shares of all rows. global-time: the latest shares of
            all rows. compat-pfedrec: loo-clean as in PFedRec's public code, where training negatives never include
            held-out items (a leak); results are marked LEAKY. Where the test rows are given (data.test, data.part),
            this says how validation rows are taken from the train rows, if none are given.
        ratio: The shares of validation and test, where the protocol holds out shares.
        user_core: k-core: drop users with fewer interactions than this, repeated together with item_core until nothing
            changes.
        item_core: k-core: drop items with fewer interactions than this.
        items_with: Features, such as genre=Drama; items that have none of them are left out. Empty: all items stay.
        items_without: Features; items that have one of them are left out.
        label: implicit: every row is a click. rating: rows are labelled with their rating. click: with 1 where the
            rating is at least the threshold, else 0.
        threshold: The least rating that is a click, where label is click.
        malicious: Share of the clients that are malicious, see `jaxfed.core.malicious`.
        promoted: Items, by the source's ids, that malicious clients have in their histories.
        label_flip: Malicious clients train with positives and negatives exchanged.
        malice: Seed of who is malicious.
        cold: Share of the users (or silos) that never take part and are tested apart.
        cold_items: Share of the items that nobody trains on: all rows with them test. Features or texts rank them.
        deal: Seed of silos, devices, cold clients, cold items and random splits.
    """

    clients: str = "user"
    silos: int = 10
    devices: int = 2
    merge: Merge = ""
    protocol: Protocol = "loo-clean"
    ratio: tuple[float, float] = (0.1, 0.1)
    user_core: int = 0
    item_core: int = 0
    items_with: tuple[str, ...] = ()
    items_without: tuple[str, ...] = ()
    label: Label = "implicit"
    threshold: float = 4.0
    malicious: float = 0.0
    promoted: tuple[str, ...] = ()
    label_flip: bool = False
    malice: int = 0
    cold: float = 0.0
    cold_items: float = 0.0
    deal: int = 0

    @property
    def clients_of_user(self) -> Merge:
        """What a user has several of, as clients of their own: devices or domains; "": neither."""
        return "devices" if self.clients == "device" else self.merge


def prepare_population(data: Dataset, clients: str = "user", **options: Any) -> tuple[Dataset, Population]:
    """From a source's rows to clients: repeats out, k-core, clients, short histories out, split.

    Args:
        data: The data set as it came.
        clients: Who a client is, as in `PopulationOptions`.
        options: Its other fields, by name.

    Returns:
        The data set, numbered like the users of the population, cold ones still among them, with notes on all that was
        left out or put in; and the population.

    Raises:
        ValueError: options do not go together, or with these data.
    """
    chosen = PopulationOptions(clients, **options)
    if chosen.label not in get_args(Label):
        raise ValueError(f"data.label: no label {chosen.label!r}: choose one of {', '.join(get_args(Label))}")
    if chosen.label != "implicit" and chosen.protocol == "compat-pfedrec":
        raise ValueError(
            f'data.label = "{chosen.label}": no negatives are drawn that could leak: take another data.protocol'
        )
    if chosen.label != "implicit" and chosen.label_flip:
        raise ValueError(
            f'data.label = "{chosen.label}": data.label_flip exchanges clicks and negatives: set it to false'
        )
    source = data
    with log_stage("dividing the rows into clients"):
        data, names = divide_into_clients(data, chosen)
    check_fraction(chosen.malicious, "data.malicious")
    if chosen.promoted:
        data = poison_histories(data, chosen.promoted, chosen.malicious, chosen.malice)
    with log_stage("splitting the clients' histories"):
        parts = split_histories(data, chosen.protocol, chosen.ratio)
    if PART not in source.columns:  # which only said what chance holds out
        data = data._replace(columns={name: column for name, column in data.columns.items() if name != PART})
    order = describe_file_order(data, parts)
    data = add_notes(data, *note_ties(data, parts), *note_file_order(data, chosen.protocol, order))
    with log_stage("laying the histories out client by client"):
        population = make_population(data, parts, names, chosen.label, chosen.threshold)
    population = population._replace(protocol=describe_protocol(source, chosen.protocol, order))
    if chosen.cold_items:
        population = exclude_untrained_items(population)
        population = population._replace(protocol=f"cold items, validation {population.protocol}")
    if data.negatives:
        refused = {"data.promoted": chosen.promoted, "data.merge": chosen.clients_of_user == "domains"}
        data, population = add_given_negatives(data, population, parts.part, [key for key in refused if refused[key]])
    if chosen.label_flip:
        flipped = is_malicious(np.arange(population.num_clients), chosen.malicious, chosen.malice)
        population = population._replace(label_flipped=flipped)
    data, population = split_by_kind(data, population, parts, chosen)
    data = add_notes(data, *note_zero_ratings(data, chosen.label), *note_few_candidates(population.asked))
    if chosen.cold:
        warm = split_cold_clients(population, chosen.cold, chosen.deal)
        every, num_cold = population.asked.num_clients, population.asked.num_clients - warm.asked.num_clients
        note = f"{num_cold:,} of {every:,} clients are cold: they never take part, and are tested apart"
        return add_notes(data, note), warm
    return data, population


def divide_into_clients(data: Dataset, options: PopulationOptions) -> tuple[Dataset, np.ndarray]:
    """(the data set with a client for every row that stays, what the clients are called)."""
    if PART in data.columns:
        check_given_parts(data, options.user_core, options.item_core)
    data = select_domain(drop_repeats(data), options.items_with, options.items_without)
    if options.user_core or options.item_core:
        data = k_core(data, options.user_core, options.item_core)
    clients = options.clients
    check_merge_options(
        clients, options.merge, options.devices, options.malicious, options.protocol, options.cold, data.columns
    )
    if options.clients_of_user == "domains":
        group, names = group_by_user_and_kind(data, clients)
    else:
        column = "user" if options.clients_of_user else clients
        group, names = assign_clients(data, column, options.silos, options.deal)
    data = split_shared_users(data, group)
    if options.cold_items and (options.clients_of_user or options.promoted):
        raise ValueError(
            "data.cold_items: devices, domains and promoted items would bring cold items back into training: leave one "
            "of the two out"
        )
    if options.cold_items:
        return hold_out_items(data, options.cold_items, options.protocol, options.ratio, options.deal), names
    return prepare_parts(data, options.protocol, options.ratio, options.deal), names


def split_by_kind(
    data: Dataset, population: Population, parts: Split, options: PopulationOptions
) -> tuple[Dataset, Population]:
    """The users of a population as their devices, or its clients as domains, where options say so."""
    if options.clients_of_user == "devices":
        column = options.clients if options.merge else ""
        devices = assign_devices(data, parts, column, options.devices, options.deal)
        population = split_into_devices(population, *devices)
        return add_notes(data, f"{population.num_clients:,} devices of {len(data.users):,} users"), population
    if options.clients_of_user == "domains":
        note = "a user has one client for each domain, and one private part in all of them"
        return add_notes(data, note), split_into_domains(population, data, options.clients)
    return data, population
