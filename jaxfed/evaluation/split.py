"""What is asked in an evaluation: held-out items, what is left out of the ranking, and users in chunks of clients."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from jaxfed.core.model import TimesRead
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.data.population import ALONE, SAMPLED, Label, Population, ProcessShare
from jaxfed.data.ragged import Ragged, concatenate_ranges
from jaxfed.evaluation.candidates import DRAWS, UNIFORM, SampleOptions, make_candidates

DECILES = 10
Past = Literal["", "train", "all"]


class EvalBatch(NamedTuple):
    """What is asked of U users each of m clients."""

    client: np.ndarray  # int [m]: past the end: nobody
    num_train: np.ndarray  # float [m]: train interactions of each
    decile: np.ndarray  # int [m]: of the client's `num_train`, 0 the fewest
    user: np.ndarray  # int [m, U]: positions among the client's users
    targets: np.ndarray  # int [m, U, T]: held-out items; N where unused
    masked: np.ndarray  # int [m, U, L]: items left out of the ranking; N where unused
    history: np.ndarray  # int [m, U, H]: what a model may fold in, earliest first; past all ends where unused
    sampled: np.ndarray  # int [m, U, draws, most]: candidates beside the targets; N where a user has fewer
    labels: np.ndarray  # float [m, U, T]: of the targets; [m, U, 0] where every row is a click
    user_features: np.ndarray  # int [m, U, F]: features of the users; [m, U, 0] where the model reads none
    times: np.ndarray  # int [m, U, H + 1]: see `History`; [m, U, 0] where the model reads none


class EvalSplit(NamedTuple):
    """A split to be evaluated on: A clients, their U users numbered client by client, and what each is asked.

    Of several processes each has its own clients here, and all have the same shapes and number of chunks.
    """

    num_items: int
    num_clients: int
    who: np.ndarray  # int32 [A]: clients
    first: np.ndarray  # int64 [A + 1]: the users of each
    user: np.ndarray  # int64 [U]: their numbers in the population
    num_train: np.ndarray  # float32 [A]
    decile: np.ndarray  # int64 [A]: among all clients
    targets: Ragged  # held-out items of each user
    masked: Ragged  # items left out of the ranking
    history: Ragged  # what a model may fold in; empty where it need not
    times: Ragged | None  # of each place of it, then of the request, as far as the model reads them; None: it does not
    sampled: np.ndarray  # int32 [U, draws, most]: candidates beside the targets
    labels: Ragged  # of the held-out items; empty where every row is a click
    user_features: np.ndarray  # int32 [U, F]: features of the users; [U, 0] where the model reads none
    clients: int  # at a time
    users: int  # of each client at a time
    cohort: np.ndarray  # int32: the clients of all processes
    chunks: int  # of clients
    longest: tuple[int, int, int, int]  # users of a client, held-out items, items left out and history of a user
    label: Label = "implicit"


def concatenate_ragged(*lists: Ragged) -> Ragged:
    """Joins lists of the same users, user by user."""
    users = [np.repeat(np.arange(len(each.counts)), each.counts) for each in lists]
    order = np.argsort(np.concatenate(users), kind="stable")
    counts = np.sum([each.counts for each in lists], 0)
    values = np.concatenate([each.values for each in lists])[order]
    return Ragged(values, np.concatenate([[0], np.cumsum(counts)]))


def make_eval_split(
    population: Population,
    part: str,
    seed: int = 0,
    most: int = 0,
    devices: int = 1,
    share: ProcessShare = ALONE,
    budget: int = 1 << 22,
    history: Past = "",
    features: tuple[str, ...] = (),
    candidates: SampleOptions = UNIFORM,
    times: TimesRead = "none",
) -> EvalSplit:
    """part: `val` (train items are left out of the ranking) or `test` (train and validation items are).

    most: so many clients are asked, drawn by the seed; 0: all. devices: over which a chunk of clients is spread.
    history: what a model folds in of its users (see `Model.fold_in`): their `train` items; `all` that are left out of
    the ranking, for a test the validation items too; or nothing. features: the sides that the model reads.
    candidates: how those of sampled figures are drawn, where they are not given. times: which ones the model reads.
    budget: scores and histories [clients, users, N + longest] held at a time: memory does not grow with the population.
    """
    if part not in ("val", "test"):
        raise ValueError(f"no part {part!r}: choose val or test")
    cohort = sample_eval_cohort(population.num_clients, most, seed)
    asked_users, counts = count_user_items(population, cohort)
    longest = longest_lengths(population, cohort, asked_users, counts, history)
    if not counts[part].any():
        name = {"val": "validation", "test": "test"}[part]
        raise ValueError(f"none of the {len(cohort):,} clients that are asked has a {name} item: ask more of them")
    users = min(longest[0], 64)
    more = max(candidates.draws * candidates.size - DRAWS * SAMPLED, 0)  # than a budget is meant for
    numbers = users * (population.num_items + sum(longest[1:]) + more)  # of a client
    clients = int(np.clip(budget // numbers, 1, min(len(cohort), 256)))
    clients = max(clients // devices, 1) * devices // share.size
    owner = share.owner(cohort, population.num_clients)

    who = cohort[owner == share.rank]
    count = population.client_offsets[who + 1] - population.client_offsets[who]
    user = concatenate_ranges(population.client_offsets[who], count)
    edges = np.quantile(population.num_train, np.arange(1, DECILES) / DECILES)
    num_train, labelled = population.num_train[who], population.labels
    return EvalSplit(
        num_items=population.num_items,
        num_clients=population.num_clients,
        who=who,
        first=np.concatenate([[0], np.cumsum(count)]),
        user=user,
        num_train=num_train.astype(np.float32),
        decile=np.searchsorted(edges, num_train, "right"),
        **held_out_lists(population, part, user, history),
        times=None if times == "none" else list_history_times(population, part, user, history, times),
        sampled=make_candidates(population, user, candidates, seed),
        user_features=user_feature_rows(population, features, user),
        clients=clients,
        users=users,
        cohort=cohort,
        chunks=-(-int(np.bincount(owner).max()) // clients),
        longest=longest,
        label=labelled.kind if labelled else "implicit",
    )


def sample_eval_cohort(num_clients: int, most: int, seed: int) -> np.ndarray:
    """int32, ascending: the clients that are asked, so many at `most`, drawn by the seed; 0: all."""
    cohort = np.arange(num_clients, dtype=np.int32)
    if 0 < most < len(cohort):
        return np.sort(setup_rng(seed, SetupStream.EVALUATED_CLIENTS).choice(cohort, most, replace=False))
    return cohort


def held_out_lists(population: Population, part: str, users: np.ndarray, history: Past) -> dict[str, Ragged]:
    """The lists of `EvalSplit` of these users: targets, masked, history, labels."""
    train, valid, test = (each.some(users) for each in (population.train, population.valid, population.test))
    targets, masked = (valid, train) if part == "val" else (test, concatenate_ragged(train, valid))
    past = {"": empty_lists(len(users)), "train": train, "all": masked}[history]
    labels = empty_lists(len(users), np.float32)
    if population.labels:
        rows = population.valid if part == "val" else population.test
        values = population.labels.valid if part == "val" else population.labels.test
        labels = Ragged(values, rows.start).some(users)
    if population.domains:
        masked = concatenate_ragged(masked, other_domains_items(population, users))
    return {"targets": targets, "masked": masked, "history": past, "labels": labels}


def list_history_times(population: Population, part: str, users: np.ndarray, history: Past, times: TimesRead) -> Ragged:
    """The times of these users' histories, then of the request: that of the first held-out item, if the model reads it.

    Raises ValueError where rows have no times.
    """
    train, valid, test = (each.some(users) for each in population.time_lists)
    asked = valid if part == "val" else test
    past = concatenate_ragged(train, valid) if part == "test" and history == "all" else train
    if times == "known":
        return past
    there = asked.counts > 0
    first = Ragged(asked.values[asked.start[:-1][there]], np.concatenate([[0], np.cumsum(there)]))
    return concatenate_ragged(past, first)


def other_domains_items(population: Population, users: np.ndarray) -> Ragged:
    """The items of other domains than each user's own: nothing to recommend to that user."""
    begin, size = population.span(users)
    assert population.domains
    rest = population.num_items - size
    at = concatenate_ranges(begin + size, rest) % population.num_items
    return Ragged(population.domains.items[at], np.concatenate([[0], np.cumsum(rest)]))


def map_to_homes(split: EvalSplit, population: Population) -> EvalSplit:
    """The same questions, each put to the client that holds the private part of who is asked: the first device."""
    homes = population.homes
    return split._replace(num_clients=population.num_clients, who=homes[split.who], cohort=homes[split.cohort])


def empty_lists(users: int, dtype: type = np.int32) -> Ragged:
    """An empty list for each of so many users."""
    return Ragged(np.zeros(0, dtype), np.zeros(users + 1, np.int64))


def user_feature_rows(population: Population, features: tuple[str, ...], users: np.ndarray) -> np.ndarray:
    """int32 [..., F]: the features of users, as far as a model reads those (see `Model.features`); else [..., 0]."""
    if "user" in features and population.user_features:
        return population.user_features.rows(users)
    return np.zeros((*np.shape(users), 0), np.int32)


def count_user_items(population: Population, clients: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(the users of these clients, {part: how many items of each it has})."""
    count = population.client_offsets[clients + 1] - population.client_offsets[clients]
    users = concatenate_ranges(population.client_offsets[clients], count)
    parts = {"train": population.train, "val": population.valid, "test": population.test}
    return users, {name: part.counts[users] for name, part in parts.items()}


def longest_lengths(
    population: Population, clients: np.ndarray, users: np.ndarray, counts: dict[str, np.ndarray], history: Past
) -> tuple[int, int, int, int]:
    """The most users of a client, held-out items of a user, items left out and history: lengths that all processes
    know. They are those of both parts, so that one program evaluates both. users, counts: see `count_user_items`."""
    most_users = int(np.diff(population.client_offsets)[clients].max())
    targets, masked = np.maximum(counts["val"], counts["test"]), counts["train"] + counts["val"]
    past = {"": 0, "train": counts["train"].max(), "all": masked.max()}[history]
    of_other_domains = population.num_items - population.span(users)[1]
    return most_users, int(targets.max()), int((masked + of_other_domains).max()), int(past)


def iterate_users(of: EvalSplit) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Chunks of clients and blocks of their users, in the order of `make_eval_batches`: (int [m]: places in `who`, past
    its end where there is nobody; for each block int [m, U]: the users, `first[-1]` where there is none)."""
    none, most_users = int(of.first[-1]), of.longest[0]
    first = np.append(of.first, none)
    # clients of like histories come together: a model that folds them in reads as many places as the longest has
    order = np.arange(len(of.who) + 1)
    if most_users == 1:
        order[:-1] = np.argsort(of.history.counts[of.first[: len(of.who)]], kind="stable")
    for low in range(0, of.chunks * of.clients, of.clients):
        at = order[np.minimum(np.arange(low, low + of.clients), len(of.who))]
        blocks = []
        for start in range(0, most_users, of.users):
            user = first[at][:, None] + start + np.arange(of.users)
            blocks.append(np.where(user < first[at + 1][:, None], user, none))
        yield at, blocks


def make_eval_batches(of: EvalSplit) -> Iterator[list[EvalBatch]]:
    """Those asked, in chunks of one shape: for each group of clients the blocks of their users."""
    items, most_users = of.num_items, of.longest[0]
    past = np.iinfo(np.int32).max  # tables may have more rows than there are items
    lists = [
        Ragged(each.values, np.append(each.start, each.start[-1]))
        for each in (of.targets, of.masked, of.history, of.labels)
    ]
    fills, widths = (items, items, past, 0), (*of.longest[1:], 0 if of.label == "implicit" else of.longest[1])
    # after the last client comes nobody, without users, and after the last user one without lists
    who = np.append(of.who, np.int32(of.num_clients))
    num_train, decile = np.append(of.num_train, np.float32(0)), np.append(of.decile, 0)
    sampled = np.concatenate([of.sampled, np.full((1, *of.sampled.shape[1:]), items, np.int32)])
    times = of.times and Ragged(of.times.values, np.append(of.times.start, of.times.start[-1]))
    features = of.user_features
    features = np.concatenate(
        [features, features[:1] if len(features) else np.zeros_like(features, shape=(1, features.shape[1]))]
    )
    for at, blocks in iterate_users(of):
        group = []
        for start, user in zip(range(0, most_users, of.users), blocks, strict=True):
            local = np.broadcast_to(start + np.arange(of.users), user.shape)
            targets, masked, history, labels = (
                each.padded(user.ravel(), fill, width).reshape(*user.shape, width)
                for each, fill, width in zip(lists, fills, widths, strict=True)
            )
            local = np.minimum(local, most_users - 1).astype(np.int32)
            when = np.zeros((*user.shape, 0), np.int32)
            if times is not None:
                when = times.padded(user.ravel(), 0, widths[2] + 1).reshape(*user.shape, widths[2] + 1)
            clients = who[at], num_train[at], decile[at]
            known = sampled[user], labels, features[user], when
            group.append(EvalBatch(*clients, local, targets, masked, history, *known))
        yield group
